# SPDX-License-Identifier: GPL-2.0-or-later
"""A take is one instant over all its origins: between two writes, and the same two on each."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.nbd.control import Control
from tests.nbd.datapath import Datapath, Origin
from tests.nbd.load import Report, Work, running
from tests.nbd.nbdwire import Client, content_of

TAKES = 210
RECORD = 4096
SLOTS = 256
PAUSE_S = 0.002
STRIDE = 101
"""Odd, so that consecutive records visit every slot, far from each other."""


def slots_of(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return where the records of these numbers are written."""
    return numbers * np.uint64(STRIDE) % np.uint64(SLOTS)


@dataclass
class Progress:
    """How far a writer is: the last number it began, and the last that both origins acknowledged."""

    begun: int = 0
    done: int = 0


def writer(first: Origin, second: Origin, at: int, progress: Progress) -> Work:
    """Return a work that writes each record to ``second`` only after ``first`` has acknowledged it."""

    def work(stopping: Callable[[], bool]) -> None:
        with Client(first.socket) as one, Client(second.socket) as other:
            for number in itertools.count(1):
                if stopping():
                    return
                record = number.to_bytes(8, "little") * (RECORD // 8)
                place = at + number * STRIDE % SLOTS * RECORD
                progress.begun = number
                one.write(place, record)
                other.write(place, record)
                progress.done = number
                # So that a take finds most slots as they were at the take before.
                if number % 8 == 0:
                    time.sleep(PAUSE_S)

    return work


def newest_of(content: bytes, at: int) -> int:
    """Return the newest record of a region, which must hold exactly what a writer had written by then."""
    region = np.frombuffer(content[at : at + SLOTS * RECORD], dtype="<u8").reshape(SLOTS, -1)
    assert (region == region[:, :1]).all(), "a record is torn"
    found = region[:, 0]
    newest = int(found.max())
    numbers = np.arange(max(1, newest - SLOTS + 1), newest + 1, dtype=np.uint64)
    expected = np.zeros(SLOTS, np.uint64)
    expected[slots_of(numbers)] = numbers
    assert (found == expected).all(), "the image is of no instant"
    return newest


@pytest.mark.timeout(120)
def test_a_take_over_two_origins_never_shows_an_effect_without_its_cause(
    datapath: Datapath, report: Report
) -> None:
    """Two writers each write B only after A; no image of B is newer than that of A, and both are exact.

    Each image must hold all records up to its newest and none after it, its newest must not be older than what was
    acknowledged before the take nor newer than what was begun before its answer, and the map must hold exactly the records
    between two takes.
    """
    size = 2 * SLOTS * RECORD
    origins = first, second = [datapath.add(size, block_size=RECORD) for _ in range(2)]
    # Every queue thread has to be woken for a take: these make it likely that the two are not woken at once.
    between_them = [datapath.add(RECORD) for _ in range(12)]
    states = [Progress(), Progress()]
    regions = [0, SLOTS * RECORD]
    previous = [[0, 0], [0, 0]]
    written = between = 0
    # The first writer writes A then B, the second B then A: neither order may be the lucky one.
    works = [writer(first, second, regions[0], states[0]), writer(second, first, regions[1], states[1])]
    with running(*works) as going:
        for _ in range(TAKES):
            assert going()
            before = [state.done for state in states]
            snapshot = datapath.create(chunk_size=16 << 10)
            snapshot.take(first, *between_them, second)
            after = [state.begun for state in states]
            contents = [content_of(origin.socket, snapshot.name) for origin in origins]
            newest = [[newest_of(content, at) for at in regions] for content in contents]
            for region, (cause, effect) in enumerate(((0, 1), (1, 0))):
                assert before[region] <= newest[effect][region] <= newest[cause][region] <= after[region]
                assert newest[cause][region] <= newest[effect][region] + 1
                between += newest[cause][region] - newest[effect][region]
            for number, origin in enumerate(origins):
                expected = set()
                for region in (0, 1):
                    new = np.arange(previous[number][region] + 1, newest[number][region] + 1, dtype=np.uint64)
                    written += len(new)
                    expected |= {SLOTS * region + int(slot) for slot in slots_of(new)}
                map_ = snapshot.taken_maps[origin.name]
                assert {block for block, byte in enumerate(map_) if byte == max(map_)} == expected
            previous = newest
            snapshot.destroy()
    summary = (
        f"{TAKES} takes over two origins among {written} writes, {between} times between cause and effect"
    )
    report(summary)
    assert written > 4 * TAKES
    assert between > 0


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
