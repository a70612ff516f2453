# SPDX-License-Identifier: GPL-2.0-or-later
"""What a tracked node says is on the disk is on the disk: FLUSH and FUA reach the device below, at the right moment."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.nbd.control import opened
from tests.vm.guest import devices, logwrites, ublk
from tests.vm.guest.nodes import (
    assert_whole,
    make_file_system,
    mounted,
    sync_directory,
    tracked_top,
    write_synced,
)

MIB = 1 << 20
BLOCK = 4096
LOG = Path("/dev/vdb")
SIZES = {"ext4": 64 * MIB, "xfs": 320 * MIB}
MARKS = 10
STEPS = 4
NODISCARD = {"ext4": ("-E", "nodiscard"), "xfs": ("-K",)}


@contextlib.contextmanager
def node_over(device: Path, *, tracked: bool) -> Iterator[tuple[Path, ublk.Tracked | None]]:
    """A device itself, or the node of a tracker over it."""
    if not tracked:
        yield device, None
        return
    with ublk.datapath() as running:
        one = tracked_top(running, device, "blksnap-logged")
        yield one.node, one
        one.remove()


@pytest.mark.parametrize("held", [False, True], ids=["plain", "held"])
def test_what_was_flushed_is_on_the_disk(*, held: bool) -> None:
    """All that was written before a flush and all that is FUA, and of a bare device's requests none is missing."""
    pattern = {number: bytes([number]) * BLOCK for number in range(1, 200)}
    with devices.null_blk(16 * MIB, cache_bytes=4 * MIB) as disk:
        with logwrites.logged(disk, LOG) as device, node_over(device, tracked=True) as (node, tracked):
            assert tracked is not None
            snapshot = ublk.take(tracked, storage_bytes=64 * MIB)[0] if held else None
            for number in range(1, 100):
                ublk.write(node, number * BLOCK, pattern[number])
            logwrites.mark("written")
            with opened(node, os.O_RDWR) as fd:
                os.fsync(fd)
            logwrites.mark("flushed")
            for number in range(100, 110):
                ublk.write(node, number * BLOCK, pattern[number])
            for number in range(110, 120):
                ublk.write(node, number * BLOCK, pattern[number], sync=True)
            logwrites.mark("fua")
            if snapshot is not None:
                snapshot.destroy()
        on_disk: dict[str, set[int]] = {}
        copy = Path("/dev/shm/replayed")  # noqa: S108 # of the guest alone
        for text in logwrites.replay(LOG, copy, 16 * MIB):
            data = copy.read_bytes()
            on_disk[text] = {n for n in range(1, 120) if data[n * BLOCK : (n + 1) * BLOCK] == pattern[n]}
        copy.unlink()
        assert on_disk["written"] == set()
        assert on_disk["flushed"] == set(range(1, 100))
        # The ten that are not FUA may have been flushed with those that are, where a disk has no FUA of its own.
        assert on_disk["fua"] >= set(range(1, 100)) | set(range(110, 120))
        assert any(entry.fua for entry in logwrites.entries(LOG))


@pytest.mark.parametrize("tracked", [False, True], ids=["bare", "tracked"])
@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_a_file_system_recovers_at_each_mark(kind: str, tmp_path: Path, *, tracked: bool) -> None:
    """A disk that has only what was flushed: the log is replayed, what was synced is there, and nothing is left to repair."""
    size = SIZES[kind]
    with devices.null_blk(size, cache_bytes=16 * MIB) as disk:
        with logwrites.logged(disk, LOG) as device, node_over(device, tracked=tracked) as (node, one):
            make_file_system(node, kind, *NODISCARD[kind])
            with mounted(node, tmp_path / "mnt") as target:
                snapshot = ublk.take(one)[0] if one is not None else None
                known = work(target)
            if snapshot is not None:
                snapshot.destroy()
        found = list(logwrites.entries(LOG))
        flushes = sum(entry.flush for entry in found)
        fuas = sum(entry.fua and entry.length > 0 for entry in found)
        print(f"{kind}: {len(found)} requests, {flushes} flushes, {fuas} writes with FUA")
        replayed, copy = tmp_path / "replayed", tmp_path / "copy"
        checked = 0
        for text in logwrites.replay(LOG, replayed, size):
            if text in known:
                devices.run("cp", "--sparse=always", str(replayed), str(copy))
                with devices.loop(copy) as loop:
                    with mounted(loop, tmp_path / f"at-{text}") as target:
                        for name, digest in known[text].items():
                            there = (target / name).read_bytes() if (target / name).exists() else b""
                            assert hashlib.sha256(there).hexdigest() == digest, f"{name} at mark {text}"
                    assert_whole(loop, kind)
                checked += 1
        assert checked == MARKS


def work(target: Path) -> dict[str, dict[str, str]]:
    """Write, rename and remove files, each synced, beside others that are not; what had to be there at each mark."""
    chance = random.Random(7)
    synced: dict[str, str] = {}
    known: dict[str, dict[str, str]] = {}
    for number in range(MARKS):
        for step in range(STEPS):
            (target / f"loose-{chance.randrange(20)}").write_bytes(
                chance.randbytes(chance.randrange(1, 90_000))
            )
            data = chance.randbytes(chance.randrange(1, 60_000))
            name = f"file-{chance.randrange(8)}"
            write_synced(target / f"new-{step}", data)
            (target / f"new-{step}").rename(target / name)
            sync_directory(target)
            synced[name] = hashlib.sha256(data).hexdigest()
        if len(synced) > 5:
            gone = min(synced)
            (target / gone).unlink()
            sync_directory(target)
            synced[gone] = hashlib.sha256(b"").hexdigest()
        data = chance.randbytes(8 * BLOCK)
        with opened(target / "direct", os.O_WRONLY | os.O_CREAT | os.O_DSYNC) as fd:
            os.pwrite(fd, data, 0)
        synced["direct"] = hashlib.sha256(data).hexdigest()
        sync_directory(target)
        logwrites.mark(str(number))
        known[str(number)] = dict(synced)
    return known
