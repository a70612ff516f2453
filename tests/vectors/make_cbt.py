# SPDX-License-Identifier: GPL-2.0-or-later
"""Writes cbt.json: what the reference (`changemap`) does with fixed sequences, for every other implementation to replay.

    python tests/vectors/make_cbt.py

The format, all of it integers, strings and lists:

block_sizes    [size, requested, block size or null where refused]
slide          the byte that each byte 0 … 255 becomes, as hex
numbers        [base, active, [changes, oldest, base after a take, active after a take, slides] or null where refused]
sequences      {name, size, block_size, steps}; a step is {op, …, numbers, live, taken, asked?}:
    write      offset, length
    mark       ranges [[offset, length], …]; blocks, or null where the list is refused
    mark-all   blocks
    take       slides. An aborted take is no step: it leaves nothing to compare
    reset      size (the numbers, and both maps, are new)
    restore    the live map and numbers continue; the taken map is lowered from it
    After each step: numbers [base, active], the bytes of both maps as hex, and asked, a list of
    [view, since, [[offset, length], …] or null where the answer is "generation changed"].
"""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

from blksnap_service.cbt import (
    MAX_BLOCKS,
    CbtError,
    GenerationChanged,
    GenerationId,
    Geometry,
    InvalidRange,
    Number,
    Numbers,
    ResetReason,
    View,
    slide,
)
from blksnap_service.changemap import ChangeMap

PATH = Path(__file__).with_name("cbt.json")
GIB = 1 << 30
BLOCK = 4096

Json = dict[str, Any]


class Recorder:
    """A change map whose every step is written down."""

    def __init__(self, name: str, size: int, block_size: int = BLOCK) -> None:
        self.name, self.size, self.block_size = name, size, block_size
        self.ids = (GenerationId(str(count)) for count in itertools.count())
        self.map = ChangeMap(size, next(self.ids), block_size)
        self.steps: list[Json] = []

    def sequence(self) -> Json:
        """All that was recorded."""
        return {"name": self.name, "size": self.size, "block_size": self.block_size, "steps": self.steps}

    def write(self, offset: int, length: int) -> None:
        """Record a write."""
        self.map.record_write(offset, length)
        self._step({"op": "write", "offset": offset, "length": length})

    def mark(self, ranges: list[tuple[int, int]]) -> None:
        """Record a list of dirty ranges, good or bad."""
        try:
            blocks = self.map.mark_dirty(ranges)
        except InvalidRange:
            blocks = None
        self._step({"op": "mark", "ranges": ranges, "blocks": blocks})

    def mark_all(self) -> None:
        """Record that everything is dirty."""
        self._step({"op": "mark-all", "blocks": self.map.mark_all_dirty()})

    def take(self) -> None:
        """Record a take, with an aborted one before it."""
        self.map.prepare_take(next(self.ids))
        plan = self.map.prepare_take(next(self.ids))
        self.map.release(self.map.commit_take(plan))
        self._step({"op": "take", "slides": plan.slides})

    def reset(self, size: int) -> None:
        """Record a new generation."""
        self.map.reset(next(self.ids), ResetReason.REQUESTED, size)
        self._step({"op": "reset", "size": size})

    def restore(self) -> None:
        """Record a clean stop and start."""
        self.map = ChangeMap.restore(self.map.read())
        self._step({"op": "restore"})

    def ask(self, view: View, since: int) -> None:
        """Add a question to the last step."""
        try:
            ranges: list[list[int]] | None = [
                list(each) for each in self.map.read(view).changed_ranges(since)[0]
            ]
        except GenerationChanged:
            ranges = None
        self.steps[-1].setdefault("asked", []).append([str(view), since, ranges])

    def _step(self, step: Json) -> None:
        numbers = self.map.numbers
        step["numbers"] = [numbers.base, numbers.active]
        step["live"] = self.map.read().data.hex()
        step["taken"] = self.map.taken.reading().data.hex()
        self.steps.append(step)


def block_sizes() -> list[list[int | None]]:
    """The table, its borders, and everything that is refused."""
    sizes = [0, 1, 65536, GIB, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]
    for step in range(11):
        sizes += [(128 << step) * GIB, (128 << step) * GIB + 1]
    sizes += [MAX_BLOCKS << 26, (MAX_BLOCKS << 26) + 1]
    requests = [1, 512, 2048, 4096, 4097, 65536, 96 << 10, 64 << 20, 128 << 20, 1 << 32, 1 << 63]
    cases = [(size, 0) for size in sizes] + [(GIB + 1, requested) for requested in requests]
    cases += [(MAX_BLOCKS * BLOCK, BLOCK), (MAX_BLOCKS * BLOCK + 1, BLOCK)]
    rows: list[list[int | None]] = []
    for size, requested in cases:
        try:
            rows.append([size, requested, Geometry.of(size, requested).block_size])
        except CbtError:
            rows.append([size, requested, None])
    return rows


def number_pairs() -> list[list[Any]]:
    """Numbers at every border of the window."""
    rows: list[list[Any]] = []
    for base in (0, 1, 127, 128, 256, 1 << 20, (1 << 32) - 256, (1 << 32) - 128):
        for byte in (0, 1, 2, 127, 128, 129, 254, 255, 256):
            if base + byte >= 1 << 32:
                continue
            try:
                numbers = Numbers(base, Number(base + byte))
                after = numbers.after_take()
            except CbtError:
                rows.append([base, base + byte, None])
            else:
                row = [numbers.changes, numbers.oldest, after.base, after.active, numbers.slides_next]
                rows.append([base, base + byte, row])
    return rows


def many_takes() -> Json:
    """650 takes in a row, through four slides, each with a few changes before it."""
    dice = random.Random(1)
    recorder = Recorder("650 takes in a row", 9 * BLOCK + 100)
    for take in range(650):
        for _ in range(dice.choice([0, 0, 1, 2])):
            offset = dice.randrange(recorder.size)
            recorder.write(offset, min(dice.randrange(1, 3 * BLOCK), recorder.size - offset))
        if dice.random() < 0.1:
            recorder.mark([(dice.randrange(8) * BLOCK + dice.randrange(99), dice.randrange(1, 1000))])
        recorder.take()
        oldest, changes = recorder.map.numbers.oldest, recorder.map.numbers.changes
        if take % 9 == 0 or 250 <= take < 260 or 380 <= take < 386:
            for view in View:
                for since in sorted(
                    {max(0, oldest - 1), oldest, (oldest + changes) // 2, changes - 1, changes + 1}
                ):
                    recorder.ask(view, since)
    return recorder.sequence()


def marks() -> Json:
    """Good and bad lists of ranges before and after takes."""
    recorder = Recorder("marks", 20 * BLOCK + 1)
    size = recorder.size
    lists: list[list[tuple[int, int]]] = [
        [],
        [(0, 1), (5 * BLOCK - 1, 2), (size - 1, 1)],
        [(3 * BLOCK, BLOCK), (3 * BLOCK, BLOCK)],
        [(7 * BLOCK, 1), (8 * BLOCK, 0)],
        [(7 * BLOCK, 1), (size, 1)],
        [(7 * BLOCK, 1), (0, size + 1)],
        [(7 * BLOCK, 1), (1, (1 << 64) - 1)],
        [((1 << 64) - 1, (1 << 64) - 1)],
        [(0, 0)],
        [(9 * BLOCK, 2 * BLOCK + 1)],
    ]
    for _ in range(3):
        for ranges in lists:
            recorder.mark(ranges)
        for since in range(4):
            recorder.ask(View.LIVE, since)
            recorder.ask(View.TAKEN, since)
        recorder.take()
    recorder.mark_all()
    recorder.ask(View.TAKEN, 2)
    recorder.take()
    recorder.ask(View.LIVE, 4)
    return recorder.sequence()


def everything() -> Json:
    """All steps in any order, with bursts of takes that slide the window between them."""
    dice = random.Random(2)
    recorder = Recorder("everything in any order", 6 * BLOCK)
    for _ in range(200):
        size = recorder.map.geometry.size
        offset = dice.randrange(size)
        match dice.randrange(40):
            case 0:
                recorder.reset(dice.randrange(1, 12 * BLOCK))
            case 1:
                recorder.mark_all()
            case 2 | 3:
                recorder.restore()
            case 4 | 5 | 6:
                for _ in range(dice.randrange(90)):
                    recorder.take()
            case 7 | 8 | 9 | 10 | 11 | 12:
                recorder.mark([(offset, dice.randrange(2 * BLOCK)) for _ in range(dice.randrange(3))])
            case 13 | 14 | 15 | 16 | 17 | 18 | 19 | 20:
                recorder.take()
            case _:
                recorder.write(offset, min(dice.randrange(3 * BLOCK), size - offset))
        for view in View:
            recorder.ask(view, dice.randint(0, recorder.map.numbers.active))
            recorder.ask(view, recorder.map.numbers.oldest)
    return recorder.sequence()


def by_the_rule() -> Json:
    """Blocks of 64 KiB because nothing else was requested, kept so when the device grows."""
    recorder = Recorder("block size by the rule", 5 << 16, 0)
    recorder.write((2 << 16) - 1, 2)
    recorder.reset((7 << 16) + 1)
    recorder.write(7 << 16, 1)
    recorder.ask(View.LIVE, 0)
    return recorder.sequence()


def text() -> str:
    """The whole file: one step per line, so that a change of the rules can be read in a diff."""
    lines = ["{"]
    for name, rows in (("block_sizes", block_sizes()), ("numbers", number_pairs())):
        lines += [f'"{name}": [', ",\n".join(json.dumps(row) for row in rows), "],"]
    lines += [f'"slide": "{slide(bytes(range(256))).hex()}",', '"sequences": [']
    sequences = []
    for sequence in (many_takes(), marks(), everything(), by_the_rule()):
        steps = ",\n".join(json.dumps(step, separators=(",", ":")) for step in sequence.pop("steps"))
        sequences.append(f'{json.dumps(sequence)[:-1]}, "steps": [\n{steps}\n]}}')
    lines += [",\n".join(sequences), "]", "}"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PATH.write_text(text(), encoding="utf-8")
