# SPDX-License-Identifier: GPL-2.0-or-later
"""
The part of `bench.ublk` that runs in a guest: the same loads over the same memory through every stack that is compared.

Prints each reading, and writes all as JSON to the file it is given. Needs root, one processor, and a kernel with nothing else to do.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.instructions import Load, MeasureError, per_request
from tests.nbd.control import opened
from tests.vm.guest import devices, ublk

DISK_BYTES = 224 << 20
CHUNK_BYTES = 64 << 10
BRD, NULL_BLK = "brd", "null_blk"

RAW, LINEAR, LOOP = "raw", "dm-linear", "loop, direct I/O"
ON, OFF, TOP = "ours", "ours, tracking off", "ours, dm-linear on top"
DM_SNAPSHOT = "dm-snapshot N"

RANDOM = (
    Load("4k random write, depth 32", "randwrite", 4096, 32, 10_000),
    Load("4k random write, depth 1", "randwrite", 4096, 1, 10_000),
    Load("4k random read, depth 32", "randread", 4096, 32, 10_000),
    Load("4k random read, depth 1", "randread", 4096, 1, 10_000),
)
SEQUENTIAL = (
    Load("128k write, depth 8", "write", 128 << 10, 8, 1_500),
    Load("128k read, depth 8", "read", 128 << 10, 8, 1_500),
)
FIRST = Load("first touch: one 4k write into each 64k chunk, depth 1", "write:60k", 4096, 1, 2_000)
FIRST_DEEP = Load("first touch: one 4k write into each 64k chunk, depth 32", "write:60k", 4096, 32, 2_000)
REWRITE = Load("rewrite: 4k random write into kept chunks, depth 1", "randwrite", 4096, 1, 10_000)
REWRITE_DEEP = Load("rewrite: 4k random write into kept chunks, depth 32", "randwrite", 4096, 32, 10_000)

TOUCHES = ((FIRST, REWRITE), (FIRST_DEEP, REWRITE_DEEP))
"""First touch, then rewrite: into chunks that the first touch has had kept, as it goes further into the disk."""

COUNTS = (1, 8)
"""How many devices there are when memory is read."""
DEPTH = 64
"""Requests of one device at a time (datapath/src/engine/ublk.rs)."""
_MIB = 1 << 20

Stack = Callable[[Path], AbstractContextManager[Path]]


@dataclass(frozen=True, slots=True)
class Reading:
    """Instructions per request of one load through one stack over one kind of disk."""

    disk: str
    stack: str
    load: str
    value: float


def main(output: Path, rounds: int) -> None:
    """Measure everything `rounds` times, say how it goes, and write what was found."""
    readings = []
    with _ram(1) as (disk,):
        # Not counted: what is read from the host for the first time.
        per_request(disk, RANDOM[0])
    for _ in range(rounds):
        for part in (_plain, _large, _kept):
            for reading in part():
                print(f"{reading.disk}, {reading.load}, {reading.stack}: {reading.value:.0f}", flush=True)
                readings.append(asdict(reading))
    found = {
        "readings": readings,
        "memory": [_memory(count) for count in COUNTS],
        "zero_copy": _zero_copy(),
    }
    output.write_text(json.dumps(found))


def _plain() -> Iterator[Reading]:
    """What every request costs, on the way through."""
    with _ram(1) as (disk,):
        for name, stack in _STACKS.items():
            with stack(disk) as node:
                for load in (*RANDOM, *SEQUENTIAL):
                    yield Reading(BRD, name, load.name, per_request(node, load))


def _large() -> Iterator[Reading]:
    """Large requests once more over a disk that takes them whole: brd cuts them."""
    with devices.null_blk(DISK_BYTES) as disk:
        _fill(disk)
        for name in (RAW, LOOP, ON):
            with _STACKS[name](disk) as node:
                for load in SEQUENTIAL:
                    yield Reading(NULL_BLK, name, load.name, per_request(node, load))


def _kept() -> Iterator[Reading]:
    """What the first write into a chunk of a snapshot costs, and each one after it."""
    for stack, snapshot in ((DM_SNAPSHOT, _dm_snapshot), (ON, _our_snapshot)):
        for first, rewrite in TOUCHES:
            with _ram(2) as (disk, differences), snapshot(disk, differences) as node:
                for load in (first, rewrite):
                    yield Reading(BRD, stack, load.name, per_request(node, load))


@contextlib.contextmanager
def _ram(count: int) -> Iterator[list[Path]]:
    """RAM disks that have all their memory; the first holds no zeros, which are not kept but noted."""
    devices.modprobe("brd", f"rd_nr={count}", f"rd_size={DISK_BYTES >> 10}")
    try:
        disks = [devices.wait_for(Path(f"/dev/ram{number}")) for number in range(count)]
        for disk in disks:
            _fill(disk)
        yield disks
    finally:
        devices.run("modprobe", "--remove", "brd")


def _fill(disk: Path) -> None:
    with mmap.mmap(-1, _MIB) as block, opened(disk, os.O_WRONLY | os.O_DIRECT) as fd:
        block.write(os.urandom(_MIB))
        for _ in range(DISK_BYTES // _MIB):
            os.write(fd, block)


@contextlib.contextmanager
def _raw(disk: Path) -> Iterator[Path]:
    yield disk


@contextlib.contextmanager
def _linear(disk: Path) -> Iterator[Path]:
    with devices.dm("bench", f"0 {DISK_BYTES >> 9} linear {disk} 0") as node:
        yield node


@contextlib.contextmanager
def _loop(disk: Path) -> Iterator[Path]:
    with devices.loop(disk, direct_io=True) as node:
        yield node


def _ours(**options: object) -> Stack:
    @contextlib.contextmanager
    def stack(disk: Path) -> Iterator[Path]:
        with ublk.datapath() as running:
            tracked = ublk.track(running, disk, **options)
            yield tracked.node
            tracked.remove()

    return stack


_STACKS: dict[str, Stack] = {
    RAW: _raw,
    LINEAR: _linear,
    LOOP: _loop,
    ON: _ours(),
    OFF: _ours(tracking=False),
    TOP: _ours(top="bench"),
}


@contextlib.contextmanager
def _dm_snapshot(disk: Path, differences: Path) -> Iterator[Path]:
    """A non-persistent snapshot as lvm(8) would make it: what keeps the old bytes, and the origin that is written to."""
    devices.modprobe("dm-snapshot")
    sectors = DISK_BYTES >> 9
    with (
        devices.dm("bench-image", f"0 {sectors} snapshot {disk} {differences} N {CHUNK_BYTES >> 9}"),
        devices.dm("bench", f"0 {sectors} snapshot-origin {disk}") as node,
    ):
        yield node


@contextlib.contextmanager
def _our_snapshot(disk: Path, differences: Path) -> Iterator[Path]:
    with ublk.datapath() as running, opened(differences, os.O_RDWR | os.O_EXCL | os.O_DIRECT) as storage:
        tracked = ublk.track(running, disk)
        snapshot = running.create(storage=storage, limit=0, chunk_size=CHUNK_BYTES)
        snapshot.take(tracked.origin)
        copies = tracked.counters()["copies"]
        yield tracked.node
        kept = tracked.counters()["copies"] - copies
        state = snapshot.info()
        if kept < FIRST.requests or state.state != "taken":
            raise MeasureError(f"{kept} chunks were kept ({state.state}: {state.error})")
        snapshot.destroy()
        tracked.remove()


def _zero_copy() -> bool:
    """Whether requests' pages are used where they are."""
    with ublk.datapath() as running:
        return bool(running.control.call("hello", protocol=1)["ublk"]["zero_copy"])


def _memory(count: int) -> dict[str, int]:
    """Memory of a data path with `count` devices, each of which was used with large requests."""
    copied = not _zero_copy()
    with ublk.datapath() as running, contextlib.ExitStack() as stack:
        disks = [stack.enter_context(devices.null_blk(DISK_BYTES)) for _ in range(count)]
        origins = [ublk.track(running, disk) for disk in disks]
        for tracked in origins:
            per_request(tracked.node, SEQUENTIAL[0])
        found = {
            "devices": count,
            "resident": running.memory().total,
            "maps": sum(2 * tracked.origin.info().block_count for tracked in origins),
            "buffers": sum(map(_buffers, origins)) if copied else 0,
        }
        for tracked in origins:
            tracked.remove()
    return found


def _buffers(tracked: ublk.Tracked) -> int:
    """What a device sets aside for the bytes of its requests."""
    longest = Path("/sys/class/block", tracked.node.name, "queue/max_hw_sectors_kb").read_text()
    return DEPTH * (int(longest) << 10)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
