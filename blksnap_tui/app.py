# SPDX-License-Identifier: GPL-2.0-or-later
"""The terminal program: puts the feed, the screens and the acts together, and owns none of what they do."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Coroutine, Iterable
from pathlib import Path, PurePath
from typing import Any, ClassVar

from rich.text import Text
from textual.app import App, SystemCommand
from textual.binding import Binding, BindingType
from textual.screen import Screen

from blksnap_tui import events
from blksnap_tui.acts import Acts
from blksnap_tui.announce import announcement
from blksnap_tui.client import Client
from blksnap_tui.commands import commands
from blksnap_tui.defects import record
from blksnap_tui.feed import Feed
from blksnap_tui.heat.pane import MapPane
from blksnap_tui.heat.ramp import ANCHORS, Palette, depth_of, palette
from blksnap_tui.history import Entry, Severity, differences
from blksnap_tui.messages import (
    CountsReady,
    FrameFailed,
    FrameReady,
    Happened,
    InfoReady,
    Link,
    LinkChanged,
    Silence,
    StateUpdated,
)
from blksnap_tui.model import Device, Snapshot, Tracker
from blksnap_tui.recording import Recorder
from blksnap_tui.screens.board import ACTS, Board, Desk
from blksnap_tui.screens.connect import ConnectScreen
from blksnap_tui.screens.events import EventsScreen
from blksnap_tui.screens.help import HelpScreen
from blksnap_tui.screens.jobs import JobsScreen
from blksnap_tui.screens.main import MainScreen
from blksnap_tui.screens.overview import OverviewScreen
from blksnap_tui.screens.questions import AskLine
from blksnap_tui.screens.snapshots import SnapshotsScreen
from blksnap_tui.settings import Settings
from blksnap_tui.themes import DARK, LIGHT
from blksnap_tui.units import parse_place
from blksnap_tui.widgets.facts import changed_blocks

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
        settings: Settings = Settings(),  # noqa: B008 - frozen
        source: str = "",
        recorder: Recorder | None = None,
    ) -> None:
        super().__init__()
        self.desk = Desk(bus, now_us, read_only=settings.read_only, source=source)
        self._feed = Feed(
            make_client or (lambda: Client(bus, wait_for_service=True)),
            self.post_message,
            rate_hz=settings.rate_hz,
            recorder=recorder,
        )
        self._acts = Acts(self, lambda: self._feed.client)
        self._connect: ConnectScreen | None = None
        self.background: Callable[[], Coroutine[Any, Any, None]] | None = None
        self._ramp = settings.ramp
        self.register_theme(DARK)
        self.register_theme(LIGHT)
        self.theme = settings.theme if settings.theme in self.available_themes else DARK.name
        self.set_keymap(dict(settings.keys))
        self.main = MainScreen(self.desk, self._palette())
        self._boards: dict[str, Board] = {
            "map": self.main,
            "overview": OverviewScreen(self.desk),
            "snapshots": SnapshotsScreen(self.desk),
            "events": EventsScreen(self.desk),
        }

    def on_mount(self) -> None:
        """Show the main screen, and begin. The connect screen comes when connecting does not work at once."""
        self.theme_changed_signal.subscribe(self, lambda _theme: self.main.set_palette(self._palette()))
        self.push_screen(self.main)
        self.run_worker(self._feed.run(), name="feed", exit_on_error=True)
        if self.background is not None:
            self.run_worker(self.background(), name="background", exit_on_error=True)

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
        return palette(self._ramp, depth, dark=theme.dark)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:  # noqa: ARG002 - Textual's
        """Take the keys of acts away when nothing may be changed."""
        return not (self.desk.read_only and action in ACTS)

    @property
    def board(self) -> Board:
        """Give the full screen that is shown, also below a question."""
        return next(
            (screen for screen in reversed(self.screen_stack) if isinstance(screen, Board)), self.main
        )

    # ---- what the feed says

    def on_link_changed(self, message: LinkChanged) -> None:
        """Cover the screens while there is no service."""
        if message.link is Link.UP:
            if self._connect is not None:
                self._connect.dismiss()
                self._connect = None
                self._record("information", "service", "connected again")
        elif self._connect is None:
            if self.desk.known:
                self._record("error", "service", f"{message.link.value}: {message.reason}")
                self.desk.rates.interrupt()
            while not isinstance(self.screen, Board):
                self.pop_screen()
            self._connect = ConnectScreen(self.desk.bus, message)
            self.push_screen(self._connect)
        else:
            self._connect.show(message)

    def on_state_updated(self, message: StateUpdated) -> None:
        """Show it, and note what is different."""
        desk, state = self.desk, message.state
        if desk.known:
            for severity, subject, text in differences(desk.state, state):
                self._record(severity, subject, text)
        desk.state, desk.known = state, True
        desk.storage.note(state, time.monotonic())
        tracked = {str(device.object_path) for device in state.devices if device.tracker is not None}
        desk.rates.keep_only(tracked)
        desk.changed = {path: count for path, count in desk.changed.items() if path in tracked}
        self.main.take_state(state)
        self._news()

    def on_frame_ready(self, message: FrameReady) -> None:
        """Draw it."""
        self.main.take_frame(message.frame)

    def on_frame_failed(self, message: FrameFailed) -> None:
        """Say so."""
        words = f"{message.text}\n\npress u to be asked for a password" if message.locked else message.text
        self.main.take_failure(message.device, words)

    def on_counts_ready(self, message: CountsReady) -> None:
        """Show them."""
        self.main.take_counts(message.counts)

    def on_info_ready(self, message: InfoReady) -> None:
        """Show it."""
        self.desk.rates.note(message.device, message.info, message.at_s)
        device = self.desk.state.device(message.device)
        if device is not None and device.tracker is not None:
            changed = changed_blocks(message.info, device.tracker.shown_since)
            if changed is not None:
                self.desk.changed[device.object_path] = changed
        self.main.take_info(message.device, message.info)

    def on_silence(self, message: Silence) -> None:
        """Say how old the picture is."""
        self.desk.silent_s = message.seconds
        if self.is_running:
            self.board.show_status()

    def on_map_pane_wanting(self, message: MapPane.Wanting) -> None:
        """Have it fetched."""
        self._feed.want(message.wanted)

    def on_map_pane_looking(self, message: MapPane.Looking) -> None:
        """Have it counted."""
        self._feed.look_at(message.spot)

    def _news(self) -> None:
        """Let the screen that is shown look at the desk, unless it is the one that is told by itself."""
        board = self.board
        if board is not self.main and board.is_mounted and self.is_running:
            board.show_news()

    def _record(self, severity: Severity, subject: str, text: str) -> None:
        self.desk.log.add(Entry(self.desk.now_us(), severity, subject, text))
        self._news()

    def on_happened(self, message: Happened) -> None:
        """Log what the service announced, and tell it, so that it is not missed."""
        told = announcement(message.event, self.desk.state)
        if told is None or not self.is_running:
            return
        severity, subject, text, note = told
        self._record(severity, subject, text)
        if isinstance(message.event, events.GenerationStarted):
            event = message.event
            self.main.pane.restarted(event.device, event.generation_id, event.reason)
        if note:
            self.desk.note = note
            self.board.show_status()
        self.notify(
            f"{subject}: {text}",
            severity=severity,
            timeout=30 if severity == "error" else 15,
            markup=False,
        )

    # ---- acts

    def action_retry(self) -> None:
        """Try the bus again now."""
        self._feed.retry_now()

    def action_help(self) -> None:
        """Show help for where we are."""
        self.push_screen(HelpScreen(self.screen, self.desk.state.manager))

    def action_board(self, name: str) -> None:
        """Go to one of the full screens."""
        board = self._boards[name]
        if self.screen is not board and isinstance(self.screen, Board):
            if self.screen is not self.main:
                self.pop_screen()
            if board is not self.main:
                self.push_screen(board)

    def action_show_device(self, path: str) -> None:
        """Go to the map of a device."""
        self.action_board("map")
        self.main.choose(path)

    def get_system_commands(self, screen: Screen[Any]) -> Iterable[SystemCommand]:
        """Offer every action besides what Textual offers."""
        yield from commands(self, screen, self.desk.state)
        yield from super().get_system_commands(screen)

    def action_ramp(self) -> None:
        """Draw with the next ramp of colours."""
        ramps = list(ANCHORS)
        self._ramp = ramps[(ramps.index(self._ramp) + 1) % len(ramps)]
        self.main.set_palette(self._palette())
        self.notify(f"colours: {self._ramp}", timeout=2)

    def action_add_file(self) -> None:
        """Add an image file."""
        self.run_worker(self._add_file(), group="acts", exit_on_error=True)

    async def _add_file(self) -> None:
        device = await self._acts.add_file()
        if device is not None:
            self.call_later(self.main.choose, device)

    @property
    def _device(self) -> Device | None:
        device = self.board.device
        if device is None:
            self.notify("choose a device first", severity="information")
        return device

    @property
    def _snapshot(self) -> Snapshot | None:
        snapshot = self.board.snapshot
        if snapshot is None:
            self.notify("there is no snapshot to do that to", severity="information")
        return snapshot

    def action_track(self) -> None:
        """Track the chosen device."""
        if device := self._device:
            self.run_worker(self._acts.track(device, self.desk.state.manager), group="acts")

    def action_untrack(self) -> None:
        """Stop tracking the chosen device."""
        if device := self._device:
            self.run_worker(self._acts.untrack(device), group="acts")

    def action_snapshot(self) -> None:
        """Take a snapshot."""
        if device := self._device:
            self.run_worker(self._acts.snapshot(device, self.desk.state), group="acts")

    def action_destroy(self) -> None:
        """Destroy the chosen snapshot."""
        if snapshot := self._snapshot:
            self.run_worker(self._acts.destroy(snapshot, self.desk.state), group="acts")

    def action_release(self) -> None:
        """Let the chosen snapshot stay."""
        if snapshot := self._snapshot:
            self.run_worker(self._acts.release(snapshot), group="acts")

    def action_mark(self) -> None:
        """Mark a range of the chosen device."""
        if device := self._device:
            self.run_worker(self._acts.mark(device, self.main.pane.byte_range), group="acts")

    def action_export(self) -> None:
        """Write what changed on the chosen device to a file."""
        if device := self._device:
            self.run_worker(self._acts.export(device, self.main.pane.since), group="acts")

    def action_open_image(self, path: str, name: str) -> None:
        """Open an image."""
        image = next((image for image in self.desk.state.images if image.object_path == path), None)
        if image is not None:
            self.run_worker(self._acts.open_image(image, name), group="acts")

    def action_unlock(self) -> None:
        """Ask for the permission to read the map of the chosen device."""
        if device := self._device:
            self.run_worker(self._unlock(device), group="acts")

    async def _unlock(self, device: Device) -> None:
        await self._acts.unlock(device)
        self._feed.look_again()

    def action_copy_range(self) -> None:
        """Copy the bytes under the cursor, as OFFSET:LENGTH."""
        chosen = self.main.pane.byte_range
        if chosen is None:
            self.notify("point at something in the map first")
        else:
            self.copy_to_clipboard(f"{chosen[0]}:{chosen[1]}")
            self.notify(f"{chosen[0]}:{chosen[1]} is in the clipboard, if the terminal allows it", timeout=4)

    def action_go_to(self) -> None:
        """Go to a place in the map."""
        device = self._device
        if device is not None and device.tracker is not None:
            self.run_worker(self._go_to(device, device.tracker), group="acts")

    async def _go_to(self, device: Device, tracker: Tracker) -> None:
        def read(text: str) -> int:
            return parse_place(
                text,
                capacity=tracker.capacity,
                block_size=tracker.block_size,
                sector_size=device.logical_block_size,
            )

        block = await self.push_screen_wait(
            AskLine(
                f"go to a place on {device.name}",
                "an offset such as 12G, b123 for a block, s2048 for a sector, or 50%",
                read,
                example="12G",
                yes="go",
            )
        )
        if block is not None:
            self.main.pane.go_to(block)

    def action_jobs(self) -> None:
        """Show what the service is busy with."""
        self.run_worker(self._show_jobs(), group="acts")

    async def _show_jobs(self) -> None:
        job = await self.push_screen_wait(JobsScreen(self.desk))
        if job is not None:
            await self._acts.cancel(job)
