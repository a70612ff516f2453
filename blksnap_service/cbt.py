# SPDX-License-Identifier: GPL-2.0-or-later
"""The rules of the change map: block size, numbers, window, and what changed since when.

This and `changemap` (the same rules in motion: writes, marks, takes, resets) are the reference every backend
must agree with and the oracle of the tests. Pure: no I/O, no clock, no lock. Written to be read, not to be fast:
`mapview` reads real maps, `datapath/src/cbt.rs` writes them. "Defect N" is one of the kernel filter's, as listed
and guarded against in tests/unit/test_cbt_defects.py.

**No query misses a block.** Let *t* be the last interval in which a block was written or marked dirty (none: 0)
and *m* its byte. The map keeps this true:

    m == 0  if t == 0;  otherwise  base + m == t,  or  m == 1 and base > 0 and t <= base + 1          (I)

A write or mark sets t = active and m = active - base: (I) holds. A take changes neither t nor m. A slide adds 128
to base and takes 128 from m. For m > 129 nothing else happens and base + m is what it was. For 0 < m <= 129 the
byte becomes 1, and t <= base + m (true by (I)) is at most the new base + 1. For m == 0 it stays 0.

A query "changed since N" wants t > N and returns base + m > N. It is answered for N >= oldest, where oldest is 0
while base is 0, and base + 1 after a slide. While base is 0, (I) is base + m == t for every block: the answer is
exact. After a slide, N >= base + 1, so that blocks with m <= 1 are not returned, rightly: their t is at most
base + 1. For all others base + m == t. So every answer given is exact in blocks: neither a miss nor a false
positive. For an older N the blocks folded into 1 could not be told apart, and `GenerationChanged` says so. (0 could
still be answered after a slide, by all nonzero bytes, but a client is to need no other test than N >= oldest.)
At least the 126 takes before the last one are never below oldest.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, NamedTuple, NewType

GenerationId = NewType("GenerationId", str)
"""A lower-case uuid with dashes: maps and numbers compare only inside one generation."""
Number = NewType("Number", int)
"""A snapshot number: counts takes inside a generation."""

START_BLOCK_SIZE: Final = 64 << 10
MIN_BLOCK_SIZE: Final = 4 << 10
MAX_BLOCK_SIZE: Final = 64 << 20
COMFORTABLE_BLOCKS: Final = 2_097_152
MAX_BLOCKS: Final = 1 << 30
"""A map above 1 GiB of memory is refused: a sparse file can claim to be 8 EiB."""
MAX_SIZE: Final = (1 << 63) - 1
MAX_NUMBER: Final = (1 << 32) - 1
MAX_BYTE: Final = 255
SLIDE: Final = 128


class CbtError(Exception):
    """A rule of the map forbids it; nothing was changed."""


class InvalidSize(CbtError):
    """Raised when no map can be made for a size and block size."""


class InvalidRange(CbtError):
    """Raised when a range is empty or does not lie inside the device or the map."""


class InvalidMap(CbtError):
    """Raised when a saved map, its numbers or its generation cannot be continued or used."""


class GenerationChanged(CbtError):
    """Raised when changes since a number are not known (any more): the client needs a full copy."""


class StalePlan(CbtError):
    """Raised when a prepared take no longer fits the map it was prepared for."""


class Range(NamedTuple):
    """A run of bytes of the device."""

    offset: int
    length: int


class View(StrEnum):
    """Which map is read: the one being written, or the immutable copy of the last take."""

    LIVE = "live"
    TAKEN = "taken"


class ResetReason(StrEnum):
    """Why a generation started."""

    ATTACHED = "attached"
    REQUESTED = "requested"
    GROWN = "grown"
    SHRUNK = "shrunk"
    BYTES_MISSED = "bytes-missed"
    MEDIA_CHANGED = "media-changed"
    UNCLEAN_STOP = "unclean-stop"
    NUMBERS_EXHAUSTED = "numbers-exhausted"


@dataclass(frozen=True, slots=True)
class Geometry:
    """How `size` bytes are cut into blocks of `block_size` bytes; the last block may be partial.

    ======== ========== ===========        ======== ========== ===========
    size     block size blocks             size     block size blocks
    ======== ========== ===========        ======== ========== ===========
    1 GiB    64 KiB     16 384             4 TiB    2 MiB      2 097 152
    128 GiB  64 KiB     2 097 152          16 TiB   8 MiB      2 097 152
    129 GiB  128 KiB    1 056 768          64 TiB   32 MiB     2 097 152
    256 GiB  128 KiB    2 097 152          128 TiB  64 MiB     2 097 152
    512 GiB  256 KiB    2 097 152          256 TiB  64 MiB     4 194 304
    1 TiB    512 KiB    2 097 152          1 PiB    64 MiB     16 777 216
    ======== ========== ===========        ======== ========== ===========
    """

    size: int
    block_size: int

    @classmethod
    def of(cls, size: int, requested: int = 0) -> Geometry:
        """Cut by the rule, or into blocks of `requested` bytes.

        Raises `InvalidSize` for a size of 0, for blocks that are no power of two from 4 KiB to 64 MiB, and for
        more than `MAX_BLOCKS` of them.
        """
        if not 0 < size <= MAX_SIZE:
            raise InvalidSize(f"a size of {size} bytes cannot be tracked")
        if requested:
            if requested & (requested - 1) or not MIN_BLOCK_SIZE <= requested <= MAX_BLOCK_SIZE:
                bounds = f"{MIN_BLOCK_SIZE} to {MAX_BLOCK_SIZE}"
                raise InvalidSize(f"block size {requested} is no power of two from {bounds}")
            geometry = cls(size, requested)
        else:
            geometry = cls(size, START_BLOCK_SIZE)
            while geometry.block_count > COMFORTABLE_BLOCKS and geometry.block_size < MAX_BLOCK_SIZE:
                geometry = cls(size, geometry.block_size * 2)
        if geometry.block_count > MAX_BLOCKS:
            raise InvalidSize(
                f"the map would have {geometry.block_count} blocks, more than {MAX_BLOCKS}: "
                "choose a larger block size"
            )
        return geometry

    @property
    def block_count(self) -> int:
        """The length of a map in bytes."""
        return -(-self.size // self.block_size)

    def blocks(self, offset: int, length: int) -> range:
        """The blocks that the bytes touch; what lies past the end is left out."""
        start, end = max(offset, 0), min(offset + length, self.size)
        return range(start // self.block_size, -(-end // self.block_size)) if start < end else range(0)

    def bytes(self, blocks: range) -> Range:
        """The bytes of a run of blocks, clipped to the end of the device."""
        offset = blocks.start * self.block_size
        return Range(offset, min(blocks.stop * self.block_size, self.size) - offset)

    def validate(self, ranges: Iterable[Range | tuple[int, int]]) -> list[range]:
        """The blocks of each range.

        Raises `InvalidRange`, naming the index, for a range that is empty or does not lie inside the device.
        """
        checked = []
        for index, (offset, length) in enumerate(ranges):
            if length <= 0:
                raise InvalidRange(f"range {index} is empty")
            if offset < 0 or offset + length > self.size:
                raise InvalidRange(f"range {index} does not lie inside the device of {self.size} bytes")
            checked.append(self.blocks(offset, length))
        return checked


@dataclass(frozen=True, slots=True)
class Numbers:
    """Which interval is being written (`active`) and from where the bytes count (`base`).

    Raises `InvalidMap` when no sequence of takes leads to these two.
    """

    base: int = 0
    active: Number = Number(1)

    def __post_init__(self) -> None:
        least = SLIDE if self.base else 1
        in_window = least <= self.active - self.base <= MAX_BYTE
        if self.base < 0 or self.base % SLIDE or not in_window or self.active > MAX_NUMBER:
            raise InvalidMap(f"base {self.base} and active number {self.active} do not belong together")

    @property
    def changes(self) -> Number:
        """The number of the last take, 0 before the first."""
        return Number(self.active - 1)

    @property
    def oldest(self) -> Number:
        """The smallest number a client may ask "changed since" for."""
        return Number(self.base + 1 if self.base else 0)

    @property
    def byte_for_active(self) -> int:
        """What a write puts into the live map: 1 to 255."""
        return self.active - self.base

    @property
    def byte_for_changes(self) -> int:
        """What a mark puts into the map of the last take: 0 to 254, 0 marks nothing (there was no take)."""
        return self.changes - self.base

    @property
    def slides_next(self) -> bool:
        """Whether the next take slides the window."""
        return self.byte_for_active == MAX_BYTE

    def after_take(self) -> Numbers:
        """The numbers after a take. Raises `InvalidMap` when `active` is the last there is (2**32 - 1)."""
        return Numbers(self.base + SLIDE if self.slides_next else self.base, Number(self.active + 1))

    def threshold(self, since: int) -> int:
        """The byte above which a block has changed since the number.

        Raises `GenerationChanged` for a number before `oldest`, and for one never handed out: an empty answer to
        it would lose changes silently (defect 6).
        """
        if not self.oldest <= since <= self.changes:
            raise GenerationChanged(
                f"changes since {since} are not known, only since {self.oldest} to {self.changes}: "
                "a full copy is needed"
            )
        return since - self.base


def slide(data: bytes | bytearray) -> bytearray:
    """The bytes after the window slid: 128 less, but a changed block stays changed (1)."""
    return bytearray(data.translate(_SLIDE))


_SLIDE: Final = bytes([0, *(max(1, byte - SLIDE) for byte in range(1, MAX_BYTE + 1))])


@dataclass(frozen=True, slots=True)
class Reading:
    """One consistent reading of a map: bytes, numbers and generation of one moment (defects 7 and 17)."""

    generation: GenerationId
    geometry: Geometry
    numbers: Numbers
    data: bytes

    def read(self, offset: int, length: int) -> bytes:
        """A part of the map's bytes. Raises `InvalidRange` unless the whole part lies inside (defect 5)."""
        count = len(self.data)
        if not 0 <= offset <= count or not 0 <= length <= count - offset:
            raise InvalidRange(f"{length} bytes at {offset} do not lie inside the map of {count} bytes")
        return self.data[offset : offset + length]

    def changed_blocks(self, since: int) -> list[int]:
        """The indexes of the blocks changed since the number. Raises as `Numbers.threshold` does."""
        threshold = self.numbers.threshold(since)
        return [block for block, byte in enumerate(self.data) if byte > threshold]

    def changed_ranges(
        self, since: int, offset: int = 0, max_ranges: int | None = None
    ) -> tuple[list[Range], int]:
        """The bytes changed since the number: (ranges, next offset).

        `offset` is rounded down to its block. Ranges are whole blocks, but that the last block ends with the
        device; they are in order and never touch. After `max_ranges` the next offset is where the range that
        follows starts; the size when none does.
        Raises `GenerationChanged`, and `InvalidRange` for an offset past the end or a `max_ranges` below 1.
        """
        geometry = self.geometry
        if not 0 <= offset <= geometry.size:
            raise InvalidRange(f"offset {offset} is past the end of the device ({geometry.size} bytes)")
        if max_ranges is not None and max_ranges < 1:
            raise InvalidRange("at least one range must be asked for")
        runs: list[range] = []
        first = geometry.block_count if offset == geometry.size else offset // geometry.block_size
        for block in self.changed_blocks(since):
            if block < first:
                continue
            if runs and runs[-1].stop == block:
                runs[-1] = range(runs[-1].start, block + 1)
            elif len(runs) == max_ranges:
                return [geometry.bytes(run) for run in runs], block * geometry.block_size
            else:
                runs.append(range(block, block + 1))
        return [geometry.bytes(run) for run in runs], geometry.size
