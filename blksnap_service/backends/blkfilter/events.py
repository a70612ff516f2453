# SPDX-License-Identifier: GPL-2.0-or-later
"""Waits for the events of one snapshot, in a thread of its own.

Whoever waits keeps the snapshot's images and storage in the kernel, and an event goes to one waiter only: there is one thread
for each snapshot of ours, none for those of others, and it ends before the snapshot is said to be gone.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import Final

from blksnap_service import errors
from blksnap_service.backends.blkfilter.control import Control
from blksnap_service.backends.blkfilter.uapi import Event

_log = logging.getLogger(__name__)

TICKS: Final = 50
"""How long one call waits: 50 ms with 1000 ticks a second, 0.5 s with 100. So long may a destroy take."""


class EventThread:
    """Tells events of one snapshot to the event loop it was made on, until ``end`` or until the snapshot is gone."""

    def __init__(self, control: Control, snapshot: str, tell: Callable[[Event], None]) -> None:
        """Start. ``tell`` is called on the loop."""
        self._control = control
        self._snapshot = snapshot
        self._tell = tell
        self._loop = asyncio.get_running_loop()
        self._ended = self._loop.create_future()
        self._stopping = threading.Event()
        # A daemon: the kernel cannot be told that nobody waits any more.
        self._thread = threading.Thread(target=self._run, daemon=True, name=f"events-{snapshot[:8]}")
        self._thread.start()

    def stop(self) -> None:
        """Have it end; it does within one wait."""
        self._stopping.set()

    async def ended(self) -> None:
        """Wait until it has ended."""
        await asyncio.shield(self._ended)

    def _run(self) -> None:
        try:
            with self._control.opened() as fd:
                while not self._stopping.is_set():
                    event = self._control.wait(fd, self._snapshot, TICKS)
                    if event is not None:
                        self._loop.call_soon_threadsafe(self._tell, event)
        except errors.NotFound:
            pass
        except errors.BlksnapError as error:
            _log.error("events of snapshot %s are not heard any more: %s", self._snapshot, error)
        except RuntimeError:
            # The loop is closed.
            return
        try:
            self._loop.call_soon_threadsafe(self._note_end)
        except RuntimeError:
            return

    def _note_end(self) -> None:
        if not self._ended.done():
            self._ended.set_result(None)
