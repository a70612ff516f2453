# SPDX-License-Identifier: GPL-2.0-or-later
"""A change map for pictures and tests: the rules a viewer can see, and a believable history to fill it with."""

from __future__ import annotations

import random
from dataclasses import dataclass, field


@dataclass(slots=True)
class FakeMap:
    """One byte per block by the rules of a real map, but without the sliding window."""

    values: bytearray
    active: int = 1
    taken: bytes = b""
    sequence: int = 1
    often: dict[int, int] = field(default_factory=dict)

    def write(self, first: int, count: int) -> None:
        """Mark blocks as changed now."""
        end = min(first + count, len(self.values))
        self.values[first:end] = bytes([self.active]) * max(0, end - first)
        self.sequence += 1

    def take(self) -> None:
        """Begin the next interval."""
        self.taken = bytes(self.values)
        for block, value in enumerate(self.values):
            if value == self.active:
                self.often[block] = self.often.get(block, 0) + 1
        self.active += 1
        self.sequence += 1

    def summary(self, first: int, count: int, bins: int, mode: str, since: int) -> bytes:
        """Fold blocks into bins as Summarize does."""
        folded = bytearray(bins)
        for index in range(bins):
            begin = first + index * count // bins
            part = self.values[begin : max(first + (index + 1) * count // bins, begin + 1)]
            if mode == "age":
                newest = max(part)
                folded[index] = 255 - (self.active - newest) if newest else 0
            elif mode == "frequency":
                most = max(self.often.get(begin + at, 0) for at in range(len(part)))
                folded[index] = -(-255 * most // max(self.active - 1, 1))
            else:
                changed = sum(value > since for value in part)
                folded[index] = -(-255 * changed // len(part))
        return bytes(folded)


def believable_map(blocks: int, intervals: int = 12, seed: int = 3) -> FakeMap:
    """Write what a disk in use writes: metadata here and there, a journal, a database, a growing log, a few big copies."""
    chance = random.Random(seed)  # noqa: S311 - a picture, no secret
    shown = FakeMap(bytearray(blocks))
    used = int(blocks * 0.62)
    for interval in range(1, intervals + 1):
        for _ in range(chance.randrange(3)):
            shown.write(chance.randrange(used), chance.randrange(blocks // 400 + 1, blocks // 60 + 2))
        for group in range(0, used, max(1, blocks // 128)):
            if chance.random() < 0.3:
                shown.write(group, chance.randrange(1, blocks // 20_000 + 3))
        shown.write(int(blocks * 0.31), blocks // 512 + 1)
        start, length = int(blocks * 0.42), blocks * 0.06
        for _ in range(min(400, blocks // 200)):
            shown.write(start + int(chance.random() ** 3 * length), 1)
        shown.write(int(blocks * 0.55) + interval * (blocks // 600 + 1), blocks // 600 + 1)
        if interval < intervals:
            shown.take()
    return shown
