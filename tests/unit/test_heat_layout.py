# SPDX-License-Identifier: GPL-2.0-or-later
"""Where bins are drawn, as properties of the curve and of the timeline."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, strategies as st

from blksnap_tui.heat.grid import NEWEST, Window
from blksnap_tui.heat.layout import bin_at, curve, place_of, rearranged
from blksnap_tui.heat.timeline import MOST_SLICES, Timeline, slices_for

sides = st.integers(1, 48)


@given(sides, sides)
def test_the_curve_goes_through_every_place_once(cols: int, rows: int) -> None:
    """Nothing of the device is left out or drawn twice, whatever the terminal's shape."""
    bins, places = curve(cols, rows)
    assert sorted(bins) == list(range(cols * rows))
    assert [bins[place] for place in places] == list(range(cols * rows))


@given(sides, sides)
def test_the_curve_never_jumps(cols: int, rows: int) -> None:
    """Neighbours on the device are neighbours on the screen."""
    spots = [divmod(place, cols) for place in curve(cols, rows)[1]]
    assert spots[0] == (0, 0)
    assert all(max(abs(a[0] - b[0]), abs(a[1] - b[1])) == 1 for a, b in itertools.pairwise(spots))


@given(st.integers(1, 12).map(lambda half: 2 * half), st.integers(1, 12).map(lambda half: 2 * half))
def test_with_even_sides_the_curve_has_no_diagonals(cols: int, rows: int) -> None:
    """Each step is to the side, up or down."""
    spots = [divmod(place, cols) for place in curve(cols, rows)[1]]
    assert all(abs(a[0] - b[0]) + abs(a[1] - b[1]) == 1 for a, b in itertools.pairwise(spots))


@given(sides, sides)
def test_what_is_drawn_is_where_the_cursor_finds_it(cols: int, rows: int) -> None:
    """The picture and the inspector agree on every place."""
    values = bytes(index % 251 for index in range(cols * rows))
    drawn = rearranged(values, cols, rows)
    assert all(drawn[place] == values[bin_at("hilbert", cols, rows, place)] for place in range(cols * rows))


@given(st.sampled_from(["rows", "hilbert"]), sides, sides, st.data())
def test_a_bin_is_found_again_at_its_place(layout: str, cols: int, rows: int, data: st.DataObject) -> None:
    """From a bin to its place and back."""
    index = data.draw(st.integers(0, cols * rows - 1))
    assert bin_at(layout, cols, rows, place_of(layout, cols, rows, index)) == index


timelines = st.builds(
    Timeline,
    cols=st.integers(1, 60),
    rows=st.integers(1, 12),
    slices=st.integers(1, 40),
    active=st.just(300),
    intervals=st.integers(1, 255),
)


@given(timelines, st.data())
def test_every_change_is_drawn_in_the_column_of_its_age(timeline: Timeline, data: st.DataObject) -> None:
    """One changed slice lights the columns of its interval in its row, and nothing else."""
    row = data.draw(st.integers(0, timeline.rows - 1))
    age = data.draw(st.integers(0, timeline.shown - 1))
    ages = bytearray(timeline.rows * timeline.slices)
    ages[row * timeline.slices] = NEWEST - age
    drawn = timeline.draw(bytes(ages), 24)
    assert len(drawn) == timeline.cols * timeline.rows
    lit = {divmod(at, timeline.cols) for at, level in enumerate(drawn) if level}
    first = timeline.column_of(age)
    assert lit == {(row, col) for col in range(first, first + timeline.width)}
    assert all(timeline.age_at(col) == age for _, col in lit)


@given(timelines)
def test_only_the_margin_belongs_to_no_interval(timeline: Timeline) -> None:
    """The newest interval is at the right edge, what is left of the room at the left."""
    ages = [timeline.age_at(col) for col in range(timeline.cols)]
    margin = timeline.cols - timeline.shown * timeline.width
    assert ages[:margin] == [None] * margin
    assert ages[-1] == 0
    assert {age for age in ages if age is not None} == set(range(timeline.shown))


@pytest.mark.parametrize(
    "blocks, rows, slices", [(1, 40, 1), (100, 10, 10), (101, 10, 11), (1 << 24, 64, 1024)]
)
def test_a_row_has_a_slice_for_each_block_where_that_is_not_too_many(
    blocks: int, rows: int, slices: int
) -> None:
    """So that small devices are drawn exactly."""
    assert slices_for(blocks, rows) == slices
    assert slices * rows <= max(MOST_SLICES, rows)


windows = st.integers(1, 1 << 30).flatmap(
    lambda total: st.tuples(st.just(total), st.integers(1, total)).flatmap(
        lambda pair: st.tuples(
            st.just(pair[0]),
            st.builds(Window, first=st.integers(0, pair[0] - pair[1]), count=st.just(pair[1])),
        )
    )
)


@given(windows, st.integers(0, 1 << 30), st.integers(0, 1 << 31))
def test_a_zoomed_window_shows_the_block_it_was_zoomed_at(
    pair: tuple[int, Window], about: int, count: int
) -> None:
    """What is under the cursor stays in sight, and the window inside the device."""
    total, window = pair
    about = min(about, total - 1)
    zoomed = window.zoomed(about, count, total)
    assert zoomed.count == min(max(count, 1), total)
    assert zoomed.first >= 0
    assert zoomed.first + zoomed.count <= total
    if window.first <= about < window.first + window.count:
        assert zoomed.first <= about < zoomed.first + zoomed.count


@given(windows, st.integers(-(1 << 31), 1 << 31), st.integers(0, 1 << 30))
def test_a_moved_window_stays_inside_the_device(pair: tuple[int, Window], blocks: int, block: int) -> None:
    """Panning ends at the ends; going to a block shows it."""
    total, window = pair
    block = min(block, total - 1)
    for moved in (window.moved(blocks, total), window.around(block, total)):
        assert moved.count == window.count
        assert 0 <= moved.first <= total - moved.count
    assert 0 <= block - moved.first < moved.count
