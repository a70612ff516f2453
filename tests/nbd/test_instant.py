# SPDX-License-Identifier: GPL-2.0-or-later
"""A take is one instant over all its origins: between two writes, and the same two on each."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest

from tests.nbd.causality import RECORD, SIZE, Causality, Connect, Put
from tests.nbd.control import Control
from tests.nbd.datapath import Datapath, Origin
from tests.nbd.load import Report, Work, running
from tests.nbd.nbdwire import Client, content_of

TAKES = 210


def connect(origin: Origin) -> Connect:
    """Return how a writer reaches an origin."""

    @contextlib.contextmanager
    def client() -> Iterator[Put]:
        with Client(origin.socket) as one:
            yield one.write

    return client


@pytest.mark.timeout(120)
def test_a_take_over_two_origins_never_shows_an_effect_without_its_cause(
    datapath: Datapath, report: Report
) -> None:
    """Two writers each write B only after A; no image of B is newer than that of A, and both are exact."""
    origins = first, second = [datapath.add(SIZE, block_size=RECORD) for _ in range(2)]
    # Every queue thread has to be woken for a take: these make it likely that the two are not woken at once.
    between_them = [datapath.add(RECORD) for _ in range(12)]
    causality = Causality(connect(first), connect(second))
    with running(*causality.works()) as going:
        for _ in range(TAKES):
            assert going()
            done = causality.done()
            snapshot = datapath.create(chunk_size=16 << 10)
            snapshot.take(first, *between_them, second)
            begun = causality.begun()
            contents = [content_of(origin.socket, snapshot.name) for origin in origins]
            maps = [snapshot.taken_maps[origin.name] for origin in origins]
            marked = [{block for block, byte in enumerate(map_) if byte == max(map_)} for map_ in maps]
            causality.judge(done, begun, contents, marked)
            snapshot.destroy()
    report(str(causality))
    assert causality.written > 4 * TAKES
    assert causality.between > 0


def test_takes_of_several_clients_come_one_after_the_other(datapath: Datapath) -> None:
    """Three control connections take the same two origins at once: every number is given once, the same way round."""
    origins = [datapath.add() for _ in range(2)]
    numbers: list[list[tuple[int, ...]]] = [[], [], []]

    def taker(mine: list[tuple[int, ...]], order: int) -> Work:
        def work(_: Callable[[], bool]) -> None:
            with Control(datapath.control_socket) as control:
                for _number in range(30):
                    snapshot = datapath.create(control=control)
                    taken = snapshot.take(*origins[::order], control=control)
                    mine.append(tuple(image.number for image in taken.images))
                    snapshot.destroy(control)

        return work

    with running(*(taker(mine, order) for mine, order in zip(numbers, (1, -1, 1), strict=True))):
        pass
    together = sorted(pair for mine in numbers for pair in mine)
    assert together == [(number, number) for number in range(1, 91)]
    assert all(mine == sorted(mine) for mine in numbers)
