# SPDX-License-Identifier: GPL-2.0-or-later
"""Real processes for tests: a message bus, blksnapd, its data path, programs that use it. Nothing outlives a test."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from blksnap_service.bus import paths, wire
from blksnap_service.bus.paths import TRACKER
from blksnap_service.bus.wire import Value, variant
from blksnap_service.errors import ERROR_PREFIX, RemoteError
from tests.bus.hostile import Caller

REPOSITORY = Path(__file__).parents[2]
MIB = 1 << 20
BLOCK = 65_536
EMULATED = "BLKSNAP_VM_GUEST" in os.environ
"""In a guest of tests/vm, where all takes ten to thirty times longer."""
START_S = 150.0 if EMULATED else 30.0
ANSWER_S = 600.0 if EMULATED else 60.0

BUS_CONFIG = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>session</type>
  <listen>unix:path={path}</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow user="*"/>
    <allow own="*"/>
    <allow send_destination="*" eavesdrop="true"/>
    <allow eavesdrop="true"/>
  </policy>
</busconfig>
"""


class Bus:
    """A private message bus that every user of this machine may use."""

    config = BUS_CONFIG

    def __init__(self, directory: Path) -> None:
        self.path = directory / "bus"
        config = directory / "bus.conf"
        config.write_text(self.config.format(path=self.path))
        words = ("dbus-daemon", f"--config-file={config}", "--nofork", "--nopidfile", "--nosyslog")
        self.process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end = time.monotonic() + START_S
        while not self._listens():
            assert self.process.poll() is None, "dbus-daemon ended"
            assert time.monotonic() < end, "dbus-daemon does not listen"
            time.sleep(0.01)

    def _listens(self) -> bool:
        """Whether it takes connections: its socket has a name before that."""
        with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
            probe.connect(str(self.path))
            return True
        return False

    @property
    def address(self) -> str:
        """Its address."""
        return f"unix:path={self.path}"

    def stop(self) -> None:
        """End it."""
        self.process.terminate()
        self.process.wait()


class Daemon:
    """A blksnapd with directories of its own below ``directory``, and the data path it leaves running."""

    def __init__(self, directory: Path, bus: Bus, *options: str) -> None:
        self.directory = directory
        self.state, self.run, self.log = directory / "state", directory / "run", directory / "log"
        self.words = (
            sys.executable, *(() if EMULATED else ("-X", "dev")), "-m", "blksnap_service", f"--bus={bus.address}", "--authority=owner",
            f"--state-dir={self.state}", f"--runtime-dir={self.run}", *options,
        )  # fmt: skip
        self.process: subprocess.Popen[bytes] | None = None
        self._bus = bus

    async def start(self) -> None:
        """Start it and wait until it has its name on the bus."""
        self.launch()
        await self.ready()

    def launch(self) -> None:
        """Start it."""
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.words, stdin=subprocess.DEVNULL, stderr=log, cwd="/", env=environment
            )

    async def ready(self) -> None:
        """Wait until it has its name on the bus."""
        assert self.process is not None
        async with asyncio.timeout(START_S):
            while "ready on" not in self.said():
                assert self.process.poll() is None, self.said()
                await asyncio.sleep(0.02)

    def said(self) -> str:
        """Return the log of the present run."""
        return self.log.read_text().rpartition("-- ended --\n")[2]

    async def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and wait; returns the exit status."""
        assert self.process is not None
        self.process.send_signal(number)
        return await self.ended()

    async def ended(self) -> int:
        """Wait until it has ended; returns the exit status."""
        assert self.process is not None
        status = await asyncio.to_thread(self.process.wait, 20)
        with self.log.open("a") as log:
            log.write("-- ended --\n")
        return status

    @property
    def peak_bytes(self) -> int:
        """The most memory it ever had."""
        assert self.process is not None
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))

    def datapath_pid(self) -> int | None:
        """Return the data path's process id, if it runs."""
        with contextlib.suppress(FileNotFoundError, ValueError, ProcessLookupError):
            pid = int((self.run / "datapath.pid").read_text())
            if str(self.run).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
        return None

    def kill_datapath(self) -> None:
        """Kill the data path as the kernel would when memory runs out; another one follows."""
        pid = self.datapath_pid()
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        _await_end(pid)

    def lose_datapath(self) -> None:
        """Kill the data path and the holder that would start it again: nobody has what they kept."""
        pid = self.datapath_pid()
        assert pid is not None
        holder = int(Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[1])
        assert b"--hold" in Path(f"/proc/{holder}/cmdline").read_bytes()
        for one in (holder, pid):
            os.kill(one, signal.SIGKILL)
            _await_end(one)

    def clean_up(self) -> None:
        """End whatever still runs."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        end = time.monotonic() + START_S
        while (pid := self.datapath_pid()) is not None:
            # In order: its holder ends with it.
            os.kill(pid, signal.SIGTERM)
            assert time.monotonic() < end, "the data path does not end"
            time.sleep(0.1)


def _await_end(pid: int) -> None:
    """Wait until a process is gone, or is a zombie that nobody has waited for yet."""
    end = time.monotonic() + START_S
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        while Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z":
            assert time.monotonic() < end, f"process {pid} does not end"
            time.sleep(0.01)


@contextlib.contextmanager
def standing_still(daemon: Daemon) -> Iterator[None]:
    """Have the data path answer nothing for as long as the block lasts."""
    pid = daemon.datapath_pid()
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


class Client:
    """A caller on the bus that keeps to the rules."""

    def __init__(self, connection: wire.Connection) -> None:
        self.connection = connection

    async def call(
        self, path: str, interface: str, member: str, signature: str, *arguments: Any, **options: Any
    ) -> Any:
        """Call a method of ours; ``options`` are (type, value) pairs, ``_`` in their names stands for ``-``."""
        last = {name.replace("_", "-"): variant(*pair) for name, pair in options.items()}
        results = await self.connection.call(
            paths.BUS_NAME,
            path,
            interface,
            member,
            f"{signature}a{{sv}}",
            [*arguments, last],
            timeout=ANSWER_S,
        )
        return results[0] if len(results) == 1 else tuple(results)

    async def get(self, path: str, interface: str, name: str) -> Any:
        """Return a property."""
        (value,) = await self.connection.call(
            paths.BUS_NAME, path, "org.freedesktop.DBus.Properties", "Get", "ss", [interface, name]
        )
        return value.value

    async def objects(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Return all objects with all properties."""
        (managed,) = await self.connection.call(
            paths.BUS_NAME, paths.ROOT, "org.freedesktop.DBus.ObjectManager", "GetManagedObjects"
        )
        return {
            path: {
                interface: {name: _plain(value) for name, value in values.items()}
                for interface, values in interfaces.items()
            }
            for path, interfaces in managed.items()
        }

    async def add(self, image: Path) -> str:
        """Add an image file; returns its device."""
        return str(await self.call(paths.MANAGER_PATH, paths.MANAGER, "AddImageFile", "s", str(image)))

    async def attach(self, image: Path, **options: Any) -> str:
        """Add an image file and attach a tracker; returns the device."""
        device = await self.add(image)
        await self.call(device, paths.DEVICE, "Attach", "", **options)
        return device

    async def snapshot(self, *devices: str, **options: Any) -> str:
        """Create a snapshot."""
        return str(
            await self.call(
                paths.MANAGER_PATH, paths.MANAGER, "CreateSnapshot", "ao", list(devices), **options
            )
        )


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Value) else value


@contextlib.asynccontextmanager
async def client(bus: Bus) -> AsyncIterator[Client]:
    """Keep a connection to the bus for as long as the block lasts."""
    connection = await wire.connect(bus.address)
    try:
        yield Client(connection)
    finally:
        connection.close()


class Signals:
    """What the service tells everybody, in order: (path, member, body)."""

    def __init__(self, bus: Bus) -> None:
        self._caller = Caller(bus.address, paths.BUS_NAME, paths.ROOT, paths.BUS_NAME)
        self.heard: list[tuple[str, str, list[Any]]] = []
        rule = f"type='signal',sender='{paths.BUS_NAME}',path_namespace='{paths.ROOT}'"
        self._caller.listen(rule)
        self._caller.socket.settimeout(None)
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def _listen(self) -> None:
        with contextlib.suppress(OSError, EOFError):
            while True:
                message = self._caller.receive()
                path, member = str(message.path), str(message.member)
                if message.message_type.name == "SIGNAL" and path.startswith(paths.ROOT):
                    self.heard.append((path, member, message.body))

    async def wait_for(self, member: str, path: str = "") -> list[Any]:
        """Wait for a signal; returns its body."""
        while True:
            for heard_path, heard_member, body in self.heard:
                if heard_member == member and path in {"", heard_path}:
                    return body
            await asyncio.sleep(0.02)

    def close(self) -> None:
        """Stop listening."""
        with contextlib.suppress(OSError):
            self._caller.socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        with self._caller:
            pass


def make_image(path: Path, size: int = MIB) -> Path:
    """Make a sparse image file."""
    path.write_bytes(b"")
    os.truncate(path, size)
    return path


@contextlib.contextmanager
def refused(name: str, text: str | None = None) -> Iterator[None]:
    """Expect an error of ours by its last name."""
    with pytest.raises(RemoteError, match=text) as caught:
        yield
    assert caught.value.remote_name == ERROR_PREFIX + name
    assert "Traceback" not in str(caught.value)
    assert "/blksnap_service/" not in str(caught.value)


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A directory with a name short enough for sockets, which others may pass through."""
    directory = Path(tempfile.mkdtemp(prefix="blk"))
    directory.chmod(0o711)
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


async def program(*words: str | Path) -> str:
    """Run a program that must succeed; returns what it printed."""
    process = await asyncio.create_subprocess_exec(
        *words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=tempfile.gettempdir(),
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, f"{words[0]} ended with {process.returncode}: {output.decode()}"
    return output.decode()


async def write(uri: str, *writes: tuple[int, int, int]) -> None:
    """Write (byte, offset, length) patterns through NBD with a program that is not ours."""
    commands = [
        part for byte, offset, length in writes for part in ("-c", f"write -P {byte} {offset} {length}")
    ]
    await program("qemu-io", "-f", "raw", *commands, uri)


async def content(uri: str) -> bytes:
    """Read a whole export with a program that is not ours."""
    process = await asyncio.create_subprocess_exec("nbdcopy", uri, "-", stdout=subprocess.PIPE)
    output, _ = await process.communicate()
    assert process.returncode == 0
    return output


async def blocks_since(user: Client, device: str, number: int) -> list[int]:
    """Return the offsets of the blocks changed since a number."""
    ranges, following = await user.call(
        device, TRACKER, "GetChangedRanges", "utu", number, 0, 65_536, view=("s", "live")
    )
    assert following == await user.get(device, TRACKER, "Capacity")
    return [block for offset, length in ranges for block in range(offset, offset + length, BLOCK)]


def run_daemon(words: Sequence[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a blksnapd that is to end by itself."""
    return subprocess.run(
        [sys.executable, "-m", "blksnap_service", *words],
        capture_output=True, text=True, timeout=30, check=False, cwd="/",
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
    )  # fmt: skip
