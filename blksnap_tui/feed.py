# SPDX-License-Identifier: GPL-2.0-or-later
"""
Keeps a client alive and turns what it learns into messages.

Runs as one coroutine in the program's event loop, never touches a widget, and never queues work: a slow service makes frames rarer, not
later. Pausing is the screen's affair; collecting goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from textual.message import Message

from blksnap_tui.client import Client
from blksnap_tui.errors import BlksnapError, BusUnavailableError, ServiceError
from blksnap_tui.events import BusLost, Event, ServiceFound, ServiceLost, StateChanged
from blksnap_tui.messages import (
    Frame,
    FrameFailed,
    FrameReady,
    Happened,
    InfoReady,
    Link,
    LinkChanged,
    StateUpdated,
    Wanted,
)
from blksnap_tui.model import ObjectPath

DEFAULT_RATE_HZ = 2.0
RETRY_S = (0.5, 1.0, 2.0, 5.0)

# Counters change with every write; people do not read them faster.
INFO_PERIOD_S = 1.0

# Bursts of changes (a take touches every device) become one message.
SETTLE_S = 0.05


class Feed:
    """
    One source of messages for one program.

    `make_client` makes a client that waits for its service; `post` takes the messages. `client` is the present one, for acts: None while
    there is no bus.
    """

    def __init__(
        self,
        make_client: Callable[[], Client],
        post: Callable[[Message], object],
        *,
        rate_hz: float = DEFAULT_RATE_HZ,
    ) -> None:
        self.client: Client | None = None
        self._make_client = make_client
        self._post = post
        self._period_s = 1 / rate_hz
        self._wanted: Wanted | None = None
        self._last: Frame | None = None
        self._info_at = 0.0
        self._last_info: tuple[ObjectPath, Mapping[str, Any]] | None = None
        self._look = asyncio.Event()
        self._changed = asyncio.Event()
        self._lost = asyncio.Event()
        self._retry = asyncio.Event()
        self._lost_reason = ""

    def want(self, wanted: Wanted | None) -> None:
        """Say what to draw from now on; it is fetched at once."""
        if wanted != self._wanted:
            self._wanted = wanted
            self._last = None
            self._last_info = None
            self._look.set()

    def retry_now(self) -> None:
        """Try to reach the bus without waiting any longer."""
        self._retry.set()

    async def run(self) -> None:
        """Work until cancelled."""
        attempt = 0
        while True:
            try:
                async with self._make_client() as client:
                    attempt = 0
                    await self._serve(client)
                reason = self._lost_reason
            except BusUnavailableError as error:
                reason = str(error)
            except BlksnapError as error:
                self._post(LinkChanged(Link.FOREIGN, str(error), RETRY_S[-1]))
                await self._pause(RETRY_S[-1])
                continue
            delay_s = RETRY_S[min(attempt, len(RETRY_S) - 1)]
            attempt += 1
            self._post(LinkChanged(Link.NO_BUS, reason, delay_s))
            await self._pause(delay_s)

    async def _pause(self, delay_s: float) -> None:
        self._retry.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._retry.wait(), delay_s)

    async def _serve(self, client: Client) -> None:
        """Follow one client until its bus is gone."""
        self._lost.clear()
        self._last, self._last_info = None, None
        unsubscribe = client.subscribe(self._on_event)
        self.client = client
        try:
            self._announce(client)
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._follow_state(client)),
                    group.create_task(self._follow_map(client)),
                ]
                await self._lost.wait()
                for task in tasks:
                    task.cancel()
        finally:
            self.client = None
            unsubscribe()

    def _on_event(self, event: Event) -> None:
        if isinstance(event, BusLost):
            self._lost_reason = event.reason
            self._lost.set()
        elif isinstance(event, StateChanged | ServiceFound | ServiceLost):
            self._changed.set()
        else:
            self._post(Happened(event))

    def _announce(self, client: Client) -> None:
        """Post how things stand."""
        if not client.available:
            self._last, self._last_info = None, None
            self._post(
                LinkChanged(Link.NO_SERVICE, f"nobody owns the service's name on the {client.bus} bus")
            )
            return
        try:
            state = client.state
        except BlksnapError as error:
            self._post(LinkChanged(Link.FOREIGN, str(error)))
            return
        self._post(LinkChanged(Link.UP))
        self._post(StateUpdated(state))

    async def _follow_state(self, client: Client) -> None:
        while True:
            await self._changed.wait()
            await asyncio.sleep(SETTLE_S)
            self._changed.clear()
            self._announce(client)
            self._look.set()

    async def _follow_map(self, client: Client) -> None:
        """Fetch what is wanted, at most at the set rate, and post what differs."""
        while True:
            self._look.clear()
            wanted = self._wanted
            if wanted is not None and client.available:
                await self._fetch(client, wanted)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._look.wait(), self._period_s)

    async def _fetch(self, client: Client, wanted: Wanted) -> None:
        grid = wanted.grid
        try:
            values, sequence = await client.summarize(
                wanted.device,
                grid.window.first,
                grid.window.count,
                grid.bins,
                wanted.mode,
                since=wanted.since,
            )
            now = asyncio.get_running_loop().time()
            if self._last_info is None or now >= self._info_at + INFO_PERIOD_S:
                self._info_at = now
                self._post_info(wanted, await client.get_info(wanted.device))
        except BlksnapError as error:
            # Detached or left a moment ago: the state says so too. Anything else is worth showing.
            if wanted == self._wanted and not (isinstance(error, ServiceError) and error.kind in _GONE):
                self._post(FrameFailed(wanted.device, str(error)))
            return
        frame = Frame(wanted, values, sequence)
        if wanted == self._wanted and (self._last is None or values != self._last.values):
            self._last = frame
            self._post(FrameReady(frame))

    def _post_info(self, wanted: Wanted, info: Mapping[str, Any]) -> None:
        if wanted == self._wanted and self._last_info != (wanted.device, info):
            self._last_info = (wanted.device, info)
            self._post(InfoReady(wanted.device, info))


_GONE = ("NotTracked", "NotFound", "UnknownObject", "UnknownInterface", "UnknownMethod")
