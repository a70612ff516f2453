# SPDX-License-Identifier: GPL-2.0-or-later
"""The log of what happened: the service's signals, what came and went, connections lost and found. Newest at the end."""

from __future__ import annotations

from typing import ClassVar

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.widgets import Footer, Input, RichLog, Static

from blksnap_tui.history import EVENTS_KEPT, Entry
from blksnap_tui.screens.board import BOARD_BINDINGS, Board
from blksnap_tui.units import format_time
from blksnap_tui.widgets.filter import FilterLine
from blksnap_tui.widgets.status import StatusBar
from blksnap_tui.widgets.words import Tone, style_of

_TONES: dict[str, tuple[str, Tone]] = {
    "information": ("·", "dim"),
    "warning": ("▲", "busy"),
    "error": ("✕", "bad"),
}


class Lines(RichLog):
    """The lines of the log."""

    HELP = "What happened since the program was started, at most the last 1000 things. / shows only lines with some words."


class EventsScreen(Board):
    """The log, with a filter."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("slash", "filter", "filter", id="view.filter", tooltip="show only lines with these words"),
        *BOARD_BINDINGS,
    ]

    _written = -1

    def compose(self) -> ComposeResult:
        """Lay it out."""
        yield StatusBar(id="status")
        with Vertical(id="all"):
            yield FilterLine(id="filter")
            yield Lines(id="lines", max_lines=EVENTS_KEPT, wrap=False, auto_scroll=True)
            yield Static("nothing has happened since the program was started", id="nothing", markup=False)
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        """Show what there is."""
        self.query_one("#all").border_title = "events"
        self.query_one(Lines).focus()
        self._rewrite()

    def show_news(self) -> None:
        """Append what is new."""
        log, lines = self.desk.log, self.query_one(Lines)
        missing = log.count - self._written
        self._written = log.count
        for entry in list(log)[-missing:] if 0 < missing <= len(log) else (log if missing else ()):
            if entry.matches(self._words):
                lines.write(self._line(entry), shrink=False)
        lines.display = bool(len(log))
        self.query_one("#nothing").display = not len(log)
        shown = f"lines with: {self._words}" if self._words else ""
        self.query_one("#all").border_subtitle = shown.replace("[", r"\[")
        self.show_status()

    @property
    def _words(self) -> str:
        return self.query_one(FilterLine).value

    def _rewrite(self) -> None:
        self.query_one(Lines).clear()
        self._written = self.desk.log.count - len(self.desk.log)
        self.show_news()

    def _line(self, entry: Entry) -> Text:
        glyph, tone = _TONES[entry.severity]
        style = style_of(self.app, tone)
        when = format_time(entry.at_us, now_us=self.desk.now_us())
        word = "" if entry.severity == "information" else f"{entry.severity}: "
        return Text.assemble(
            (when, "dim"), " ", (glyph, style), " ", (entry.subject, "bold"), "  ", (word, style), entry.text
        )

    def action_filter(self) -> None:
        """Ask which lines to show."""
        self.query_one(FilterLine).ask()

    @on(Input.Changed, "#filter")
    def _filter_changed(self) -> None:
        self._rewrite()

    @on(FilterLine.Done)
    def _filter_done(self) -> None:
        self.query_one(Lines).focus()
