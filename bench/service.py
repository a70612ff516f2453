# SPDX-License-Identifier: GPL-2.0-or-later
"""
The service on a private bus, seen by a client: a map of 64 Mi blocks handed over and asked, and the memory it takes.

The image is a sparse file of 256 GiB in blocks of 4 KiB: the number of blocks is what costs, and it is 32 times what
the block-size rule would choose.
"""

from __future__ import annotations

import asyncio
import mmap
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from bench.maps import BINS, BLOCKS
from bench.processes import memory
from bench.report import Bar, Figure, Sense, Spread
from blksnap_tui.client import Client
from blksnap_tui.events import ServiceFound
from blksnap_tui.model import ObjectPath
from demo.programs import DemoError
from demo.service import private_bus, private_service

_BLOCK_BYTES = 4096
_RSS_BAR_BYTES = 60 << 20
_OPEN_BAR = Bar(Sense.AT_MOST, 5.0)
_FOUND_TIMEOUT_S = 20.0
_OPENS = 20
"""Opening takes a millisecond: that many in each round."""


async def service(directory: Path, rounds: int) -> list[Figure]:
    """Measure through a service with everything of its own in `directory`."""
    image = directory / "sparse"
    with image.open("wb") as file:
        file.truncate(BLOCKS * _BLOCK_BYTES)
    async with (
        private_bus(directory) as address,
        private_service(address, directory) as daemon,
        Client(address, wait_for_service=True) as client,
    ):
        async with asyncio.timeout(_FOUND_TIMEOUT_S):
            await _found(client)
        idle = memory(daemon.pid)
        device = await client.add_image_file(str(image))
        await client.attach(device, block_size=_BLOCK_BYTES)
        figures = await _handing_over(client, device, rounds)
        figures += await _asking(client, device, rounds)
        busy = memory(daemon.pid)
    image.unlink()
    part = "service: resident memory"
    bar = Bar(Sense.AT_MOST, _RSS_BAR_BYTES / (1 << 20))
    return [
        *figures,
        Figure(part, "nothing tracked", "MiB", Spread.of([idle.now / (1 << 20)]), bar),
        Figure(part, "64 Mi blocks, after all of the above", "MiB", Spread.of([busy.now / (1 << 20)]), bar),
        Figure(part, "the most there was meanwhile", "MiB", Spread.of([busy.peak / (1 << 20)]), bar),
    ]


async def _found(client: Client) -> None:
    """Wait until the service is on the bus."""
    found = asyncio.Event()
    forget = client.subscribe(lambda event: found.set() if isinstance(event, ServiceFound) else None)
    if not client.available:
        await found.wait()
    forget()


async def _handing_over(client: Client, device: ObjectPath, rounds: int) -> list[Figure]:
    async def open_and_look() -> None:
        with await client.open_map(device, view="live") as file:
            if int(file.info["block-count"]) != BLOCKS:
                raise DemoError(f"the map has {file.info['block-count']} blocks instead of {BLOCKS}")
            with mmap.mmap(file.fd, BLOCKS, prot=mmap.PROT_READ) as mapped:
                _ = mapped[0], mapped[-1]

    part = "service: map of 64 Mi blocks"
    times = await _wall_ms(open_and_look, rounds * _OPENS)
    worst = max(times)
    return [
        Figure(
            part,
            "OpenMap to mapped in the client",
            "ms",
            Spread.of(times),
            _OPEN_BAR,
            f"worst: {worst:.1f} ms",
        )
    ]


async def _asking(client: Client, device: ObjectPath, rounds: int) -> list[Figure]:
    """A picture and the ranges of a map with 1 % of its blocks changed, evenly spread in runs."""
    run_bytes, every_bytes = 64 * _BLOCK_BYTES, 6400 * _BLOCK_BYTES
    await client.mark_dirty(
        device, [(offset, run_bytes) for offset in range(0, BLOCKS * _BLOCK_BYTES, every_bytes)]
    )

    async def ranges() -> None:
        count = 0
        async for _ in client.changed_ranges(device, 0, view="live"):
            count += 1
        if count != -(-BLOCKS * _BLOCK_BYTES // every_bytes):
            raise DemoError(f"{count} ranges came back instead of those that were marked")

    part = "service: map of 64 Mi blocks"
    picture = await _wall_ms(lambda: client.summarize(device, 0, BLOCKS, BINS), rounds)
    lists = await _wall_ms(ranges, rounds)
    return [
        Figure(part, f"Summarize, {BINS} bins by age", "ms", Spread.of(picture)),
        Figure(part, "GetChangedRanges, 10 486 ranges", "ms", Spread.of(lists)),
    ]


async def _wall_ms(work: Callable[[], Awaitable[object]], count: int) -> list[float]:
    """Milliseconds each of `count` calls takes; the first of all does not count."""
    times = []
    for number in range(-1, count):
        start = time.perf_counter_ns()
        await work()
        elapsed_ms = (time.perf_counter_ns() - start) / 1e6
        if number >= 0:
            times.append(elapsed_ms)
    return times
