# SPDX-License-Identifier: GPL-2.0-or-later
"""How the program looks, in a few states that matter."""

from __future__ import annotations

import pytest
from textual.widgets import Input

from blksnap_tui.screens.connect import ConnectScreen
from blksnap_tui.testing import FakeService
from tests.tui.golden import Golden
from tests.tui.worlds import DISK, drawn, running, until


@pytest.mark.parametrize("size", [(40, 12), (80, 24), (200, 60)], ids="{0[0]}x{0[1]}".format)
async def test_busy(busy: FakeService, golden: Golden, size: tuple[int, int]) -> None:
    """Everything is on the screen at 80 by 24, more at 200 by 60; the map alone is left at 40 by 12."""
    async with running(busy, size) as (app, pilot):
        await drawn(app, pilot)
        golden.check(app, f"busy-{size[0]}x{size[1]}")


async def test_inspector(busy: FakeService, golden: Golden) -> None:
    """The cursor says which blocks it is on and when they changed."""
    async with running(busy) as (app, pilot):
        await until(pilot, lambda: app.main.device is not None)
        app.main.choose(DISK)
        await until(pilot, lambda: app.main.device is not None and app.main.device.object_path == DISK)
        await drawn(app, pilot)
        await pilot.press("tab", "down", "down", "right", "right")
        await pilot.pause()
        golden.check(app, "inspector-80x24")


async def test_density(busy: FakeService, golden: Golden) -> None:
    """The second mode has its own title and legend."""
    async with running(busy) as (app, pilot):
        await drawn(app, pilot)
        await pilot.press("m")
        await drawn(app, pilot)
        golden.check(app, "density-80x24")


async def test_empty(golden: Golden) -> None:
    """With no devices the screen says what to do."""
    async with running(FakeService()) as (app, pilot):
        await until(pilot, lambda: app.main.state.manager is not None)
        golden.check(app, "empty-80x24")


async def test_untracked(busy: FakeService, golden: Golden) -> None:
    """A device without a tracker has a hint in place of a map."""
    async with running(busy) as (app, pilot):
        await drawn(app, pilot)
        await pilot.press("down")
        await pilot.pause()
        golden.check(app, "untracked-80x24")


async def test_no_service(golden: Golden) -> None:
    """An absent service has a screen of its own that says what to do."""
    async with running(FakeService(service_up=False)) as (app, pilot):
        await until(pilot, lambda: isinstance(app.screen, ConnectScreen))
        golden.check(app, "no-service-80x24")


async def test_paused(busy: FakeService, golden: Golden) -> None:
    """A held picture is marked, with what it holds back."""
    async with running(busy) as (app, pilot):
        await drawn(app, pilot)
        await pilot.press("space")
        busy.set_snapshot(app.main.state.snapshots[0].object_path, StorageUsed=1 << 30)
        await until(pilot, lambda: app.main.held == 1)
        golden.check(app, "paused-80x24")


@pytest.mark.parametrize(
    "name, key",
    [("destroy", "x"), ("snapshot", "s"), ("add", "a"), ("untrack", "d"), ("help", "question_mark")],
)
async def test_dialogs(busy: FakeService, golden: Golden, name: str, key: str) -> None:
    """Each question fits 80 by 24, buttons and all."""
    async with running(busy) as (app, pilot):
        await drawn(app, pilot)
        await pilot.press(key)
        await until(pilot, lambda: app.screen is not app.main)
        for field in app.screen.query(Input):
            field.cursor_blink = False
        await pilot.pause()
        golden.check(app, f"{name}-80x24")


async def test_light(busy: FakeService, golden: Golden) -> None:
    """On a light theme the newest change is the darkest."""
    async with running(busy) as (app, pilot):
        app.theme = "blksnap-light"
        await drawn(app, pilot)
        golden.check(app, "light-80x24")


async def test_glyphs(busy: FakeService, golden: Golden) -> None:
    """With the terminal's own colours the map is made of characters."""
    async with running(busy) as (app, pilot):
        app.theme = "ansi-dark"
        await pilot.pause()
        await drawn(app, pilot)
        golden.check(app, "glyphs-80x24")
