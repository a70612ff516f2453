# SPDX-License-Identifier: GPL-2.0-or-later
"""
The screen people keep open: devices and facts on the left, the map on the right, snapshots below.

It is given state, frames and readings, and says what it wants drawn (`Wanting`). Pausing holds what arrives and keeps the picture still.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.message import Message
from textual.screen import Screen
from textual.widgets import DataTable, Footer, Static

from blksnap_tui.heat.grid import MODES, Grid, Window, age_levels, density_levels
from blksnap_tui.heat.ramp import Palette
from blksnap_tui.heat.widget import HeatMap
from blksnap_tui.messages import Frame, Wanted
from blksnap_tui.model import Device, ObjectPath, Snapshot, State
from blksnap_tui.widgets.device_table import DeviceTable
from blksnap_tui.widgets.facts import Facts
from blksnap_tui.widgets.lines import Inspector, Legend, StatusBar
from blksnap_tui.widgets.map_words import CONNECTING, hint, titles
from blksnap_tui.widgets.snapshot_table import WIDE, SnapshotTable

NO_SNAPSHOTS = "no snapshots yet: s takes one of the chosen device"

# From this width on the keys in the footer are set apart.
ROOMY_FOOTER = 100


class MainScreen(Screen[None]):
    """The main screen; `now_us` is the clock."""

    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (60, "-normal"), (120, "-wide")]  # noqa: RUF012 - Textual declares it for instances
    VERTICAL_BREAKPOINTS = [(0, "-low"), (20, "-medium"), (40, "-tall")]  # noqa: RUF012 - Textual declares it for instances

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("a", "app.add_file", "add", id="device.add", tooltip="add an image file to the devices"),
        Binding(
            "t", "app.track", "track", id="device.track", tooltip="record what changes on the chosen device"
        ),
        Binding(
            "d", "app.untrack", "untrack", id="device.untrack", tooltip="stop recording; the history ends"
        ),
        Binding(
            "s",
            "app.snapshot",
            "snapshot",
            id="snapshot.take",
            tooltip="take a snapshot of one or more devices",
        ),
        Binding("x", "app.destroy", "destroy", id="snapshot.destroy", tooltip="destroy the chosen snapshot"),
        Binding(
            "m",
            "mode",
            "mode",
            id="map.mode",
            tooltip="show age of the last change, or how much changed since",
        ),
        Binding(
            "space", "pause", "pause", id="view.pause", tooltip="hold the picture still; recording goes on"
        ),
        Binding("question_mark,f1", "app.help", "help", id="app.help", tooltip="show this"),
        Binding("q", "app.quit", "quit", id="app.quit", tooltip="leave; trackers and snapshots stay"),
        Binding(
            "tab", "app.focus_next", "next part", show=False, id="focus.next", tooltip="go to the next part"
        ),
    ]

    class Wanting(Message):
        """The screen wants this drawn now; None when there is nothing to draw."""

        def __init__(self, wanted: Wanted | None) -> None:
            super().__init__()
            self.wanted = wanted

    def __init__(self, bus: str, palette: Palette, now_us: Callable[[], int]) -> None:
        super().__init__()
        self._bus, self._palette, self._now_us = bus, palette, now_us
        self._state = State()
        self._latest = State()
        self._known = False
        self._info: tuple[ObjectPath, Mapping[str, Any]] | None = None
        self._frame: Frame | None = None
        self._failure = ""
        self._mode = MODES[0]
        self._room: tuple[int, int] | None = None
        self._wanted: Wanted | None = None
        self._pointed: tuple[int, int] | None = None
        self._held: dict[str, Callable[[], None]] | None = None
        self._held_count = 0
        self._note = ""
        self._choice = ""
        self._borders: dict[str, tuple[str, str]] = {}

    def compose(self) -> ComposeResult:
        """Lay it out."""
        yield StatusBar(id="status")
        with Horizontal(id="upper"):
            with Vertical(id="side"):
                yield DeviceTable(id="devices")
                with VerticalScroll(id="facts-box", can_focus=False):
                    yield Facts(id="facts")
            with Vertical(id="map"):
                yield HeatMap(id="heat")
                yield Static(CONNECTING, id="hint", markup=False)
                yield Legend(id="legend")
                yield Inspector(id="inspector")
        with Vertical(id="lower"):
            yield SnapshotTable(id="snapshots")
            yield Static(NO_SNAPSHOTS, id="no-snapshots", markup=False)
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        """Name the parts and show that nothing is known yet."""
        self.query_one("#devices").border_title = "devices"
        self.query_one(HeatMap).palette = self._palette
        self.query_one("#devices").focus()
        self._show_all()

    @property
    def is_drawn(self) -> bool:
        """Say whether the chosen device's map and reading are on the screen."""
        frame, device = self._frame, self.device
        return (
            frame is not None
            and device is not None
            and frame.wanted == self._wanted
            and self._info is not None
            and self._info[0] == device.object_path
        )

    def value_of_block(self, block: int) -> int | None:
        """Give the byte the last frame has for a block; None when it is not shown."""
        if self._frame is None:
            return None
        try:
            return self._frame.values[self._frame.wanted.grid.bin_of(block)]
        except IndexError:
            return None

    @property
    def held(self) -> int:
        """Give how many updates a pause holds back."""
        return self._held_count

    # ---- what is chosen

    @property
    def state(self) -> State:
        """Give the newest state, also while the picture is held."""
        return self._latest

    @property
    def device(self) -> Device | None:
        """Give the chosen device."""
        chosen = self.query_one(DeviceTable).chosen
        return None if chosen is None else self._state.device(chosen)

    @property
    def snapshot(self) -> Snapshot | None:
        """Give the chosen snapshot."""
        chosen = self.query_one(SnapshotTable).chosen
        return None if chosen is None else self._state.snapshot(chosen)

    def choose(self, device: str) -> None:
        """Put the cursor on a device, as soon as it is in the state."""
        table = self.query_one(DeviceTable)
        self._choice = device
        if self._state.device(device) is not None:
            self._choice = ""
            table.move_cursor(row=table.get_row_index(device), animate=False)

    # ---- what arrives

    def take_state(self, state: State) -> None:
        """Show a new state."""
        self._latest = state
        self._or_hold("state", lambda: self._set_state(state))

    def take_frame(self, frame: Frame) -> None:
        """Draw a new frame."""
        self._or_hold("frame", lambda: self._set_frame(frame))

    def take_info(self, device: ObjectPath, info: Mapping[str, Any]) -> None:
        """Show a new reading of a tracker."""
        self._or_hold("info", lambda: self._set_info(device, info))

    def take_failure(self, device: ObjectPath, text: str) -> None:
        """Say why the map cannot be drawn."""
        if self._wanted is not None and self._wanted.device == device:
            self._failure, self._frame = text, None
            self._show_map()

    def note(self, text: str) -> None:
        """Keep an alarm in the status bar."""
        self._note = text
        self._show_status()

    def _or_hold(self, what: str, apply: Callable[[], None]) -> None:
        if self._held is None:
            apply()
        else:
            self._held[what] = apply
            self._held_count += 1
            self._show_status()

    def _set_state(self, state: State) -> None:
        first, self._state, self._known = not self._state.devices, state, True
        self._show_all()
        tracked = next((device for device in state.devices if device.tracker is not None), None)
        if self._choice:
            self.choose(self._choice)
        elif first and tracked is not None:
            self.choose(tracked.object_path)

    def _set_frame(self, frame: Frame) -> None:
        if frame.wanted == self._wanted:
            self._frame, self._failure = frame, ""
            self._show_map()
            self._show_inspector()

    def _set_info(self, device: ObjectPath, info: Mapping[str, Any]) -> None:
        self._info = (device, info)
        self._show_facts()

    # ---- what is done here

    def action_pause(self) -> None:
        """Hold the picture, or let it go on with what came meanwhile."""
        if self._held is None:
            self._held, self._held_count = {}, 0
        else:
            held, self._held = self._held, None
            for apply in held.values():
                apply()
        self._show_status()

    def action_mode(self) -> None:
        """Go to the next mode of the map."""
        self._mode = MODES[(MODES.index(self._mode) + 1) % len(MODES)]
        self._ask()
        self._show_map()

    @on(DataTable.RowHighlighted, "#devices")
    def _device_chosen(self) -> None:
        self._ask()
        self._show_facts()
        self._show_map()
        self._show_inspector()

    @on(DataTable.RowHighlighted, "#snapshots")
    def _snapshot_chosen(self) -> None:
        self._show_snapshot()

    @on(HeatMap.Resized)
    def _room_changed(self, event: HeatMap.Resized) -> None:
        self._room = (event.cols, event.rows)
        self._ask()
        self._show_map()

    @on(HeatMap.Pointed)
    def _pointed_at(self, event: HeatMap.Pointed) -> None:
        self._pointed = (event.col, event.row)
        self._show_inspector()

    def on_resize(self) -> None:
        """Let the lines that depend on the width be written again."""
        self.call_after_refresh(self._show_all)

    def set_palette(self, palette: Palette) -> None:
        """Draw with other colours."""
        self._palette = palette
        self.query_one(HeatMap).palette = palette
        self._show_all()

    def _ask(self) -> None:
        """Work out what should be drawn, and say so when it is something else."""
        device, wanted = self.device, None
        if device is not None and device.tracker is not None and self._room is not None:
            cols, rows = self._room
            grid = Grid(Window(0, max(device.tracker.block_count, 1)), cols, rows)
            since = device.tracker.shown_since if self._mode == "density" else 0
            wanted = Wanted(device.object_path, grid, self._mode, since)
        if wanted != self._wanted:
            if wanted is None or self._wanted is None or wanted.device != self._wanted.device:
                self._frame, self._failure = None, ""
            self._wanted = wanted
            self.post_message(self.Wanting(wanted))

    # ---- showing

    def _show_all(self) -> None:
        now_us = self._now_us()
        self.query_one(Footer).compact = self.app.size.width < ROOMY_FOOTER
        self.query_one(DeviceTable).show(self._state.devices, wide=self.app.size.width >= WIDE)
        self.query_one(SnapshotTable).show(self._state, now_us=now_us, width=self.app.size.width)
        self.set_class(not self._state.snapshots, "-no-snapshots")
        self._show_snapshot()
        self._ask()
        self._show_facts()
        self._show_map()
        self._show_inspector()
        self._show_status()

    def _show_status(self) -> None:
        self.query_one(StatusBar).show(
            self._state, bus=self._bus, paused=self._held is not None, held=self._held_count, note=self._note
        )

    def _show_snapshot(self) -> None:
        """Write on the border what the row of the chosen snapshot may have no room for."""
        snapshot = self.snapshot
        if snapshot is None:
            self._title("#lower", "snapshots")
            return
        where = f"kept in {snapshot.storage_path}" if snapshot.storage_path else ""
        words = snapshot.error or " · ".join(filter(None, (snapshot.description, where)))
        self._title("#lower", "snapshots", words)

    def _reading(self, device: Device | None) -> Mapping[str, Any] | None:
        """Give the last reading, if it is this device's."""
        if self._info is None or device is None or self._info[0] != device.object_path:
            return None
        return self._info[1]

    def _show_facts(self) -> None:
        device = self.device
        self._title("#facts-box", "device" if device is None else device.name)
        self.query_one(Facts).show(device, self._reading(device), now_us=self._now_us())

    def _show_map(self) -> None:
        device = self.device
        words = hint(self._state if self._known else None, device, self._failure, self._reading(device))
        self.set_class(bool(words), "-hint")
        if words:
            self.query_one("#hint", Static).update(words)
        tracker = None if device is None else device.tracker
        grid = None if self._wanted is None else self._wanted.grid
        self._title("#map", *titles(self._state, device, grid, self._mode, now_us=self._now_us()))
        self.query_one(Legend).show(self._palette, self._mode, None if words else tracker)
        frame, heat = self._frame, self.query_one(HeatMap)
        if frame is None or tracker is None:
            heat.show(b"", 0)
        elif frame.wanted.mode == "age":
            intervals = tracker.active_number - max(tracker.oldest_number, 1) + 1
            heat.show(
                frame.values.translate(age_levels(self._palette.levels, intervals)), frame.wanted.grid.cols
            )
        else:
            heat.show(frame.values.translate(density_levels(self._palette.levels)), frame.wanted.grid.cols)

    def _title(self, selector: str, title: str, subtitle: str = "") -> None:
        """Write on a border, unless it is there already: Textual draws all of a box again for it."""
        if self._borders.get(selector) != (title, subtitle):
            self._borders[selector] = (title, subtitle)
            box = self.query_one(selector)
            # Escaped: a device may be called [red].
            box.border_title, box.border_subtitle = Content(title).markup, Content(subtitle).markup

    def _show_inspector(self) -> None:
        frame = self._frame
        if frame is None or self._pointed is None:
            self.query_one(Inspector).show(None, None, 0, None, self._mode)
            return
        grid = frame.wanted.grid
        index = grid.index(*self._pointed)
        value = frame.values[index] if index < len(frame.values) else None
        self.query_one(Inspector).show(self.device, grid, index, value, frame.wanted.mode)
