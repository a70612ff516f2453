# SPDX-License-Identifier: GPL-2.0-or-later
"""The arithmetic of the heat map, as properties."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, strategies as st

from blksnap_tui.heat.grid import (
    NEWEST,
    Grid,
    Window,
    age_levels,
    age_of,
    changed_rows,
    density_levels,
)

windows = st.builds(Window, first=st.integers(0, 1 << 40), count=st.integers(1, 1 << 26))
grids = st.builds(Grid, window=windows, cols=st.integers(1, 300), rows=st.integers(1, 200))
level_counts = st.integers(2, 31)


@given(grids)
def test_the_first_bin_begins_and_the_last_ends_with_the_window(grid: Grid) -> None:
    """Nothing of the window is left out at its ends."""
    assert grid.blocks(0).start == grid.window.first
    assert grid.blocks(grid.bins - 1).stop == grid.window.first + grid.window.count


@given(grids, st.data())
def test_neighbouring_bins_leave_no_block_between_them(grid: Grid, data: st.DataObject) -> None:
    """Each bin begins where the one before ends, or shares its block when bins are smaller than blocks."""
    index = data.draw(st.integers(0, max(0, grid.bins - 2)))
    if grid.bins == 1:
        return
    here, following = grid.blocks(index), grid.blocks(index + 1)
    assert following.start in (here.stop, here.start)
    assert following.start == here.stop or len(here) == 1


@given(grids, st.data())
def test_a_bin_is_never_empty_and_stays_inside_the_window(grid: Grid, data: st.DataObject) -> None:
    """Every bin stands for at least one block that is really shown."""
    blocks = grid.blocks(data.draw(st.integers(0, grid.bins - 1)))
    assert len(blocks) >= 1
    assert grid.window.first <= blocks.start
    assert blocks.stop <= grid.window.first + grid.window.count


@given(grids, st.data())
def test_bins_differ_in_width_by_one_block_at_most(grid: Grid, data: st.DataObject) -> None:
    """The picture is to scale."""
    blocks = grid.blocks(data.draw(st.integers(0, grid.bins - 1)))
    assert abs(len(blocks) - max(1.0, grid.blocks_per_bin)) < 1


@given(grids, st.data())
def test_a_block_is_found_again_in_its_bin(grid: Grid, data: st.DataObject) -> None:
    """From a block to its first bin and back."""
    block = data.draw(st.integers(grid.window.first, grid.window.first + grid.window.count - 1))
    index = grid.bin_of(block)
    assert block in grid.blocks(index)
    assert index == 0 or block not in grid.blocks(index - 1)


@given(grids, st.integers(-1000, 1000), st.integers(-1000, 1000))
def test_a_place_outside_is_moved_inside(grid: Grid, col: int, row: int) -> None:
    """A cursor is always on a bin, whatever the mouse says."""
    index = grid.index(col, row)
    assert 0 <= index < grid.bins
    if 0 <= col < grid.cols and 0 <= row < grid.rows:
        assert divmod(index, grid.cols) == (row, col)


@pytest.mark.parametrize("index", [-1, 12])
def test_a_bin_outside_the_grid_is_an_error(index: int) -> None:
    """There are no blocks behind the last bin."""
    with pytest.raises(IndexError):
        Grid(Window(0, 100), 4, 3).blocks(index)


@pytest.mark.parametrize("block", [9, 110])
def test_a_block_outside_the_window_is_in_no_bin(block: int) -> None:
    """Only what is shown can be found."""
    with pytest.raises(IndexError):
        Grid(Window(10, 100), 4, 3).bin_of(block)


@pytest.mark.parametrize("first, count", [(-1, 5), (0, 0)])
def test_a_window_shows_something(first: int, count: int) -> None:
    """A window of no blocks cannot be made."""
    with pytest.raises(ValueError, match="shows nothing"):
        Window(first, count)


@pytest.mark.parametrize("cols, rows", [(0, 5), (5, 0)])
def test_a_grid_has_bins(cols: int, rows: int) -> None:
    """A grid of no cells cannot be made."""
    with pytest.raises(ValueError, match="no bins"):
        Grid(Window(0, 1), cols, rows)


@given(level_counts, st.integers(1, 255))
def test_younger_changes_have_higher_levels(levels: int, intervals: int) -> None:
    """Level 0 is never, the highest is the current interval, and between them order holds."""
    table = age_levels(levels, intervals)
    assert table[0] == 0
    assert table[NEWEST] == levels - 1
    assert all(1 <= low <= high < levels for low, high in itertools.pairwise(table[1:]))


@given(level_counts.filter(lambda levels: levels > 2), st.integers(1, 255))
def test_the_oldest_interval_has_the_lowest_level(levels: int, intervals: int) -> None:
    """Older than the scale is long, too."""
    table = age_levels(levels, intervals)
    assert table[1] == 1
    assert table[NEWEST - max(intervals, 8) + 1] == 1


@given(level_counts)
def test_more_changed_has_a_higher_level_and_a_little_is_never_nothing(levels: int) -> None:
    """Density keeps its order, and only zero is drawn as unchanged."""
    table = density_levels(levels)
    assert table[0] == 0
    assert table[255] == levels - 1
    assert all(1 <= low <= high for low, high in itertools.pairwise(table[1:]))


@pytest.mark.parametrize("levels", [0, 1, 257])
def test_a_scale_needs_two_levels_and_fits_a_byte(levels: int) -> None:
    """One for never, one for the rest."""
    with pytest.raises(ValueError, match="cannot be drawn"):
        age_levels(levels, 3)
    with pytest.raises(ValueError, match="cannot be drawn"):
        density_levels(levels)


@pytest.mark.parametrize("value, age", [(0, None), (255, 0), (254, 1), (1, 254)])
def test_a_byte_tells_how_many_snapshots_ago(value: int, age: int | None) -> None:
    """As Summarize describes its bytes."""
    assert age_of(value) == age


@given(st.integers(1, 40), st.integers(1, 2), st.integers(1, 30), st.data())
def test_exactly_the_lines_that_differ_are_named(
    cols: int, height: int, lines: int, data: st.DataObject
) -> None:
    """Changing bins names their lines and no others."""
    old = bytes(cols * height * lines)
    touched = data.draw(st.sets(st.integers(0, len(old) - 1), max_size=10))
    new = bytes(1 if at in touched else 0 for at in range(len(old)))
    assert changed_rows(old, new, cols, height) == sorted({at // (cols * height) for at in touched})


def test_frames_of_other_size_are_all_new() -> None:
    """After a resize nothing of the old picture can stay."""
    assert changed_rows(bytes(10), bytes(12), 2, 1) is None
