# SPDX-License-Identifier: GPL-2.0-or-later
"""
The map as offset (downwards) against snapshot interval (to the right): which parts of the device changed last in which interval.

Pure. Drawn from the ages of many thin slices of each row, so a slice that changed in several intervals is seen in the last of them: that is
all the map remembers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from blksnap_tui.heat.grid import NEWEST

MOST_SLICES: Final = 65_536
"""More are not asked for: a frame stays below what a bus carries without effort."""

WIDEST_COLUMN: Final = 8


@dataclass(frozen=True, slots=True)
class Timeline:
    """
    `rows` lines of `slices` slices each, drawn in `cols` columns for the intervals up to `active`.

    `intervals` is how many there are to be told apart; when there is no room for all, the latest are drawn.
    """

    cols: int
    rows: int
    slices: int
    active: int
    intervals: int

    @property
    def shown(self) -> int:
        """Give how many intervals are drawn."""
        return max(1, min(self.intervals, self.cols))

    @property
    def width(self) -> int:
        """Give how many columns each interval takes."""
        return min(self.cols // self.shown, WIDEST_COLUMN)

    def age_at(self, col: int) -> int | None:
        """Give the age in intervals of what is drawn in a column; None in the margin on the left."""
        age = (self.cols - 1 - min(col, self.cols - 1)) // self.width
        return age if age < self.shown else None

    def column_of(self, age: int) -> int:
        """Give the first column of an age."""
        return self.cols - (age + 1) * self.width

    def draw(self, ages: bytes, levels: int) -> bytes:
        """Turn the age bytes of all slices into one level for each of `rows` times `cols` places."""
        table = _levels(self.slices, levels)
        margin = bytes(self.cols - self.shown * self.width)
        drawn = bytearray()
        for begin in range(0, self.rows * self.slices, self.slices):
            row = ages[begin : begin + self.slices]
            drawn += margin
            for age in range(self.shown - 1, -1, -1):
                drawn += table[row.count(NEWEST - age)] * self.width
        return bytes(drawn)


def slices_for(blocks: int, rows: int) -> int:
    """Choose how many slices a row has: one for each block where that is not too many."""
    return max(1, min(-(-blocks // rows), MOST_SLICES // rows))


def _levels(slices: int, levels: int) -> list[bytes]:
    """List the level for each number of slices: 0 only for none, the square root lifts what is sparse."""
    return [b"\0"] + [
        bytes([1 + round(math.sqrt(count / slices) * (levels - 2))]) for count in range(1, slices + 1)
    ]
