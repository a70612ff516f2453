# SPDX-License-Identifier: GPL-2.0-or-later
"""The workload, on a plain directory and on another NBD server."""

from __future__ import annotations

import itertools
import os
import random
from pathlib import Path

import pytest

from demo.programs import DemoError
from demo.work import FileSystemWork, SocketWork
from demo.workload import workload
from tests.demo.servers import nbdkit

SIZE = 256 << 20


def test_the_file_system_is_really_worked_on(tmp_path: Path) -> None:
    """Trees, a database and a big file are there after one round (without the trim, which needs a mount of its own)."""
    mount = tmp_path / "mount"
    mount.mkdir()
    work = FileSystemWork(mount, tmp_path / "tree.tar", random.Random(1))

    said = [piece() for piece in itertools.islice(work.pieces(), 8)]

    assert (mount / "big-file").stat().st_size == 48 << 20
    assert (mount / "database.sqlite").stat().st_size > 100_000
    assert len(list((mount / "tree-1").rglob("*.py"))) > 10
    assert "deleted 400 rows from SQLite" in said


async def test_the_bare_socket_is_really_written_to(tmp_path: Path) -> None:
    """Every kind of request of the rotation goes through; the export holds data afterwards."""
    disk = tmp_path / "disk.img"
    disk.touch()
    os.truncate(disk, SIZE)
    async with nbdkit(tmp_path, "file", disk) as uri:
        work = SocketWork(uri, SIZE, random.Random(1))
        said = [piece() for piece in itertools.islice(work.pieces(), 5)]

    assert [" ".join(text.split()[:2]) for text in said] == [
        "qemu-io wrote",
        "fio wrote",
        "qemu-io zeroed",
        "qemu-io wrote",
        "qemu-io discarded",
    ]
    assert disk.stat().st_blocks * 512 > 1 << 20


async def test_the_workload_runs_beside_and_stops_when_told(tmp_path: Path) -> None:
    """Pieces are reported while it runs; at the block's end it is gone."""
    async with (
        nbdkit(tmp_path, "memory", str(SIZE)) as uri,
        workload(tmp_path, "--uri", uri, "--size", str(SIZE)) as work,
    ):
        first = await work.more(2)
        second = await work.more(1)
    assert len(first) >= 2
    assert work.done()[len(first) : len(first) + len(second)] == second


async def test_a_workload_that_fails_is_a_failure_of_the_demo(tmp_path: Path) -> None:
    """The reason is what the workload said last."""
    async with workload(
        tmp_path, "--uri", f"nbd+unix:///?socket={tmp_path}/nowhere", "--size", str(SIZE)
    ) as work:
        with pytest.raises(DemoError, match=r"ended by itself: failed: .*qemu-io"):
            await work.more(1)
