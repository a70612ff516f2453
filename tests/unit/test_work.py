# SPDX-License-Identifier: GPL-2.0-or-later
"""Work that can be stopped: where it says it is, while it waits for a lock, and nowhere else."""

from __future__ import annotations

import asyncio

import pytest

from blksnap_service import errors
from blksnap_service.work import Work


def test_it_stops_where_it_says_it_is() -> None:
    """And not before."""
    work = Work()
    work.reach(0.5)
    work.stop()
    assert work.share == 0.5
    with pytest.raises(errors.Cancelled):
        work.reach(1.0)
    assert work.share == 0.5


def test_it_cannot_be_stopped_for_ever() -> None:
    """What must be finished says so, and what was asked to stop before that does not get there."""
    told: list[bool] = []
    work = Work(lambda: told.append(work.stoppable))
    work.commit()
    work.commit()
    assert told == [False]
    with pytest.raises(errors.NotSupported):
        work.stop()
    other = Work()
    other.stop()
    with pytest.raises(errors.Cancelled):
        other.commit()


async def test_a_lock_is_held_for_the_block() -> None:
    """And free afterwards, however it ends."""
    lock = asyncio.Lock()
    async with Work().holding(lock):
        assert lock.locked()
    with pytest.raises(ZeroDivisionError):
        async with Work().holding(lock):
            raise ZeroDivisionError
    assert not lock.locked()


async def test_who_waits_for_a_lock_can_be_stopped() -> None:
    """The lock stays with who has it, and the next one gets it."""
    lock, work = asyncio.Lock(), Work()
    order: list[str] = []

    async def wait(one: Work, name: str) -> None:
        async with one.holding(lock):
            order.append(name)

    await lock.acquire()
    waiting = asyncio.create_task(wait(work, "stopped"))
    following = asyncio.create_task(wait(Work(), "following"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    work.stop()
    with pytest.raises(errors.Cancelled):
        await waiting
    assert lock.locked()
    lock.release()
    await following
    assert order == ["following"]
    assert not lock.locked()


@pytest.mark.parametrize("steps", range(6))
async def test_a_lock_is_not_lost_to_who_is_cancelled(steps: int) -> None:
    """At whatever step: the lock is free when nobody is in the block."""
    lock = asyncio.Lock()

    async def wait() -> None:
        async with Work().holding(lock):
            await asyncio.Event().wait()

    await lock.acquire()
    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    lock.release()
    for _ in range(steps):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    for _ in range(3):
        await asyncio.sleep(0)
    assert not lock.locked()


async def test_a_stop_in_the_step_the_lock_comes_leaves_it_free() -> None:
    """It has it, and gives it back."""
    lock, work = asyncio.Lock(), Work()

    async def wait() -> None:
        async with work.holding(lock):
            raise AssertionError("it was stopped before")

    await lock.acquire()
    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    lock.release()
    work.stop()
    with pytest.raises(errors.Cancelled):
        await task
    assert not lock.locked()
