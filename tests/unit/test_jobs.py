# SPDX-License-Identifier: GPL-2.0-or-later
"""Which operations are shown as jobs."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from blksnap_service import errors
from blksnap_service.bus import job as jobs
from blksnap_service.bus.access import Context
from blksnap_service.bus.wire import Publisher


class Board:
    """Where jobs are shown; remembers what was."""

    def __init__(self) -> None:
        self.told: list[tuple[str, ...]] = []
        self.shown = asyncio.Event()

    def export(self, path: str, implementations: dict[str, Any]) -> None:
        """Show one."""
        self.told.append(("shown", path))
        self.shown.set()

    def unexport(self, path: str) -> None:
        """Take it away."""
        self.told.append(("gone", path))

    def signal(self, path: str, interface: str, name: str, *arguments: object) -> None:
        """Tell about it."""
        self.told.append((name, *map(str, arguments)))

    def changed(self, path: str, interface: str, what: tuple[str, ...]) -> None:
        """Tell what is different."""
        self.told.append(what)


def run(board: Board, uid: int = 1000) -> Any:
    """Begin an operation."""
    context = cast("Context", None)
    return jobs.Jobs(cast("Publisher", board)).run(context, jobs.Operation("test", [], [], uid))


async def test_what_is_quick_is_no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """Objects that come and go with everything would be noise."""
    monkeypatch.setattr(jobs, "SHOW_AFTER_S", 0.01)
    board = Board()
    async with run(board) as work:
        work.reach(0.5)
    await asyncio.sleep(0.05)
    assert board.told == []


async def test_what_takes_long_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until it ends, and it says how."""
    monkeypatch.setattr(jobs, "SHOW_AFTER_S", 0.01)
    board = Board()

    async def fail() -> None:
        async with run(board) as work:
            await board.shown.wait()
            work.reach(0.5)
            raise errors.Busy("the disk is in use")

    with pytest.raises(errors.Busy):
        await fail()
    path = "/org/blksnap/Blksnap1/jobs/1"
    assert board.told == [
        ("shown", path),
        ("Progress", "ProgressValid", "ExpectedEndTime", "Cancelable"),
        ("Completed", "False", "the disk is in use"),
        ("gone", path),
    ]


async def test_one_user_has_so_many_at_once() -> None:
    """Root has more."""
    context, every = cast("Context", None), jobs.Jobs(cast("Publisher", Board()))

    async def one(uid: int, started: asyncio.Semaphore, end: asyncio.Event) -> None:
        async with every.run(context, jobs.Operation("test", [], [], uid)):
            started.release()
            await end.wait()

    started, end = asyncio.Semaphore(0), asyncio.Event()
    async with asyncio.TaskGroup() as group:
        for uid in (1000, 0):
            for _ in range(jobs.MAX_JOBS_PER_UID):
                group.create_task(one(uid, started, end))
        for _ in range(2 * jobs.MAX_JOBS_PER_UID):
            await started.acquire()
        with pytest.raises(errors.LimitExceeded, match="uid 1000 has 32 operations under way"):
            await one(1000, started, end)
        end.set()
        await one(0, started, end)
    await one(1000, started, end)
