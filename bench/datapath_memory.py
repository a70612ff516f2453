# SPDX-License-Identifier: GPL-2.0-or-later
"""
Resident memory of the data path: an origin of 1 TiB that nobody uses, and the same after four busy clients.

The bar is 16 MiB, 2 bytes per block (the live and the taken map) and, while there are clients, their buffers.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from bench.fio import Load, measure
from bench.processes import Memory, memory
from bench.report import Bar, Figure, Sense, Spread
from bench.servers import ORIGIN, Server, datapath
from demo.programs import DemoError

_ORIGIN_BYTES = 1 << 40
_WRITTEN_BYTES = 256 << 20
_FIXED_BYTES = 16 << 20
_MAPS_PER_BLOCK = 2
_CLIENTS = 4
_CLIENT_BUFFERS_BYTES = (256 << 10) + 64 * (128 << 10)
"""What one connection may hold: its receive buffer and 64 pieces (datapath/src/engine/connection.rs)."""
_LOADS = (
    Load("4k random write", "randwrite", 4096, 32, 20_000),
    Load("128k read and write", "randrw", 128 << 10, 32, 2_000),
)


async def datapath_memory(binary: Path, directory: Path) -> list[Figure]:
    """Measure one data path over a sparse file in `directory`."""
    image = directory / "sparse"
    with image.open("wb") as file:
        file.truncate(_ORIGIN_BYTES)
    async with datapath(binary, directory / "mem") as path, path.serving(image) as server:
        blocks = (await path.client.origin_info(ORIGIN)).block_count
        await path.client.origin_mark_all(ORIGIN)  # every page of both maps is there
        idle = memory(path.pid)
        for load in _LOADS:
            await _load(server, load)
        busy = memory(path.pid)
    image.unlink()
    fixed = _FIXED_BYTES + _MAPS_PER_BLOCK * blocks
    part = f"data path: resident memory, 1 TiB, {blocks} blocks"
    return [
        _figure(part, "no client yet, every block marked", idle.now, fixed, idle),
        _figure(part, f"after {_CLIENTS} clients", busy.now, fixed, busy),
        _figure(
            part,
            f"the most there was, with {_CLIENTS} clients",
            busy.peak,
            fixed + _CLIENTS * _CLIENT_BUFFERS_BYTES,
            None,
        ),
    ]


async def _load(server: Server, load: Load) -> None:
    """Run a load from several clients at once."""
    slots = await asyncio.gather(*(measure(server, load, _WRITTEN_BYTES, seed) for seed in range(_CLIENTS)))
    if not all(slot.requests_per_s for slot in slots):
        raise DemoError("a client was not served")


def _figure(part: str, what: str, size: int, bar: int, read: Memory | None) -> Figure:
    note = "" if read is None else f"of which memory files: {read.shared / (1 << 20):.1f} MiB"
    return Figure(
        part,
        what,
        "MiB",
        Spread.of([size / (1 << 20)]),
        Bar(Sense.AT_MOST, bar / (1 << 20)),
        note,
    )
