# SPDX-License-Identifier: GPL-2.0-or-later
"""Writers that write to one origin only after the other has acknowledged, and what images of one instant show of them.

One of the two writes a record to the first origin and then to the second, the other the other way round, so that neither
order may be the lucky one. Each has a region of its own in both origins.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tests.nbd.load import Work

RECORD = 4096
SLOTS = 256
REGION = SLOTS * RECORD
SIZE = 2 * REGION
STRIDE = 101
"""Odd, so that consecutive records visit every slot, far from each other."""

Put = Callable[[int, bytes], object]
"""Writes bytes at an offset of an origin and returns when they are acknowledged."""
Connect = Callable[[], AbstractContextManager[Put]]
"""Opens an origin; called by each writer on its own thread."""


def slots_of(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return where the records of these numbers are written."""
    return numbers * np.uint64(STRIDE) % np.uint64(SLOTS)


def newest_of(content: bytes, at: int) -> int:
    """Return the newest record of a region, which must hold exactly what a writer had written by then."""
    region = np.frombuffer(content[at : at + REGION], dtype="<u8").reshape(SLOTS, -1)
    assert (region == region[:, :1]).all(), "a record is torn"
    found = region[:, 0]
    newest = int(found.max())
    numbers = np.arange(max(1, newest - SLOTS + 1), newest + 1, dtype=np.uint64)
    expected = np.zeros(SLOTS, np.uint64)
    expected[slots_of(numbers)] = numbers
    assert (found == expected).all(), "the image is of no instant"
    return newest


@dataclass
class Progress:
    """How far a writer is: the last number it began, and the last that both origins acknowledged."""

    begun: int = 0
    done: int = 0


def _writer(cause: Connect, effect: Connect, at: int, progress: Progress, pause_s: float) -> Work:
    def work(stopping: Callable[[], bool]) -> None:
        with cause() as put_first, effect() as put_then:
            for number in itertools.count(1):
                if stopping():
                    return
                record = number.to_bytes(8, "little") * (RECORD // 8)
                place = at + number * STRIDE % SLOTS * RECORD
                progress.begun = number
                put_first(place, record)
                put_then(place, record)
                progress.done = number
                # So that a take finds most slots as they were at the take before.
                if number % 8 == 0:
                    time.sleep(pause_s)

    return work


@dataclass
class Causality:
    """Both writers over two origins of `SIZE` bytes with blocks of `RECORD`, and the judge of the images."""

    first: Connect
    second: Connect
    pause_s: float = 0.002
    """Of each writer after eight records."""
    takes: int = 0
    written: int = 0
    between: int = 0
    """How often an image showed a cause before its effect: a take that no writer stood between shows nothing."""
    _progress: tuple[Progress, Progress] = field(default_factory=lambda: (Progress(), Progress()))
    _previous: list[list[int]] = field(default_factory=lambda: [[0, 0], [0, 0]])

    def works(self) -> tuple[Work, Work]:
        """Return what is to run while snapshots are taken."""
        one, other = self._progress
        return (
            _writer(self.first, self.second, 0, one, self.pause_s),
            _writer(self.second, self.first, REGION, other, self.pause_s),
        )

    def done(self) -> list[int]:
        """Return what each writer has had acknowledged: to be asked before a take."""
        return [progress.done for progress in self._progress]

    def begun(self) -> list[int]:
        """Return what each writer has begun: to be asked after a take."""
        return [progress.begun for progress in self._progress]

    def judge(
        self, done: Sequence[int], begun: Sequence[int], contents: Sequence[bytes], maps: Sequence[set[int]]
    ) -> None:
        """Check both images of a take, and the blocks that the maps call changed since the take before.

        Each image holds all records up to its newest and none after it; the newest is not older than what was
        acknowledged before the take nor newer than what was begun before its answer; an effect has its cause.
        """
        newest = [[newest_of(content, at) for at in (0, REGION)] for content in contents]
        for region, (cause, effect) in enumerate(((0, 1), (1, 0))):
            assert done[region] <= newest[effect][region] <= newest[cause][region] <= begun[region]
            assert newest[cause][region] <= newest[effect][region] + 1
            self.between += newest[cause][region] - newest[effect][region]
        for origin, marked in enumerate(maps):
            expected = set()
            for region in (0, 1):
                new = np.arange(
                    self._previous[origin][region] + 1, newest[origin][region] + 1, dtype=np.uint64
                )
                self.written += len(new)
                expected |= {SLOTS * region + int(slot) for slot in slots_of(new)}
            assert marked == expected
        self._previous = newest
        self.takes += 1

    def __str__(self) -> str:
        """Say it in one line."""
        return f"{self.takes} takes over two origins among {self.written} writes, {self.between} times between cause and effect"
