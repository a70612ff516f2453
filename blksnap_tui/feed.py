# SPDX-License-Identifier: GPL-2.0-or-later
"""
Keeps a client alive and turns what it learns into messages.

Runs as one coroutine in the program's event loop, never touches a widget, and never queues work: a slow service makes frames rarer, not
later. Pausing is the screen's affair; collecting goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from textual.message import Message

from blksnap_tui.client import Client
from blksnap_tui.errors import BlksnapError, BusUnavailableError, ServiceError
from blksnap_tui.events import BusLost, Event, ServiceFound, ServiceLost, StateChanged
from blksnap_tui.heat.grid import Grid
from blksnap_tui.messages import (
    Counts,
    CountsReady,
    Frame,
    FrameFailed,
    FrameReady,
    Happened,
    InfoReady,
    Link,
    LinkChanged,
    Silence,
    Spot,
    StateUpdated,
    Wanted,
)
from blksnap_tui.model import Device, Tracker
from blksnap_tui.recording import Recorder
from blksnap_tui.settings import DEFAULT_RATE_HZ

RETRY_S = (0.5, 1.0, 2.0, 5.0)

# Counters change with every write; people do not read them faster.
INFO_PERIOD_S = 1.0

# Devices that are not being looked at closely are read this often, and not more than this many of them in a second.
SURVEY_PERIOD_S = 2.0
SURVEYED_PER_S = 5.0

# A cursor that moves on is not counted under; one that rests is, and again when the picture changes.
REST_S = 0.05
MOST_COUNTED = 1 << 20

# What was refused is asked for less often: every question is one to polkit too.
REFUSED_PERIOD_S = 3.0

# An answer that takes longer than this is worth a word.
PATIENCE_S = 3.0

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
        recorder: Recorder | None = None,
    ) -> None:
        self.client: Client | None = None
        self._make_client = make_client
        self._post = post
        self._recorder = recorder
        self._period_s = 1 / rate_hz
        self._wanted: Wanted | None = None
        self._last: Frame | None = None
        self._info_at = 0.0
        self._spot: Spot | None = None
        self._spotted = asyncio.Event()
        self._asked_at: float | None = None
        self._look = asyncio.Event()
        self._changed = asyncio.Event()
        self._lost = asyncio.Event()
        self._retry = asyncio.Event()
        self._lost_reason = ""

    def want(self, wanted: Wanted | None) -> None:
        """Say what to draw from now on; it is fetched at once."""
        if wanted != self._wanted:
            if self._wanted is None or wanted is None or wanted.device != self._wanted.device:
                self._info_at = 0.0
            self._wanted = wanted
            self._last = None
            self._look.set()

    def look_at(self, spot: Spot | None) -> None:
        """Say which blocks to count, once the cursor rests there."""
        self._spot = spot
        self._spotted.set()

    def look_again(self) -> None:
        """Fetch what is wanted without waiting any longer."""
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
        self._last, self._info_at = None, 0.0
        unsubscribe = client.subscribe(self._on_event)
        self.client = client
        try:
            self._announce(client)
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._follow_state(client)),
                    group.create_task(self._follow_map(client)),
                    group.create_task(self._follow_spot(client)),
                    group.create_task(self._survey(client)),
                    group.create_task(self._watch_silence()),
                ]
                if self._recorder is not None:
                    tasks.append(group.create_task(self._recorder.follow(client)))
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
            if self._recorder is not None:
                self._recorder.event(event)
            self._post(Happened(event))

    def _announce(self, client: Client) -> None:
        """Post how things stand."""
        if not client.available:
            self._last, self._info_at = None, 0.0
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
            wanted, good = self._wanted, True
            if wanted is not None and client.available:
                good = await self._fetch(client, wanted)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._look.wait(), self._period_s if good else REFUSED_PERIOD_S)

    async def _fetch(self, client: Client, wanted: Wanted) -> bool:
        """Fetch what is wanted and post it; gives whether the service let us."""
        grid, strip = wanted.grid, b""
        self._asked_at = _now()
        try:
            values, sequence = await _summary(client, wanted, grid)
            if wanted.strip is not None:
                strip, _ = await _summary(client, wanted, wanted.strip)
            if _now() >= self._info_at + INFO_PERIOD_S:
                info = await client.get_info(wanted.device, ask=False)
                self._info_at = _now()
                self._post(InfoReady(wanted.device, info, self._info_at))
        except BlksnapError as error:
            # The picture goes with what is said about it, so the next answer is new even if it is the same.
            self._last = None
            # Detached or left a moment ago: the state says so too. Anything else is worth showing.
            if wanted == self._wanted and not (isinstance(error, ServiceError) and error.kind in _GONE):
                locked = isinstance(error, ServiceError) and error.kind == "NotAuthorizedCanObtain"
                self._post(FrameFailed(wanted.device, str(error), locked=locked))
            return False
        finally:
            self._asked_at = None
        frame = Frame(wanted, values, sequence, strip)
        last = self._last
        if wanted == self._wanted and (last is None or (values, strip) != (last.values, last.strip)):
            self._last = frame
            self._post(FrameReady(frame))
        return True

    async def _follow_spot(self, client: Client) -> None:
        """Count what is under the cursor whenever it has come to rest."""
        while True:
            await self._spotted.wait()
            await asyncio.sleep(REST_S)
            self._spotted.clear()
            spot = self._spot
            before = None if spot is None else _tracker(client, spot.device)
            if spot is None or before is None or not 0 < len(spot.blocks) <= MOST_COUNTED:
                continue
            try:
                values = await client.read_map(spot.device, spot.blocks.start, len(spot.blocks), ask=False)
            except BlksnapError:
                # The frame fails too, and says why.
                continue
            after = _tracker(client, spot.device)
            # The bytes count from a base that slides; across a slide they cannot be told apart.
            if spot == self._spot and after is not None and _numbers(before) == _numbers(after):
                base = max(after.oldest_number - 1, 0)
                by_number = {
                    base + value if value else 0: count
                    for value in range(256)
                    if (count := values.count(value))
                }
                self._post(CountsReady(Counts(spot, after.generation_id, by_number)))

    async def _survey(self, client: Client) -> None:
        """Read the trackers nobody is looking at, in turns."""
        while True:
            paths = [device.object_path for device in _devices(client) if device.tracker is not None]
            pause_s = max(SURVEY_PERIOD_S / max(len(paths), 1), 1 / SURVEYED_PER_S)
            for path in paths:
                if self._wanted is None or self._wanted.device != path:
                    with contextlib.suppress(BlksnapError):
                        info = await client.get_info(path, ask=False)
                        self._post(InfoReady(path, info, _now()))
                await asyncio.sleep(pause_s)
            if not paths:
                await asyncio.sleep(SURVEY_PERIOD_S)

    async def _watch_silence(self) -> None:
        """Say how old the picture is while the service does not answer."""
        told = False
        while True:
            await asyncio.sleep(1.0)
            asked = self._asked_at
            silent_s = 0.0 if asked is None else _now() - asked
            if silent_s > PATIENCE_S or told:
                told = silent_s > PATIENCE_S
                self._post(Silence(silent_s if told else 0.0))


_GONE = ("NotTracked", "NotFound", "UnknownObject", "UnknownInterface", "UnknownMethod")


def _now() -> float:
    return asyncio.get_running_loop().time()


async def _summary(client: Client, wanted: Wanted, grid: Grid) -> tuple[bytes, int]:
    window = grid.window
    return await client.summarize(
        wanted.device, window.first, window.count, grid.bins, wanted.mode, since=wanted.since, ask=False
    )


def _devices(client: Client) -> tuple[Device, ...]:
    try:
        return client.state.devices
    except BlksnapError:
        # A service of another version; its screen is up already.
        return ()


def _tracker(client: Client, path: str) -> Tracker | None:
    return next((device.tracker for device in _devices(client) if device.object_path == path), None)


def _numbers(tracker: Tracker) -> tuple[str, int]:
    return tracker.generation_id, tracker.oldest_number
