# SPDX-License-Identifier: GPL-2.0-or-later
"""The real service, with its data path, on a bus and in directories of its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

from blksnap_tui.client import Client
from tests.tui.bus import private_bus

START_S = 30.0


class RealService:
    """blksnapd, which can be killed and started again on the same state."""

    def __init__(self, bus: str, directory: Path) -> None:
        self.bus = bus
        self.directory = directory
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start it and wait until it is on the bus."""
        with (self.directory / "blksnapd.log").open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "blksnap_service",
                f"--bus={self.bus}",
                "--authority=owner",
                f"--state-dir={self.directory / 'state'}",
                f"--runtime-dir={self.directory / 'run'}",
                stderr=log,
            )
        async with asyncio.timeout(START_S), Client(self.bus, wait_for_service=True) as client:
            while not client.available:
                assert self._process.returncode is None, (self.directory / "blksnapd.log").read_text()
                await asyncio.sleep(0.05)

    async def kill(self) -> None:
        """End it as a crash would."""
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()

    def end_data_path(self) -> None:
        """End what outlives the service on purpose."""
        with contextlib.suppress(OSError, ValueError):
            os.kill(int((self.directory / "run" / "datapath.pid").read_text()), signal.SIGTERM)

    def image_file(self, name: str, size: int) -> Path:
        """Make a sparse file."""
        path = self.directory / name
        with path.open("wb") as file:
            file.truncate(size)
        return path


@contextlib.asynccontextmanager
async def real_service() -> AsyncIterator[RealService]:
    """Run one, and leave nothing of it."""
    with tempfile.TemporaryDirectory(prefix="blksnap-tui-") as name:
        directory = Path(name)
        async with private_bus(directory) as bus:
            service = RealService(bus, directory)
            try:
                await service.start()
                yield service
            finally:
                await service.kill()
                service.end_data_path()


async def write(node: str, *ranges: tuple[int, int]) -> None:
    """Have qemu-io write (offset, length) through a tracker's NBD socket."""
    commands = [word for offset, length in ranges for word in ("-c", f"write -P 7 {offset} {length}")]
    done = await asyncio.create_subprocess_exec(
        "qemu-io", "-f", "raw", *commands, node, stdout=asyncio.subprocess.DEVNULL
    )
    assert await done.wait() == 0
