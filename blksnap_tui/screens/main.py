# SPDX-License-Identifier: GPL-2.0-or-later
"""
The screen people keep open: devices and facts on the left, the map on the right, snapshots below.

Pausing holds what arrives and keeps the picture still; acts go by the newest state all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.widgets import DataTable, Footer, Input, Static

from blksnap_tui.heat.pane import MapPane
from blksnap_tui.heat.ramp import Palette
from blksnap_tui.messages import Counts, Frame
from blksnap_tui.model import Device, ObjectPath, Snapshot, State
from blksnap_tui.screens.board import ACT_BINDINGS, BOARD_BINDINGS, Board, Desk
from blksnap_tui.widgets.device_table import DeviceTable
from blksnap_tui.widgets.facts import Facts
from blksnap_tui.widgets.filter import FilterLine
from blksnap_tui.widgets.snapshot_table import WIDE, SnapshotTable
from blksnap_tui.widgets.status import StatusBar

NO_SNAPSHOTS = "no snapshots yet: s takes one of the chosen device"


def _map(key: str, act: str, name: str, tooltip: str, *, show: bool = False) -> Binding:
    """Bind a key to something the map does, wherever the focus is."""
    words = act.partition("(")[0]
    direction = {"zoom(1)": "-in", "zoom(-1)": "-out", "since(-1)": "-before", "since(1)": "-after"}
    return Binding(
        key, f"map('{act}')", name, show=show, id=f"map.{words}{direction.get(act, '')}", tooltip=tooltip
    )


class MainScreen(Board):
    """The main screen."""

    BINDINGS: ClassVar[list[BindingType]] = [
        *ACT_BINDINGS,
        _map(
            "m", "mode", "mode", "age of the last change, next increment, share changed, how often", show=True
        ),
        _map("v", "layout", "view", "rows, Hilbert curve, offset against snapshot", show=True),
        _map("plus,equals_sign", "zoom(1)", "zoom in", "look closer at what is under the cursor"),
        _map("minus", "zoom(-1)", "zoom out", "see more of the device"),
        _map("0", "zoom(0)", "fit", "see all of the device"),
        _map("left_square_bracket", "since(-1)", "since before", "count increments from the snapshot before"),
        _map("right_square_bracket", "since(1)", "since after", "count increments from the snapshot after"),
        Binding("g", "app.go_to", "go to", show=False, id="map.go", tooltip="go to an offset, block or sector"),
        Binding("y", "app.copy_range", "copy", show=False, id="map.copy", tooltip="copy the range under the cursor"),
        Binding("e", "app.export", "export", show=False, id="map.export", tooltip="write what changed to a file (CSV or JSON)"),
        Binding("M", "app.mark", "mark", show=False, id="map.mark", tooltip="mark a range as changed, or everything"),
        Binding("u", "app.unlock", "unlock", show=False, id="map.unlock", tooltip="ask for the permission to read the map"),
        Binding("slash", "filter", "filter", show=False, id="view.filter", tooltip="show only devices with these words"),
        Binding(
            "space", "pause", "pause", id="view.pause", tooltip="hold the picture still; recording goes on"
        ),
        *BOARD_BINDINGS,
    ]  # fmt: skip

    def __init__(self, desk: Desk, palette: Palette) -> None:
        super().__init__(desk)
        self._palette = palette
        self._state = State()
        self._known = False
        self._infos: dict[ObjectPath, Mapping[str, Any]] = {}
        self._held: dict[str, Callable[[], None]] | None = None
        self._held_count = 0
        self._filter = ""
        self._choice = ""
        self._borders: dict[str, tuple[str, str]] = {}

    def compose(self) -> ComposeResult:
        """Lay it out."""
        yield StatusBar(id="status")
        with Horizontal(id="upper"):
            with Vertical(id="side"):
                yield FilterLine(id="filter")
                yield DeviceTable(id="devices")
                with VerticalScroll(id="facts-box", can_focus=False):
                    yield Facts(id="facts")
            yield MapPane(id="map")
        with Vertical(id="lower"):
            yield SnapshotTable(id="snapshots")
            yield Static(NO_SNAPSHOTS, id="no-snapshots", markup=False)
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        """Name the parts and show that nothing is known yet."""
        self.query_one("#devices").border_title = "devices"
        self.pane.use_palette(self._palette)
        self.query_one("#devices").focus()
        self._show_all()

    @property
    def pane(self) -> MapPane:
        """Give the map."""
        return self.query_one(MapPane)

    @property
    def is_drawn(self) -> bool:
        """Say whether the chosen device's map and reading are on the screen."""
        device = self.device
        return device is not None and self.pane.is_drawn and device.object_path in self._infos

    def value_of_block(self, block: int) -> int | None:
        """Give the byte the last frame has for a block; None when it is not shown."""
        return self.pane.value_of_block(block)

    @property
    def held(self) -> int:
        """Give how many updates a pause holds back."""
        return self._held_count

    # ---- what is chosen

    @property
    def state(self) -> State:
        """Give the newest state, also while the picture is held."""
        return self.desk.state

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
            if not table.shows(device):
                self.query_one(FilterLine).clear()
                self._set_filter("")
            table.move_cursor(row=table.get_row_index(device), animate=False)

    # ---- what arrives

    def take_state(self, state: State) -> None:
        """Show a new state."""
        self._or_hold("state", lambda: self._set_state(state))

    def take_frame(self, frame: Frame) -> None:
        """Draw a new frame; one that was asked for during a pause is not held back."""
        if self.app.is_running and not self.pane.is_drawn:
            self.pane.take_frame(frame)
        else:
            self._or_hold("frame", lambda: self.pane.take_frame(frame))

    def take_info(self, device: ObjectPath, info: Mapping[str, Any]) -> None:
        """Show a new reading of a tracker."""
        if self._infos.get(device) != info:
            self._or_hold(f"info {device}", lambda: self._set_info(device, info))

    def take_counts(self, counts: Counts) -> None:
        """Show what is under the cursor."""
        if self.app.is_running:
            self.pane.take_counts(counts)

    def take_failure(self, device: ObjectPath, text: str) -> None:
        """Say why the map cannot be drawn."""
        if self.app.is_running:
            self.pane.take_failure(device, text)

    def show_news(self) -> None:
        """Show what may be different apart from the state, which comes by `take_state`."""
        self._show_all()

    def _or_hold(self, what: str, apply: Callable[[], None]) -> None:
        # What arrives while the program is being taken down finds no parts any more.
        if not self.app.is_running:
            return
        if self._held is None:
            apply()
        else:
            self._held[what] = apply
            self._held_count += 1
            self.show_status()

    def _set_state(self, state: State) -> None:
        first, self._state, self._known = not self._state.devices, state, True
        present = {device.object_path for device in state.devices if device.tracker is not None}
        self._infos = {path: info for path, info in self._infos.items() if path in present}
        self._show_all()
        tracked = next((device for device in state.devices if device.tracker is not None), None)
        if self._choice:
            self.choose(self._choice)
        elif first and tracked is not None:
            self.choose(tracked.object_path)

    def _set_info(self, device: ObjectPath, info: Mapping[str, Any]) -> None:
        self._infos[device] = info
        if self.device is not None and self.device.object_path == device:
            self._show_device()

    # ---- what is done here

    def action_pause(self) -> None:
        """Hold the picture, or let it go on with what came meanwhile."""
        if self._held is None:
            self._held, self._held_count = {}, 0
        else:
            held, self._held = self._held, None
            for apply in held.values():
                apply()
        self.show_status()

    async def action_map(self, act: str) -> None:
        """Have the map do something."""
        await self.app.run_action(act, self.pane)

    def action_filter(self) -> None:
        """Ask which devices to show."""
        self.query_one(FilterLine).ask()

    @on(Input.Changed, "#filter")
    def _filter_changed(self, event: Input.Changed) -> None:
        self._set_filter(event.value)

    @on(FilterLine.Done)
    def _filter_done(self) -> None:
        self.query_one(DeviceTable).focus()

    def _set_filter(self, words: str) -> None:
        self._filter = words
        self._show_all()

    @on(DataTable.RowHighlighted, "#devices")
    def _device_chosen(self) -> None:
        self._show_device()

    @on(DataTable.RowHighlighted, "#snapshots")
    def _snapshot_chosen(self) -> None:
        self._show_snapshot()

    @on(DataTable.RowSelected, "#snapshots")
    def _snapshot_picked(self) -> None:
        """Show what changed since the snapshot that was picked: the next increment after it."""
        snapshot, device = self.snapshot, self.device
        if snapshot is None:
            return
        images = {image.device: image for image in self._state.images_of(snapshot)}
        if device is None or device.object_path not in images:
            device = next((self._state.device(path) for path in images), None)
        if device is not None and device.tracker is not None:
            image = images[device.object_path]
            if image.generation_id != device.tracker.generation_id:
                self.notify(
                    "this snapshot is of an older history: nothing can be counted since it", markup=False
                )
                return
            self.choose(device.object_path)
            self._show_device()
            self.pane.count_since(image.changes_number)

    def set_palette(self, palette: Palette) -> None:
        """Draw with other colours."""
        self._palette = palette
        self.pane.use_palette(palette)
        self._show_all()

    # ---- showing

    def _show_all(self) -> None:
        now_us = self.desk.now_us()
        self.query_one(Footer).compact = self.app.size.width < 100
        table = self.query_one(DeviceTable)
        table.show(self._state.devices, wide=self.app.size.width >= WIDE, words=self._filter)
        subtitle = f"{table.row_count} of {len(self._state.devices)}: {self._filter}" if self._filter else ""
        self._title("#devices", "devices", subtitle)
        self.query_one(SnapshotTable).show(self._state, now_us=now_us, width=self.app.size.width)
        self.set_class(not self._state.snapshots, "-no-snapshots")
        self._show_snapshot()
        self._show_device()
        self.show_status()

    def show_status(self) -> None:
        """Write the status line."""
        self.query_one(StatusBar).show(
            self._state,
            bus=self.desk.source or self.desk.bus,
            held=None if self._held is None else self._held_count,
            note=self.desk.note,
            silent_s=self.desk.silent_s,
        )

    def _show_device(self) -> None:
        device, now_us = self.device, self.desk.now_us()
        info = None if device is None else self._infos.get(device.object_path)
        self._title("#facts-box", "device" if device is None else device.name)
        self.query_one(Facts).show(device, info, now_us=now_us)
        self.pane.show(self._state if self._known else None, device, info, now_us=now_us)

    def _show_snapshot(self) -> None:
        """Write on the border what the row of the chosen snapshot may have no room for."""
        snapshot = self.snapshot
        if snapshot is None:
            self._title("#lower", "snapshots")
            return
        where = f"kept in {snapshot.storage_path}" if snapshot.storage_path else ""
        words = snapshot.error or " · ".join(filter(None, (snapshot.description, where)))
        self._title("#lower", "snapshots", words)

    def _title(self, selector: str, title: str, subtitle: str = "") -> None:
        """Write on a border, unless it is there already: Textual draws all of a box again for it."""
        if self._borders.get(selector) != (title, subtitle):
            self._borders[selector] = (title, subtitle)
            box = self.query_one(selector)
            # Escaped: a device may be called [red].
            box.border_title, box.border_subtitle = Content(title).markup, Content(subtitle).markup
