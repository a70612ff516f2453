# SPDX-License-Identifier: GPL-2.0-or-later
"""Trackers of a running service: increments, maps, counts, memory, history."""

from __future__ import annotations

import fcntl
import mmap
import os
from pathlib import Path

import pytest

from blksnap_service.bus import wire
from blksnap_service.bus.paths import DEVICE, IMAGE, SNAPSHOT, TRACKER
from tests.bus.daemons import BLOCK, MIB, Client, Daemon, content, make_image, refused, write

RESIDENT_BYTES_MAX = 60 * MIB


async def test_an_increment_is_what_changed(user: Client, image: Path) -> None:
    """Track, write, take, write, take: the ranges since the first take cover every difference, and the image stands still."""
    device = await user.attach(image)
    uri = await user.get(device, TRACKER, "Node")
    await write(uri, (1, 0, BLOCK), (2, 5 * BLOCK + 512, 512))
    first = await user.snapshot(device, description=("s", "first"))
    (picture,) = await user.get(first, SNAPSHOT, "Images")
    before = await content(await user.call(picture, IMAGE, "Export", ""))
    await write(uri, (3, 9 * BLOCK, 2 * BLOCK))
    second = await user.snapshot(device)
    (newer,) = await user.get(second, SNAPSHOT, "Images")
    number = await user.get(picture, IMAGE, "ChangesNumber")
    ranges, following = await user.call(device, TRACKER, "GetChangedRanges", "utu", number, 0, 100)
    assert [tuple(one) for one in ranges] == [(9 * BLOCK, 2 * BLOCK)]
    assert following == MIB
    copy = bytearray(before)
    now = await content(await user.get(newer, IMAGE, "NbdUri"))
    for offset, length in ranges:
        copy[offset : offset + length] = now[offset : offset + length]
    assert bytes(copy) == now == image.read_bytes()
    assert await content(await user.get(picture, IMAGE, "NbdUri")) == before


async def test_maps_are_handed_over_and_cannot_be_harmed(user: Client, image: Path) -> None:
    """The live map shows a write at once; nobody but the data path can write it."""
    device = await user.attach(image)
    fd, info = await user.call(device, TRACKER, "OpenMap", "")
    with fd:
        assert {name: value.value for name, value in info.items()} | {"sequence": 0} == {
            "generation-id": await user.get(device, TRACKER, "GenerationId"),
            "base": 0,
            "active": 1,
            "changes-number": 0,
            "oldest-number": 0,
            "block-size": BLOCK,
            "block-count": 16,
            "sequence": 0,
            "view": "live",
        }
        with mmap.mmap(fd.fileno(), 16, prot=mmap.PROT_READ) as shown:
            await write(await user.get(device, TRACKER, "Node"), (1, 3 * BLOCK, 512))
            assert shown[:] == bytes([0, 0, 0, 1]) + bytes(12)
        seals = fcntl.fcntl(fd.fileno(), fcntl.F_GET_SEALS)
        assert seals & (fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        # Root may open it again for writing; the seal holds all the same.
        with wire.OwnedFd(os.open(f"/proc/self/fd/{fd.fileno()}", os.O_RDWR)) as again:
            with pytest.raises(PermissionError):
                os.pwrite(again.fileno(), b"x", 0)
            with pytest.raises(PermissionError):
                mmap.mmap(again.fileno(), 16)
    assert await user.call(device, TRACKER, "ReadMap", "tu", 2, 3) == b"\0\1\0"
    fd, info = await user.call(device, TRACKER, "OpenMap", "", view=("s", "taken"))
    with fd:
        assert os.pread(fd.fileno(), 100, 0) == bytes(16)


async def test_a_reading_counts(user: Client, image: Path) -> None:
    """Requests, bytes, and blocks since each number."""
    device = await user.attach(image)
    await write(await user.get(device, TRACKER, "Node"), (1, 0, 2 * BLOCK))
    await user.snapshot(device)
    await user.call(device, TRACKER, "MarkDirty", "a(tt)", [(15 * BLOCK, 1)])
    info = {name: value.value for name, value in (await user.call(device, TRACKER, "GetInfo", "")).items()}
    assert info["writes"] >= 1
    assert info["written-bytes"] == 2 * BLOCK
    assert info["changed-blocks"] == {0: 3, 1: 1}
    assert (info["state"], info["changes-number"], info["capacity"]) == ("tracking", 1, MIB)
    await user.call(device, TRACKER, "MarkAllDirty", "")
    info = await user.call(device, TRACKER, "GetInfo", "")
    assert info["changed-blocks"].value == {0: 16, 1: 16}


@pytest.mark.parametrize("gibibytes", [64, 256])
async def test_memory_stays_small(user: Client, daemon: Daemon, directory: Path, gibibytes: int) -> None:
    """At its peak, with a map of 16 Mi blocks that is taken, handed over, read, counted, searched and drawn; 64 Mi too."""
    device = await user.attach(make_image(directory / "disk.img", gibibytes << 30), block_size=("u", 4096))
    uri = await user.get(device, TRACKER, "Node")
    await write(uri, (1, 0, MIB), (2, gibibytes - 1 << 30, MIB))
    for _ in range(3):
        await user.snapshot(device, limit=("t", 64 * MIB))
        fd, _ = await user.call(device, TRACKER, "OpenMap", "")
        fd.close()
        await user.call(device, TRACKER, "GetInfo", "")
        ranges, _ = await user.call(device, TRACKER, "GetChangedRanges", "utu", 0, 0, 65_536)
        assert len(ranges) == 2
        for mode in ("age", "density", "frequency"):
            await user.call(device, TRACKER, "Summarize", "ttus", 0, gibibytes << 18, 4096, mode)
        await user.call(device, TRACKER, "ReadMap", "tu", 0, 1 << 20)
    assert daemon.peak_bytes <= RESIDENT_BYTES_MAX


async def test_history_goes_on_over_a_detach(user: Client, image: Path) -> None:
    """Numbers and map, with a real file's fingerprint."""
    device = await user.attach(image)
    await write(await user.get(device, TRACKER, "Node"), (1, 2 * BLOCK, 512))
    snapshot = await user.snapshot(device)
    await user.call(snapshot, SNAPSHOT, "Destroy", "")
    before = (await user.objects())[device][TRACKER]
    await user.call(device, DEVICE, "Detach", "")
    await user.call(device, DEVICE, "Attach", "")
    after = (await user.objects())[device][TRACKER]
    assert {**after, "AttachedAt": 0} == {**before, "AttachedAt": 0}
    ranges, _ = await user.call(device, TRACKER, "GetChangedRanges", "utu", 0, 0, 10, view=("s", "live"))
    assert [tuple(one) for one in ranges] == [(2 * BLOCK, BLOCK)]


async def test_a_file_another_program_has_locked_is_busy(user: Client, image: Path) -> None:
    """As QEMU locks its images."""
    with image.open("r+b") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        with refused("Busy"):
            await user.attach(image)
