# SPDX-License-Identifier: GPL-2.0-or-later
"""Origins with a ublk device in front of them, as the tests in a guest handle them. Holds no expectation of its own."""

import contextlib
import errno
import itertools
import json
import mmap
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.nbd.control import Control, opened
from tests.nbd.datapath import Datapath, Maps, Origin, Snapshot
from tests.nbd.load import Work
from tests.vm.guest import devices

MIB = 1 << 20
STEP = 4 * MIB
STORAGE_BYTES = 128 * MIB
"""For a snapshot of the largest origin; an eighth of it is allocated at once, which takes its time under emulation."""


@contextlib.contextmanager
def datapath() -> Iterator[Datapath]:
    """A data path of its own, with the driver loaded; what it still serves is stopped by force."""
    devices.modprobe("ublk_drv")
    with tempfile.TemporaryDirectory() as directory:
        running = Datapath(Path(directory))
        try:
            yield running
            with Control(running.control_socket) as control:
                control.call("stop", force=True)
            assert running.process.wait(30) == 0, running.story()
        finally:
            running.kill()


@dataclass(frozen=True)
class Tracked:
    """An origin with a block device."""

    datapath: Datapath
    origin: Origin
    device: Path
    """The one below."""
    node: Path

    def counters(self) -> dict[str, int]:
        """What the data path has counted."""
        return dict(self.origin.info().counters)

    def maps(self) -> Maps:
        """A reading with both maps."""
        return self.origin.maps()

    def remove(self, *, force: bool = False) -> Maps:
        """Remove it. Raises ``Refused``."""
        return self.origin.remove(force=force)


def track(running: Datapath, device: Path, **options: Any) -> Tracked:
    """Put a block device over ``device``. Raises ``Refused``."""
    origin = running.add(path=device, flags=os.O_RDWR | os.O_EXCL | os.O_DIRECT, front="ublk", **options)
    return Tracked(running, origin, device, Path(origin.info().node))


def take(
    *tracked: Tracked, storage_bytes: int = STORAGE_BYTES, writable: bool = False
) -> tuple[Snapshot, list[Path]]:
    """Take all of them at once; the snapshot and the nodes of its images."""
    running = tracked[0].datapath
    snapshot = running.create(limit=storage_bytes)
    taken = snapshot.take(*(one.origin for one in tracked), writable=writable)
    return snapshot, [Path(image.path) for image in taken.images]


def read(node: Path) -> bytes:
    """All bytes of a block device, read past the page cache."""
    with opened(node, os.O_RDONLY | os.O_DIRECT) as fd:
        size = os.lseek(fd, 0, os.SEEK_END)
        memory = mmap.mmap(-1, STEP)
        parts = []
        for offset in range(0, size, STEP):
            count = os.preadv(fd, [memory], offset)
            assert count == min(STEP, size - offset)
            parts.append(memory[:count])
        memory.close()
    return b"".join(parts)


def write(node: Path, offset: int, data: bytes, *, sync: bool = False) -> None:
    """Write whole sectors past the page cache."""
    with opened(node, os.O_WRONLY | os.O_DIRECT | (os.O_DSYNC if sync else 0)) as fd:
        memory = mmap.mmap(-1, len(data))
        memory.write(data)
        assert os.pwritev(fd, [memory], offset) == len(data)
        memory.close()


def differing(before: bytes, after: bytes, block_size: int) -> set[int]:
    """The blocks in which two contents of one size differ."""
    assert len(before) == len(after)

    def unequal(start: int, end: int, step: int) -> Iterator[int]:
        places = range(start, min(end, len(before)), step)
        return (at for at in places if before[at : at + step] != after[at : at + step])

    # Most of it is the same: large pieces first.
    large = max(block_size, MIB)
    return {
        at // block_size
        for piece in unequal(0, len(before), large)
        for at in unequal(piece, piece + large, block_size)
    }


def fio(name: str, *options: str) -> dict[str, Any]:
    """Run one fio job to its end; its report. Raises ``CalledProcessError`` when an I/O or a comparison failed."""
    words = ["fio", "--output-format=json", f"--name={name}", "--ioengine=io_uring", "--direct=1", *options]
    report = json.loads(devices.run(*words, timeout_s=280))
    job: dict[str, Any] = report["jobs"][0]
    assert job["error"] == 0
    return job


def fronts() -> list[str]:
    """All ublk devices, started or not."""
    found = Path("/sys/class/ublk-char")
    return sorted(one.name for one in found.iterdir()) if found.exists() else []


def await_writes(tracked: Tracked, count: int) -> None:
    """Return after ``count`` more writes. Raises ``TimeoutError``."""
    goal, end = tracked.counters()["writes"] + count, time.monotonic() + 60
    while tracked.counters()["writes"] < goal:
        if time.monotonic() > end:
            raise TimeoutError(f"fewer than {count} writes in a minute")
        time.sleep(0.02)


def verifying(target: Path, size_bytes: int) -> Work:
    """Return a work that writes ``target`` at random, and reads and compares all it wrote, again and again."""

    def work(stopping: Callable[[], bool]) -> None:
        for seed in itertools.count():
            # Polite: who is killed under it is to come back soon.
            fio("verified", *verified_writes(target, size_bytes, f"--randseed={seed}", "--nice=19"))
            if stopping():
                return

    return work


@contextlib.contextmanager
def writer(tracked: Tracked) -> Iterator[None]:
    """Random writes to the node, many at a time, for as long as the block lasts. Raises ``AssertionError`` for an error."""
    words = [
        *(
            "fio",
            "--output-format=json",
            "--name=writer",
            "--ioengine=io_uring",
            "--direct=1",
            "--iodepth=32",
        ),
        *(
            f"--filename={tracked.node}",
            "--rw=randwrite",
            "--bsrange=4k-64k",
            "--norandommap",
            "--randrepeat=0",
        ),
        *("--time_based", "--runtime=250", "--refill_buffers"),
    ]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        try:
            await_writes(tracked, 50)
            yield
            assert process.poll() is None, "the writer ended early"
        finally:
            process.send_signal(signal.SIGINT)
            report, _ = process.communicate(timeout=60)
        (job,) = json.loads(report[report.index("{") :])["jobs"]
        # EINTR: the signal above.
        assert job["error"] in (0, errno.EINTR)
        assert job["write"]["total_ios"]


def verified_writes(target: Path, size_bytes: int, *options: str) -> Sequence[str]:
    """Options of an fio job that writes ``target`` at random, and then reads and compares all it wrote."""
    return (
        f"--filename={target}",
        f"--size={size_bytes}",
        "--rw=randwrite",
        "--bsrange=4k-64k",
        "--iodepth=32",
        "--verify=crc32c",
        *options,
    )
