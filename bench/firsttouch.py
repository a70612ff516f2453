# SPDX-License-Identifier: GPL-2.0-or-later
"""
Copy-before-write: what the first write into a chunk costs more than any other.

One 4k write into every 64k chunk, before a take and right after it, on the same server; the difference storage is
a new file on the same file system. The store goes on behind the answers: processor time is read when the server has
come to rest.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from pathlib import Path

from bench.fio import Load, Slot, measure
from bench.nbd import make_image
from bench.report import Figure, Spread, ratios
from bench.servers import ORIGIN, Server, datapath
from blksnap_service.datapath.client import DatapathClient, TakeDevice
from blksnap_service.fds import OwnedFd
from demo.programs import DemoError

FILE_BYTES = 512 << 20
_CHUNK_BYTES = 64 << 10
_WRITE_BYTES = 4096
_CHUNKS = FILE_BYTES // _CHUNK_BYTES
_LOAD = Load(
    "one 4k write per chunk",
    f"write:{(_CHUNK_BYTES - _WRITE_BYTES) >> 10}k",
    _WRITE_BYTES,
    32,
    _CHUNKS,
)
_STORAGE_LIMIT = 2 * FILE_BYTES


async def first_touch(binary: Path, directory: Path, rounds: int) -> list[Figure]:
    """Measure it `rounds` times over a file in `directory`."""
    image = make_image(directory / "image", FILE_BYTES)
    plain: list[Slot] = []
    touched: list[Slot] = []
    async with datapath(binary, directory / "cow") as path, path.serving(image) as server:
        for number in range(-1, rounds):
            pair = await _pair(path.client, server, directory, number + 1)
            if number >= 0:
                plain.append(pair[0])
                touched.append(pair[1])
    image.unlink()
    return _figures(plain, touched)


async def _pair(client: DatapathClient, server: Server, directory: Path, seed: int) -> tuple[Slot, Slot]:
    """The same writes without and with a snapshot that has not kept any chunk yet."""
    plain = await measure(server, _LOAD, FILE_BYTES, seed)
    snapshot = str(uuid.uuid4())
    storage = OwnedFd(os.open(directory, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600))
    await client.snapshot_create(
        snapshot, storage, limit=_STORAGE_LIMIT, chunk_size=_CHUNK_BYTES, step=FILE_BYTES
    )
    await client.snapshot_take(snapshot, [TakeDevice(ORIGIN, str(uuid.uuid4()))])
    before = (await client.origin_info(ORIGIN)).counters["copies"]
    touched = await measure(server, _LOAD, FILE_BYTES, seed)
    copies = (await client.origin_info(ORIGIN)).counters["copies"] - before
    state = await client.snapshot_info(snapshot)
    if copies != _CHUNKS or state.state != "taken":
        raise DemoError(f"{copies} of {_CHUNKS} chunks were kept ({state.state}: {state.error})")
    await client.snapshot_destroy(snapshot)
    return plain, touched


def _figures(plain: Sequence[Slot], touched: Sequence[Slot]) -> list[Figure]:
    part = "copy-before-write: one 4k write into each 64k chunk, depth 32"
    more = [after.cpu_us - before.cpu_us for before, after in zip(plain, touched, strict=True)]
    rate = [slot.requests_per_s for slot in touched]
    return [
        Figure(part, "server cpu per write, no snapshot", "µs", Spread.of([slot.cpu_us for slot in plain])),
        Figure(part, "server cpu per write, first touch", "µs", Spread.of([slot.cpu_us for slot in touched])),
        Figure(part, "server cpu per chunk kept (the difference)", "µs", Spread.of(more)),
        Figure(part, "writes/s, first touch", "1/s", Spread.of(rate)),
        Figure(
            part,
            "old bytes kept per second",
            "MB/s",
            Spread.of([writes_per_s * _CHUNK_BYTES / 1e6 for writes_per_s in rate]),
        ),
        ratios(
            part,
            "writes/s, first touch ÷ no snapshot",
            rate,
            [slot.requests_per_s for slot in plain],
            None,
        ),
    ]
