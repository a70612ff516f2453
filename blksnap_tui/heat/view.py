# SPDX-License-Identifier: GPL-2.0-or-later
"""
How a map is to be seen, what must be asked of the service for it, and what becomes of its answer.

Pure. The widgets only keep a `View`, a window and a size, and hand them in here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from blksnap_tui.heat.grid import MODES, Grid, Window, age_levels, density_levels, since_levels
from blksnap_tui.heat.layout import LAYOUTS, rearranged
from blksnap_tui.heat.timeline import Timeline, slices_for
from blksnap_tui.messages import Frame, Wanted
from blksnap_tui.model import Device, Tracker


@dataclass(frozen=True, slots=True)
class View:
    """How the map is to be seen; `since` is the number that increments are counted from, None for the latest whose changes the map has."""

    mode: str = MODES[0]
    layout: str = LAYOUTS[0]
    since: int | None = None

    def next_mode(self) -> View:
        """Give the view in the next mode; the timeline has one only, so it becomes rows."""
        layout = LAYOUTS[0] if self.layout == "time" else self.layout
        return replace(self, mode=MODES[(MODES.index(self.mode) + 1) % len(MODES)], layout=layout)

    def next_layout(self) -> View:
        """Give the view in the next layout."""
        return replace(self, layout=LAYOUTS[(LAYOUTS.index(self.layout) + 1) % len(LAYOUTS)])

    def counting_since(self, number: int, tracker: Tracker) -> View:
        """Give the view that shows increments since a number, as far back as the map remembers."""
        number = min(max(number, tracker.oldest_number), tracker.changes_number)
        return View(
            self.mode if self.mode == "density" else "since",
            LAYOUTS[0] if self.layout == "time" else self.layout,
            None if number == tracker.shown_since else number,
        )

    def since_number(self, tracker: Tracker) -> int:
        """Give the number that increments are counted from."""
        return tracker.shown_since if self.since is None else self.since

    def holds_for(self, before: Tracker | None, tracker: Tracker) -> bool:
        """Say whether the number still means what it meant."""
        if self.since is None:
            return True
        same = before is not None and before.generation_id == tracker.generation_id
        return same and tracker.oldest_number <= self.since <= tracker.changes_number


def total_blocks(tracker: Tracker) -> int:
    """Give the number of blocks, at least 1: a window is never empty."""
    return max(tracker.block_count, 1)


def intervals_of(tracker: Tracker) -> int:
    """Give how many intervals the map tells apart."""
    return tracker.active_number - max(tracker.oldest_number, 1) + 1


def wanted_for(device: Device, tracker: Tracker, view: View, window: Window, room: tuple[int, int]) -> Wanted:
    """Say what to ask the service for: `room` is how many columns and rows of bins there are."""
    cols, rows = room
    total = total_blocks(tracker)
    strip = Grid(Window(0, total), cols, 1) if window.count < total else None
    if view.layout == "time":
        grid = Grid(window, slices_for(window.count, rows), rows)
        return Wanted(device.object_path, grid, "age", strip=strip)
    grid = Grid(window, cols, rows)
    if view.mode in ("since", "density"):
        return Wanted(device.object_path, grid, "density", view.since_number(tracker), strip)
    return Wanted(device.object_path, grid, view.mode, strip=strip)


def timeline_of(tracker: Tracker, view: View, grid: Grid, cols: int) -> Timeline | None:
    """Give how the timeline is drawn; None in another layout."""
    if view.layout != "time":
        return None
    return Timeline(cols, grid.rows, grid.cols, tracker.active_number, intervals_of(tracker))


def painted(frame: Frame, tracker: Tracker, view: View, cols: int, levels: int) -> bytes:
    """Turn a frame into one of `levels` for each place, row by row, `cols` in a row."""
    grid = frame.wanted.grid
    timeline = timeline_of(tracker, view, grid, cols)
    if timeline is not None:
        return timeline.draw(frame.values, levels)
    values = frame.values.translate(table_of(frame, tracker, view, levels))
    return rearranged(values, grid.cols, grid.rows) if view.layout == "hilbert" else values


def table_of(frame: Frame, tracker: Tracker, view: View, levels: int) -> bytes:
    """Give the table from the service's bytes to levels, for `bytes.translate`."""
    if frame.wanted.mode == "age":
        return age_levels(levels, intervals_of(tracker))
    if frame.wanted.mode == "density" and view.mode == "since":
        return since_levels(levels)
    return density_levels(levels)
