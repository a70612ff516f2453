# SPDX-License-Identifier: GPL-2.0-or-later
"""
Serving an image file over NBD: tracking on against tracking off, and against `nbdkit file`.

All over one and the same file: what the page cache keeps a file in depends on how and when it was written, and decides
more than any tracking does. On and off are one data path, to which the file is attached for each run and detached.
A round gives every server two short runs, there and back (on, off, nbdkit, nbdkit, off, on), in all orders by turns:
what drifts meets all alike. Compared are the runs of one round. A round in which other programs used the machine is
done again. The next round has processes of its own, so that one with its memory laid out badly does not decide.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

from bench.fio import Load, Slot, measure, together
from bench.processes import Gone
from bench.report import Bar, Figure, Sense, Spread, ratios
from bench.servers import Datapath, datapath, nbdkit
from demo.programs import DemoError

FILE_BYTES = 256 << 20
SMALL_FOLIO_BYTES, LARGE_FOLIO_BYTES = 4096, 1 << 20
"""What an image is written in decides what the page cache keeps it in (ext4 since 6.16, XFS since 5.18)."""
ON, OFF, NBDKIT = "on", "off", "nbdkit"
ORDERS = tuple(itertools.permutations((ON, OFF, NBDKIT)))
_ATTEMPTS = 5
_OTHERS_MOST = 0.15
_LABELS = ((ON, "tracking on"), (OFF, "tracking off"), (NBDKIT, "nbdkit file"))


@dataclass(frozen=True, slots=True)
class Case:
    """A load on an image that was written in one way."""

    load: Load
    folio_bytes: int = SMALL_FOLIO_BYTES

    @property
    def name(self) -> str:
        """As in the table."""
        large = ", image in large folios" if self.folio_bytes == LARGE_FOLIO_BYTES else ""
        return self.load.name + large


_WRITES = Load("4k random write, depth 32", "randwrite", 4096, 32, 40_000)
BARRED = Case(_WRITES)
CASES = (
    BARRED,
    Case(_WRITES, LARGE_FOLIO_BYTES),
    Case(Load("4k random read, depth 32", "randread", 4096, 32, 40_000)),
    Case(Load("4k random write, depth 1", "randwrite", 4096, 1, 10_000)),
    Case(Load("128k write, depth 8", "write", 128 << 10, 8, 6_000)),
    Case(Load("128k read, depth 8", "read", 128 << 10, 8, 6_000)),
)

_Round = dict[str, Slot]


class Comparison:
    """One case, round by round."""

    def __init__(self, case: Case, binary: Path, directory: Path, image: Path) -> None:
        self.case = case
        self._binary = binary
        self._directory = directory
        self._image = image
        self._rounds: list[_Round] = []

    async def warm(self) -> None:
        """One run that is not counted: the image has just been written and goes to the disk for the first time."""
        async with datapath(self._binary, self._directory / "nbd") as path:
            await self._run(OFF, path, 0)

    async def round(self, number: int, most_attempts: int) -> None:
        """Do a round, again while others use the machine; of all attempts the least disturbed counts."""
        attempts: list[_Round] = []
        while len(attempts) < most_attempts:
            attempts.append(await self._round(number))
            if _disturbance(attempts[-1]) <= _OTHERS_MOST:
                break
        self._rounds.append(min(attempts, key=_disturbance))

    async def _round(self, number: int) -> _Round:
        there = ORDERS[number % len(ORDERS)]
        async with datapath(self._binary, self._directory / "nbd") as path:
            slots = [(name, await self._run(name, path, number)) for name in (*there, *reversed(there))]
        return {name: together(*(slot for whose, slot in slots if whose == name)) for name in there}

    async def _run(self, name: str, path: Datapath, seed: int) -> Slot:
        """One run. That of nbdkit is repeated when it does not live to its end.

        nbdkit 1.32 aborts now and then when a client leaves (`raw_send_socket: Assertion`): its processor time is then lost.
        """
        if name != NBDKIT:
            async with path.serving(self._image, tracking=name == ON) as server:
                return await measure(server, self.case.load, FILE_BYTES, seed)
        for _ in range(_ATTEMPTS):
            with contextlib.suppress(Gone):
                async with nbdkit(self._directory / NBDKIT, self._image) as server:
                    return await measure(server, self.case.load, FILE_BYTES, seed)
        raise DemoError(f"nbdkit ended before its client {_ATTEMPTS} times")

    def figures(self) -> list[Figure]:
        """All that was measured."""
        part = f"nbd: {self.case.name}"
        slots = {name: [done[name] for done in self._rounds] for name, _ in _LABELS}
        rate = {name: [slot.requests_per_s for slot in slots[name]] for name, _ in _LABELS}
        cpu = {name: [slot.cpu_us for slot in slots[name]] for name, _ in _LABELS}
        others = [_disturbance(done) * 100 for done in self._rounds]
        barred = self.case is BARRED
        on_bar, nbdkit_bar = (Bar(Sense.AT_LEAST, value) if barred else None for value in (0.97, 1.0))
        return [
            ratios(part, "requests/s, tracking on ÷ off", rate[ON], rate[OFF], on_bar),
            ratios(part, "requests/s, ours ÷ nbdkit file", rate[ON], rate[NBDKIT], nbdkit_bar),
            ratios(part, "server cpu, tracking on ÷ off", cpu[ON], cpu[OFF], None),
            ratios(part, "server cpu, ours ÷ nbdkit file", cpu[ON], cpu[NBDKIT], None),
            *(Figure(part, f"requests/s, {label}", "1/s", Spread.of(rate[name])) for name, label in _LABELS),
            *(
                Figure(part, f"server cpu per request, {label}", "µs", Spread.of(cpu[name]))
                for name, label in _LABELS
            ),
            Figure(part, "others on the machine meanwhile", "%", Spread.of(others)),
        ]


async def nbd(binary: Path, directory: Path, rounds: int, most_attempts: int) -> list[Figure]:
    """Compare the three servers over one file in `directory`; a disturbed round is tried `most_attempts` times."""
    images = {
        folio_bytes: make_image(directory / f"image{folio_bytes}", FILE_BYTES, folio_bytes)
        for folio_bytes in (SMALL_FOLIO_BYTES, LARGE_FOLIO_BYTES)
    }
    comparisons = [Comparison(case, binary, directory, images[case.folio_bytes]) for case in CASES]
    for comparison in comparisons:
        await comparison.warm()
    for number in range(rounds):
        print(f"bench: nbd, round {number + 1} of {rounds}", file=sys.stderr)
        for comparison in comparisons:
            await comparison.round(number, most_attempts)
    for image in images.values():
        image.unlink()
    return [figure for comparison in comparisons for figure in comparison.figures()]


def make_image(path: Path, size: int, folio_bytes: int = SMALL_FOLIO_BYTES) -> Path:
    """Write a file of zeros, so that every block of it is allocated and none is an unwritten extent."""
    zeros = bytes(folio_bytes)
    with path.open("wb", buffering=0) as image:
        for _ in range(size // folio_bytes):
            image.write(zeros)
    return path


def _disturbance(done: _Round) -> float:
    return max(slot.others for slot in done.values())
