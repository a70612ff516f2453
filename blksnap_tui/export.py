# SPDX-License-Identifier: GPL-2.0-or-later
"""Changed ranges written to a file of the user's, as CSV or JSON. No Textual; nothing is drawn here."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from blksnap_tui.client import Client
from blksnap_tui.model import Device


@dataclass(frozen=True, slots=True)
class Written:
    """What is in the file now."""

    path: Path
    ranges: int
    size: int


async def export_ranges(client: Client, device: Device, since: int, path: Path) -> Written:
    """
    Write what changed on a device since a number, up to now; the file's ending says how: .csv or .json.

    A file that is there is replaced only when the new one is complete. Raises ValueError for another ending or an untracked device,
    OSError, and what the service refuses.
    """
    if path.suffix not in (".csv", ".json"):
        raise ValueError(f"{path.name}: the name must end in .csv or .json")
    if device.tracker is None:
        raise ValueError(f"{device.path} is not tracked")
    generation = device.tracker.generation_id
    found = client.changed_ranges(device.object_path, since, generation_id=generation, view="live")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf8") as file:
            put = _csv if path.suffix == ".csv" else _json
            head = {"device": device.path, "generation_id": generation, "since": since}
            ranges, size = await put(file, head, found)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return Written(path, ranges, size)


async def _csv(
    file: TextIO, _head: dict[str, object], found: AsyncIterator[tuple[int, int]]
) -> tuple[int, int]:
    file.write("offset,length\n")
    ranges = size = 0
    async for offset, length in found:
        file.write(f"{offset},{length}\n")
        ranges, size = ranges + 1, size + length
    return ranges, size


async def _json(
    file: TextIO, head: dict[str, object], found: AsyncIterator[tuple[int, int]]
) -> tuple[int, int]:
    ranges = size = 0
    file.write(json.dumps({**head, "ranges": []}).removesuffix("]}"))
    async for offset, length in found:
        file.write(f"{',' if ranges else ''}\n[{offset}, {length}]")
        ranges, size = ranges + 1, size + length
    file.write("\n]}\n")
    return ranges, size
