# SPDX-License-Identifier: GPL-2.0-or-later
"""
Where bins are drawn: in rows, along a Hilbert curve, or as offset against snapshot number.

Pure. A *place* is a position on the screen (row by row, left to right), a *bin* a stretch of the device (in order of offset). In the layout
`rows` they are the same. Along the curve neighbours on the device are neighbours on the screen, so regions are blobs that keep their shape
when the terminal is resized, but an offset can only be read off with the cursor.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from functools import lru_cache
from operator import itemgetter
from typing import Final

LAYOUTS: Final = ("rows", "hilbert", "time")


def rearranged(values: bytes, cols: int, rows: int) -> bytes:
    """Put one byte per bin, in order of offset, where the curve has them on a screen of `cols` by `rows` places."""
    if len(values) < 2:
        return values
    return bytes(_picker(cols, rows)(values))


def bin_at(layout: str, cols: int, rows: int, place: int) -> int:
    """Give the bin that is drawn at a place."""
    return curve(cols, rows)[0][place] if layout == "hilbert" else place


def place_of(layout: str, cols: int, rows: int, index: int) -> int:
    """Give the place at which a bin is drawn."""
    return curve(cols, rows)[1][index] if layout == "hilbert" else index


@lru_cache(maxsize=4)
def curve(cols: int, rows: int) -> tuple[array[int], array[int]]:
    """
    Draw a Hilbert-like curve through every place of a rectangle: the bin at each place, and the place of each bin.

    Squares of powers of two would leave most of a terminal empty. The rectangle is halved again and again, along the longer side when it is
    much longer, else into three parts as Hilbert does; steps are to a neighbour, diagonal at a few places when a side is odd.
    """
    bins, places = array("Q", bytes(8 * cols * rows)), array("Q", bytes(8 * cols * rows))
    # Parts still to be drawn: where they begin, the side along which the curve goes on the whole, and the other side.
    waiting = [(0, 0, cols, 0, 0, rows) if cols >= rows else (0, 0, 0, rows, cols, 0)]
    index = 0
    while waiting:
        x, y, ax, ay, bx, by = waiting.pop()
        along, across = abs(ax + ay), abs(bx + by)
        dax, day, dbx, dby = _sign(ax), _sign(ay), _sign(bx), _sign(by)
        if along == 1 or across == 1:
            dx, dy = (dax, day) if across == 1 else (dbx, dby)
            for step in range(max(along, across)):
                place = (y + step * dy) * cols + x + step * dx
                bins[place], places[index] = index, place
                index += 1
            continue
        ax2, ay2, bx2, by2 = ax // 2, ay // 2, bx // 2, by // 2
        if 2 * along > 3 * across:
            # An even half keeps the steps straight.
            if abs(ax2 + ay2) % 2 and along > 2:
                ax2, ay2 = ax2 + dax, ay2 + day
            waiting += [(x + ax2, y + ay2, ax - ax2, ay - ay2, bx, by), (x, y, ax2, ay2, bx, by)]
            continue
        if abs(bx2 + by2) % 2 and across > 2:
            bx2, by2 = bx2 + dbx, by2 + dby
        waiting += [
            (
                x + (ax - dax) + (bx2 - dbx),
                y + (ay - day) + (by2 - dby),
                -bx2,
                -by2,
                -(ax - ax2),
                -(ay - ay2),
            ),
            (x + bx2, y + by2, ax, ay, bx - bx2, by - by2),
            (x, y, bx2, by2, ax2, ay2),
        ]
    return bins, places


@lru_cache(maxsize=4)
def _picker(cols: int, rows: int) -> Callable[[bytes], tuple[int, ...]]:
    pick: Callable[[bytes], tuple[int, ...]] = itemgetter(*curve(cols, rows)[0])
    return pick


def _sign(value: int) -> int:
    return (value > 0) - (value < 0)
