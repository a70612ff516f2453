# SPDX-License-Identifier: GPL-2.0-or-later
"""All devices at one look: state, what tracks them, how much is written to them now, what the next increment costs, space."""

from __future__ import annotations

from typing import ClassVar

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Vertical
from textual.widgets import DataTable, Footer, Static

from blksnap_tui.history import sparkline
from blksnap_tui.model import Device
from blksnap_tui.screens.board import ACT_BINDINGS, BOARD_BINDINGS, Board
from blksnap_tui.units import format_share, format_size
from blksnap_tui.widgets.status import StatusBar
from blksnap_tui.widgets.table import Cell, RowTable
from blksnap_tui.widgets.words import device_state, fill_tone, style_of

_WIDE_FROM = 110
_SPARK = {False: 16, True: 40}

_COMMON = (("device", "device", 20), ("state", "state", 12), ("size", "    size", 8))
_NARROW = (*_COMMON, ("rate", "written now", 12), ("spark", "of late", _SPARK[False]))
_WIDE = (
    *_COMMON,
    ("by", "by", 9),
    ("rate", "written now", 12),
    ("spark", "of late", _SPARK[True]),
    ("since", "changed since", 22),
    ("space", "fullest snapshot", None),
)


class OverviewTable(RowTable):
    """One row per device."""

    HELP = (
        "Every device with what is written to it: the line shows the last minutes, its highest bar is the most there was; a dot is a time "
        "nothing was known. Enter shows the device's map."
    )


class OverviewScreen(Board):
    """The overview; enter leads to a device's map."""

    BINDINGS: ClassVar[list[BindingType]] = [*ACT_BINDINGS, *BOARD_BINDINGS]

    def compose(self) -> ComposeResult:
        """Lay it out."""
        yield StatusBar(id="status")
        with Vertical(id="all"):
            yield OverviewTable(_NARROW, id="overview")
            yield Static("no devices yet: a adds an image file", id="nothing", markup=False)
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        """Show what there is, and what is written as time goes on."""
        self.query_one("#all").border_title = "all devices"
        self.show_news()
        self.set_interval(1.0, self.show_news)

    @property
    def device(self) -> Device | None:
        """Give the chosen device."""
        chosen = self.query_one(OverviewTable).chosen
        return None if chosen is None else self.desk.state.device(chosen)

    def show_news(self) -> None:
        """Show all of it; only cells that differ are drawn."""
        wide, devices = self.app.size.width >= _WIDE_FROM, self.desk.state.devices
        table = self.query_one(OverviewTable)
        table.set_columns(_WIDE if wide else _NARROW)
        table.show_rows({device.object_path: self._row(device, wide=wide) for device in devices})
        table.display = bool(devices)
        self.query_one("#nothing").display = not devices
        self.show_status()

    @on(DataTable.RowSelected, "#overview")
    async def _picked(self) -> None:
        if device := self.device:
            await self.app.run_action(f"show_device({device.object_path!r})")

    def _row(self, device: Device, *, wide: bool) -> tuple[Cell, ...]:
        glyph, word, tone = device_state(device)
        style = style_of(self.app, tone)
        rates = self.desk.rates.rates(device.object_path)
        rate = self.desk.rates.latest(device.object_path)
        tracker = device.tracker
        cells: tuple[Cell, ...] = (
            Text(device.name, overflow="ellipsis", no_wrap=True),
            Text.assemble((glyph, style), " ", (word, style if tone == "bad" else "")),
            Text(format_size(device.size), justify="right"),
        )
        now = Text("-" if rate is None else f"{format_size(rate)}/s", justify="right")
        line = Text(sparkline(rates, _SPARK[wide]) if tracker is not None else "", style_of(self.app, "good"))
        if not wide:
            return *cells, now, line
        by = Text("-" if tracker is None else tracker.backend)
        return *cells, by, now, line, self._since(device), self._space(device)

    def _since(self, device: Device) -> Text:
        tracker, changed = device.tracker, self.desk.changed.get(device.object_path)
        if tracker is None or changed is None:
            return Text("-")
        share = format_share(changed, tracker.block_count)
        return Text(f"#{tracker.shown_since}: {format_size(changed * tracker.block_size)}, {share}")

    def _space(self, device: Device) -> Text:
        shares = [
            (snapshot.storage_used / snapshot.storage_limit, snapshot)
            for snapshot in self.desk.state.snapshots
            if device.object_path in snapshot.devices and snapshot.storage_limit
        ]
        if not shares:
            return Text("-")
        share, fullest = max(shares, key=lambda pair: pair[0])
        if fullest.state == "failed":
            return Text("failed", style_of(self.app, "bad"))
        tone = fill_tone(fullest.storage_used, fullest.storage_limit)
        return Text(f"{share:.0%} of {format_size(fullest.storage_limit)}", style_of(self.app, tone))
