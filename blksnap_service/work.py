# SPDX-License-Identifier: GPL-2.0-or-later
"""One operation that may take long: how far it is, and whether it is to stop.

Whoever does the work says where it is; at those places, and while it waits for a lock, it ends with ``errors.Cancelled`` when
it was asked to stop. Nowhere else: nothing the data path does is left half known. It shows nothing to anybody: ``bus.job`` does.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from blksnap_service import errors


class Work:
    """An operation under way. ``changed`` is called when it is further, or cannot be stopped any more."""

    def __init__(self, changed: Callable[[], None] = lambda: None) -> None:
        """Begin; nothing is known about how far it is."""
        self._changed = changed
        self._stopped = asyncio.Event()
        self.share: float | None = None
        """How much of it is done, from 0 to 1; None: not known."""
        self.stoppable = True

    def stop(self) -> None:
        """Ask it to stop. Raises ``errors.NotSupported`` when it cannot any more."""
        if not self.stoppable:
            raise errors.NotSupported("it cannot be cancelled any more: it is nearly done")
        self._stopped.set()

    def reach(self, share: float | None = None) -> None:
        """Say that this much is done. Raises ``errors.Cancelled``."""
        self._check()
        if share is not None:
            self.share = share
            self._changed()

    def commit(self) -> None:
        """Say that it cannot be stopped from here on. Raises ``errors.Cancelled`` if it was before."""
        self._check()
        if self.stoppable:
            self.stoppable = False
            self._changed()

    @contextlib.asynccontextmanager
    async def holding(self, lock: asyncio.Lock) -> AsyncIterator[None]:
        """Hold a lock for the block. Raises ``errors.Cancelled`` when it is to stop before it has it."""
        acquiring = asyncio.ensure_future(lock.acquire())
        stopping = asyncio.ensure_future(self._stopped.wait())
        try:
            await asyncio.wait({acquiring, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not acquiring.done():
                self._check()
        except BaseException:
            if not acquiring.cancel() and not acquiring.cancelled():
                lock.release()
            raise
        finally:
            stopping.cancel()
        try:
            self._check()
            yield
        finally:
            lock.release()

    def _check(self) -> None:
        if self._stopped.is_set():
            raise errors.Cancelled("it was cancelled, and is undone")
