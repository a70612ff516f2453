# SPDX-License-Identifier: GPL-2.0-or-later
"""The line under the map that says what its colours mean."""

from __future__ import annotations

from rich.color import Color
from rich.style import Style
from rich.text import Text

from blksnap_tui.heat.ramp import Palette
from blksnap_tui.model import Tracker
from blksnap_tui.widgets.map_words import Shown
from blksnap_tui.widgets.steady import SteadyText

# Narrower than this the legend shows every other colour.
LEGEND_WIDTH, LEGEND_STEPS = 64, 12


class Legend(SteadyText):
    """The real colours of the map with words at both ends."""

    _explained: tuple[object, ...] | None = None

    def show(self, palette: Palette, shown: Shown, tracker: Tracker | None) -> None:
        """Explain a palette in a mode and layout."""
        explained = (palette, shown.mode, shown.layout, shown.since, tracker, self.size.width)
        if explained == self._explained:
            return
        self._explained = explained
        if tracker is None:
            self.write("")
            return
        narrow, tiny = self.size.width < LEGEND_WIDTH, self.size.width < LEGEND_WIDTH - 16
        nothing, low, high = _ends(shown, tracker, narrow=narrow, tiny=tiny)
        never = self._swatch(palette, 0, 2)
        if not low:
            newest = self._swatch(palette, palette.levels - 1, 2)
            self.write(Text.assemble(" ", never, f" {nothing}  ", newest, f" {high}", no_wrap=True))
            return
        step = 1 if palette.levels <= LEGEND_STEPS or not narrow else 3 if tiny else 2
        ramp = [self._swatch(palette, level, 1) for level in range(1, palette.levels, step)]
        self.write(Text.assemble(" ", never, f" {nothing}  ", low, " ", *ramp, " ", high, no_wrap=True))

    @staticmethod
    def _swatch(shown: Palette, level: int, width: int) -> Text:
        if shown.glyphs:
            return Text(shown.glyphs[level] * width)
        return Text(" " * width, style=Style(bgcolor=Color.from_rgb(*shown.colours[level])))


def _ends(shown: Shown, tracker: Tracker, *, narrow: bool, tiny: bool) -> tuple[str, str, str]:
    """Give the words for level 0 and both ends of the ramp; no low end where there is one other level only."""
    if shown.layout == "time":
        return "nothing", "a little", "all" if narrow else "all changed last in the interval"
    if shown.mode == "age":
        low = f"oldest #{max(tracker.oldest_number, 1)}"
        return "never", low.removeprefix("oldest ") if tiny else low, f"#{tracker.active_number} now"
    if shown.mode == "since":
        return "the same", "", "changed" if tiny else f"changed since #{shown.since}"
    if shown.mode == "density":
        return "nothing", "a little", "all" if narrow else f"all of it changed since #{shown.since}"
    return "never", "seldom", "always" if narrow else "in every interval seen"
