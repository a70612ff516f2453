# SPDX-License-Identifier: GPL-2.0-or-later
"""The terminal program: puts the feed, the screens and the acts together, and owns none of what they do."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import ClassVar

from rich.text import Text
from textual.app import App
from textual.binding import Binding, BindingType

from blksnap_tui import events
from blksnap_tui.acts import Acts
from blksnap_tui.client import Client
from blksnap_tui.defects import record
from blksnap_tui.feed import DEFAULT_RATE_HZ, Feed
from blksnap_tui.heat.ramp import DEFAULT_RAMP, Palette, depth_of, palette
from blksnap_tui.messages import FrameFailed, FrameReady, Happened, InfoReady, Link, LinkChanged, StateUpdated
from blksnap_tui.screens.connect import ConnectScreen
from blksnap_tui.screens.help import HelpScreen
from blksnap_tui.screens.main import MainScreen
from blksnap_tui.themes import DARK, LIGHT
from blksnap_tui.units import format_size

_STYLES = Path(__file__).parent / "styles"


def wall_clock_us() -> int:
    """Give the time in microseconds since the epoch."""
    return time.time_ns() // 1000


class BlksnapApp(App[None]):
    """
    The program on one bus.

    `make_client` makes a client that waits for its service; `now_us` is the clock, both replaceable for
    tests.
    """

    TITLE = "blksnap"
    ENABLE_COMMAND_PALETTE = True
    CSS_PATH: ClassVar[list[str | PurePath]] = [_STYLES / "app.tcss", _STYLES / "dialogs.tcss"]
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+c", "quit", "quit", show=False, id="app.interrupt", priority=True),
    ]

    def __init__(
        self,
        bus: str = "system",
        *,
        make_client: Callable[[], Client] | None = None,
        now_us: Callable[[], int] = wall_clock_us,
        rate_hz: float = DEFAULT_RATE_HZ,
    ) -> None:
        super().__init__()
        self.bus = bus
        self._feed = Feed(
            make_client or (lambda: Client(bus, wait_for_service=True)), self.post_message, rate_hz=rate_hz
        )
        self._acts = Acts(self, lambda: self._feed.client)
        self._connect: ConnectScreen | None = None
        self.register_theme(DARK)
        self.register_theme(LIGHT)
        self.theme = DARK.name
        self.main = MainScreen(bus, self._palette(), now_us)

    def on_mount(self) -> None:
        """Show the main screen, and begin. The connect screen comes when connecting does not work at once."""
        self.theme_changed_signal.subscribe(self, lambda _theme: self.main.set_palette(self._palette()))
        self.push_screen(self.main)
        self.run_worker(self._feed.run(), name="feed", exit_on_error=True)

    def _fatal_error(self) -> None:
        """
        Leave without a traceback on the screen; Textual calls this for what nobody caught, while it is
        handled.
        """
        error = self._exception or sys.exc_info()[1]
        if error is not None:
            self._exit_renderables.append(Text(f"blksnap-tui: {record(error)}"))
        self._close_messages_no_wait()

    def _palette(self) -> Palette:
        theme = self.current_theme
        depth = depth_of(
            self.console.color_system, no_color=self.no_color, ansi_theme=theme.name.startswith("ansi-")
        )
        return palette(DEFAULT_RAMP, depth, dark=theme.dark)

    # ---- what the feed says

    def on_link_changed(self, message: LinkChanged) -> None:
        """Cover the main screen while there is no service."""
        if message.link is Link.UP:
            if self._connect is not None:
                self._connect.dismiss()
                self._connect = None
        elif self._connect is None:
            while self.screen is not self.main:
                self.pop_screen()
            self._connect = ConnectScreen(self.bus, message)
            self.push_screen(self._connect)
        else:
            self._connect.show(message)

    def on_state_updated(self, message: StateUpdated) -> None:
        """Show it."""
        self.main.take_state(message.state)

    def on_frame_ready(self, message: FrameReady) -> None:
        """Draw it."""
        self.main.take_frame(message.frame)

    def on_frame_failed(self, message: FrameFailed) -> None:
        """Say so."""
        self.main.take_failure(message.device, message.text)

    def on_info_ready(self, message: InfoReady) -> None:
        """Show it."""
        self.main.take_info(message.device, message.info)

    def on_main_screen_wanting(self, message: MainScreen.Wanting) -> None:
        """Have it fetched."""
        self._feed.want(message.wanted)

    def on_happened(self, message: Happened) -> None:
        """Tell what the service announced, so that it is not missed."""
        state, event = self.main.state, message.event
        match event:
            case events.GenerationStarted():
                device = state.device(event.device)
                name = event.device if device is None else device.name
                self.notify(
                    f"history of {name} restarted: {event.reason}. the next backup must be full.",
                    severity="warning",
                    timeout=15,
                    markup=False,
                )
            case events.LowSpace():
                text = f"{format_size(event.used)} of {format_size(event.limit)} used"
                self.main.note("a snapshot's storage is nearly full")
                self.notify(
                    f"a snapshot's difference storage is nearly full: {text}", severity="warning", timeout=15
                )
            case events.NoSpace():
                self.main.note("a snapshot overflowed")
                self.notify(
                    "a snapshot failed: its difference storage is full. devices are not touched.",
                    severity="error",
                    timeout=30,
                    markup=False,
                )
            case events.Corrupted():
                self.main.note("a snapshot failed")
                self.notify(f"a snapshot failed: {event.message}", severity="error", timeout=30, markup=False)
            case events.JobCompleted() if not event.success:
                self.notify(f"a job failed: {event.message}", severity="error", timeout=30, markup=False)

    # ---- acts

    def action_retry(self) -> None:
        """Try the bus again now."""
        self._feed.retry_now()

    def action_help(self) -> None:
        """Show help for where we are."""
        self.push_screen(HelpScreen(self.screen, self.main.state.manager))

    def action_add_file(self) -> None:
        """Add an image file."""
        self.run_worker(self._add_file(), group="acts", exit_on_error=True)

    async def _add_file(self) -> None:
        device = await self._acts.add_file()
        if device is not None:
            self.call_later(self.main.choose, device)

    def action_track(self) -> None:
        """Track the chosen device."""
        device = self.main.device
        if device is not None:
            self.run_worker(self._acts.track(device), group="acts")

    def action_untrack(self) -> None:
        """Stop tracking the chosen device."""
        device = self.main.device
        if device is not None:
            self.run_worker(self._acts.untrack(device), group="acts")

    def action_snapshot(self) -> None:
        """Take a snapshot."""
        device = self.main.device
        if device is not None:
            self.run_worker(self._acts.snapshot(device, self.main.state), group="acts")

    def action_destroy(self) -> None:
        """Destroy the chosen snapshot."""
        snapshot = self.main.snapshot
        if snapshot is None:
            self.notify("there is no snapshot to destroy", severity="information")
        else:
            self.run_worker(self._acts.destroy(snapshot, self.main.state), group="acts")
