# SPDX-License-Identifier: GPL-2.0-or-later
"""What dm-log-writes recorded of a device, replayed up to a mark: what a disk with a write cache had for certain.

The log has every write that was followed by a flush, or was FUA, in that order (kernel: drivers/md/dm-log-writes.c,
Documentation/admin-guide/device-mapper/log-writes.rst). One that was followed by none is missing until one comes.
"""

import contextlib
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.vm.guest import devices

NAME = "logged"
_SUPER = struct.Struct("<QQQI")
_ENTRY = struct.Struct("<QQQQ")
_MAGIC = 0x6A736677736872
_VERSION = 1
_FLUSH, _FUA, _DISCARD, _MARK = 1, 2, 4, 8


@dataclass(frozen=True, slots=True)
class Entry:
    """One request, or a mark. ``position`` is where its data is in the log; all in bytes."""

    offset: int
    length: int
    position: int
    flush: bool
    fua: bool
    discard: bool
    mark: str


@contextlib.contextmanager
def logged(device: Path, log: Path) -> Iterator[Path]:
    """A device over ``device`` whose writes are recorded in ``log``; the record is complete when the block has ended."""
    devices.modprobe("dm-log-writes")
    sectors = int(devices.run("blockdev", "--getsz", str(device)))
    with devices.dm(NAME, f"0 {sectors} log-writes {device} {log}") as node:
        yield node


def mark(text: str) -> None:
    """Record that this moment has come."""
    devices.run("dmsetup", "message", NAME, "0", "mark", text)


def entries(log: Path) -> Iterator[Entry]:
    """All there is in a log."""
    with log.open("rb", buffering=0) as file:
        magic, version, count, sector = _SUPER.unpack(file.read(4096)[: _SUPER.size])
        assert (magic, version) == (_MAGIC, _VERSION), "not a log"
        position = sector
        for _ in range(count):
            head = os.pread(file.fileno(), sector, position)
            first, sectors, flags, data_length = _ENTRY.unpack(head[: _ENTRY.size])
            position += sector
            text = head[_ENTRY.size : _ENTRY.size + data_length] if flags & _MARK else b""
            yield Entry(
                first * sector,
                sectors * sector,
                position,
                bool(flags & _FLUSH),
                bool(flags & _FUA),
                bool(flags & _DISCARD),
                text.rstrip(b"\0").decode(),
            )
            if not flags & _DISCARD:
                position += sectors * sector


def replay(log: Path, target: Path, size_bytes: int) -> Iterator[str]:
    """Write to a new file what the device had at each mark, one after the other; gives the mark's text."""
    with log.open("rb", buffering=0) as source, target.open("wb", buffering=0) as file:
        os.truncate(target, size_bytes)
        for entry in entries(log):
            if entry.mark:
                yield entry.mark
            elif entry.discard:
                # What a discarded block reads as is the disk's affair: anything.
                os.pwrite(file.fileno(), b"\xdd" * entry.length, entry.offset)
            elif entry.length:
                data = os.pread(source.fileno(), entry.length, entry.position)
                assert len(data) == entry.length
                os.pwrite(file.fileno(), data, entry.offset)
