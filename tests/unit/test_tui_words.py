# SPDX-License-Identifier: GPL-2.0-or-later
"""What is written about the map."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from blksnap_tui import model
from blksnap_tui.fakemap import FakeMap
from blksnap_tui.heat.grid import Grid, Window
from blksnap_tui.heat.view import View
from blksnap_tui.messages import Counts, Spot, Wanted
from blksnap_tui.model import Device, State
from blksnap_tui.testing import START_US, FakeService
from blksnap_tui.widgets.inspector import Pointed, counted, where
from blksnap_tui.widgets.map_words import Shown, hint, titles


@pytest.fixture
def state() -> State:
    """A tracked disk of 16 blocks with one snapshot, and an untracked one."""
    service = FakeService()
    disk = service.add_device("/srv/a.img", 1 << 20)
    service.add_device("/srv/b.img", 1 << 20)
    service.track(disk, FakeMap(bytearray(16)))
    service.answer(model.MANAGER_PATH, "CreateSnapshot", ([disk], {}))
    return model.state_from(service.objects)


def tracked(shown: State, **changes: Any) -> Device:
    """Give the tracked disk, its tracker changed."""
    device = shown.devices[0]
    assert device.tracker is not None
    return replace(device, tracker=replace(device.tracker, **changes))


def seen(grid: Grid | None = None, mode: str = "age", since: int = 0) -> Shown:
    """Give what a map shows: all of the 16 blocks, or a grid."""
    window = Window(0, 16) if grid is None else grid.window
    wanted = None if grid is None else Wanted(model.ObjectPath("/disk"), grid)
    return Shown(mode, "rows", since, window, wanted)


def test_before_the_service_is_found_nothing_is_claimed() -> None:
    """An unknown state is not an empty one."""
    assert "looking for the service" in hint(None, None, "", None)
    assert "press a" in hint(State(), None, "", None)


def test_a_broken_tracker_says_why(state: State) -> None:
    """The reading knows it; before one, what began the generation is all there is."""
    device = tracked(state, state="broken", last_reset="first attach")
    assert "the file has shrunk" in hint(state, device, "", {"reason": "the file has shrunk"})
    assert "first attach" in hint(state, device, "", None)


def test_a_map_that_cannot_be_read_says_why(state: State) -> None:
    """In the service's words."""
    assert hint(state, tracked(state), "not authorized", None).endswith("not authorized")
    assert hint(state, tracked(state), "", None) == ""


def test_a_map_that_is_not_live_says_as_of_when(state: State) -> None:
    """Else a viewer would take it for the present."""
    device = tracked(state, map_is_live=False)
    title, _ = titles(state, device, seen(), None, now_us=START_US)
    assert "as of snapshot #1, " in title
    assert "as of" not in titles(state, tracked(state), seen(), None, now_us=START_US)[0]


def test_a_map_that_is_not_live_shows_what_the_last_snapshot_has(state: State) -> None:
    """What changed after it is not in the map: a picture of that would be empty."""
    for live, since in ((True, "#1"), (False, "#0")):
        tracker = tracked(state, map_is_live=live).tracker
        assert tracker is not None
        assert f"#{View('density').since_number(tracker)}" == since


@pytest.mark.parametrize(
    "cols, text",
    [(4, "1 dot ≈ 256 KiB (4.0 blocks)"), (16, "1 dot ≈ 64.0 KiB (1.0 blocks)"), (32, "≈ 2.0 dots")],
)
def test_the_scale_is_told(state: State, cols: int, text: str) -> None:
    """How much a dot stands for, or how many dots a block takes."""
    _, subtitle = titles(state, tracked(state), seen(Grid(Window(0, 16), cols, 1)), None, now_us=START_US)
    assert subtitle.endswith(text)


def test_a_part_of_a_device_is_named_by_where_it_lies(state: State) -> None:
    """Zoomed in, one still knows where one is."""
    _, subtitle = titles(state, tracked(state), seen(Grid(Window(4, 8), 8, 1)), None, now_us=START_US)
    assert subtitle.startswith("512 KiB at 256 KiB of 1.00 MiB · ")


def test_the_next_increment_is_told_in_bytes_when_it_is_known(state: State) -> None:
    """And never as 0 before it is."""
    shown = seen(mode="since", since=1)
    title, _ = titles(state, tracked(state), shown, {"changed-blocks": {1: 3}}, now_us=START_US)
    assert "next increment since #1: 192 KiB, 18.8 %" in title
    assert titles(state, tracked(state), shown, None, now_us=START_US)[0].endswith("since #1")


def test_a_restarted_history_is_said_on_the_map(state: State) -> None:
    """An empty map would look as if nothing had changed."""
    title, _ = titles(state, tracked(state), seen(), None, restarted="the disk has grown", now_us=START_US)
    assert title.endswith("history restarted: the disk has grown")


def pointed(shown: State, **changes: Any) -> Pointed:
    """Give a cursor on blocks 4 to 7."""
    tracker = shown.devices[0].tracker
    assert tracker is not None
    return replace(Pointed(tracker, range(4, 8), "age", 1, 255), **changes)


@pytest.mark.parametrize(
    "mode, value, words",
    [
        ("age", 255, "last changed in interval #2 (now)"),
        ("age", 254, "last changed in interval #1 (1 snapshot ago)"),
        ("age", 0, "never changed"),
        ("since", 1, "in the next increment since #1"),
        ("since", 0, "not in the next increment since #1"),
        ("density", 255, "all changed since #1"),
        ("density", 1, "about 1 % changed since #1"),
        ("density", 0, "nothing changed since #1"),
        ("frequency", 0, "not seen to change"),
    ],
)
def test_what_is_under_the_cursor_is_said_in_words(state: State, mode: str, value: int, words: str) -> None:
    """Each mode has its own."""
    text = str(where(pointed(state, mode=mode, value=value)))
    assert text == f" ▸ {words} · 256 KiB at 256 KiB · blocks 4 to 7"


def test_true_counts_are_told_when_they_are_there(state: State) -> None:
    """Since the number in question, and by interval; nothing before they were counted."""
    spot = Spot(state.devices[0].object_path, range(4, 8))
    counts = Counts(spot, "", {2: 1, 1: 2, 0: 1})
    assert not str(counted(pointed(state))).strip()
    assert (
        str(counted(pointed(state, counts=counts))).strip()
        == "1 of 4 changed since #1 · last changes in #2: 1, #1: 2, never: 1"
    )
