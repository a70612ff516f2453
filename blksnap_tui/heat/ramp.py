# SPDX-License-Identifier: GPL-2.0-or-later
"""
What levels look like: ramps of colours for terminals that have many, of glyphs for those that have few.

Pure: colours are (red, green, blue), nothing is drawn. The ramps are matplotlib's (CC0), monotone in
lightness, so they survive greyscale and colour blindness. There are at most 31 levels: Textual's colour
filter remembers 1024 pairs of colours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

RGB = tuple[int, int, int]
Depth = Literal["truecolor", "256", "glyph"]

LEVELS: Final = 24
DEFAULT_RAMP: Final = "viridis"

# Every eighth of the published 256-entry tables.
ANCHORS: Final[dict[str, tuple[str, ...]]] = {
    "viridis": ("440154", "472d7b", "3b528b", "2c728e", "21918c", "28ae80", "5ec962", "addc30", "fde725"),
    "cividis": ("00224e", "123570", "3b496c", "575d6d", "707173", "8a8678", "a59c74", "c3b369", "fee838"),
    "inferno": ("000004", "210c4a", "57106e", "8a226a", "bc3754", "e45a31", "f98e09", "f9cb35", "fcffa4"),
}

# Hand-made for 256 colours: rounding the true ones leaves two steps darker than the ones before them.
XTERM: Final[dict[str, tuple[int, ...]]] = {
    "viridis": (53, 24, 30, 36, 77, 149, 220, 226),
    "cividis": (60, 61, 102, 245, 144, 186, 227),
    "inferno": (53, 89, 125, 167, 203, 209, 214, 221, 229),
}

GLYPHS: Final = " ·░▒▓█"

NEVER_DARK: Final[RGB] = (28, 30, 34)
NEVER_LIGHT: Final[RGB] = (226, 228, 231)

# The end of a ramp that can hardly be told from the background is left out: this share of it.
_SKIPPED: Final = {"viridis": 0.1, "cividis": 0.1, "inferno": 0.2}

_CUBE: Final = (0, 95, 135, 175, 215, 255)


@dataclass(frozen=True, slots=True)
class Palette:
    """
    How each level is drawn; level 0 is "never changed".

    With `glyphs` a level is a character in the terminal's own colours and a bin a whole cell, else it is one
    of `colours` and a bin half a cell.
    """

    name: str
    levels: int
    colours: tuple[RGB, ...] = ()
    glyphs: str = ""

    @property
    def bins_per_cell(self) -> int:
        """Give how many bins lie over each other in a character cell."""
        return 1 if self.glyphs else 2


def palette(name: str = DEFAULT_RAMP, depth: Depth = "truecolor", *, dark: bool = True) -> Palette:
    """
    Give the palette for a ramp, a terminal and a background; the newest level always stands out most.

    Raises KeyError for a ramp there is none of.
    """
    if depth == "glyph":
        return Palette(name, len(GLYPHS), glyphs=GLYPHS)
    never = NEVER_DARK if dark else NEVER_LIGHT
    if depth == "256":
        steps = tuple(xterm_rgb(index) for index in XTERM[name])
    else:
        steps = _interpolate(
            tuple(_from_hex(text) for text in ANCHORS[name]), LEVELS - 1, _SKIPPED[name], dark=dark
        )
    if not dark:
        steps = steps[::-1]
    return Palette(name, len(steps) + 1, (never, *steps))


def depth_of(color_system: str | None, *, no_color: bool, ansi_theme: bool) -> Depth:
    """
    Choose how to draw on a terminal, given what Rich found out about it.

    Without colour, or with only the terminal's own sixteen, half blocks would mean nothing.
    """
    if no_color or ansi_theme:
        return "glyph"
    if color_system == "truecolor":
        return "truecolor"
    return "256" if color_system == "256" else "glyph"


def xterm_rgb(index: int) -> RGB:
    """
    Give the colour of an entry of xterm's table from 16 on. Raises ValueError below, where terminals differ.
    """
    if not 16 <= index <= 255:
        raise ValueError(f"colour {index} is whatever the terminal makes of it")
    if index >= 232:
        grey = 8 + 10 * (index - 232)
        return grey, grey, grey
    cube = index - 16
    return _CUBE[cube // 36], _CUBE[cube // 6 % 6], _CUBE[cube % 6]


def lightness(colour: RGB) -> float:
    """Give a colour's CIE L* (0 black … 100 white), by which ramps are ordered."""
    red, green, blue = (
        value / 255 / 12.92 if value <= 10 else ((value / 255 + 0.055) / 1.055) ** 2.4 for value in colour
    )
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    if luminance > (6 / 29) ** 3:
        return float(116 * luminance ** (1 / 3) - 16)
    return float(luminance * (29 / 3) ** 3)


def _from_hex(text: str) -> RGB:
    return int(text[0:2], 16), int(text[2:4], 16), int(text[4:6], 16)


def _interpolate(anchors: tuple[RGB, ...], count: int, skipped: float, *, dark: bool) -> tuple[RGB, ...]:
    """Draw `count` colours from the part of a ramp that shows on the background."""
    begin, end = (skipped, 1.0) if dark else (0.0, 1.0 - skipped)
    colours = []
    for step in range(count):
        place = (begin + (end - begin) * step / (count - 1)) * (len(anchors) - 1)
        left = min(int(place), len(anchors) - 2)
        share = place - left
        low, high = anchors[left], anchors[left + 1]
        red, green, blue = (round(a + (b - a) * share) for a, b in zip(low, high, strict=True))
        colours.append((red, green, blue))
    return tuple(colours)
