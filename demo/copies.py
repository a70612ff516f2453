# SPDX-License-Identifier: GPL-2.0-or-later
"""
What a backup program does with blksnap: a full copy once, then only what changed, and the proof that the copy is true.

The copy is a plain file. It is proved against the whole export of the snapshot's image, read by another program
(nbdcopy) that is told to ignore what the server says about holes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from demo.nbd import READ_MAX_BYTES, Export
from demo.programs import DemoError, pipe, run


@dataclass(frozen=True, slots=True)
class Increment:
    """
    One line of the summary: a copy brought up to the instant of snapshot `number`.

    `written_blocks` is how many blocks the map says were written since the number before, `written_bytes` what
    the data path counted.
    """

    number: int
    written_blocks: int
    written_bytes: int
    ranges: int
    copied_bytes: int
    full_bytes: int
    verified: bool


async def full_copy(uri: str, copy: Path) -> None:
    """Copy a whole export into a new file; holes stay holes."""
    await run("nbdcopy", uri, copy)


def _apply(uri: str, ranges: Sequence[tuple[int, int]], copy: Path) -> int:
    copied = 0
    with Export(uri) as export, copy.open("r+b") as target:
        if copy.stat().st_size != export.size:
            raise DemoError(f"the copy has {copy.stat().st_size} bytes, the image {export.size}")
        for start, length in ranges:
            target.seek(start)
            for offset in range(start, start + length, READ_MAX_BYTES):
                copied += target.write(export.read(offset, min(READ_MAX_BYTES, start + length - offset)))
    return copied


async def apply_increment(uri: str, ranges: Sequence[tuple[int, int]], copy: Path) -> int:
    """Overwrite `ranges` (offset, length) of the copy with what the export holds there; returns the bytes copied."""
    return await asyncio.to_thread(_apply, uri, ranges, copy)


async def keep(copy: Path, kept: Path) -> None:
    """Put a second copy aside; holes stay holes."""
    await run("cp", "--reflink=auto", "--sparse=always", copy, kept)


async def is_true(uri: str, copy: Path) -> bool:
    """Compare the copy with every byte of the export; whether they are the same."""
    # cmp: 0 the same, 1 different (and it does not read on); anything else is an error.
    return await pipe(("nbdcopy", "--no-extents", uri, "-"), ("cmp", "-", str(copy)), enough=1) == 0
