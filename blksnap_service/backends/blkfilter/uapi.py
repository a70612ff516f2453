# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel filter's interface: numbers and structures of every generation, as bytes. It calls nothing.

The generations are those of include/uapi/linux/blk-filter.h and include/uapi/linux/blksnap.h in the patch sets for Linux
6.7 (v6), 6.8 (v7), 6.9 and 6.15, and of the out-of-tree module of Veeam Agent 7. Structures are those of 64-bit
processes: the control node has no handler for 32-bit ones. Numbers are those of asm-generic/ioctl.h.
"""

from __future__ import annotations

import struct
import uuid
from dataclasses import dataclass
from typing import Final, Literal

FILTER_NAME: Final = "blksnap"
SECTOR: Final = 512
WRAPPED: Final = 255
"""The changes number of a map whose numbers have just run out: it is of the old generation, beside the new one's id."""

_READ: Final = 2
_WRITE: Final = 1


def ior(kind: int, number: int, size: int) -> int:
    """A request that brings data back."""
    return _ioc(_READ, kind, number, size)


def iow(kind: int, number: int, size: int) -> int:
    """A request that takes data along."""
    return _ioc(_WRITE, kind, number, size)


def iowr(kind: int, number: int, size: int) -> int:
    """A request that does both."""
    return _ioc(_READ | _WRITE, kind, number, size)


def _ioc(direction: int, kind: int, number: int, size: int) -> int:
    return direction << 30 | size << 16 | kind << 8 | number


NAME: Final = struct.Struct("=32s")
ATTACH: Final = struct.Struct("=32sQI4x")
"""Name, options, length of the options (6.15)."""
CTL: Final = struct.Struct("=32sIIQ")
"""Name, command, length of its argument, where that is."""
VAL7_NAME: Final = struct.Struct("=Q32s")
VAL7_CTL: Final = struct.Struct("=Q32sIIQ")

CBTINFO: Final = struct.Struct("=QII16sB7x")
CBTMAP: Final = struct.Struct("=IIQ")
CBTDIRTY: Final = struct.Struct("=I4xQ")
SECTORS: Final = struct.Struct("=QQ")
SNAPSHOTADD: Final = struct.Struct("=16s")
SNAPSHOTINFO: Final = struct.Struct("=i32s")

VERSION: Final = struct.Struct("=4H")
CREATE_BY_FD: Final = struct.Struct("=QI16s4x")
"""Limit in sectors, descriptor, id (v6)."""
CREATE_BY_NAME: Final = struct.Struct("=QQ16s")
"""Limit in sectors, where the name is, id (v7 and later). The same size and so the same number as ``CREATE_BY_FD``."""
UUID: Final = struct.Struct("=16s")
COLLECT: Final = struct.Struct("=I4xQ")
EVENT: Final = struct.Struct("=16sIIq4064s")
EVENT_CORRUPTED: Final = struct.Struct("=IIi")
EVENT_SPACE: Final = struct.Struct("=Q")

CTL_CBTINFO: Final = 0
CTL_CBTMAP: Final = 1
CTL_CBTDIRTY: Final = 2
CTL_SNAPSHOTADD: Final = 3
CTL_SNAPSHOTINFO: Final = 4

_BLK: Final = 0x12
_CONTROL: Final = 0x56
_BDEVFILTER: Final = 0x46

IOCTL_VERSION: Final = ior(_CONTROL, 0, VERSION.size)
IOCTL_CREATE: Final = iowr(_CONTROL, 1, CREATE_BY_NAME.size)
IOCTL_DESTROY: Final = iow(_CONTROL, 2, UUID.size)
IOCTL_TAKE: Final = iow(_CONTROL, 3, UUID.size)
IOCTL_COLLECT: Final = ior(_CONTROL, 4, COLLECT.size)
IOCTL_WAIT_EVENT: Final = ior(_CONTROL, 5, EVENT.size)

VAL7_ATTACH: Final = iowr(_BDEVFILTER, 140, VAL7_NAME.size)
VAL7_DETACH: Final = iowr(_BDEVFILTER, 141, VAL7_NAME.size)
VAL7_CTL_REQUEST: Final = iowr(_BDEVFILTER, 142, VAL7_CTL.size)
VAL7_MOD: Final = ior(_CONTROL, 32, 40)
VAL7_SETLOG: Final = iow(_CONTROL, 33, 24)
VAL7_APPEND_STORAGE: Final = iow(_CONTROL, 34, 40)

EventKind = Literal["corrupted", "no-space"]


@dataclass(frozen=True, slots=True)
class Generation:
    """One generation of the interface that is spoken here."""

    name: str
    attach: int
    detach: int
    ctl: int
    attach_size: int
    create_by_name: bool
    skipped_sectors: int
    """How much at the start of difference storage the kernel leaves unused."""
    quiet_sysfs: bool
    """Whether reading a device's ``filter`` in sysfs does not stop its queue."""
    events: tuple[EventKind, ...]
    """By code."""

    def attach_argument(self) -> bytearray:
        """The argument of an attach."""
        argument = bytearray(self.attach_size)
        NAME.pack_into(argument, 0, FILTER_NAME.encode())
        return argument

    def event_kind(self, code: int) -> EventKind | None:
        """What an event is about; None for a code this generation has not."""
        return self.events[code] if code < len(self.events) else None


_OLD_ATTACH: Final = iowr(_BLK, 140, NAME.size)
_OLD_DETACH: Final = iowr(_BLK, 141, NAME.size)
_OLD_CTL: Final = iowr(_BLK, 142, CTL.size)

V6: Final = Generation("v6", _OLD_ATTACH, _OLD_DETACH, _OLD_CTL, NAME.size, False, 0, False, ("corrupted",))
V7: Final = Generation("v7", _OLD_ATTACH, _OLD_DETACH, _OLD_CTL, NAME.size, True, 0, False, ("corrupted",))
"""Also the patch set for Linux 6.9: the interface is the same."""
V615: Final = Generation(
    "6.15",
    # The number the older ones have for CTL. What is not known to be of this generation must never be sent there.
    iowr(_BLK, 142, ATTACH.size),
    iowr(_BLK, 143, NAME.size),
    iowr(_BLK, 144, CTL.size),
    ATTACH.size,
    True,
    4096,
    True,
    ("corrupted", "no-space"),
)
GENERATIONS: Final = (V6, V7, V615)

LEGACY: Final = {
    "VERSION": 0x40085600,
    "TRACKER_REMOVE": 0x40085601,
    "TRACKER_COLLECT": 0x40105602,
    "TRACKER_READ_CBT_MAP": 0x80185603,
    "TRACKER_MARK_DIRTY_BLOCKS": 0x80185604,
    "SNAPSHOT_CREATE": 0x40205605,
    "SNAPSHOT_DESTROY": 0x80105606,
    "SNAPSHOT_APPEND_STORAGE": 0x40285607,
    "SNAPSHOT_TAKE": 0x80105608,
    "SNAPSHOT_COLLECT": 0x40105609,
    "SNAPSHOT_COLLECT_IMAGES": 0x4020560A,
    "SNAPSHOT_WAIT_EVENT": 0x5000560B,
}
"""Requests of the modules before 2.0 (Veeam Agent 6, blksnap 1.0), which go by the last byte alone. Never sent."""


@dataclass(frozen=True, slots=True)
class CbtInfo:
    """What the kernel says of a map. Sizes in bytes."""

    capacity: int
    block_size: int
    block_count: int
    generation: str
    raw_number: int
    """As the kernel says it: see ``WRAPPED``."""

    @classmethod
    def parse(cls, data: bytes | bytearray) -> CbtInfo:
        """Read ``CBTINFO``; the bytes behind the number are the kernel's stack."""
        capacity, block_size, block_count, generation, number = CBTINFO.unpack_from(data)
        return cls(capacity, block_size, block_count, str(uuid.UUID(bytes=generation)), number)

    @property
    def wrapped(self) -> bool:
        """Whether the last take began this generation because numbers had run out; its map is another one's then."""
        return self.raw_number == WRAPPED

    @property
    def changes(self) -> int:
        """The number of the last take of this generation; 0 before the first, and for the one that began it by wrapping.

        That one left the numbers at "1 is written now", as a new generation has: its image is what number 0 is.
        """
        return 0 if self.wrapped else self.raw_number


@dataclass(frozen=True, slots=True)
class SnapshotInfo:
    """What the kernel says of a device in a snapshot; ``errno`` is positive, 0 for none, ``image`` a disk name or empty."""

    errno: int
    image: str

    @classmethod
    def parse(cls, data: bytes | bytearray) -> SnapshotInfo:
        """Read ``SNAPSHOTINFO``."""
        error, image = SNAPSHOTINFO.unpack_from(data)
        return cls(abs(error), image.split(b"\0", 1)[0].decode("utf-8", "replace"))


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a snapshot."""

    kind: EventKind
    device: tuple[int, int] = (0, 0)
    """Major and minor number, of "corrupted"."""
    errno: int = 0
    requested: int = 0
    """Bytes, of "no-space"."""


def parse_event(generation: Generation, data: bytes | bytearray) -> Event | None:
    """Read ``EVENT``; None for one that is not known."""
    _, _, code, _, payload = EVENT.unpack_from(data)
    kind = generation.event_kind(code)
    if kind == "corrupted":
        major, minor, error = EVENT_CORRUPTED.unpack_from(payload)
        return Event(kind, (major, minor), abs(error))
    if kind is None:
        return None
    return Event(kind, requested=EVENT_SPACE.unpack_from(payload)[0] * SECTOR)
