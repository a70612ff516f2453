# SPDX-License-Identifier: GPL-2.0-or-later
"""What the ramps promise to eyes and terminals."""

from __future__ import annotations

import itertools

import pytest

from blksnap_tui.heat.ramp import (
    ANCHORS,
    GLYPHS,
    LEVELS,
    XTERM,
    Depth,
    depth_of,
    lightness,
    palette,
    xterm_rgb,
)

MANY: tuple[Depth, ...] = ("truecolor", "256")


@pytest.mark.parametrize("dark", [True, False])
@pytest.mark.parametrize("depth", MANY)
@pytest.mark.parametrize("name", sorted(ANCHORS))
def test_lightness_only_rises_or_only_falls(name: str, depth: Depth, dark: bool) -> None:
    """Age can be read in greyscale and by the colour blind; the newest has the most contrast with the background."""
    values = [lightness(colour) for colour in palette(name, depth, dark=dark).colours[1:]]
    rising = list(itertools.pairwise(values))
    assert all(low < high for low, high in rising) if dark else all(low > high for low, high in rising)


@pytest.mark.parametrize("dark", [True, False])
@pytest.mark.parametrize("depth", MANY)
@pytest.mark.parametrize("name", sorted(ANCHORS))
def test_never_is_told_from_the_oldest_change(name: str, depth: Depth, dark: bool) -> None:
    """The first step of a ramp differs from "never" in at least one channel by what an eye can see."""
    never, oldest = palette(name, depth, dark=dark).colours[:2]
    assert max(abs(a - b) for a, b in zip(never, oldest, strict=True)) >= 30


@pytest.mark.parametrize("name", sorted(ANCHORS))
def test_levels_stay_below_what_textual_remembers(name: str) -> None:
    """Pairs of colours must fit into Textual's cache of 1024."""
    assert palette(name).levels == LEVELS == len(palette(name).colours)
    assert palette(name).levels ** 2 <= 1024


@pytest.mark.parametrize("name", sorted(XTERM))
def test_ramps_of_256_colours_come_from_the_fixed_part_of_the_table(name: str) -> None:
    """The first sixteen are whatever the terminal's theme makes of them."""
    shown = palette(name, "256")
    assert shown.colours[1:] == tuple(xterm_rgb(index) for index in XTERM[name])
    with pytest.raises(ValueError, match="terminal"):
        xterm_rgb(15)


@pytest.mark.parametrize(
    "index, colour", [(16, (0, 0, 0)), (231, (255, 255, 255)), (226, (255, 255, 0)), (232, (8, 8, 8))]
)
def test_xterm_colours_are_those_of_xterm(index: int, colour: tuple[int, int, int]) -> None:
    """Corners of the cube and the first grey."""
    assert xterm_rgb(index) == colour


def test_glyphs_stand_for_whole_cells() -> None:
    """Without colours a bin is a character of its own, and never is blank."""
    shown = palette(depth="glyph")
    assert (shown.bins_per_cell, shown.levels, shown.glyphs[0]) == (1, len(GLYPHS), " ")
    assert palette().bins_per_cell == 2


@pytest.mark.parametrize(
    "system, no_color, ansi, expected",
    [
        ("truecolor", False, False, "truecolor"),
        ("256", False, False, "256"),
        ("standard", False, False, "glyph"),
        (None, False, False, "glyph"),
        ("truecolor", True, False, "glyph"),
        ("truecolor", False, True, "glyph"),
    ],
)
def test_the_drawing_suits_the_terminal(
    system: str | None, no_color: bool, ansi: bool, expected: Depth
) -> None:
    """Half blocks only where their colours come through."""
    assert depth_of(system, no_color=no_color, ansi_theme=ansi) == expected
