# SPDX-License-Identifier: GPL-2.0-or-later
"""The terminal program and the command line with the real service behind them."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator

import pytest

from blksnap_tui.app import BlksnapApp
from blksnap_tui.client import Client
from blksnap_tui.heat.grid import NEWEST
from blksnap_tui.screens.connect import ConnectScreen
from blksnap_tui.screens.dialogs import AskFile, AskSnapshot, Confirm
from blksnap_tui.screens.questions import AskTrack
from blksnap_tui.settings import Settings
from tests.tui.golden import screen_text
from tests.tui.real import RealService, real_service, write
from tests.tui.worlds import drawn, until

pytestmark = pytest.mark.timeout(180)

MIB = 1 << 20
BLOCK = 65_536


@pytest.fixture
async def service() -> AsyncIterator[RealService]:
    """A service of this test's own."""
    async with real_service() as made:
        yield made


async def ctl(service: RealService, *words: str, status: int = 0) -> str:
    """Run blksnapctl as a program; gives its stdout."""
    done = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "blksnapctl",
        f"--bus={service.bus}",
        *words,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await done.communicate()
    assert done.returncode == status, err.decode()
    assert b"Traceback" not in err
    return out.decode()


async def test_the_command_line_tells_the_whole_story(service: RealService) -> None:
    """Add, attach, snapshot, write, increment, map, mark, export, destroy, detach."""
    path = str(service.image_file("disk.img", 64 * MIB))
    assert await ctl(service, "add", path) == f"{path}\n"
    node = (await ctl(service, "attach", path)).strip()
    first = (await ctl(service, "snapshot", "create", path, "--limit", "16M")).strip()
    await write(node, (MIB, 2 * MIB), (40 * MIB + 5, 1))
    assert await ctl(service, "changes", "disk.img", "--since", "1", "--view", "taken") == ""
    await ctl(service, "snapshot", "create", path, "--limit", "16M", "--description", "second")
    ranges = await ctl(service, "changes", "disk.img", "--since", "1")
    assert ranges == f"{MIB}\t{2 * MIB}\n{40 * MIB}\t{BLOCK}\n"
    await ctl(service, "map", path, "-o", str(service.directory / "map"))
    shown = (service.directory / "map").read_bytes()
    assert [at for at, value in enumerate(shown) if value] == [*range(16, 48), 640]
    await ctl(service, "mark", path, "63M:1")
    assert f"{63 * MIB}\t{BLOCK}\n" in await ctl(service, "changes", path, "--since", "1")
    assert f"///{first}" in await ctl(service, "export", first)
    info = json.loads(await ctl(service, "info", path, "--json"))
    assert info["info"]["writes"] >= 2
    await ctl(service, "detach", path, status=1)
    await ctl(service, "changes", path, "--since", "7", status=5)
    listed = json.loads(await ctl(service, "snapshot", "list", "--json"))
    assert [snapshot["description"] for snapshot in listed["snapshots"]] == ["", "second"]
    await ctl(service, "snapshot", "destroy", *(snapshot["id"] for snapshot in listed["snapshots"]))
    await ctl(service, "detach", path)
    (device,) = (
        device
        for device in json.loads(await ctl(service, "status", "--json"))["devices"]
        if device["path"] == path
    )
    assert device["tracker"] is None


async def test_ranges_of_a_ragged_map_are_those_of_the_map_file(service: RealService) -> None:
    """Many pages of ranges, the same as the bytes of the map say."""
    path = service.image_file("ragged.img", 128 * MIB)
    async with Client(service.bus) as client:
        disk = await client.add_image_file(str(path))
        await client.attach(disk, block_size=4096)
        await client.mark_dirty(disk, [(block * 4096, 4096) for block in range(0, 32_768, 2)])
        with await client.open_map(disk, view="live") as shown:
            blocks = shown.size
        found = [pair async for pair in client.changed_ranges(disk, 0, view="live")]
        levels, _ = await client.summarize(disk, 0, blocks, 7)
    assert blocks == 32_768
    assert found == [(block * 4096, 4096) for block in range(0, 32_768, 2)]
    assert levels == bytes([NEWEST]) * 7


async def test_the_program_does_all_of_it_by_keys(service: RealService) -> None:
    """A file is added, tracked, written to, snapshotted; the snapshot destroyed; the map shows the write."""
    path = service.image_file("disk.img", 64 * MIB)
    app = BlksnapApp(service.bus, settings=Settings(rate_hz=10))
    async with app.run_test(size=(100, 30)) as pilot:
        await until(pilot, lambda: app.main.state.manager is not None)
        await pilot.press("a")
        await until(pilot, lambda: isinstance(app.screen, AskFile))
        await pilot.press(*str(path), "enter")
        await until(pilot, lambda: app.main.device is not None and app.main.device.path == str(path))
        await pilot.press("t")
        await until(pilot, lambda: isinstance(app.screen, AskTrack))
        await pilot.press("right", "enter")
        await drawn(app, pilot)
        device = app.main.device
        assert device is not None
        assert device.tracker is not None
        await write(device.tracker.node, (32 * MIB, 1))
        await until(pilot, lambda: app.main.value_of_block(512) == NEWEST)
        assert app.main.value_of_block(511) == 0
        await pilot.press("s")
        await until(pilot, lambda: isinstance(app.screen, AskSnapshot))
        await pilot.press("enter")
        await until(pilot, lambda: [shot.state for shot in app.main.state.snapshots] == ["taken"])
        await until(pilot, lambda: app.main.value_of_block(512) == NEWEST - 1)
        app.main.query_one("#snapshots").focus()
        await pilot.press("x")
        await until(pilot, lambda: isinstance(app.screen, Confirm))
        await pilot.press("right", "enter")
        await until(pilot, lambda: not app.main.state.snapshots)
        await pilot.press("d")
        await until(pilot, lambda: isinstance(app.screen, Confirm))
        await pilot.press("right", "enter")
        await until(pilot, lambda: "is not tracked" in screen_text(app))


async def test_the_program_survives_the_service(service: RealService) -> None:
    """Killed and started again: the connect screen comes and goes, and what was chosen still is."""
    path = service.image_file("disk.img", 64 * MIB)
    async with Client(service.bus) as client:
        disk = await client.add_image_file(str(path))
        await client.attach(disk)
    app = BlksnapApp(service.bus, settings=Settings(rate_hz=10))
    async with app.run_test(size=(80, 24)) as pilot:
        await drawn(app, pilot)
        await service.kill()
        await until(pilot, lambda: isinstance(app.screen, ConnectScreen))
        assert "the service is not running" in screen_text(app)
        await service.start()
        await until(pilot, lambda: app.screen is app.main)
        await drawn(app, pilot)
        assert app.main.device is not None
        assert app.main.device.object_path == disk
