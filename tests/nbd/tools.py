# SPDX-License-Identifier: GPL-2.0-or-later
"""What nbdinfo says, as Python values."""

from __future__ import annotations

import json
from typing import Any

from tests.nbd.datapath import BLOCK, run


def nbdinfo(uri: str, *options: str) -> dict[str, Any]:
    """Return what ``nbdinfo --json`` says about the only export it shows."""
    (export,) = json.loads(run("nbdinfo", "--json", *options, uri))["exports"]
    assert isinstance(export, dict)
    return export


def map_of(uri: str, context: str = "base:allocation") -> list[tuple[int, int, int]]:
    """Return (offset, length, flags) of each extent, equal neighbours joined, as ``nbdinfo --map`` has them."""
    extents: list[tuple[int, int, int]] = []
    for item in json.loads(run("nbdinfo", f"--map={context}", "--json", uri)):
        if extents and extents[-1][2] == item["type"]:
            offset, length, flags = extents.pop()
            extents.append((offset, length + item["length"], flags))
        else:
            extents.append((item["offset"], item["length"], item["type"]))
    return extents


def dirty_blocks(uri: str, since: int, block: int = BLOCK) -> set[int]:
    """Return the blocks that ``blksnap:since:N`` calls dirty; fails when an extent ends inside a block."""
    found: set[int] = set()
    for offset, length, flags in map_of(uri, f"blksnap:since:{since}"):
        assert offset % block == 0
        assert flags in {0, 1}
        if flags:
            found |= set(range(offset // block, (offset + length + block - 1) // block))
    return found
