# SPDX-License-Identifier: GPL-2.0-or-later
"""Snapshots closely: how full each storage is and when it will be at this rate, and the images with where they are to be had."""

from __future__ import annotations

import math
from typing import ClassVar

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.widgets import DataTable, Footer, Static

from blksnap_tui.history import snapshot_name
from blksnap_tui.model import Device, Image, Snapshot
from blksnap_tui.screens.board import ACT_BINDINGS, BOARD_BINDINGS, Board
from blksnap_tui.units import format_age, format_size, format_time
from blksnap_tui.widgets.snapshot_table import SnapshotTable
from blksnap_tui.widgets.status import StatusBar
from blksnap_tui.widgets.steady import SteadyText
from blksnap_tui.widgets.table import Cell, RowTable
from blksnap_tui.widgets.words import style_of

_IMAGES = (
    ("device", "image of", 24),
    ("size", "size", 9),
    ("where", "where", None),
)

# Nobody plans further ahead.
_FAR_S = 30 * 86_400.0
# From here on it is worth a colour.
_SOON_S = 3_600.0


class ImageTable(RowTable):
    """One row per image of the chosen snapshot."""

    HELP = "The devices as they were at the instant of the snapshot. Enter or o opens one: it is served if it is not, and where is copied."


class SnapshotsScreen(Board):
    """The snapshots, newest first, with all there is to know of the chosen one."""

    BINDINGS: ClassVar[list[BindingType]] = [
        *ACT_BINDINGS,
        Binding("o", "open_image", "open", id="image.open", tooltip="open an image and copy where it is"),
        Binding("R", "app.release", "release", id="snapshot.release", tooltip="let a held snapshot stay"),
        *BOARD_BINDINGS,
    ]

    def compose(self) -> ComposeResult:
        """Lay it out."""
        yield StatusBar(id="status")
        with Vertical(id="all"):
            yield SnapshotTable(id="snapshots")
            yield Static(
                "no snapshots yet: 1 leads to the devices, s takes a snapshot", id="nothing", markup=False
            )
        with VerticalScroll(id="details", can_focus=False):
            yield SteadyText("", id="facts")
        with Vertical(id="images-box"):
            yield ImageTable(_IMAGES, id="images")
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        """Show what there is; forecasts change as time goes on."""
        self.query_one("#all").border_title = "snapshots"
        self.query_one("#images-box").border_title = "images"
        self.show_news()
        self.set_interval(1.0, self.show_news)

    @property
    def snapshot(self) -> Snapshot | None:
        """Give the chosen snapshot."""
        chosen = self.query_one(SnapshotTable).chosen
        return None if chosen is None else self.desk.state.snapshot(chosen)

    @property
    def device(self) -> Device | None:
        """Give the device of the chosen image."""
        snapshot = self.snapshot
        image = self.image
        if image is not None:
            return self.desk.state.device(image.device)
        return None if snapshot is None else self.desk.state.device(next(iter(snapshot.devices), ""))

    @property
    def image(self) -> Image | None:
        """Give the chosen image."""
        chosen = self.query_one(ImageTable).chosen
        return next((image for image in self.desk.state.images if image.object_path == chosen), None)

    def show_news(self) -> None:
        """Show all of it."""
        state = self.desk.state
        table = self.query_one(SnapshotTable)
        table.show(state, now_us=self.desk.now_us(), width=self.app.size.width)
        for selector in ("#snapshots", "#details", "#images-box"):
            self.query_one(selector).display = bool(state.snapshots)
        self.query_one("#nothing").display = not state.snapshots
        self._show_chosen()
        self.show_status()

    @on(DataTable.RowHighlighted, "#snapshots")
    def _show_chosen(self) -> None:
        snapshot, state = self.snapshot, self.desk.state
        if snapshot is None:
            return
        self.query_one("#details").border_title = "chosen"
        self.query_one("#facts", SteadyText).write(self._facts(snapshot))
        rows: dict[str, tuple[Cell, ...]] = {}
        for image in state.images_of(snapshot):
            device = state.device(image.device)
            name = image.device.rpartition("/")[2] if device is None else device.name
            where = Text(image.error, style_of(self.app, "bad")) if image.error else _where(image)
            rows[image.object_path] = (
                Text(f"{name} #{image.changes_number}"),
                format_size(image.size),
                where,
            )
        self.query_one(ImageTable).show_rows(rows)

    def _facts(self, snapshot: Snapshot) -> Text:
        now_us = self.desk.now_us()
        used, allocated, limit = map(
            format_size, (snapshot.storage_used, snapshot.storage_allocated, snapshot.storage_limit)
        )
        lines: list[tuple[str, str | Text]] = [
            ("of", snapshot_name(self.desk.state, snapshot)),
            ("state", f"{snapshot.state}: {snapshot.error}" if snapshot.error else snapshot.state),
            ("full", self._forecast(snapshot)),
            (
                "storage",
                f"{used} used, {allocated} allocated, at most {limit}, in {snapshot.storage_path or '-'}",
            ),
            (
                "taken",
                f"{format_time(snapshot.taken_at, now_us=now_us)}, by uid {snapshot.owner_uid}"
                + (", held: it ends when its owner leaves (R lets it stay)" if snapshot.held else ""),
            ),
            ("about", snapshot.description or "-"),
            ("id", snapshot.id),
        ]
        text = Text(no_wrap=True, overflow="ellipsis")
        for at, (label, value) in enumerate(lines):
            text.append(("\n" if at else "") + label.ljust(9), "dim")
            text.append(value)
        return text

    def _forecast(self, snapshot: Snapshot) -> Text:
        """Say when the storage will be full if it goes on like this."""
        if snapshot.state == "failed":
            return Text("failed already", style_of(self.app, "bad"))
        left_s, growth = self.desk.storage.full_in_s(snapshot), self.desk.storage.growth(snapshot)
        if left_s is None or growth is None:
            return Text("not known yet: nothing was seen of its growth")
        if math.isinf(left_s):
            return Text("not at this rate: it has not grown of late")
        rate = f"at {format_size(growth)}/s"
        if left_s > _FAR_S:
            return Text(f"not within a month {rate}")
        return Text(
            f"in about {format_age(left_s)} {rate}", style_of(self.app, "bad") if left_s < _SOON_S else ""
        )

    @on(DataTable.RowSelected, "#images")
    def action_open_image(self) -> None:
        """Open the chosen image."""
        image, device = self.image, self.device
        if image is None:
            self.notify("there is no image to open")
        else:
            name = image.device.rpartition("/")[2] if device is None else device.name
            self.app.call_later(self.app.run_action, f"open_image({image.object_path!r}, {name!r})")


def _where(image: Image) -> Text:
    return Text(image.path or image.nbd_uri or "not served: o serves it", no_wrap=True, overflow="ellipsis")
