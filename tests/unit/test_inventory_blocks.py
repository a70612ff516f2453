# SPDX-License-Identifier: GPL-2.0-or-later
"""Block devices that come, go, grow and change under a tracker."""

from __future__ import annotations

import asyncio
import stat
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from blksnap_service import errors
from blksnap_service.catalogue import Catalogue
from blksnap_service.devices import Device
from blksnap_service.inventory import Inventory
from blksnap_service.storage import Identity
from tests.unit.fakes.service import Blocks, Recorder, image_file

SDA = Device("sda", "block", "/dev/sda", Identity(0x800, 0), 1 << 30, diskseq=7)


class Rig:
    """An inventory that writes down what a service would be told about its trackers."""

    def __init__(self, catalogue: Catalogue) -> None:
        self.blocks = Blocks()
        self.watcher = Recorder()
        self.tracked: set[str] = set()
        self.told: list[str] = []
        self.inventory = Inventory(catalogue.images, self.blocks, self.watcher, lambda: self.tracked, self)

    def device_found(self, device: Device) -> None:
        """Write it down."""
        self.told.append(f"found {device.path}")

    def device_lost(self, device: Device) -> None:
        """Write it down."""
        self.told.append(f"lost {device.path}")

    def device_resized(self, device: Device) -> None:
        """Write it down."""
        self.told.append(f"resized {device.path} to {device.size}")

    async def looked(self) -> None:
        """Wait until nothing is about to be looked at."""
        assert self.inventory._refreshing is not None
        await self.inventory._refreshing

    async def see(self, *devices: Device) -> None:
        """Let these be all there are."""
        self.blocks.devices = {device.name: device for device in devices}
        await self.inventory.refresh()


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    """An empty inventory."""
    with Catalogue(tmp_path / "state") as catalogue:
        yield Rig(catalogue)


async def test_a_tracked_device_that_is_pulled_out_is_told_once(rig: Rig) -> None:
    """Its object stays, for its tracker to say what happened."""
    await rig.see(SDA)
    rig.tracked = {"sda"}
    await rig.see()
    await rig.see()
    assert rig.told == ["lost /dev/sda"]
    assert rig.inventory.get("sda") == SDA


async def test_a_device_nobody_tracks_just_goes(rig: Rig) -> None:
    """There is nobody to tell but the bus."""
    await rig.see(SDA)
    await rig.see()
    assert rig.told == []
    assert rig.watcher.told == ["+device sda", "-device sda"]


async def test_a_lost_device_goes_when_it_is_not_tracked_any_more(rig: Rig) -> None:
    """And is told again the next time."""
    await rig.see(SDA)
    rig.tracked = {"sda"}
    await rig.see()
    rig.tracked = set()
    await rig.see()
    assert rig.watcher.told == ["+device sda", "-device sda"]
    await rig.see(SDA)
    rig.tracked = {"sda"}
    await rig.see()
    assert rig.told == ["lost /dev/sda"] * 2


async def test_another_disk_of_the_same_name_is_a_loss(rig: Rig) -> None:
    """Between two looks one may have gone and another come; so does a medium."""
    await rig.see(SDA)
    rig.tracked = {"sda"}
    await rig.see(replace(SDA, diskseq=8))
    await rig.see(replace(SDA, diskseq=8))
    assert rig.told == ["lost /dev/sda"]


async def test_without_disk_sequence_numbers_nothing_is_concluded_from_them(rig: Rig) -> None:
    """A kernel before 5.15, or a device-mapper device."""
    await rig.see(replace(SDA, diskseq=0))
    rig.tracked = {"sda"}
    await rig.see(SDA)
    await rig.see(replace(SDA, diskseq=0))
    assert rig.told == []


async def test_a_tracked_device_that_grew_is_told(rig: Rig) -> None:
    """After its object shows the new size."""
    await rig.see(SDA)
    rig.tracked = {"sda"}
    await rig.see(replace(SDA, size=2 << 30))
    assert rig.told == [f"resized /dev/sda to {2 << 30}"]
    assert rig.inventory.get("sda").size == 2 << 30


async def test_a_block_device_keeps_its_object_beside_a_file_of_its_name(rig: Rig, tmp_path: Path) -> None:
    """However often one looks."""
    await rig.inventory.add_image(str(image_file(tmp_path, "sda")))
    for _ in range(3):
        await rig.see(SDA)
    assert rig.watcher.told == ["+device sda", "+device sda__2"]
    await rig.see()
    assert rig.watcher.told[-1] == "-device sda__2"


async def test_a_device_that_is_to_be_tracked_always_is_told_when_it_comes(rig: Rig) -> None:
    """A disk that is plugged in late; not again while it stays."""
    always = replace(SDA, stable_key="serial-x", node_name="backup")
    await rig.see(always)
    await rig.see(replace(always, id_label="new"))
    assert rig.told == ["found /dev/sda"]
    assert rig.inventory.by_key("serial-x").name == "sda"
    with pytest.raises(errors.NotFound, match="serial-y"):
        rig.inventory.by_key("serial-y")


async def test_the_node_of_a_tracker_is_its_origin(rig: Rig) -> None:
    """Who names what is mounted means what is tracked."""
    null = Path("/dev/null").stat().st_rdev
    await rig.see(replace(SDA, nodes=(null,)))
    assert (await rig.inventory.resolve("/dev/null")).name == "sda"


async def test_many_events_are_one_look_at_a_time(rig: Rig) -> None:
    """And what came during a look is seen by the next one."""
    looks = 0
    go = threading.Event()

    def list_slowly() -> dict[str, Device]:
        nonlocal looks
        looks += 1
        go.wait(5)
        return dict(rig.blocks.devices)

    rig.blocks.list = list_slowly  # type: ignore[method-assign]
    for _ in range(100):
        rig.inventory.refresh_soon()
        await asyncio.sleep(0)
    rig.blocks.devices = {"sda": SDA}
    rig.inventory.refresh_soon()
    go.set()
    async with asyncio.timeout(5):
        await rig.looked()
    assert looks == 2
    assert rig.watcher.told == ["+device sda"]
    rig.inventory.close()


async def test_a_node_that_has_just_appeared_is_looked_for(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be used before the event of its appearance has come."""
    await rig.see(SDA)
    monkeypatch.setattr(stat, "S_ISBLK", stat.S_ISCHR)
    rig.blocks.devices = {"sda": replace(SDA, nodes=(Path("/dev/null").stat().st_rdev,))}
    assert (await rig.inventory.resolve("/dev/null")).name == "sda"
    with pytest.raises(errors.NotFound):
        await rig.inventory.resolve("/dev/zero")
