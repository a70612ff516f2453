# SPDX-License-Identifier: GPL-2.0-or-later
"""What is written about the map."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from blksnap_tui import model
from blksnap_tui.fakemap import FakeMap
from blksnap_tui.heat.grid import Grid, Window
from blksnap_tui.model import Device, State
from blksnap_tui.testing import START_US, FakeService
from blksnap_tui.widgets.map_words import hint, titles


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
    title, _ = titles(state, device, None, "age", now_us=START_US)
    assert "as of snapshot #1, " in title
    assert "as of" not in titles(state, tracked(state), None, "age", now_us=START_US)[0]


def test_a_map_that_is_not_live_shows_what_the_last_snapshot_has(state: State) -> None:
    """What changed after it is not in the map: a picture of that would be empty."""
    for live, since in ((True, "#1"), (False, "#0")):
        title, _ = titles(state, tracked(state, map_is_live=live), None, "density", now_us=START_US)
        assert f"share changed since {since}" in title


@pytest.mark.parametrize(
    "cols, text",
    [(4, "1 dot ≈ 256 KiB (4.0 blocks)"), (16, "1 dot ≈ 64.0 KiB (1.0 blocks)"), (32, "≈ 2.0 dots")],
)
def test_the_scale_is_told(state: State, cols: int, text: str) -> None:
    """How much a dot stands for, or how many dots a block takes."""
    _, subtitle = titles(state, tracked(state), Grid(Window(0, 16), cols, 1), "age", now_us=START_US)
    assert subtitle.endswith(text)
