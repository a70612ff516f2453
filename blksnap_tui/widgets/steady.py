# SPDX-License-Identifier: GPL-2.0-or-later
"""A piece of text whose place does not depend on what it says."""

from __future__ import annotations

from rich.text import Text
from textual.widgets import Static


class SteadyText(Static):
    """
    Shows a text without laying out the screen again unless it has another number of lines, and nothing at all when
    it is the same text.

    A layout draws every line of every widget once more: the difference between 2 % and 8 % of a processor at 2 Hz.
    """

    _written: Text | str | None = None

    def write(self, text: Text | str) -> None:
        """Show a text."""
        before, self._written = self._written, text
        if text != before:
            self.update(text, layout=before is None or _lines(text) != _lines(before))


def _lines(text: Text | str) -> int:
    return str(text).count("\n")
