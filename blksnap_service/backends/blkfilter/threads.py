# SPDX-License-Identifier: GPL-2.0-or-later
"""Calls that block and that have an effect, made from the event loop so that a cancelled caller leaves none."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TypeVar

from blksnap_service import errors

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


async def to_the_end(work: Callable[[], _T], undo: Callable[[_T], object]) -> _T:
    """Run ``work`` in a thread. It cannot be stopped there: when the caller is, its result is waited for and undone."""
    task = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        if task.exception() is None:
            try:
                await asyncio.to_thread(undo, task.result())
            except errors.BlksnapError as error:
                _log.error("what nobody waited for any more could not be undone: %s", error)
        raise
