# SPDX-License-Identifier: GPL-2.0-or-later
"""What is recorded is seen again; settings reach the program."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from blksnap_tui.app import BlksnapApp
from blksnap_tui.client import Client
from blksnap_tui.recording import Recorder, RecordingError, Replay
from blksnap_tui.screens.dialogs import AskSnapshot
from blksnap_tui.settings import Settings
from blksnap_tui.testing import FakeService
from tests.tui.golden import screen_text
from tests.tui.worlds import DISK, drawn, running, until


async def recorded(service: FakeService, path: Path, *, act: bool = True) -> None:
    """Record a service for a moment, in which a device is written to and its history restarts."""
    recorder = Recorder(path)
    async with Client("system", transport=service.connect) as client:
        client.subscribe(recorder.event)
        task = asyncio.create_task(recorder.follow(client))
        async with asyncio.timeout(20):
            while path.read_text().count('"info": {"path"') < 2:  # noqa: ASYNC110 - a file has no event
                await asyncio.sleep(0.01)
            if act:
                service.restart_history(DISK, "bytes were missed")
                while path.read_text().count('"map"') < 3:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.wait([task])
    recorder.close()


async def test_a_recording_shows_what_there_was(busy: FakeService, tmp_path: Path) -> None:
    """The same objects, and maps that say the same at every resolution a terminal has."""
    path = tmp_path / "film"
    await recorded(busy, path, act=False)
    film = Replay(path)
    await film.play()
    async with (
        Client("system", transport=busy.connect) as real,
        Client("recording", transport=film.connect) as played,
    ):
        assert played.state == real.state
        for first, count, bins in ((0, 16_384, 1034), (5000, 100, 50), (3, 16_000, 7)):
            for mode, since in (("age", 0), ("density", 13), ("density", 4)):
                shown, _ = await played.summarize(DISK, first, count, bins, mode, since=since)
                wanted, _ = await real.summarize(DISK, first, count, bins, mode, since=since)
                assert shown == wanted
        assert await played.read_map(DISK, 4990, 60) == await real.read_map(DISK, 4990, 60)


async def test_a_recording_is_played_in_the_program(busy: FakeService, tmp_path: Path) -> None:
    """Signals and maps come at their time, and nothing can be done to it."""
    path = tmp_path / "film"
    await recorded(busy, path)
    film = Replay(path)
    app = BlksnapApp(
        make_client=film.client,
        now_us=film.clock_us,
        settings=Settings(rate_hz=10, read_only=True),
        source="recording film",
    )
    app.background = film.play
    async with app.run_test(size=(100, 30)) as pilot:
        await drawn(app, pilot)
        assert "recording film" in screen_text(app)
        await until(pilot, lambda: "bytes were missed" in " ".join(entry.text for entry in app.desk.log))
        await pilot.press("s")
        await pilot.pause()
        assert not isinstance(app.screen, AskSnapshot)


def test_what_is_no_recording_is_refused(tmp_path: Path) -> None:
    """In words, with the file's name; nor is a file overwritten."""
    (tmp_path / "film").write_text("hello\n")
    with pytest.raises(RecordingError, match="not a recording"):
        Replay(tmp_path / "film")
    with pytest.raises(RecordingError, match="cannot be written"):
        Recorder(tmp_path / "film")


async def test_keys_can_be_others(busy: FakeService) -> None:
    """What the settings name leads there, and what it was no longer does."""
    async with running(busy, settings=Settings(rate_hz=10, keys={"map.mode": "f5"})) as (app, pilot):
        await drawn(app, pilot)
        await pilot.press("m")
        assert app.main.pane.view.mode == "age"
        await pilot.press("f5")
        await until(pilot, lambda: app.main.pane.view.mode == "since")
