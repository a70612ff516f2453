# SPDX-License-Identifier: GPL-2.0-or-later
"""The byte oracle: what differs between two takes must be marked, while clients write and snapshots come and go."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.nbd.datapath import MIB, Datapath, Origin, Snapshot, run
from tests.nbd.load import FIO_BYTES, Report, fio_work, odd_work, running
from tests.nbd.nbdwire import content_of

TAKES = 220
ACTIVE = 120
"""Where the numbers begin: the window slides at 255, in the middle of the takes."""
BLOCK = 16 << 10
SIZE = FIO_BYTES + 4 * MIB + 5_000
MOST_HELD = 4


@dataclass(frozen=True)
class Instant:
    """A snapshot and what its image held right after the take."""

    snapshot: Snapshot
    number: int
    content: NDArray[np.uint8]


@dataclass
class Verdict:
    """What the comparisons found, in blocks."""

    takes: int = 0
    compared: int = 0
    differing: int = 0
    misses: int = 0
    marked: int = 0
    false_positives: int = 0
    released: int = 0

    def __str__(self) -> str:
        """Say it in one line."""
        share = self.false_positives / max(1, self.marked)
        return (
            f"{self.takes} takes: {self.differing} of {self.compared} blocks differ from the take before,"
            f" {self.misses} of them not marked; {self.marked} marked, {self.false_positives} ({share:.1%}) without"
            f" a difference; {self.released} images read the same at take and release"
        )


def differing(one: NDArray[np.uint8], other: NDArray[np.uint8], block: int) -> set[int]:
    """Return the blocks in which two contents differ."""
    unequal = np.zeros(-(-len(one) // block) * block, dtype=bool)
    np.not_equal(one, other, out=unequal[: len(one)])
    return set(np.flatnonzero(unequal.reshape(-1, block).any(axis=1)).tolist())


def marked(map_: bytes, base: int, since: int) -> set[int]:
    """Return the blocks that a map calls changed since a number (DESIGN section 5)."""
    cells = np.frombuffer(map_, dtype=np.uint8).astype(np.int64)
    return set(np.flatnonzero((cells > 0) & (cells + base > since)).tolist())


def release(origin: Origin, instant: Instant, out: Path) -> None:
    """Check that an image is what it was, every third one as a third-party client copies it, and end it."""
    name = instant.snapshot.name
    if instant.number % 3 == 0:
        run("nbdcopy", origin.uri(name), out)
        now = out.read_bytes()
    else:
        now = content_of(origin.socket, name)
    assert now == instant.content.tobytes()
    assert instant.snapshot.info().state == "taken"
    instant.snapshot.destroy()


def take(
    datapath: Datapath, origin: Origin, chance: random.Random, earlier: list[Instant], verdict: Verdict
) -> Instant:
    """Take, read the image and compare it with all ``earlier`` ones, the last of which is of the take before."""
    snapshot = datapath.create(chunk_size=chance.choice([0, 4096, 64 << 10, 1 << 20]))
    (image,) = snapshot.take(origin).images
    assert image.reset == ""
    content = np.frombuffer(content_of(origin.socket, snapshot.name), np.uint8)
    instant = Instant(snapshot, image.number, content)
    map_ = snapshot.taken_maps[origin.name]
    verdict.takes += 1
    for old in earlier:
        if old.number < image.oldest:
            continue
        differ, mark = (
            differing(old.content, instant.content, BLOCK),
            marked(map_, image.base, old.number),
        )
        verdict.misses += len(differ - mark)
        if old is earlier[-1]:
            assert image.number == old.number + 1
            verdict.compared += len(map_)
            verdict.differing += len(differ)
            verdict.marked += len(mark)
            verdict.false_positives += len(mark - differ)
    return instant


@pytest.mark.timeout(180)
def test_no_change_is_missed_and_no_image_moves(datapath: Datapath, directory: Path, report: Report) -> None:
    """While four fio clients write and verify, every difference between takes is marked and held images stand still.

    Up to four snapshots are held at once, over chunks of several sizes, and every one is read at its take and before
    its end. Each take is compared with the one before and with all that are held.
    """
    unmarked = bytes(-(-SIZE // BLOCK))
    origin = datapath.add(SIZE, block_size=BLOCK, saved=unmarked, active=ACTIVE)
    chance = random.Random(20)
    verdict = Verdict()
    held: list[Instant] = []
    before: list[Instant] = []
    with running(fio_work(origin, 100), odd_work(origin, 200)) as going:
        while verdict.takes < TAKES and going():
            others = [instant for instant in held if instant not in before]
            before = [take(datapath, origin, chance, others + before, verdict)]
            held += before
            while len(held) > chance.randrange(0, MOST_HELD + 1):
                release(origin, held.pop(chance.randrange(len(held))), directory / "out")
                verdict.released += 1
    for instant in held:
        release(origin, instant, directory / "out")
        verdict.released += 1
    last = before[0]
    after = origin.maps()
    now = np.frombuffer(origin.content(), np.uint8)
    verdict.misses += len(
        differing(last.content, now, BLOCK) - marked(after.live, after.reading.base, last.number)
    )
    report(str(verdict))
    assert verdict.misses == 0
    assert verdict.takes == verdict.released == TAKES
    assert after.reading.base > 0, "the window never slid"
    # The load must have left something to miss, and something not to mark.
    assert verdict.compared * 0.01 < verdict.differing < verdict.compared * 0.9
