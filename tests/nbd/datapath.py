# SPDX-License-Identifier: GPL-2.0-or-later
"""The data path under test: its process, its origins and its snapshots, as the tests handle them.

It holds no expectation: what a reading must say is the tests' business.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blksnap_service.datapath.model import OriginReading, SnapshotReading, Taken
from blksnap_service.fds import OwnedFd, close_all
from tests.nbd.control import Control, Events, opened, read_all

BINARY = "blksnap-datapath"
REPOSITORY = Path(__file__).parents[2]
MIB = 1 << 20
BLOCK = 64 << 10


def find_binary() -> Path:
    """Return the program under test. Raises ``FileNotFoundError``: a missing one is a failure and no reason to skip."""
    if named := os.environ.get("BLKSNAP_DATAPATH"):
        return Path(named)
    candidates = [
        REPOSITORY / "datapath" / "target" / "release" / BINARY,
        Path(sys.executable).parent / BINARY,
        Path(shutil.which(BINARY) or "/nonexistent"),
    ]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"{BINARY} is not built: make build, or name it with BLKSNAP_DATAPATH")


def new_id() -> str:
    """Return a fresh uuid as the protocol writes it."""
    return str(uuid.uuid4())


def uri_of(socket: Path | str, export: str = "") -> str:
    """Return the NBD URI of an export."""
    return f"nbd+unix:///{export}?socket={socket}"


@dataclass(frozen=True)
class Maps:
    """The bytes of both maps at one reading."""

    reading: OriginReading
    live: bytes
    taken: bytes

    def changed(self, since: int, *, live: bool = False) -> set[int]:
        """Return the blocks changed since a number by the rule of DESIGN section 5."""
        base = self.reading.base if live else self.reading.taken_base
        map_ = self.live if live else self.taken
        return {block for block, byte in enumerate(map_) if byte and base + byte > since}


@dataclass(frozen=True)
class Memory:
    """Resident memory of the process in bytes, as /proc tells it."""

    total: int
    anonymous: int
    file: int
    shared: int

    def __str__(self) -> str:
        """Show MiB."""
        parts = {"anon": self.anonymous, "file": self.file, "shmem": self.shared}
        text = ", ".join(f"{name} {size / MIB:.1f}" for name, size in parts.items())
        return f"RSS {self.total / MIB:.1f} MiB ({text})"


class Origin:
    """A tracked image file."""

    def __init__(self, datapath: Datapath, name: str, path: Path) -> None:
        """Name it; it is added by ``Datapath.add``."""
        self._datapath = datapath
        self.name = name
        self.path = path
        self.size = path.stat().st_size

    @property
    def socket(self) -> Path:
        """Its NBD socket."""
        return self._datapath.directory / "nbd" / f"{self.name}.sock"

    def uri(self, export: str = "") -> str:
        """Return the URI of the origin, or of the image that a snapshot's uuid names."""
        return uri_of(self.socket, export)

    def info(self) -> OriginReading:
        """Return a reading."""
        return OriginReading.parse(self._datapath.control.call("origin.info", origin=self.name))

    def maps(self) -> Maps:
        """Return a reading with the content of both maps."""
        ok, (live, taken, state) = self._datapath.control.request("origin.maps", origin=self.name)
        state.close()
        return Maps(OriginReading.parse(ok), read_all(live), read_all(taken))

    def content(self) -> bytes:
        """Return the bytes of the file, read past the data path."""
        return self.path.read_bytes()

    def remove(self, *, force: bool = False) -> Maps:
        """Remove it; returns the final reading and maps."""
        ok, (live, taken) = self._datapath.control.request("origin.remove", origin=self.name, force=force)
        return Maps(OriginReading.parse(ok), read_all(live), read_all(taken))

    def wait_for_no_clients(self) -> None:
        """Wait until the data path has seen the end of every client. Raises ``TimeoutError``."""
        end = time.monotonic() + 10
        while self.info().clients:
            if time.monotonic() > end:
                raise TimeoutError(f"{self.info().clients} clients are still counted")
            time.sleep(0.01)


class Snapshot:
    """A snapshot that was created."""

    def __init__(self, datapath: Datapath, name: str) -> None:
        """Name it; it is made by ``Datapath.create``."""
        self._datapath = datapath
        self.name = name
        self.taken_maps: dict[str, bytes] = {}

    def take(
        self,
        *origins: Origin,
        writable: bool = False,
        timeout_ms: int = 10_000,
        control: Control | None = None,
    ) -> Taken:
        """Take all origins; ``taken_maps`` then holds the map of each by the origin's name. Raises ``Refused``."""
        devices = [
            {"origin": origin.name, "writable": writable, "next_generation": new_id()} for origin in origins
        ]
        ok, fds = (control or self._datapath.control).request(
            "snapshot.take", snapshot=self.name, devices=devices, timeout_ms=timeout_ms
        )
        assert len(fds) == 3 * len(origins)
        for origin, taken in zip(origins, fds[::3], strict=True):
            self.taken_maps[origin.name] = read_all(taken)
        close_all(fds)
        return Taken.parse(ok)

    def info(self) -> SnapshotReading:
        """Return a reading."""
        return SnapshotReading.parse(self._datapath.control.call("snapshot.info", snapshot=self.name))

    def destroy(self, control: Control | None = None) -> None:
        """Destroy it."""
        (control or self._datapath.control).call("snapshot.destroy", snapshot=self.name)


class Datapath:
    """A running data path with a directory of its own."""

    def __init__(self, directory: Path, *options: str) -> None:
        """Start it and wait until it is ready. Raises ``AssertionError`` with its log."""
        self.directory = directory
        self.log = directory / "datapath.log"
        self._names = iter(f"o{number}" for number in range(1_000_000))
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [find_binary(), *options, "--runtime-dir", directory], stdout=subprocess.PIPE, stderr=log
            )
        assert self.process.stdout is not None
        with self.process.stdout as ready:
            line = ready.readline()
        if line != b"ready\n":
            self.process.wait(10)
            raise AssertionError(f"it did not get ready: {self.story()}")
        self.control = Control(self.control_socket)
        self.control.call("hello", protocol=1)

    @property
    def control_socket(self) -> Path:
        """Where it listens."""
        return self.directory / "datapath.sock"

    def story(self) -> str:
        """Return how the process is and what it said."""
        return f"status {self.process.poll()}, log:\n{self.log.read_text(errors='replace')}"

    def events(self) -> Events:
        """Return a new subscriber."""
        return Events(self.control_socket)

    def connect(self) -> Control:
        """Return one more control connection."""
        return Control(self.control_socket)

    def image_file(self, size: int, content: bytes = b"") -> Path:
        """Make a sparse file of ``size`` bytes beginning with ``content``."""
        path = self.directory / f"image-{new_id()[:8]}"
        with path.open("wb") as file:
            file.write(content)
            file.truncate(size)
        return path

    def add(
        self,
        size: int = 16 * MIB,
        *,
        path: Path | None = None,
        content: bytes = b"",
        flags: int = os.O_RDWR,
        saved: bytes | None = None,
        generation: str = "",
        **options: Any,
    ) -> Origin:
        """Track a file (a new one without ``path``). ``options`` are those of ``origin.add``. Raises ``Refused``."""
        path = path or self.image_file(size, content)
        name = str(options.pop("origin", "") or next(self._names))
        with contextlib.ExitStack() as stack:
            fds = [stack.enter_context(opened(path, flags))]
            if saved is not None:
                memory = stack.enter_context(OwnedFd(os.memfd_create("saved-map")))
                os.write(memory.fileno(), saved)
                fds.append(memory.fileno())
            self.control.call(
                "origin.add", fds, origin=name, generation=generation or new_id(), label=str(path), **options
            )
        return Origin(self, name, path)

    def create(
        self,
        *,
        limit: int = 1 << 30,
        storage: int | None = None,
        control: Control | None = None,
        **options: Any,
    ) -> Snapshot:
        """Create a snapshot over the open ``storage`` (an unnamed file without it). Raises ``Refused``."""
        name = new_id()
        with contextlib.ExitStack() as stack:
            if storage is None:
                storage = stack.enter_context(opened(self.directory, os.O_RDWR | os.O_TMPFILE))
            (control or self.control).call(
                "snapshot.create", [storage], snapshot=name, limit=limit, **options
            )
        return Snapshot(self, name)

    def memory(self) -> Memory:
        """Return its resident memory now."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        lines = dict(line.split(":", 1) for line in status.splitlines())
        total, anonymous, file, shared = (
            int(lines[key].split()[0]) << 10 for key in ("VmRSS", "RssAnon", "RssFile", "RssShmem")
        )
        return Memory(total, anonymous, file, shared)

    def descriptors(self) -> int:
        """Return how many descriptors it has open."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def threads(self) -> int:
        """Return how many threads it has."""
        return len(list(Path(f"/proc/{self.process.pid}/task").iterdir()))

    def end(self, number: signal.Signals = signal.SIGTERM, seconds: float = 20) -> int:
        """Send a signal and return the exit status."""
        self.process.send_signal(number)
        return self.process.wait(seconds)

    def kill(self) -> None:
        """Leave nothing running."""
        self.control.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def run(*words: str | Path, seconds: float = 50, status: int | Sequence[int] = 0) -> str:
    """Run a program to its end and return what it printed. Raises ``AssertionError`` for another exit status."""
    environment = os.environ | {"LC_ALL": "C", "TMPDIR": tempfile.gettempdir()}
    done = subprocess.run(
        [str(word) for word in words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=seconds,
        check=False,
        env=environment,
    )
    out, err = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
    allowed = [status] if isinstance(status, int) else status
    assert done.returncode in allowed, f"{words}: exit status {done.returncode}\n{out}\n{err}"
    return out + err


def qemu_io(uri: str, *commands: str, options: Sequence[str] = (), status: int | Sequence[int] = 0) -> str:
    """Run ``qemu-io`` commands on an export."""
    words = [word for command in commands for word in ("-c", command)]
    return run("qemu-io", *options, "-f", "raw", *words, uri, status=status)
