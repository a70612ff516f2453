# SPDX-License-Identifier: GPL-2.0-or-later
"""The single lines of the main screen: status above, legend and inspector under the map."""

from __future__ import annotations

from rich.color import Color
from rich.style import Style
from rich.text import Text

from blksnap_tui.heat.grid import Grid, age_of
from blksnap_tui.heat.ramp import Palette
from blksnap_tui.model import Device, State, Tracker
from blksnap_tui.units import format_count, format_size
from blksnap_tui.widgets.steady import SteadyText
from blksnap_tui.widgets.words import style_of

# Narrower than this the legend shows every other colour.
LEGEND_WIDTH, LEGEND_STEPS = 64, 12


def _plural(count: int, word: str) -> str:
    return f"{count} {word}" + ("" if count == 1 else "s")


class StatusBar(SteadyText):
    """Whose state is shown, how much there is of it, and whether it is fresh."""

    def show(self, state: State, *, bus: str, paused: bool, held: int, note: str = "") -> None:
        """Show the sums of a state; `held` updates wait for the end of a pause, `note` is an alarm."""
        tracked = sum(device.tracker is not None for device in state.devices)
        where = f"{bus} bus" if bus in ("system", "session") else "private bus"
        version = "" if state.manager is None else f" {state.manager.version}"
        left = Text.assemble(
            (" blksnap", "bold"),
            (f"{version} · {where} · ", "dim"),
            f"{tracked} of {_plural(len(state.devices), 'device')} tracked · ",
            _plural(len(state.snapshots), "snapshot"),
        )
        if paused:
            right = Text(
                f" PAUSED · {_plural(held, 'update')} held ", style=f"reverse {style_of(self.app, 'busy')}"
            )
        elif note:
            right = Text(f" {note} ", style=style_of(self.app, "bad"))
        else:
            right = Text("● live ", style=style_of(self.app, "good"))
        room = self.size.width - left.cell_len - right.cell_len
        if room < 1:
            left.truncate(max(0, self.size.width - right.cell_len - 1), overflow="ellipsis")
            room = self.size.width - left.cell_len - right.cell_len
        self.write(Text.assemble(left, " " * max(room, 0), right, no_wrap=True))


class Legend(SteadyText):
    """The real colours of the map with words at both ends."""

    _explained: tuple[object, ...] | None = None

    def show(self, shown: Palette, mode: str, tracker: Tracker | None) -> None:
        """Explain a palette in a mode."""
        explained = (shown, mode, tracker, self.size.width)
        if explained == self._explained:
            return
        self._explained = explained
        if tracker is None:
            self.write("")
            return
        narrow = self.size.width < LEGEND_WIDTH
        tiny = self.size.width < LEGEND_WIDTH - 16
        if mode == "age":
            low, high = f"oldest #{max(tracker.oldest_number, 1)}", f"#{tracker.active_number} now"
            low = low.removeprefix("oldest ") if tiny else low
        else:
            low, high = "a little", "all" if narrow else f"all of it changed since #{tracker.changes_number}"
        nothing = "never" if mode == "age" else "nothing"
        never = self._swatch(shown, 0, 2)
        step = 1 if shown.levels <= LEGEND_STEPS or not narrow else 3 if tiny else 2
        ramp = [self._swatch(shown, level, 1) for level in range(1, shown.levels, step)]
        self.write(Text.assemble(" ", never, f" {nothing}  ", low, " ", *ramp, " ", high, no_wrap=True))

    @staticmethod
    def _swatch(shown: Palette, level: int, width: int) -> Text:
        if shown.glyphs:
            return Text(shown.glyphs[level] * width)
        return Text(" " * width, style=Style(bgcolor=Color.from_rgb(*shown.colours[level])))


class Inspector(SteadyText):
    """What is under the map's cursor."""

    def show(
        self, device: Device | None, grid: Grid | None, index: int, value: int | None, mode: str
    ) -> None:
        """Describe a bin; `value` is its byte in the last frame, None when there is none."""
        tracker = None if device is None else device.tracker
        if tracker is None or grid is None or value is None:
            self.write("")
            return
        blocks = grid.blocks(index)
        offset = blocks.start * tracker.block_size
        length = min(len(blocks) * tracker.block_size, tracker.capacity - offset)
        which = (
            f"block {format_count(blocks.start)}"
            if len(blocks) == 1
            else f"blocks {format_count(blocks.start)} to {format_count(blocks[-1])}"
        )
        self.write(
            Text.assemble(
                (" ▸ ", "bold"),
                which,
                (" · ", "dim"),
                f"{format_size(length)} at {format_size(offset)}",
                (" · ", "dim"),
                _changed(value, mode, tracker),
                no_wrap=True,
                overflow="ellipsis",
            )
        )


def _changed(value: int, mode: str, tracker: Tracker) -> str:
    if mode == "density":
        return f"{value / 2.55:.0f} % changed since #{tracker.changes_number}" if value else "nothing changed"
    age = age_of(value)
    if age is None:
        return "never changed"
    number = tracker.active_number - age
    return f"last changed in interval #{number}" + (
        " (now)" if age == 0 else f" ({_plural(age, 'snapshot')} ago)"
    )
