# SPDX-License-Identifier: GPL-2.0-or-later
"""
The heat map as a widget: levels in, strips out, and a cursor over the bins.

It does no arithmetic on blocks and knows no service: a frame is one level per bin, row by row (`grid` makes it). Drawing keeps to what
makes it cheap at 200 columns: one Strip per line, runs of equal cells as one segment, segments made once, and only lines that differ
refreshed.
"""

from __future__ import annotations

from itertools import groupby
from typing import ClassVar

from rich.color import Color
from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.binding import Binding, BindingType
from textual.geometry import Region, Size
from textual.message import Message
from textual.reactive import reactive
from textual.strip import Strip
from textual.widget import Widget

from blksnap_tui.heat.grid import changed_rows
from blksnap_tui.heat.ramp import Palette, palette

CURSOR_UPPER, CURSOR_LOWER = "◤", "◣"
CURSOR_STYLE = Style(color="rgb(255,255,255)", bgcolor="rgb(200,0,80)")

# Levels and run lengths that occur; beyond this the table starts again.
_MOST_SEGMENTS = 8192


class HeatMap(Widget, can_focus=True):
    """Draws one frame; `Resized` says how many bins there is room for, `Pointed` which one the cursor is on."""

    HELP = (
        "Each half cell stands for a stretch of the device; its colour says when it was written last, or what the mode (m) asks. Arrows or "
        "the mouse move the cursor, the lines below tell what is under it. + and the wheel zoom in, - out, dragging and page up and down "
        "move what is shown, g goes to an offset."
    )

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left,h", "move(-1, 0)", "left", show=False, id="map.left"),
        Binding("right,l", "move(1, 0)", "right", show=False, id="map.right"),
        Binding("up,k", "move(0, -1)", "up", show=False, id="map.up"),
        Binding("down,j", "move(0, 1)", "down", show=False, id="map.down"),
        Binding("home", "move(-100000, -100000)", "first", show=False, id="map.first"),
        Binding("end", "move(100000, 100000)", "last", show=False, id="map.last"),
        Binding("pageup", "page(-1)", "page up", show=False, id="map.page-up"),
        Binding("pagedown", "page(1)", "page down", show=False, id="map.page-down"),
    ]

    DEFAULT_CSS = "HeatMap { width: 1fr; height: 1fr; }"

    cursor: reactive[tuple[int, int]] = reactive((0, 0), repaint=False)

    class Resized(Message):
        """There is room for `cols` by `rows` bins now."""

        def __init__(self, cols: int, rows: int) -> None:
            super().__init__()
            self.cols, self.rows = cols, rows

    class Pointed(Message):
        """The cursor is on bin (`col`, `row`)."""

        def __init__(self, col: int, row: int) -> None:
            super().__init__()
            self.col, self.row = col, row

    class Beyond(Message):
        """Somebody wants to see what lies this many bins above or below what is shown."""

        def __init__(self, rows: int) -> None:
            super().__init__()
            self.rows = rows

    class Dragged(Message):
        """The picture was pulled by this many bins to the right and down."""

        def __init__(self, cols: int, rows: int) -> None:
            super().__init__()
            self.cols, self.rows = cols, rows

    class Wheel(Message):
        """The wheel was turned under the cursor: 1 towards the picture, -1 away."""

        def __init__(self, direction: int) -> None:
            super().__init__()
            self.direction = direction

    def __init__(self, *, id: str | None = None) -> None:  # noqa: A002 - Textual's name for it
        super().__init__(id=id)
        self._palette = palette()
        self._styles: list[Style] = []
        self._segments: dict[tuple[int, int], Segment] = {}
        self._frame = b""
        self._cols = 0
        self._strips: list[Strip | None] = []
        self._marked = False
        self._dragging = False
        self._make_styles()

    @property
    def palette(self) -> Palette:
        """Give how levels are drawn."""
        return self._palette

    @palette.setter
    def palette(self, value: Palette) -> None:
        if value == self._palette:
            return
        other_bins = value.bins_per_cell != self._palette.bins_per_cell
        self._palette = value
        self._make_styles()
        self.show(b"", 0)
        if other_bins:
            self._tell_size(self.size)

    def show(self, frame: bytes, cols: int) -> None:
        """Draw `frame`: one level per bin, `cols` bins in a row. Levels must be those of the palette."""
        per_cell = self._palette.bins_per_cell
        rows = changed_rows(self._frame, frame, cols, per_cell) if frame and cols == self._cols else None
        self._frame, self._cols = frame, cols
        if rows is None:
            self._strips = [None] * (len(frame) // (cols * per_cell) if cols else 0)
            self.refresh()
            return
        for line in rows:
            self._strips[line] = None
        if rows:
            self.refresh(*[Region(0, line, cols, 1) for line in rows])

    def render_line(self, y: int) -> Strip:
        """Draw one line of cells."""
        width = self.size.width
        if y >= len(self._strips):
            return Strip.blank(width, self.rich_style)
        strip = self._strips[y]
        if strip is None:
            strip = self._strips[y] = self._draw(y)
        return strip if self._cols == width else strip.adjust_cell_length(width, self.rich_style)

    def _draw(self, y: int) -> Strip:
        cols, per_cell, levels = self._cols, self._palette.bins_per_cell, self._palette.levels
        start = y * cols * per_cell
        upper = self._frame[start : start + cols]
        if per_cell == 1:
            keys = list(upper)
        else:
            lower = self._frame[start + cols : start + 2 * cols]
            keys = [top * levels + bottom for top, bottom in zip(upper, lower, strict=True)]
        at = self.cursor[0] if self._marked and self.cursor[1] // per_cell == y else -1
        if not 0 <= at < cols:
            return Strip(self._runs(keys), cols)
        glyph = CURSOR_UPPER if self.cursor[1] % per_cell == 0 else CURSOR_LOWER
        mark = Segment(glyph, CURSOR_STYLE)
        return Strip([*self._runs(keys[:at]), mark, *self._runs(keys[at + 1 :])], cols)

    def _runs(self, keys: list[int]) -> list[Segment]:
        return [self._segment(key, sum(1 for _ in run)) for key, run in groupby(keys)]

    def _segment(self, key: int, length: int) -> Segment:
        segment = self._segments.get((key, length))
        if segment is None:
            if len(self._segments) >= _MOST_SEGMENTS:
                self._segments.clear()
            if self._palette.glyphs:
                segment = Segment(self._palette.glyphs[key] * length, self._styles[0])
            else:
                top, bottom = divmod(key, self._palette.levels)
                # Two equal halves as a space: the same bytes, and no font can put a seam between them.
                segment = Segment((" " if top == bottom else "▀") * length, self._styles[key])
            self._segments[key, length] = segment
        return segment

    def _make_styles(self) -> None:
        colours = [Color.from_rgb(*colour) for colour in self._palette.colours]
        self._styles = [Style.from_color(top, bottom) for top in colours for bottom in colours] or [Style()]
        self._segments.clear()

    # ---- cursor

    def action_move(self, cols: int, rows: int) -> None:
        """Move the cursor by bins; past the upper and lower edge the picture moves instead."""
        col, row = self.cursor[0] + cols, self.cursor[1] + rows
        if abs(rows) == 1 and not 0 <= row < self.size.height * self._palette.bins_per_cell:
            self.post_message(self.Beyond(rows))
        self._point(col, row)

    def action_page(self, pages: int) -> None:
        """Move the picture by half its height."""
        self.post_message(self.Beyond(pages * max(1, self.size.height * self._palette.bins_per_cell // 2)))

    def on_mouse_move(self, event: events.MouseMove) -> None:
        """Let the mouse carry the cursor, to the upper half of a cell: terminals report whole cells."""
        if self._dragging and (event.delta_x or event.delta_y):
            self.post_message(self.Dragged(event.delta_x, event.delta_y * self._palette.bins_per_cell))
            return
        self._marked = True
        self._point(event.x, event.y * self._palette.bins_per_cell)

    def on_mouse_down(self, event: events.MouseDown) -> None:
        """Take hold of the picture."""
        if event.button == 1:
            self._dragging = True
            self.capture_mouse()

    def on_mouse_up(self) -> None:
        """Let go of it."""
        if self._dragging:
            self._dragging = False
            self.release_mouse()

    def on_mouse_scroll_up(self, event: events.MouseScrollUp) -> None:
        """Zoom in where the mouse is."""
        event.stop()
        self.post_message(self.Wheel(1))

    def on_mouse_scroll_down(self, event: events.MouseScrollDown) -> None:
        """Zoom out."""
        event.stop()
        self.post_message(self.Wheel(-1))

    def on_leave(self) -> None:
        """Put the cursor away, unless the keyboard is here."""
        if self._marked and not self.has_focus:
            self._marked = False
            self._redraw_row(self.cursor[1])

    def on_focus(self) -> None:
        """Show the cursor."""
        self._marked = True
        self._redraw_row(self.cursor[1])
        self._point(*self.cursor)

    def on_blur(self) -> None:
        """Put the cursor away."""
        self._marked = False
        self._redraw_row(self.cursor[1])

    def on_resize(self, event: events.Resize) -> None:
        """Tell how many bins there is room for."""
        self._tell_size(event.size)

    def point(self, col: int, row: int) -> None:
        """Put the cursor on a bin."""
        self._point(col, row)

    def _tell_size(self, size: Size) -> None:
        if size.width and size.height:
            self.post_message(self.Resized(size.width, size.height * self._palette.bins_per_cell))

    def _point(self, col: int, row: int) -> None:
        size, per_cell = self.size, self._palette.bins_per_cell
        if not size.width or not size.height:
            return
        self.cursor = (min(max(col, 0), size.width - 1), min(max(row, 0), size.height * per_cell - 1))
        self.post_message(self.Pointed(*self.cursor))

    def watch_cursor(self, old: tuple[int, int], new: tuple[int, int]) -> None:
        """Redraw the lines the cursor left and came to."""
        self._redraw_row(old[1])
        self._redraw_row(new[1])

    def _redraw_row(self, row: int) -> None:
        line = row // self._palette.bins_per_cell
        if line < len(self._strips):
            self._strips[line] = None
            self.refresh(Region(0, line, self.size.width, 1))
