# SPDX-License-Identifier: GPL-2.0-or-later
"""
The arithmetic of the heat map: which blocks a cell stands for, and which level its byte becomes.

Pure: no Textual, no D-Bus, no colours. A *bin* is one drawn unit: half a character cell where half blocks can
be drawn, else a whole one. Bins run row by row, left to right, so reading order is offset order. The service
folds the blocks of a bin into one byte by the same rule as `Grid.blocks`: bin i of n over `count` blocks
begins at block `first + i * count // n`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

NEVER: Final = 0
NEWEST: Final = 255

MODES: Final = ("age", "since", "density", "frequency")
"""What a colour says: when a bin changed last, whether the next increment has any of it, how much of it changed since a number, how
often it changed."""

ZOOM: Final = 4

# With few intervals the scale stays as if there were this many, so that colours do not jump at every take.
SHORTEST_SPAN: Final = 8


@dataclass(frozen=True, slots=True)
class Window:
    """The part of a device that is shown, in blocks; never empty."""

    first: int
    count: int

    def __post_init__(self) -> None:
        if self.first < 0 or self.count < 1:
            raise ValueError(f"a window of {self.count} blocks from {self.first} shows nothing")

    def zoomed(self, about: int, count: int, total: int) -> Window:
        """
        Give a window of `count` blocks of a device of `total`, in which block `about` lies where it lay in this one.

        It is moved inside the device; a count that is too large or too small becomes the nearest that is possible.
        """
        count = min(max(count, 1), total)
        place = min(max(about - self.first, 0), self.count)
        return Window(min(max(about - place * count // self.count, 0), total - count), count)

    def moved(self, blocks: int, total: int) -> Window:
        """Give the window this many blocks further on, as far as the device of `total` blocks goes."""
        return Window(min(max(self.first + blocks, 0), max(total - self.count, 0)), min(self.count, total))

    def around(self, block: int, total: int) -> Window:
        """Give a window as large as this one with a block in its middle, unless the device ends before."""
        return self.moved(block - self.count // 2 - self.first, total)


@dataclass(frozen=True, slots=True)
class Grid:
    """`rows` lines of `cols` bins over a window of a device."""

    window: Window
    cols: int
    rows: int

    def __post_init__(self) -> None:
        if self.cols < 1 or self.rows < 1:
            raise ValueError(f"a grid of {self.cols} by {self.rows} has no bins")

    @property
    def bins(self) -> int:
        """Give the number of bins."""
        return self.cols * self.rows

    @property
    def blocks_per_bin(self) -> float:
        """Give how many blocks a bin stands for, on average; less than 1 when blocks are drawn wider."""
        return self.window.count / self.bins

    def blocks(self, index: int) -> range:
        """
        Give the blocks a bin stands for: never empty, so bins share a block when there are more bins than
        blocks.

        Raises IndexError outside the grid.
        """
        if not 0 <= index < self.bins:
            raise IndexError(f"bin {index} of {self.bins}")
        first, count = self.window.first, self.window.count
        begin = first + index * count // self.bins
        end = first + (index + 1) * count // self.bins
        return range(begin, max(end, begin + 1))

    def index(self, col: int, row: int) -> int:
        """Give the bin at a place, which is moved inside the grid when it is not."""
        return min(max(row, 0), self.rows - 1) * self.cols + min(max(col, 0), self.cols - 1)

    def bin_of(self, block: int) -> int:
        """Give the first bin that stands for a block. Raises IndexError for a block outside the window."""
        place = block - self.window.first
        if not 0 <= place < self.window.count:
            raise IndexError(f"block {block} is not shown")
        # The last i with i * count // bins <= place; with fewer bins than blocks it is the only one.
        last = ((place + 1) * self.bins - 1) // self.window.count
        first = -(-place * self.bins // self.window.count)
        return min(first, last)


def age_of(value: int) -> int | None:
    """Give how many intervals ago a bin changed last: 0 for the current one; None for never."""
    return None if value == NEVER else NEWEST - value


def age_levels(levels: int, intervals: int) -> bytes:
    """
    Build the table from age bytes to levels, for `bytes.translate`.

    Level 0 is "never", `levels - 1` the current interval; between them ages fall on a scale of log2(1 + age)
    that ends at the oldest of `intervals` intervals, since the last few matter most. Raises ValueError for
    fewer than two levels or more than 256.
    """
    _check(levels)
    span = math.log2(max(intervals, SHORTEST_SPAN))
    table = bytearray(256)
    for value in range(1, 256):
        share = min(math.log2(1 + NEWEST - value) / span, 1.0)
        table[value] = max(1, levels - 1 - round(share * (levels - 2)))
    return bytes(table)


def density_levels(levels: int) -> bytes:
    """
    Build the table from density bytes (0 none … 255 all) to levels; the square root lifts what is sparse.

    Only 0 becomes level 0: what changed at all is never drawn as unchanged. Raises ValueError as
    `age_levels`.
    """
    _check(levels)
    table = bytearray(256)
    for value in range(1, 256):
        table[value] = 1 + round(math.sqrt(value / 255) * (levels - 2))
    return bytes(table)


def since_levels(levels: int) -> bytes:
    """
    Build the table from density bytes to levels that tells only whether anything changed: the highest level, or 0.

    Raises ValueError as `age_levels`.
    """
    _check(levels)
    return bytes(1) + bytes([levels - 1]) * 255


def changed_rows(old: bytes, new: bytes, cols: int, height: int) -> list[int] | None:
    """
    Name the lines of `height` bin rows each in which two frames differ; None when all must be drawn.

    `cols` is the number of bins in a row. Frames of different size have everything in difference.
    """
    if len(old) != len(new):
        return None
    step = cols * height
    return [
        line for line, at in enumerate(range(0, len(new), step)) if old[at : at + step] != new[at : at + step]
    ]


def _check(levels: int) -> None:
    if not 2 <= levels <= 256:
        raise ValueError(f"{levels} levels cannot be drawn")
