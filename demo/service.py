# SPDX-License-Identifier: GPL-2.0-or-later
"""
A message bus and a blksnapd of the demo's own: nothing of the system's is used, and nothing is left in it.

The service can be killed and started again on the same state. The data path it started outlives it on purpose; here it
ends last, when nothing uses it any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from demo.programs import DemoError, end_pid, running

_START_TIMEOUT_S = 20.0
_POLL_S = 0.02

_BUS_CONFIG = """\
<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>session</type>
  <listen>unix:path={socket}</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow send_destination="*" eavesdrop="true"/>
    <allow eavesdrop="true"/>
    <allow own="*"/>
  </policy>
</busconfig>
"""


@contextlib.asynccontextmanager
async def private_bus(scratch: Path) -> AsyncIterator[str]:
    """Keep a message bus running for as long as the block lasts; gives its address."""
    socket, config = scratch / "bus", scratch / "bus.conf"
    config.write_text(_BUS_CONFIG.format(socket=socket))
    words = ("dbus-daemon", f"--config-file={config}", "--nofork", "--nopidfile", "--nosyslog")
    async with running(*words, log=scratch / "bus.log") as daemon:
        async with asyncio.timeout(_START_TIMEOUT_S):
            while not socket.exists():
                if daemon.returncode is not None:
                    raise DemoError(f"dbus-daemon could not start: {_last_line(scratch / 'bus.log')}")
                await asyncio.sleep(_POLL_S)
        yield f"unix:path={socket}"


class Service:
    """A blksnapd with directories of its own."""

    def __init__(self, bus: str, scratch: Path) -> None:
        self.runtime_dir = scratch / "run"
        self.log = scratch / "blksnapd.log"
        self._words = (
            sys.executable,
            "-m",
            "blksnap_service",
            f"--bus={bus}",
            "--authority=owner",
            f"--state-dir={scratch / 'state'}",
            f"--runtime-dir={self.runtime_dir}",
        )
        self._stack = contextlib.AsyncExitStack()
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int:
        """Give its process id."""
        return self._process.pid if self._process else 0

    def check(self) -> None:
        """Raise DemoError when it has ended by itself."""
        if self._process is None or self._process.returncode is not None:
            raise DemoError(f"blksnapd has ended: {_last_line(self.log)}")

    async def start(self) -> None:
        """Start it; when it is on the bus is for the client to see."""
        self._process = await self._stack.enter_async_context(running(*self._words, log=self.log))

    async def kill(self) -> None:
        """Kill it as the kernel would when memory runs out: no warning, no clean-up."""
        if self._process is None:
            raise DemoError("blksnapd was never started")
        self._process.kill()
        await self._process.wait()

    async def end(self) -> None:
        """Stop it, then the data path it left running."""
        await self._stack.aclose()
        for pid in self._datapath_pid():
            await end_pid(pid)

    def _datapath_pid(self) -> Iterator[int]:
        """Give the pid of the data path that serves our runtime directory, if there is one."""
        with contextlib.suppress(FileNotFoundError, ValueError, ProcessLookupError):
            pid = int((self.runtime_dir / "datapath.pid").read_text())
            if str(self.runtime_dir).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                yield pid


@contextlib.asynccontextmanager
async def private_service(bus: str, scratch: Path) -> AsyncIterator[Service]:
    """Keep a blksnapd (and the data path it starts) for as long as the block lasts."""
    for name in ("state", "run"):
        (scratch / name).mkdir(mode=0o700)
    service = Service(bus, scratch)
    try:
        await service.start()
        yield service
    finally:
        await service.end()


def _last_line(log: Path) -> str:
    with contextlib.suppress(OSError):
        if lines := log.read_text(errors="replace").split("\n"):
            return next((line.strip() for line in reversed(lines) if line.strip()), "it did not say why")
    return "it did not say why"
