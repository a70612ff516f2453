# SPDX-License-Identifier: GPL-2.0-or-later
"""The other full screens: overview, snapshots, events, and how one gets to them."""

from __future__ import annotations

import pytest

from blksnap_tui.screens.dialogs import Notice
from blksnap_tui.screens.events import EventsScreen
from blksnap_tui.screens.jobs import JobsScreen
from blksnap_tui.screens.overview import OverviewScreen
from blksnap_tui.screens.snapshots import SnapshotsScreen
from blksnap_tui.testing import FakeService
from tests.tui.golden import Golden, screen_text
from tests.tui.worlds import DISK, drawn, running, until


@pytest.mark.parametrize("name, key", [("overview", "2"), ("snapshots", "3"), ("events", "4")])
async def test_boards(busy: FakeService, golden: Golden, name: str, key: str) -> None:
    """Each fits 80 by 24."""
    async with running(busy) as (app, pilot):
        await drawn(app, pilot)
        busy.set_snapshot(app.main.state.snapshots[1].object_path, State="failed", Error="the disk is gone")
        await until(pilot, lambda: app.main.state.snapshots[1].state == "failed")
        app.desk.rates.keep_only(set())
        app.desk.changed.clear()
        await pilot.press(key)
        await until(pilot, lambda: app.screen is not app.main)
        await pilot.pause()
        if name != "overview":
            golden.check(app, f"{name}-80x24")
        else:
            assert "○ untracked" in screen_text(app)


async def test_enter_in_the_overview_shows_the_map(busy: FakeService) -> None:
    """Of the device under the cursor."""
    async with running(busy) as (app, pilot):
        await drawn(app, pilot)
        await pilot.press("2")
        await until(pilot, lambda: isinstance(app.screen, OverviewScreen))
        await pilot.press("down", "down", "down", "enter")
        await until(pilot, lambda: app.screen is app.main)
        await until(pilot, lambda: app.main.device is not None and app.main.device.object_path == DISK)


async def test_the_overview_shows_what_is_written(busy: FakeService) -> None:
    """A rate from two readings, and `-` before."""
    async with running(busy, (140, 40)) as (app, pilot):
        await drawn(app, pilot)
        await until(pilot, lambda: app.desk.changed.get(DISK) == 40)
        busy.answering.clear()
        app.desk.rates.keep_only(set())
        app.desk.rates.note(DISK, {"written-bytes": 0}, 1.0)
        app.desk.rates.note(DISK, {"written-bytes": 3 << 20}, 2.0)
        await pilot.press("2")
        await until(pilot, lambda: "3.00 MiB/s" in screen_text(app))
        await until(pilot, lambda: "#13: 2.50 MiB, 0.2 %" in screen_text(app))
        busy.answering.set()


async def test_a_storage_that_fills_has_a_forecast(busy: FakeService) -> None:
    """In words on the screen of snapshots."""
    async with running(busy, (120, 40)) as (app, pilot):
        await drawn(app, pilot)
        shot = app.main.state.snapshots[0]
        await pilot.press("3")
        await until(pilot, lambda: isinstance(app.screen, SnapshotsScreen))
        await pilot.press("down", "down")
        book = app.desk.storage
        fills = book._fills[shot.object_path]
        at_s, used = fills[-1]
        fills.appendleft((at_s - 100, used - (100 << 20)))
        await until(pilot, lambda: "at 1.00 MiB/s" in screen_text(app))


async def test_an_image_is_opened_and_its_place_is_told(busy: FakeService) -> None:
    """It is exported when it has no device node."""
    async with running(busy, (120, 40)) as (app, pilot):
        await drawn(app, pilot)
        await pilot.press("3")
        await until(pilot, lambda: isinstance(app.screen, SnapshotsScreen))
        await pilot.press("o")
        await until(pilot, lambda: isinstance(app.screen, Notice))
        assert "nbdinfo" in screen_text(app)
        assert app.clipboard.startswith("nbd+unix:///")


async def test_events_are_logged_and_filtered(busy: FakeService) -> None:
    """Signals and what became different; words leave only some lines."""
    async with running(busy) as (app, pilot):
        await drawn(app, pilot)
        busy.restart_history(DISK, "bytes were missed")
        busy.set_snapshot(app.main.state.snapshots[0].object_path, State="failed", Error="full")
        await until(pilot, lambda: app.desk.log.count >= 2)
        await pilot.press("4")
        await until(pilot, lambda: isinstance(app.screen, EventsScreen))
        await until(pilot, lambda: "bytes were missed" in screen_text(app))
        assert "the snapshot failed" in screen_text(app)
        await pilot.press("slash", *"missed")
        await until(pilot, lambda: "the snapshot failed" not in screen_text(app))
        assert "bytes were missed" in screen_text(app)
        await pilot.press("escape")
        await until(pilot, lambda: "the snapshot failed" in screen_text(app))


async def test_devices_are_filtered_by_words(busy: FakeService) -> None:
    """By path, mount point, model or state; escape shows all again."""
    async with running(busy) as (app, pilot):
        await drawn(app, pilot)
        await pilot.press("slash", *"exam", "enter")
        await until(pilot, lambda: "1 of 4: exam" in screen_text(app))
        assert app.main.device is not None
        assert app.main.device.name == "sda"
        await pilot.press("slash", "escape")
        await until(pilot, lambda: "disk.img" in screen_text(app))


async def test_jobs_are_shown_and_cancelled(busy: FakeService) -> None:
    """In the status line while they run, with a list to cancel them from."""
    async with running(busy) as (app, pilot):
        await drawn(app, pilot)
        job = busy.add_job("snapshot-take", [DISK], progress=0.25)
        await until(pilot, lambda: "snapshot-take 25%" in screen_text(app))
        await pilot.press("J")
        await until(pilot, lambda: isinstance(app.screen, JobsScreen))
        await pilot.press("x")
        await until(pilot, lambda: job not in busy.objects)
        await until(pilot, lambda: "snapshot-take" not in screen_text(app))


async def test_the_palette_offers_every_act_and_device(busy: FakeService) -> None:
    """What has a key has a line, with the key in it."""
    async with running(busy) as (app, pilot):
        await drawn(app, pilot)
        offered = {command.title for command in app.get_system_commands(app.screen)}
    wanted = {
        "track (t)",
        "snapshot (s)",
        "mode (m)",
        "view (v)",
        "export (e)",
        "events (4)",
        "show disk.img",
    }
    assert wanted <= offered
