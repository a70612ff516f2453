# SPDX-License-Identifier: GPL-2.0-or-later
"""The line one writes words into to see less; it is there only while it says something."""

from __future__ import annotations

from typing import ClassVar

from textual import events
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.widgets import Input


class FilterLine(Input):
    """Enter keeps the words, escape drops them; both leave the line."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "drop", "show all", show=False, id="filter.drop"),
        Binding("enter", "keep", "filter", show=False, id="filter.keep"),
    ]

    class Done(Message):
        """The line was left with a key."""

    def __init__(self, *, id: str) -> None:  # noqa: A002 - Textual's name for it
        super().__init__(id=id, placeholder="words to look for", compact=True)
        self.display = False

    def ask(self) -> None:
        """Let words be written."""
        self.display = True
        self.focus()

    def on_blur(self, _event: events.Blur) -> None:
        """Go away when there is nothing to show."""
        self.display = bool(self.value)

    def action_keep(self) -> None:
        """Leave the line with its words."""
        self.post_message(self.Done())

    def action_drop(self) -> None:
        """Leave the line without words."""
        self.clear()
        self.post_message(self.Done())
