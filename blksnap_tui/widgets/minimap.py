# SPDX-License-Identifier: GPL-2.0-or-later
"""One line with all of the device, and the part that the map shows marked in it."""

from __future__ import annotations

from itertools import groupby

from rich.color import Color
from rich.style import Style
from rich.text import Text
from textual import events
from textual.message import Message

from blksnap_tui.heat.grid import Window
from blksnap_tui.heat.ramp import Palette
from blksnap_tui.widgets.steady import SteadyText

MARK = (230, 194, 41)


class Minimap(SteadyText):
    """Upper halves are the device, lower halves mark what is shown; with glyphs what is shown is reversed."""

    class Chosen(Message):
        """Somebody clicked at this share of the device."""

        def __init__(self, share: float) -> None:
            super().__init__()
            self.share = share

    def show(self, levels: bytes, shown: Palette, window: Window, total: int) -> None:
        """Draw one level per column, and the window."""
        cols = len(levels)
        first = window.first * cols // total
        last = max(-(-(window.first + window.count) * cols // total), first + 1)
        text = Text(no_wrap=True)
        keys = [(level, first <= col < last) for col, level in enumerate(levels)]
        for (level, inside), run in groupby(keys):
            length = sum(1 for _ in run)
            if shown.glyphs:
                text.append(shown.glyphs[level] * length, Style(reverse=inside))
                continue
            colour = Color.from_rgb(*shown.colours[level])
            below = Color.from_rgb(*MARK) if inside else Color.from_rgb(*shown.colours[0])
            text.append("▀" * length, Style(color=colour, bgcolor=below))
        self.write(text)

    def on_click(self, event: events.Click) -> None:
        """Go where the mouse is."""
        if self.size.width:
            self.post_message(self.Chosen((event.x + 0.5) / self.size.width))
