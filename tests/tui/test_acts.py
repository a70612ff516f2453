# SPDX-License-Identifier: GPL-2.0-or-later
"""What a person can do, by keys and mouse, and what the service is asked for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot
from textual.widgets import Input, Select

from blksnap_tui import model
from blksnap_tui.app import BlksnapApp
from blksnap_tui.fakelink import Refusal
from blksnap_tui.heat.widget import HeatMap
from blksnap_tui.screens.dialogs import AskFile, AskSnapshot, Confirm, Dialog, Notice, default_limit
from blksnap_tui.screens.help import HelpScreen
from blksnap_tui.screens.questions import AskLine, AskTrack
from blksnap_tui.settings import Settings
from blksnap_tui.testing import FakeService
from blksnap_tui.units import parse_size
from blksnap_tui.widgets.inspector import Inspector
from tests.tui.golden import screen_text
from tests.tui.worlds import DISK, drawn, running, until

READS = {"GetManagedObjects", "Summarize", "GetInfo", "ReadMap"}


def acts(service: FakeService) -> list[tuple[str, tuple[Any, ...]]]:
    """Give the calls that were not mere looking."""
    return [call for call in service.calls if call[0] not in READS]


async def chosen(app: BlksnapApp, pilot: Pilot[None], name: str) -> None:
    """Choose a device by its name."""
    await until(pilot, lambda: bool(app.main.state.devices))
    (path,) = (device.object_path for device in app.main.state.devices if device.name == name)
    app.main.choose(path)
    await until(pilot, lambda: app.main.device is not None and app.main.device.name == name)


async def asked(app: BlksnapApp, pilot: Pilot[None], key: str, kind: type[Any]) -> None:
    """Press a key and wait for the question it leads to."""
    await pilot.press(key)
    await until(pilot, lambda: isinstance(app.screen, kind))


async def answered(app: BlksnapApp, pilot: Pilot[None], *keys: str) -> None:
    """Answer a question and wait until the main screen is back."""
    await pilot.press(*keys)
    await until(pilot, lambda: app.screen is app.main)


async def test_a_file_is_added_and_chosen() -> None:
    """The first thing a newcomer does."""
    service = FakeService()
    async with running(service) as (app, pilot):
        await until(pilot, lambda: app.main.state.manager is not None)
        await asked(app, pilot, "a", AskFile)
        await answered(app, pilot, *"/srv/new.img", "enter")
        await until(pilot, lambda: app.main.device is not None)
        assert app.main.device is not None
        assert app.main.device.path == "/srv/new.img"
    assert acts(service) == [("AddImageFile", ("/srv/new.img", {}))]


async def test_a_file_without_a_name_is_not_added(busy: FakeService) -> None:
    """The dialog stays and says what is missing."""
    async with running(busy) as (app, pilot):
        await until(pilot, lambda: bool(app.main.state.devices))
        await asked(app, pilot, "a", AskFile)
        await pilot.press("enter")
        await until(pilot, lambda: "write a path first" in screen_text(app))
        await answered(app, pilot, "escape")
    assert acts(busy) == []


async def test_a_device_is_tracked_after_a_yes(busy: FakeService) -> None:
    """Cancel is at hand; one step to the right is yes."""
    async with running(busy) as (app, pilot):
        await chosen(app, pilot, "sda")
        await asked(app, pilot, "t", AskTrack)
        await answered(app, pilot, "right", "enter")
        await drawn(app, pilot)
        assert app.main.device is not None
        assert app.main.device.tracker is not None
    assert acts(busy) == [("Attach", ({},))]


@pytest.mark.parametrize("no", ["enter", "escape"])
@pytest.mark.parametrize("name, key", [("sda", "t"), ("disk.img", "d"), ("disk.img", "x")])
async def test_nothing_happens_without_a_yes(busy: FakeService, name: str, key: str, no: str) -> None:
    """Enter alone cancels, as escape does."""
    async with running(busy) as (app, pilot):
        await chosen(app, pilot, name)
        await asked(app, pilot, key, Dialog)
        await answered(app, pilot, no)
    assert acts(busy) == []


async def test_a_device_without_a_backend_says_why(busy: FakeService) -> None:
    """No question that could only be refused."""
    async with running(busy) as (app, pilot):
        await chosen(app, pilot, "mail")
        await asked(app, pilot, "t", Notice)
        assert "no backend can track /dev/vg0/mail" in screen_text(app)
        await answered(app, pilot, "enter")
    assert acts(busy) == []


async def test_a_mounted_device_without_a_backend_says_what_to_do(busy: FakeService) -> None:
    """The node is mounted in its place."""
    busy.add_device("/dev/sdc1", 1 << 30, MountPoints=["/srv/data"], Backends=[])
    async with running(busy) as (app, pilot):
        await chosen(app, pilot, "sdc1")
        await asked(app, pilot, "t", Notice)
        assert "/dev/sdc1 is mounted on /srv/data" in screen_text(app)
        await answered(app, pilot, "enter")
    assert acts(busy) == []


async def test_untracking_a_device_in_its_own_place_costs_no_program_anything(busy: FakeService) -> None:
    """The tracker was under it."""
    device = busy.add_device("/dev/dm-3", 1 << 30, Symlinks=["/dev/mapper/vg-home"])
    busy.track(device)
    busy.objects[device][model.TRACKER]["Node"] = "/dev/mapper/vg-home"
    async with running(busy) as (app, pilot):
        await chosen(app, pilot, "dm-3")
        await asked(app, pilot, "d", Confirm)
        assert "programs that use it go on" in screen_text(app)
        await answered(app, pilot, "escape")


async def test_untracking_removes_the_map(busy: FakeService) -> None:
    """The hint comes in its place."""
    async with running(busy) as (app, pilot):
        await chosen(app, pilot, "disk.img")
        await asked(app, pilot, "d", Confirm)
        await answered(app, pilot, "right", "enter")
        await until(pilot, lambda: "disk.img is not tracked" in screen_text(app))
    assert acts(busy) == [("Detach", ({},))]


async def test_a_snapshot_of_two_devices_is_taken(busy: FakeService) -> None:
    """Devices, limit and description go to the service as they were written."""
    async with running(busy) as (app, pilot):
        await chosen(app, pilot, "disk.img")
        await asked(app, pilot, "s", AskSnapshot)
        app.screen.query_one("#limit", Input).value = "3GiB"
        await pilot.press(*"before")
        app.screen.query_one("#devices").focus()
        await pilot.press("up", "home", "space")
        app.screen.query_one("#description").focus()
        await answered(app, pilot, "enter")
        await until(pilot, lambda: len(app.main.state.snapshots) == 4)
    ((name, (devices, options)),) = acts(busy)
    assert name == "CreateSnapshot"
    assert set(devices) == {DISK, f"{model.ROOT_PATH}/devices/nvme0n1p2"}
    assert options == {"limit": 3 << 30, "description": "before"}


async def test_a_wrong_limit_keeps_the_dialog(busy: FakeService) -> None:
    """The mistake is named beside the field."""
    async with running(busy) as (app, pilot):
        await chosen(app, pilot, "disk.img")
        await asked(app, pilot, "s", AskSnapshot)
        app.screen.query_one("#limit", Input).value = "3 gigs"
        await pilot.press("enter")
        await until(pilot, lambda: "'gigs' in '3 gigs' is not a unit" in screen_text(app))
        await answered(app, pilot, "escape")
    assert acts(busy) == []


async def test_a_snapshot_needs_a_device(busy: FakeService) -> None:
    """None chosen is said, not sent."""
    async with running(busy) as (app, pilot):
        await chosen(app, pilot, "disk.img")
        await asked(app, pilot, "s", AskSnapshot)
        app.screen.query_one("#devices").focus()
        await pilot.press("end", "space")
        app.screen.query_one("#limit").focus()
        await pilot.press("enter")
        await until(pilot, lambda: "choose at least one device" in screen_text(app))
    assert acts(busy) == []


async def test_an_untracked_device_has_no_snapshot_dialog(busy: FakeService) -> None:
    """It says what to do first."""
    async with running(busy) as (app, pilot):
        await chosen(app, pilot, "sda")
        await pilot.press("s")
        await until(pilot, lambda: "press t first" in screen_text(app))
        assert app.screen is app.main


async def test_the_chosen_snapshot_is_destroyed(busy: FakeService) -> None:
    """The second one here, after a yes."""
    async with running(busy) as (app, pilot):
        await until(pilot, lambda: len(app.main.state.snapshots) == 3)
        app.main.query_one("#snapshots").focus()
        await pilot.press("down")
        await asked(app, pilot, "x", Confirm)
        assert "before the upgrade" in screen_text(app)
        await answered(app, pilot, "right", "enter")
        await until(pilot, lambda: len(app.main.state.snapshots) == 2)
    assert acts(busy) == [("Destroy", ({},))]


async def test_refusals_are_shown_in_the_words_of_the_service(busy: FakeService) -> None:
    """As they are, markup and all, until they are closed."""
    busy.refuse["Detach"] = Refusal("Busy", "disk.img is part of 2 snapshots: destroy them [bold]first[/]")
    async with running(busy) as (app, pilot):
        await chosen(app, pilot, "disk.img")
        await asked(app, pilot, "d", Confirm)
        await pilot.press("right", "enter")
        await until(pilot, lambda: isinstance(app.screen, Notice))
        assert "destroy them [bold]first[/]" in screen_text(app)
        await answered(app, pilot, "enter")


async def test_help_lists_the_keys_and_says_what_backends_lack(busy: FakeService) -> None:
    """Made of the bindings, so that no key is missing."""
    async with running(busy) as (app, pilot):
        await until(pilot, lambda: bool(app.main.state.devices))
        await asked(app, pilot, "question_mark", HelpScreen)
        shown = screen_text(app)
        assert "take a snapshot of one or more devices" in shown
        assert "the kernel has no blksnap module" in shown
        await answered(app, pilot, "escape")


async def test_the_mouse_inspects(busy: FakeService) -> None:
    """Hovering is enough."""
    async with running(busy) as (app, pilot):
        await chosen(app, pilot, "disk.img")
        await drawn(app, pilot)
        await pilot.hover(HeatMap, offset=(3, 2))
        await until(pilot, lambda: "block" in str(app.main.query_one(Inspector).render()))


async def test_a_device_may_be_called_anything(busy: FakeService) -> None:
    """Names are text, not markup."""
    busy.add_device("/srv/[b]x[@click=app.bell].img", 1 << 20)
    async with running(busy, (160, 48)) as (app, pilot):
        await chosen(app, pilot, "[b]x[@click=app.bell].img")
        assert "─ [b]x[@click=app.bell].img ─" in screen_text(app)
        assert "[b]x[@click=app.bell].img is not tracked" in screen_text(app)


@pytest.mark.parametrize("size", [1 << 20, 1 << 30, 10 << 30, 1 << 40, (1 << 50) + 12345])
def test_the_proposed_limit_can_be_read_back(size: int) -> None:
    """It is a size like any other, and some use."""
    assert parse_size(default_limit(size)) >= min(64 << 20, size)


async def test_a_pause_holds_the_picture_but_not_the_feed(busy: FakeService) -> None:
    """What came meanwhile is shown at once afterwards."""
    async with running(busy) as (app, pilot):
        await chosen(app, pilot, "disk.img")
        await drawn(app, pilot)
        await pilot.press("space")
        busy.write(DISK, 0, 1)
        busy.add_device("/dev/later", 1 << 20)
        await until(pilot, lambda: app.main.held >= 2)
        assert "later" not in screen_text(app)
        await pilot.press("space")
        await until(pilot, lambda: "later" in screen_text(app))


async def test_resizing_keeps_what_was_chosen(busy: FakeService) -> None:
    """Through small and large."""
    async with running(busy) as (app, pilot):
        await chosen(app, pilot, "disk.img")
        for size in ((200, 60), (30, 8), (40, 12), (120, 40), (80, 24)):
            await pilot.resize_terminal(*size)
            await pilot.pause()
        await drawn(app, pilot)
        assert app.main.device is not None
        assert app.main.device.object_path == DISK


async def test_a_backend_can_be_chosen_and_what_others_lack_is_said(busy: FakeService) -> None:
    """The first is the service's choice and is not sent; another is, with the block size."""
    (sda,) = (path for path, kept in busy.objects.items() if path.endswith("/sda"))
    busy.objects[sda][model.DEVICE]["Backends"] = ["nbd", "ublk"]
    async with running(busy) as (app, pilot):
        await chosen(app, pilot, "sda")
        await asked(app, pilot, "t", AskTrack)
        assert "blkfilter: the kernel has no blksnap module" in screen_text(app)
        app.screen.query_one("#backend", Select).value = "ublk"
        app.screen.query_one("#block-size", Input).value = "1M"
        await answered(app, pilot, "right", "enter")
    assert acts(busy) == [("Attach", ({"backend": "ublk", "block-size": 1 << 20},))]


async def test_a_snapshot_can_be_held(busy: FakeService) -> None:
    """It then ends with this program, and is shown as held; R lets it stay."""
    async with running(busy) as (app, pilot):
        await chosen(app, pilot, "disk.img")
        await asked(app, pilot, "s", AskSnapshot)
        app.screen.query_one("#hold", Select).value = True
        await answered(app, pilot, "enter")
        await until(pilot, lambda: len(app.main.state.snapshots) == 4)
        assert app.main.state.snapshots[-1].held
    assert acts(busy)[0][1][1]["hold"] is True


@pytest.mark.parametrize(
    "text, call",
    [
        ("1M:128K", ("MarkDirty", ([[1 << 20, 128 << 10]], {}))),
        ("all", ("MarkAllDirty", ({},))),
    ],
)
async def test_a_range_or_all_can_be_marked(
    busy: FakeService, text: str, call: tuple[str, tuple[Any, ...]]
) -> None:
    """What lies under the cursor is proposed; what is written counts."""
    async with running(busy) as (app, pilot):
        await chosen(app, pilot, "disk.img")
        await drawn(app, pilot)
        await asked(app, pilot, "M", AskLine)
        app.screen.query_one("#line", Input).value = text
        await answered(app, pilot, "enter")
        await until(pilot, lambda: bool(acts(busy)))
    assert acts(busy) == [call]


async def test_what_changed_is_written_to_a_file(busy: FakeService, tmp_path: Path) -> None:
    """Every range since the last snapshot; a name of no known kind is refused first."""
    async with running(busy) as (app, pilot):
        await chosen(app, pilot, "disk.img")
        await drawn(app, pilot)
        await asked(app, pilot, "e", AskLine)
        app.screen.query_one("#line", Input).value = str(tmp_path / "changes.txt")
        await pilot.press("enter")
        await until(pilot, lambda: "must end in .csv or .json" in screen_text(app))
        app.screen.query_one("#line", Input).value = str(tmp_path / "changes.csv")
        await answered(app, pilot, "enter")
        await until(pilot, (tmp_path / "changes.csv").exists)
    size = 65_536
    assert (tmp_path / "changes.csv").read_text() == f"offset,length\n{5000 * size},{40 * size}\n"


async def test_read_only_takes_the_acts_away(busy: FakeService) -> None:
    """Neither the keys work nor are they shown; looking does."""
    async with running(busy, settings=Settings(rate_hz=10, read_only=True)) as (app, pilot):
        await chosen(app, pilot, "disk.img")
        await pilot.press("a", "t", "d", "s", "x", "M")
        await pilot.pause()
        assert app.screen is app.main
        assert "destroy" not in screen_text(app).splitlines()[-1]
        await pilot.press("m")
        await until(pilot, lambda: "next increment since #13" in screen_text(app))
    assert acts(busy) == []
