# SPDX-License-Identifier: GPL-2.0-or-later
"""Help made of the keys that work where it was asked for, and of what the focused part says of itself."""

from __future__ import annotations

from typing import ClassVar

from rich.table import Table
from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen, Screen
from textual.widgets import Static

from blksnap_tui.model import Manager


class HelpScreen(ModalScreen[None]):
    """Shows keys, the focused part's own words, and which backends work here."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q,question_mark,f1", "dismiss", "close", id="help.close"),
    ]

    def __init__(self, asked_from: Screen[object], manager: Manager | None) -> None:
        super().__init__()
        self._asked_from, self._manager = asked_from, manager

    def compose(self) -> ComposeResult:
        """Lay it out."""
        scroll = VerticalScroll(classes="box help")
        scroll.border_title = "help"
        scroll.border_subtitle = "escape closes"
        with scroll:
            focused = self._asked_from.focused
            words = getattr(focused, "HELP", "")
            if words:
                yield Static(words, markup=False)
            if self._manager is not None and self._manager.backends:
                yield Static(self._backends(self._manager))
            yield Static(self._keys())

    def _keys(self) -> Table:
        """List our own keys that work there: they have ids, Textual's for scrolling and typing have none."""
        table = Table.grid(padding=(0, 2))
        seen: set[str] = set()
        for key, (_, binding, enabled, tooltip) in self._asked_from.active_bindings.items():
            if (
                not binding.id
                or not (binding.tooltip or binding.show)
                or binding.action in seen
                or not enabled
            ):
                continue
            seen.add(binding.action)
            shown = self.app.get_key_display(binding) if binding.key == key else key
            table.add_row(Text(shown, "bold"), Text(tooltip or binding.description))
        return table

    @staticmethod
    def _backends(manager: Manager) -> Table:
        table = Table.grid(padding=(0, 2))
        table.add_row(Text("backends of this machine", "bold"), "")
        for backend in manager.backends:
            can = ", ".join(backend.abilities)
            glyph = "●" if backend.available else "○"
            table.add_row(f"{glyph} {backend.name}", can if backend.available else backend.reason)
        return table
