# SPDX-License-Identifier: GPL-2.0-or-later
"""
Reading maps: the bytes of up to 64 Mi blocks to changed ranges and to a picture, in this process and with nothing else.

Measured in processor time of this thread ("per core"), so a busy machine does not count.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from bench.report import Bar, Figure, Sense, Spread
from blksnap_service import mapview
from blksnap_service.mapview import Mode

BLOCKS = 64 << 20
BINS = 24_000
"""Cells of the terminal program's heat map on a 200x60 terminal, two pixels each way."""
_BLOCK_BYTES = 4096
_RUN_BLOCKS = 256
_ACTIVE = 20
_SINCE = 5
_RANGES_BAR = Bar(Sense.AT_LEAST, 2.0)


def maps(rounds: int) -> list[Figure]:
    """Measure everything `rounds` times."""
    rng = np.random.default_rng(1)
    clustered = _clustered(rng)
    kinds = (
        ("nothing changed", bytes(BLOCKS), _RANGES_BAR),
        ("sparse: 1 block in 10 000, anywhere", _scattered(rng, 10_000), _RANGES_BAR),
        (f"clustered: 10 % in runs of {_RUN_BLOCKS} blocks", clustered, _RANGES_BAR),
        ("dense: all but 1 block in 10 000", _dense(rng), _RANGES_BAR),
        ("everything changed", bytes([_ACTIVE]) * BLOCKS, _RANGES_BAR),
        ("1 block in 1000, anywhere (67 000 ranges)", _scattered(rng, 1000), _RANGES_BAR),
        ("1 block in 100, anywhere (658 000 ranges)", _scattered(rng, 100), _RANGES_BAR),
        ("1 block in 20, anywhere (3.2 million ranges)", _scattered(rng, 20), None),
    )
    return [
        *(_ranges(name, data, bar, rounds) for name, data, bar in kinds),
        *(
            _summary(clustered[:blocks], mode, rounds)
            for blocks in (16 << 20, BLOCKS)
            for mode in (Mode.AGE, Mode.DENSITY)
        ),
    ]


def _scattered(rng: np.random.Generator, one_in: int) -> bytes:
    """Single blocks changed in any interval, at random places."""
    data = np.zeros(BLOCKS, np.uint8)
    places = rng.choice(BLOCKS, BLOCKS // one_in, replace=False, shuffle=False)
    data[places] = rng.integers(_SINCE + 1, _ACTIVE + 1, len(places), np.uint8)
    return data.tobytes()


def _clustered(rng: np.random.Generator) -> bytes:
    """A tenth of all runs of blocks changed in one interval each, another tenth before the number asked for."""
    runs = np.zeros(BLOCKS // _RUN_BLOCKS, np.uint8)
    places = rng.permutation(len(runs))[: len(runs) // 5]
    young, old = np.array_split(places, 2)
    runs[young] = rng.integers(_SINCE + 1, _ACTIVE + 1, len(young), np.uint8)
    runs[old] = rng.integers(1, _SINCE + 1, len(old), np.uint8)
    return np.repeat(runs, _RUN_BLOCKS).tobytes()


def _dense(rng: np.random.Generator) -> bytes:
    data = rng.integers(_SINCE + 1, _ACTIVE + 1, BLOCKS, np.uint8)
    data[rng.choice(BLOCKS, BLOCKS // 10_000, replace=False, shuffle=False)] = 0
    return data.tobytes()


def _ranges(name: str, data: bytes, bar: Bar | None, rounds: int) -> Figure:
    capacity = len(data) * _BLOCK_BYTES
    times = cpu_times(lambda: mapview.changed_ranges(data, 0, _SINCE, _BLOCK_BYTES, capacity), rounds)
    speeds = [len(data) / elapsed_s / 1e9 for elapsed_s in times]
    return Figure("map → ranges, 64 Mi blocks, per core", name, "GB/s", Spread.of(speeds), bar)


def _summary(data: bytes, mode: Mode, rounds: int) -> Figure:
    times = cpu_times(
        lambda: mapview.summarize(data, 0, _ACTIVE, 0, len(data), BINS, mode, _SINCE),
        rounds,
    )
    what = f"{mode}, {len(data) >> 20} Mi blocks"
    return Figure(
        f"summary of {BINS} bins, per core", what, "ms", Spread.of([value * 1e3 for value in times])
    )


def cpu_times(work: Callable[[], object], rounds: int) -> Sequence[float]:
    """Seconds of processor time of this thread that `work` takes; the first time does not count."""
    times = []
    for number in range(-1, rounds):
        start = time.thread_time_ns()
        work()
        elapsed_s = (time.thread_time_ns() - start) / 1e9
        if number >= 0:
            times.append(elapsed_s)
    return times
