# SPDX-License-Identifier: GPL-2.0-or-later
"""What keys and mouse do to the map."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import pytest
from textual.pilot import Pilot

from blksnap_tui.app import BlksnapApp
from blksnap_tui.heat.grid import MODES
from blksnap_tui.heat.widget import HeatMap
from blksnap_tui.screens.questions import AskLine
from blksnap_tui.testing import FakeService
from tests.tui.golden import screen_text
from tests.tui.worlds import DISK, drawn, running, until


@contextlib.asynccontextmanager
async def on_the_map(service: FakeService) -> AsyncIterator[tuple[BlksnapApp, Pilot[None]]]:
    """Run the program with the cursor in the map of the disk image."""
    async with running(service, (120, 40)) as (app, pilot):
        await until(pilot, lambda: app.main.device is not None)
        app.main.choose(DISK)
        await until(pilot, lambda: app.main.device is not None and app.main.device.object_path == DISK)
        app.main.query_one(HeatMap).focus()
        await drawn(app, pilot)
        yield app, pilot


async def test_every_mode_is_drawn_and_named(busy: FakeService) -> None:
    """Four presses go round."""
    titles = ("next increment since #13: 2.50 MiB", "share changed since #13", "how often", "age of the last")
    async with on_the_map(busy) as (app, pilot):
        for mode, title in zip((*MODES[1:], MODES[0]), titles, strict=True):
            await pilot.press("m")
            await drawn(app, pilot)
            assert app.main.pane.view.mode == mode
            assert title in screen_text(app)


async def test_the_increment_since_an_older_snapshot_is_exact(busy: FakeService) -> None:
    """Stepping back shows more, and the map marks just the blocks whose number is greater."""
    async with on_the_map(busy) as (app, pilot):
        await pilot.press("left_square_bracket", "left_square_bracket")
        await drawn(app, pilot)
        values = busy.maps[DISK].values
        assert "next increment since #11" in screen_text(app)
        shown = [app.main.value_of_block(block) for block in range(0, len(values), 97)]
        grid = app.main.pane.spot
        assert grid is not None
        cell = len(grid.blocks)
        wanted = [
            any(value > 11 for value in values[block - block % cell : block - block % cell + cell])
            for block in range(0, len(values), 97)
        ]
        # Cells are of two widths that differ by one block; those of one width are enough to compare.
        agree = sum(bool(a) == b for a, b in zip(shown, wanted, strict=True))
        assert agree >= len(shown) * 0.9


async def test_picking_a_snapshot_shows_what_changed_since(busy: FakeService) -> None:
    """Enter in the list; the device becomes the one it is of."""
    async with running(busy, (120, 40)) as (app, pilot):
        await drawn(app, pilot)
        app.main.query_one("#snapshots").focus()
        await pilot.press("down", "down", "enter")
        await until(pilot, lambda: app.main.device is not None and app.main.device.object_path == DISK)
        assert (app.main.pane.view.mode, app.main.pane.since) == ("since", 12)


@pytest.mark.parametrize("layout, word", [("hilbert", "hilbert"), ("time", "which interval")])
async def test_every_layout_finds_its_blocks(busy: FakeService, layout: str, word: str) -> None:
    """The inspector's counts are those of the map, wherever the cursor is."""
    async with on_the_map(busy) as (app, pilot):
        while app.main.pane.view.layout != layout:
            await pilot.press("v")
        await drawn(app, pilot)
        assert word in screen_text(app)
        await pilot.press("down", "down", "down", "right", "right")
        spot = app.main.pane.spot
        assert spot is not None
        values = busy.maps[DISK].values[spot.blocks.start : spot.blocks.stop]
        changed = sum(value > 13 for value in values)
        text = f"{changed} of {len(values)} changed since #13"
        await until(pilot, lambda: text in screen_text(app).replace("\N{NARROW NO-BREAK SPACE}", ""))


async def test_zooming_keeps_the_block_under_the_cursor(busy: FakeService) -> None:
    """In three times shows a 64th of the device, out shows all again; the minimap is there meanwhile."""
    async with on_the_map(busy) as (app, pilot):
        await pilot.press("end", "up", "up", "up", "left", "left", "left")
        before = app.main.pane.spot
        assert before is not None
        for _ in range(3):
            await pilot.press("plus")
            await drawn(app, pilot)
        pane, total = app.main.pane, len(busy.maps[DISK].values)
        after = pane.spot
        assert pane.window.count == total // 64
        assert after is not None
        assert before.blocks.start in after.blocks
        assert app.main.query_one("#minimap").display
        assert f"of {1:.2f} GiB" in screen_text(app)
        await pilot.press("0")
        await drawn(app, pilot)
        assert pane.window.count == total
        assert not app.main.query_one("#minimap").display


async def test_one_can_go_to_an_offset_and_pan(busy: FakeService) -> None:
    """The cursor is on the block that was asked for; page down goes on from there, the end of the device ends it."""
    async with on_the_map(busy) as (app, pilot):
        for _ in range(3):
            await pilot.press("plus")
        await pilot.press("g")
        await until(pilot, lambda: isinstance(app.screen, AskLine))
        await pilot.press(*"512M", "enter")
        await until(pilot, lambda: app.screen is app.main)
        await drawn(app, pilot)
        pane = app.main.pane
        assert pane.spot is not None
        assert 8192 in pane.spot.blocks
        first = pane.window.first
        await pilot.press("pagedown")
        assert pane.window.first > first
        for _ in range(200):
            await pilot.press("pagedown")
        assert pane.window.first + pane.window.count == len(busy.maps[DISK].values)


async def test_the_wheel_zooms_and_dragging_pans(busy: FakeService) -> None:
    """What the keyboard can do the mouse can."""
    async with on_the_map(busy) as (app, pilot):
        heat, pane = app.main.query_one(HeatMap), app.main.pane
        await pilot.hover(HeatMap, offset=(10, 10))
        heat.post_message(HeatMap.Wheel(1))
        await drawn(app, pilot)
        assert pane.window.count == len(busy.maps[DISK].values) // 4
        first = pane.window.first
        heat.post_message(HeatMap.Dragged(0, -2))
        await until(pilot, lambda: pane.window.first > first)


async def test_a_new_history_is_said_on_the_map_until_its_first_snapshot(busy: FakeService) -> None:
    """An empty map must not look as if nothing had changed."""
    async with on_the_map(busy) as (app, pilot):
        await pilot.press("left_square_bracket")
        busy.restart_history(DISK, "the disk has grown")
        await until(pilot, lambda: "history restarted: the disk has grown" in screen_text(app))
        await until(pilot, lambda: app.main.pane.since == 0)


async def test_a_service_that_does_not_answer_makes_the_picture_old(busy: FakeService) -> None:
    """The status line says for how long nothing was heard."""
    async with on_the_map(busy) as (app, pilot):
        busy.answering.clear()
        await until(pilot, lambda: "no answer for" in screen_text(app))
        busy.answering.set()
        await until(pilot, lambda: "● live" in screen_text(app))


async def test_a_map_that_may_not_be_read_can_be_unlocked(busy: FakeService) -> None:
    """It says how, asks nobody by itself, and is drawn once it may be."""
    async with on_the_map(busy) as (app, pilot):
        busy.locked = True
        await until(pilot, lambda: "press u to be asked for a password" in screen_text(app))
        busy.calls.clear()
        await pilot.press("u")
        await until(pilot, lambda: not busy.locked)
        await drawn(app, pilot)


async def test_a_paused_map_can_still_be_zoomed(busy: FakeService) -> None:
    """What was asked for is shown; only what comes by itself is held."""
    async with on_the_map(busy) as (app, pilot):
        await pilot.press("space", "plus")
        await drawn(app, pilot)
        assert app.main.pane.zoomed
        assert "PAUSED" in screen_text(app)
