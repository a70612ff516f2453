# SPDX-License-Identifier: GPL-2.0-or-later
"""Devices: names, image files, what paths lead to."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from blksnap_service import errors
from blksnap_service.catalogue import Catalogue
from blksnap_service.datapath.process import ORIGIN_NAME_MAX
from blksnap_service.devices import Device, escape
from blksnap_service.fds import OwnedFd
from blksnap_service.inventory import Inventory
from blksnap_service.storage import Identity
from blksnap_service.udev import BlockDevices
from tests.unit.fakes.service import MIB, Blocks, Recorder, image_file

SDA = Device("sda", "block", "/dev/sda", Identity(0x800, 0), 1 << 30, symlinks=("/dev/disk/by-id/one",))


class Rig:
    """An inventory with what it needs."""

    def __init__(self, catalogue: Catalogue) -> None:
        self.catalogue = catalogue
        self.blocks = Blocks()
        self.watcher = Recorder()
        self.pinned: set[str] = set()
        self.inventory = Inventory(catalogue.images, self.blocks, self.watcher, lambda: self.pinned)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    """An empty inventory."""
    with Catalogue(tmp_path / "state") as catalogue:
        yield Rig(catalogue)


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), st.text())
def test_escaping_is_safe_and_tells_names_apart(one: str, other: str) -> None:
    """Any file name can be part of an object path, and two names never the same part."""
    assert re.fullmatch(r"[A-Za-z0-9_]+", escape(one))
    if "\0" not in other and other.isascii() and one:
        assert (escape(one) == escape(other)) == (one == other)


@pytest.mark.parametrize(
    "text, escaped",
    [("sda1", "sda1"), ("disk.img", "disk_2eimg"), ("a_b", "a_5fb"), ("cciss!c0d0", "cciss_21c0d0")],
)
def test_escaping_is_readable(text: str, escaped: str) -> None:
    """Letters and digits stay."""
    assert escape(text) == escaped


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
def test_origin_names_suit_the_data_path(name: str) -> None:
    """1 to 64 characters of its alphabet, and no longer than sockets allow."""
    device = Device("x", "file", f"/srv/{name}", Identity(1, 1), MIB)
    assert re.fullmatch(r"[A-Za-z0-9_-]+", device.origin)
    assert len(device.origin) <= ORIGIN_NAME_MAX


async def test_an_added_file_is_a_device(rig: Rig, tmp_path: Path) -> None:
    """It is told and written down."""
    path = image_file(tmp_path)
    device = await rig.inventory.add_image(str(path))
    assert (device.name, device.path, device.size, device.number) == ("disk_2eimg", str(path), MIB, 0)
    assert rig.watcher.told == ["+device disk_2eimg"]
    assert [entry.path for entry in rig.catalogue.images] == [str(path)]


async def test_the_same_file_is_the_same_device(rig: Rig, tmp_path: Path) -> None:
    """By any name."""
    path = image_file(tmp_path)
    (tmp_path / "link").symlink_to(path)
    (tmp_path / "hard").hardlink_to(path)
    first = await rig.inventory.add_image(str(path))
    assert await rig.inventory.add_image(str(tmp_path / "link")) == first
    assert await rig.inventory.add_image(str(tmp_path / "hard")) == first
    assert len(list(rig.inventory)) == 1


async def test_files_of_one_name_are_told_apart(rig: Rig, tmp_path: Path) -> None:
    """Also after a restart: the names are written down."""
    (tmp_path / "other").mkdir()
    first = await rig.inventory.add_image(str(image_file(tmp_path)))
    second = await rig.inventory.add_image(str(image_file(tmp_path / "other")))
    assert (first.name, second.name) == ("disk_2eimg", "disk_2eimg__2")
    again = Rig(rig.catalogue)
    await again.inventory.load(frozenset())
    assert {device.name: device.path for device in again.inventory} == {
        first.name: first.path,
        second.name: second.path,
    }


@pytest.mark.parametrize(
    "make, error, text",
    [
        (lambda _: None, errors.NotFound, "no such file"),
        (lambda path: path.mkdir(), errors.InvalidArgument, "not a regular file"),
        (os.mkfifo, errors.InvalidArgument, "not a regular file"),
        (lambda path: path.write_bytes(b""), errors.InvalidArgument, "0 bytes"),
        (lambda path: path.write_bytes(bytes(513)), errors.InvalidArgument, "513 bytes"),
    ],
)
async def test_what_is_no_disk_image_is_refused(
    rig: Rig, tmp_path: Path, make: object, error: type[errors.BlksnapError], text: str
) -> None:
    """With the path and the reason."""
    assert callable(make)
    make(tmp_path / "disk.img")
    with pytest.raises(error, match=text) as caught:
        await rig.inventory.add_image(str(tmp_path / "disk.img"))
    assert str(tmp_path / "disk.img") in str(caught.value)
    assert list(rig.inventory) == []


@pytest.mark.parametrize("path", ["", "disk.img", "../disk.img", "/a\0b"])
async def test_a_path_that_is_not_absolute_is_refused(rig: Rig, path: str) -> None:
    """Relative to what? The service's directory is none of the caller's business."""
    with pytest.raises(errors.InvalidArgument, match="absolute"):
        await rig.inventory.add_image(path)


async def test_a_name_that_is_no_text_is_refused(rig: Rig, tmp_path: Path) -> None:
    """The bus carries UTF-8 only; a link may lead anywhere."""
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/disk\xff"))
    odd.write_bytes(bytes(512))
    (tmp_path / "link").symlink_to(odd)
    with pytest.raises(errors.InvalidArgument, match="not UTF-8") as caught:
        await rig.inventory.add_image(str(tmp_path / "link"))
    assert str(caught.value).encode()


async def test_a_file_the_caller_opened_is_added_by_its_name(rig: Rig, tmp_path: Path) -> None:
    """The descriptor proves that the caller may write it, and is not kept."""
    fd = OwnedFd(os.open(image_file(tmp_path), os.O_RDWR))
    device = await rig.inventory.add_image("", fd)
    assert device.path == str(tmp_path / "disk.img")
    assert fd.closed


async def test_a_descriptor_of_another_file_is_refused(rig: Rig, tmp_path: Path) -> None:
    """What is opened later is the path: it must be what the caller could open."""
    fd = OwnedFd(os.open(image_file(tmp_path, "other.img"), os.O_RDWR))
    with pytest.raises(errors.InvalidArgument, match="is not the file"):
        await rig.inventory.add_image(str(image_file(tmp_path)), fd)
    assert fd.closed


async def test_a_descriptor_that_only_reads_is_refused(rig: Rig, tmp_path: Path) -> None:
    """Tracking means writing."""
    fd = OwnedFd(os.open(image_file(tmp_path), os.O_RDONLY))
    with pytest.raises(errors.InvalidArgument, match="not open for reading and writing"):
        await rig.inventory.add_image("", fd)


async def test_devices_are_found_by_every_name(rig: Rig, tmp_path: Path) -> None:
    """Path, link to it, udev's links."""
    rig.blocks.devices = {"sda": SDA}
    await rig.inventory.refresh()
    path = image_file(tmp_path)
    (tmp_path / "link").symlink_to(path)
    device = await rig.inventory.add_image(str(path))
    assert await rig.inventory.resolve(str(path)) == device
    assert await rig.inventory.resolve(str(tmp_path / "link")) == device
    assert await rig.inventory.resolve("/dev/disk/by-id/one") == SDA
    assert await rig.inventory.resolve("/dev/sda") == SDA


@pytest.mark.parametrize("path", ["", "sda", "/dev/null", "/", "/nope", "\0", "/a\0", "/" + "x" * 5000])
async def test_what_is_no_device_is_not_found(rig: Rig, path: str) -> None:
    """Whatever it is."""
    rig.blocks.devices = {"sda": SDA}
    await rig.inventory.refresh()
    with pytest.raises(errors.NotFound):
        await rig.inventory.resolve(path)


async def test_block_devices_come_change_and_go(rig: Rig) -> None:
    """Each is told once."""
    rig.blocks.devices = {"sda": SDA}
    await rig.inventory.refresh()
    await rig.inventory.refresh()
    rig.blocks.devices = {"sda": Device("sda", "block", "/dev/sda", Identity(0x800, 0), 2 << 30)}
    await rig.inventory.refresh()
    rig.blocks.devices = {}
    await rig.inventory.refresh()
    assert rig.watcher.told == ["+device sda", "~device sda", "-device sda"]


async def test_a_tracked_device_stays_listed_when_it_is_pulled(rig: Rig) -> None:
    """Its tracker is still there to be detached."""
    rig.blocks.devices = {"sda": SDA}
    rig.pinned = {"sda"}
    await rig.inventory.refresh()
    rig.blocks.devices = {}
    await rig.inventory.refresh()
    assert rig.inventory.get("sda") == SDA


async def test_a_block_device_named_like_an_image_gets_another_name(rig: Rig, tmp_path: Path) -> None:
    """The image was first; the disk is not lost for it, and keeps its name as long as it is there."""
    await rig.inventory.add_image(str(image_file(tmp_path, "sda")))
    rig.blocks.devices = {"sda": SDA}
    await rig.inventory.refresh()
    await rig.inventory.refresh()
    assert {device.name: device.path for device in rig.inventory} == {
        "sda": str(tmp_path / "sda"),
        "sda__2": "/dev/sda",
    }


async def test_a_grown_image_is_noticed(rig: Rig, tmp_path: Path) -> None:
    """Its size is a property."""
    path = image_file(tmp_path)
    device = await rig.inventory.add_image(str(path))
    os.truncate(path, 2 * MIB)
    await rig.inventory.refresh()
    assert rig.inventory.get(device.name).size == 2 * MIB
    assert rig.watcher.told[-1] == "~device disk_2eimg"


async def test_a_missing_image_is_forgotten_at_start_unless_needed(
    rig: Rig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One that is to be tracked always may be on a disk that is mounted later."""
    for name in ("one.img", "two.img"):
        await rig.inventory.add_image(str(image_file(tmp_path, name)))
        (tmp_path / name).unlink()
    again = Rig(rig.catalogue)
    await again.inventory.load(frozenset({"two_2eimg"}))
    assert list(again.inventory) == []
    assert [entry.key for entry in rig.catalogue.images] == ["two_2eimg"]
    assert "one.img" in caplog.text


async def test_a_removed_device_is_not_found(rig: Rig) -> None:
    """By its object's name."""
    with pytest.raises(errors.NotFound, match="sda"):
        rig.inventory.get("sda")


def test_without_udev_there_are_no_block_devices_and_a_reason(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As in a container without libudev."""
    import pyudev

    def missing() -> None:
        raise ImportError("No library named udev")

    monkeypatch.setattr(pyudev, "Context", missing)
    assert BlockDevices().list() == {}
    assert "no block devices are listed: udev cannot be used (No library named udev)" in caplog.text


def test_devices_nobody_tracks_are_hidden() -> None:
    """Empty loop devices, RAM disks, floppies: what is listed has a size and an own name."""
    for name, device in BlockDevices().list().items():
        assert name == device.name
        assert device.size > 0
        assert not re.match(r"fd\d|zram\d|blksnap", name)
