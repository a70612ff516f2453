# SPDX-License-Identifier: GPL-2.0-or-later
"""
The map of one device with all that belongs to it: minimap, legend, inspector, and what the keys do to it.

It is given values and says what it wants drawn (`Wanting`) and counted (`Looking`). Which device that is, is decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from textual import on
from textual.app import ComposeResult
from textual.containers import Vertical
from textual.content import Content
from textual.message import Message
from textual.widgets import Static

from blksnap_tui.heat.grid import ZOOM, Window
from blksnap_tui.heat.layout import bin_at, place_of
from blksnap_tui.heat.ramp import Palette, palette
from blksnap_tui.heat.view import View, painted, table_of, timeline_of, total_blocks, wanted_for
from blksnap_tui.heat.widget import HeatMap
from blksnap_tui.messages import Counts, Frame, Spot, Wanted
from blksnap_tui.model import Device, State, Tracker
from blksnap_tui.widgets.inspector import Inspector, Pointed
from blksnap_tui.widgets.legend import Legend
from blksnap_tui.widgets.map_words import CONNECTING, Shown, hint, titles
from blksnap_tui.widgets.minimap import Minimap

# Zoomed in further there would be less than this many blocks to see.
FEWEST_BLOCKS: Final = 16


class MapPane(Vertical):
    """The map of the chosen device."""

    class Wanting(Message):
        """This is wanted drawn now; None when there is nothing to draw."""

        def __init__(self, wanted: Wanted | None) -> None:
            super().__init__()
            self.wanted = wanted

    class Looking(Message):
        """The cursor is on these blocks; None when it is on none."""

        def __init__(self, spot: Spot | None) -> None:
            super().__init__()
            self.spot = spot

    def __init__(self, *, id: str) -> None:  # noqa: A002 - Textual's name for it
        super().__init__(id=id)
        self.view = View()
        self.failure = ""
        self._palette = palette()
        self._state: State | None = None
        self._device: Device | None = None
        self._info: Mapping[str, Any] | None = None
        self._restarted: dict[str, tuple[str, str]] = {}
        self._now_us = 0
        self._window: Window | None = None
        self._room: tuple[int, int] | None = None
        self._pointed = (0, 0)
        self._about: int | None = None
        self._looking: Spot | None = None
        self._wanted: Wanted | None = None
        self._frame: Frame | None = None
        self._counts: Counts | None = None
        self._painted: tuple[object, ...] = ()
        self._border: tuple[str, str] | None = None

    def compose(self) -> ComposeResult:
        """Lay it out."""
        yield Minimap(id="minimap")
        yield HeatMap(id="heat")
        yield Static(CONNECTING, id="hint", markup=False)
        yield Legend(id="legend")
        yield Inspector(id="inspector")

    # ---- what it is given

    def show(
        self, state: State | None, device: Device | None, info: Mapping[str, Any] | None, *, now_us: int
    ) -> None:
        """Show a device of a state (None before there is one), with its tracker's last reading."""
        before, self._state, self._device, self._info, self._now_us = (
            self._device,
            state,
            device,
            info,
            now_us,
        )
        if before is None or device is None or before.object_path != device.object_path:
            self._window, self.failure = None, ""
            self.view = replace(self.view, since=None)
        elif self.tracker is not None and not self.view.holds_for(before.tracker, self.tracker):
            self.view = replace(self.view, since=None)
        self.refresh_map()

    def take_frame(self, frame: Frame) -> None:
        """Draw what came, if it is still wanted."""
        if frame.wanted == self._wanted:
            self._frame, self.failure = frame, ""
            self._paint()
            # What is under the cursor may have changed with it.
            self._look(again=True)

    def take_failure(self, device: str, text: str) -> None:
        """Say why there is no map."""
        if self._wanted is not None and self._wanted.device == device:
            self.failure, self._frame = text, None
            self._paint()

    def take_counts(self, counts: Counts) -> None:
        """Show what was counted, if the cursor is still there."""
        if counts.spot == self._looking:
            self._counts = counts
            self._inspect()

    def restarted(self, device: str, generation_id: str, reason: str) -> None:
        """Remember that a device's history restarted, to say so until its next snapshot."""
        self._restarted[device] = (generation_id, reason)
        self._paint()

    def use_palette(self, value: Palette) -> None:
        """Draw with other colours."""
        self._palette = value
        self.query_one(HeatMap).palette = value
        self._paint()

    # ---- what can be asked of it

    @property
    def tracker(self) -> Tracker | None:
        """Give the tracker of the device that is shown."""
        return None if self._device is None else self._device.tracker

    @property
    def since(self) -> int:
        """Give the number that increments are counted from."""
        return 0 if self.tracker is None else self.view.since_number(self.tracker)

    @property
    def window(self) -> Window:
        """Give what is shown, as far as the device goes."""
        total = self._total
        return Window(0, total) if self._window is None else self._window.moved(0, total)

    @property
    def zoomed(self) -> bool:
        """Say whether less than the whole device is shown."""
        return self.tracker is not None and self.window.count < self._total

    @property
    def is_drawn(self) -> bool:
        """Say whether what is wanted is on the screen."""
        return self._frame is not None and self._frame.wanted == self._wanted

    @property
    def spot(self) -> Spot | None:
        """Give the blocks under the cursor."""
        frame, device = self._frame, self._device
        if frame is None or device is None or self._room is None:
            return None
        grid, (col, row) = frame.wanted.grid, self._inside(*self._pointed)
        if self.view.layout == "time":
            first, last = grid.blocks(row * grid.cols), grid.blocks((row + 1) * grid.cols - 1)
            return Spot(device.object_path, range(first.start, last.stop))
        index = bin_at(self.view.layout, grid.cols, grid.rows, row * grid.cols + col)
        return Spot(device.object_path, grid.blocks(index))

    @property
    def byte_range(self) -> tuple[int, int] | None:
        """Give offset and length in bytes of what is under the cursor."""
        spot, tracker = self.spot, self.tracker
        if spot is None or tracker is None:
            return None
        offset = spot.blocks.start * tracker.block_size
        return offset, min(len(spot.blocks) * tracker.block_size, tracker.capacity - offset)

    def value_of_block(self, block: int) -> int | None:
        """Give the byte the last frame has for a block; None when it is not shown."""
        try:
            return None if self._frame is None else self._frame.values[self._frame.wanted.grid.bin_of(block)]
        except IndexError:
            return None

    # ---- what keys and mouse do

    def action_mode(self) -> None:
        """Go to the next mode."""
        self._see(self.view.next_mode())

    def action_layout(self) -> None:
        """Go to the next layout."""
        self._see(self.view.next_layout())

    def action_since(self, step: int) -> None:
        """Count increments from another snapshot: the one before, or the one after."""
        self.count_since(self.since + step)

    def count_since(self, number: int) -> None:
        """Count increments from a number, as far as the map remembers."""
        if self.tracker is not None:
            self._see(self.view.counting_since(number, self.tracker))

    def action_zoom(self, direction: int) -> None:
        """Zoom in (1) or out (-1) about the cursor, or show all (0)."""
        spot = self.spot
        if self.tracker is None or spot is None:
            return
        about = spot.blocks.start if self._about is None or not self.is_drawn else self._about
        window, total = self.window, self._total
        count = total
        if direction:
            count = window.count // ZOOM if direction > 0 else window.count * ZOOM
        self._move(window.zoomed(about, max(count, min(FEWEST_BLOCKS, total)), total), about)

    def go_to(self, block: int) -> None:
        """Show a block, with the cursor on it."""
        if self.tracker is not None:
            block = min(block, self._total - 1)
            window = self.window
            inside = window.first <= block < window.first + window.count
            self._move(window if inside else window.around(block, self._total), block)

    @on(HeatMap.Beyond)
    def _beyond(self, event: HeatMap.Beyond) -> None:
        if self._room is not None:
            self._pan(event.rows * self.window.count // self._room[1])

    @on(HeatMap.Dragged)
    def _dragged(self, event: HeatMap.Dragged) -> None:
        if self._room is not None:
            cols, rows = self._room
            self._pan(-(event.rows * cols + event.cols) * self.window.count // (cols * rows))

    @on(HeatMap.Wheel)
    def _wheel(self, event: HeatMap.Wheel) -> None:
        self.action_zoom(event.direction)

    @on(Minimap.Chosen)
    def _minimap_chosen(self, event: Minimap.Chosen) -> None:
        if self.tracker is not None:
            window = self.window.around(int(event.share * self._total), self._total)
            self._move(window, None)

    @on(HeatMap.Resized)
    def _room_changed(self, event: HeatMap.Resized) -> None:
        self._room = (event.cols, event.rows)
        self.refresh_map()
        if self._about is not None:
            self._point_at(self._about)

    @on(HeatMap.Pointed)
    def _pointed_at(self, event: HeatMap.Pointed) -> None:
        self._pointed = (event.col, event.row)
        spot = self.spot
        if (
            spot is not None
            and self.is_drawn
            and not (self._about is not None and self._about in spot.blocks)
        ):
            self._about = spot.blocks.start
        self._look()
        self._inspect()

    def _see(self, view: View) -> None:
        self.view = view
        self.refresh_map()

    def _pan(self, blocks: int) -> None:
        self._move(self.window.moved(blocks, self._total), None)

    def _move(self, window: Window, block: int | None) -> None:
        """Show another part of the device, with the cursor on a block of it if one is given."""
        self._window = None if window.count >= self._total else window
        self.refresh_map()
        if block is not None:
            self._about = block
            self._point_at(block)

    def _point_at(self, block: int) -> None:
        """Put the cursor where a block is drawn, if it is."""
        grid = None if self._wanted is None else self._wanted.grid
        if grid is None or not grid.window.first <= block < grid.window.first + grid.window.count:
            return
        index = grid.bin_of(block)
        if self.view.layout == "time":
            col, row = self._pointed[0], index // grid.cols
        else:
            row, col = divmod(place_of(self.view.layout, grid.cols, grid.rows, index), grid.cols)
        self.query_one(HeatMap).point(col, row)

    # ---- asking and showing

    @property
    def _total(self) -> int:
        return 1 if self.tracker is None else total_blocks(self.tracker)

    def _inside(self, col: int, row: int) -> tuple[int, int]:
        cols, rows = self._room or (1, 1)
        return min(max(col, 0), cols - 1), min(max(row, 0), rows - 1)

    def refresh_map(self) -> None:
        """Work out what should be drawn, say so when it is something else, and show what there is."""
        device, tracker, wanted = self._device, self.tracker, None
        if device is not None and tracker is not None and self._room is not None:
            wanted = wanted_for(device, tracker, self.view, self.window, self._room)
        if wanted != self._wanted:
            if wanted is None or self._wanted is None or wanted.device != self._wanted.device:
                self._frame, self._counts, self._looking = None, None, None
            self._wanted = wanted
            # To the app at once: Textual lets no message bubble past the screen that was handling another when it was made.
            self.app.post_message(self.Wanting(wanted))
        self._paint()

    def _paint(self) -> None:
        """Draw the frame there is, and all the words about it."""
        tracker, frame = self.tracker, self._frame
        words = hint(self._state, self._device, self.failure, self._info)
        self.set_class(bool(words), "-hint")
        if words:
            self.query_one("#hint", Static).update(words)
        self.set_class(self.zoomed and not words, "-zoomed")
        shown = Shown(self.view.mode, self.view.layout, self.since, self.window, self._wanted)
        restarted = "" if self._device is None else self._restart_reason(self._device)
        self._title(
            *titles(self._state, self._device, shown, self._info, restarted=restarted, now_us=self._now_us)
        )
        self.query_one(Legend).show(self._palette, shown, None if words else tracker)
        heat = self.query_one(HeatMap)
        if frame is None or tracker is None:
            heat.show(b"", 0)
        elif frame.wanted == self._wanted or self._painted[1:] == (self._palette, self.view, tracker):
            # A frame of another window is drawn once more only as it was, until the new one is there.
            painted = (frame, self._palette, self.view, tracker)
            if painted != self._painted:
                self._painted = painted
                self._draw(heat, frame, tracker)
        self._inspect()

    def _draw(self, heat: HeatMap, frame: Frame, tracker: Tracker) -> None:
        cols, levels = self._room[0] if self._room else 1, self._palette.levels
        heat.show(painted(frame, tracker, self.view, cols, levels), cols)
        if frame.strip:
            strip = frame.strip.translate(table_of(frame, tracker, self.view, levels))
            self.query_one(Minimap).show(strip, self._palette, frame.wanted.grid.window, self._total)

    def _restart_reason(self, device: Device) -> str:
        """Say why the history of a device restarted, if it did before our eyes and there was no snapshot since."""
        generation, reason = self._restarted.get(device.object_path, ("", ""))
        tracker = device.tracker
        if tracker is None or tracker.generation_id != generation or tracker.changes_number:
            return ""
        return reason

    def _title(self, title: str, subtitle: str) -> None:
        """Write on the border, unless it is there already: Textual draws all of a box again for it."""
        if self._border != (title, subtitle):
            self._border = (title, subtitle)
            # Escaped: a device may be called [red].
            self.border_title, self.border_subtitle = Content(title).markup, Content(subtitle).markup

    def _look(self, *, again: bool = False) -> None:
        spot = self.spot
        if again or spot != self._looking:
            if spot != self._looking:
                self._counts = None
            self._looking = spot
            self.app.post_message(self.Looking(spot))

    def _inspect(self) -> None:
        spot, frame, tracker = self.spot, self._frame, self.tracker
        if spot is None or frame is None or tracker is None or frame.wanted != self._wanted:
            self.query_one(Inspector).show(None)
            return
        grid, (col, row) = frame.wanted.grid, self._inside(*self._pointed)
        timeline = timeline_of(tracker, self.view, grid, self._room[0] if self._room else 1)
        if timeline is None:
            value, age = (
                frame.values[bin_at(self.view.layout, grid.cols, grid.rows, row * grid.cols + col)],
                None,
            )
        else:
            value, age = 0, timeline.age_at(col)
        counts = self._counts
        if counts is not None and (counts.spot != spot or counts.generation_id != tracker.generation_id):
            counts = None
        self.query_one(Inspector).show(
            Pointed(
                tracker, spot.blocks, self.view.mode, self.since, value, timeline is not None, age, counts
            )
        )
