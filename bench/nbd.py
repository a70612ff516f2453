# SPDX-License-Identifier: GPL-2.0-or-later
"""
Serving an image file over NBD: tracking on against tracking off, and against `nbdkit file`.

Many short runs, interleaved: each round gives every server one run of each load, in all orders by turns, on files that
change hands. Every run has a server process of its own, so that one process with its memory laid out badly does not
decide. Compared are the runs of one round. A round in which other programs used the machine is done again.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.fio import Load, Slot, measure
from bench.processes import Gone
from bench.report import Bar, Figure, Sense, Spread, ratios
from bench.servers import Server, datapath, nbdkit
from demo.programs import DemoError

FILE_BYTES = 256 << 20
SMALL_FOLIO_BYTES, LARGE_FOLIO_BYTES = 4096, 1 << 20
"""What an image is written in decides what the page cache keeps it in (ext4 since 6.16, XFS since 5.18)."""
ON, OFF, NBDKIT = "on", "off", "nbdkit"
SERVERS = (ON, OFF, NBDKIT)
ORDERS = tuple(itertools.permutations(range(len(SERVERS))))
_ATTEMPTS = 5
_OTHERS_MOST = 0.15
_LABELS = ((ON, "tracking on"), (OFF, "tracking off"), (NBDKIT, "nbdkit file"))


@dataclass(frozen=True, slots=True)
class Case:
    """A load on images that were written in one way."""

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

    def __init__(self, case: Case, binary: Path, directory: Path, images: Sequence[Path]) -> None:
        self.case = case
        self._binary = binary
        self._directory = directory
        self._images = images
        self._rounds: list[_Round] = []

    async def warm(self) -> None:
        """Fill the page cache; not counted."""
        await self._round(0)

    async def round(self, number: int, most_attempts: int) -> None:
        """Do a round, again while others use the machine; of all attempts the least disturbed counts."""
        attempts: list[_Round] = []
        while len(attempts) < most_attempts:
            attempts.append(await self._round(number))
            if _disturbance(attempts[-1]) <= _OTHERS_MOST:
                break
        self._rounds.append(min(attempts, key=_disturbance))

    async def _round(self, number: int) -> _Round:
        done = {}
        for index in ORDERS[number % len(ORDERS)]:
            # The servers meet every file, and every order with every file.
            image = self._images[(index + number + number // len(ORDERS)) % len(self._images)]
            done[SERVERS[index]] = await self._run(SERVERS[index], image, number)
        return done

    async def _run(self, name: str, image: Path, seed: int) -> Slot:
        """One run. It is repeated when the server does not live to its end.

        nbdkit 1.32 aborts now and then when a client leaves (`raw_send_socket: Assertion`): its processor time is then lost.
        """
        for _ in range(_ATTEMPTS):
            with contextlib.suppress(Gone):
                async with _server(name, self._binary, self._directory, image) as server:
                    return await measure(server, self.case.load, FILE_BYTES, seed)
        raise DemoError(f"the server ({name}) ended before its client {_ATTEMPTS} times")

    def figures(self) -> list[Figure]:
        """All that was measured."""
        part = f"nbd: {self.case.name}"
        slots = {name: [done[name] for done in self._rounds] for name in SERVERS}
        rate = {name: [slot.requests_per_s for slot in slots[name]] for name in SERVERS}
        cpu = {name: [slot.cpu_us for slot in slots[name]] for name in SERVERS}
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
    """Compare the three servers over files in `directory`; a disturbed round is tried `most_attempts` times."""
    images = {
        folio_bytes: [
            make_image(directory / f"image{folio_bytes}-{place}", FILE_BYTES, folio_bytes)
            for place in range(len(SERVERS))
        ]
        for folio_bytes in (SMALL_FOLIO_BYTES, LARGE_FOLIO_BYTES)
    }
    comparisons = [Comparison(case, binary, directory, images[case.folio_bytes]) for case in CASES]
    for comparison in comparisons:
        await comparison.warm()
    for number in range(rounds):
        for comparison in comparisons:
            await comparison.round(number, most_attempts)
    for image in itertools.chain.from_iterable(images.values()):
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


@contextlib.asynccontextmanager
async def _server(name: str, binary: Path, directory: Path, image: Path) -> AsyncIterator[Server]:
    if name == NBDKIT:
        async with nbdkit(directory / name, image) as server:
            yield server
    else:
        async with datapath(binary, directory / name, image, tracking=name == ON) as tracked:
            yield tracked.server
