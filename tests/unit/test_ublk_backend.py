# SPDX-License-Identifier: GPL-2.0-or-later
"""Where a tracker with ublk goes, what it refuses and why, over a fake data path and devices that are not there."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest

from blksnap_service import errors
from blksnap_service.backends.datapath import freeze
from blksnap_service.devices import Device
from blksnap_service.fds import OwnedFd
from blksnap_service.persistent import Records
from blksnap_service.snapshot import Request
from blksnap_service.storage import Identity
from blksnap_service.tracker import Placement
from blksnap_service.trackers import Tracked
from blksnap_service.work import Work
from tests.unit.fakes.datapath import FakeDatapath
from tests.unit.fakes.machine import Machine
from tests.unit.fakes.service import MIB, Running, nothing_left, running_service

MINE = Request(owner_uid=1000)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine without devices."""
    return Machine(tmp_path, monkeypatch)


async def attached(rig: Running, device: Device, backend: str = "") -> Tracked:
    """Attach a tracker and return it."""
    rig.service.inventory.keep(device)
    await rig.service.registry.attach(device, owner_uid=1000, backend=backend)
    return rig.service.registry.get(device.name)


async def greet(rig: Running, fake: FakeDatapath, **abilities: tuple[bool, str]) -> None:
    """Let the data path be able to do something else."""
    fake.abilities.update(abilities)
    await rig.service._datapath.client.greet()


async def test_a_free_device_gets_a_new_one_on_top(
    rig: Running, fake: FakeDatapath, machine: Machine
) -> None:
    """With device-mapper it has a name of ours; that, and the ublk device, are written down."""
    device = machine.disk("sdb")
    tracked = await attached(rig, device)
    assert (tracked.tracker.backend, tracked.tracker.node) == ("ublk", "/dev/mapper/blksnap-sdb")
    entry = rig.catalogue.trackers.get(device.name)
    assert entry is not None
    assert (entry.backend, entry.top, entry.insert, entry.ublk_id) == ("ublk", "blksnap-sdb", "", 0)
    assert fake.origins[device.origin].front == "ublk"


async def test_without_device_mapper_the_node_is_the_ublk_device(
    rig: Running, fake: FakeDatapath, machine: Machine
) -> None:
    """Then there is nothing on top."""
    await greet(rig, fake, dm=(False, "this kernel has no device-mapper"))
    tracked = await attached(rig, machine.disk("sdb"))
    assert tracked.tracker.node == "/dev/ublkb0"
    assert tracked.tracker.placement == Placement(ublk_id=0)


async def test_a_logical_volume_in_use_gets_the_tracker_under_it(
    rig: Running, fake: FakeDatapath, machine: Machine
) -> None:
    """No descriptor is sent, and it stays what is mounted."""
    volume = machine.mount(machine.dm("vg-root"), "/srv")
    fake.live["vg-root"] = MIB
    tracked = await attached(rig, volume)
    assert tracked.tracker.node == "/dev/mapper/vg-root"
    assert tracked.tracker.placement.insert == "vg-root"
    request = next(one for one in fake.requests if one["op"] == "origin.add")
    assert (request["insert"], request["top"]) == ("vg-root", "")


async def test_a_history_never_goes_on_under_a_device_in_use(
    rig: Running, fake: FakeDatapath, machine: Machine
) -> None:
    """It was written to before the tracker came and after it went, and nobody saw that."""
    volume = machine.mount(machine.dm("vg-root"), "/srv")
    fake.live["vg-root"] = MIB
    first = (await attached(rig, volume)).tracker.last.generation
    await rig.service.detach(volume, force=False)
    again = await attached(rig, volume)
    assert again.tracker.last.generation != first
    assert again.entry.last_reset == "it was in use before it was tracked"


async def test_a_node_that_was_left_is_got_under_again(
    rig: Running, fake: FakeDatapath, machine: Machine
) -> None:
    """After a forced detach, or a boot without a tracker: who uses it goes on."""
    disk = machine.disk("sdb")
    machine.mount(machine.dm("blksnap-sdb", disk), "/srv")
    fake.live["blksnap-sdb"] = MIB
    tracked = await attached(rig, disk)
    assert (tracked.tracker.node, tracked.tracker.placement.insert) == (
        "/dev/mapper/blksnap-sdb", "blksnap-sdb",
    )  # fmt: skip


async def test_a_free_logical_volume_gets_one_on_top(rig: Running, machine: Machine) -> None:
    """Named as it is, not as its number."""
    tracked = await attached(rig, machine.dm("vg-data one"))
    assert tracked.tracker.placement.top == "blksnap-vg-data_one"


async def test_a_record_for_every_boot_names_the_node(rig: Running, machine: Machine) -> None:
    """The kernel's name may be another one next time."""
    tracked = await attached(rig, replace(machine.disk("sdb"), node_name="data"))
    assert tracked.tracker.node == "/dev/mapper/blksnap-data"


@pytest.mark.parametrize("backend", ["", "ublk"])
async def test_a_mounted_partition_is_refused_with_what_to_do(
    rig: Running, machine: Machine, backend: str
) -> None:
    """Where it is mounted, and how to go on."""
    partition = machine.mount(machine.partition(machine.disk("sdb"), "sdb1"), "/srv/data")
    with pytest.raises(errors.Busy, match=r"sdb1 is in use, it is mounted on /srv/data.*mount the Node"):
        await attached(rig, partition, backend)
    assert rig.service.registry.usable(partition) == []
    assert list(rig.catalogue.trackers) == []


async def test_who_is_in_the_way_is_said(rig: Running, machine: Machine) -> None:
    """A mounted partition of a disk, swap space, a volume group, or somebody one cannot see."""
    disk = machine.disk("sdb")
    machine.in_use.add(disk.path)
    machine.mount(machine.partition(disk, "sdb1"), "/boot")
    with pytest.raises(errors.Busy, match="its partition sdb1 is mounted on /boot"):
        await attached(rig, disk)
    physical = machine.disk("sdc")
    machine.dm("vg-root", physical)
    with pytest.raises(errors.Busy, match="it belongs to /dev/mapper/vg-root"):
        await attached(rig, physical)
    other = machine.disk("sdd")
    machine.in_use.add(other.path)
    with pytest.raises(errors.Busy, match="another program uses it"):
        await attached(rig, other, "ublk")


@pytest.mark.parametrize(
    "attributes, reason",
    [
        ({"queue__zoned": "host-managed"}, "zoned"),
        ({"queue__dax": "1"}, "dax"),
        ({"integrity__format": "T10-DIF-TYPE1-CRC"}, "integrity"),
        ({"ro": "1"}, "read-only"),
    ],
)
async def test_devices_nothing_can_be_put_over_are_refused(
    rig: Running, machine: Machine, attributes: dict[str, str], reason: str
) -> None:
    """And not offered."""
    device = machine.disk("sdb", **attributes)
    with pytest.raises(errors.NotSupported, match=reason):
        await attached(rig, device, "ublk")
    assert "ublk" not in rig.service.registry.usable(device)


async def test_an_image_file_is_for_nbd(rig: Running) -> None:
    """Which is what it gets when nobody asks for a backend."""
    device = await rig.image()
    assert rig.service.registry.usable(device) == ["nbd"]
    with pytest.raises(errors.NotSupported, match="use the backend nbd"):
        await rig.service.registry.attach(device, owner_uid=0, backend="ublk")


async def test_a_block_device_is_best_tracked_by_ublk(
    rig: Running, fake: FakeDatapath, machine: Machine
) -> None:
    """By NBD where there is no ublk; the reason is in the list of backends and in the error."""
    device = machine.disk("sdb")
    assert rig.service.registry.usable(device) == ["ublk", "nbd"]
    await greet(rig, fake, ublk=(False, "the kernel module ublk_drv is not loaded"))
    assert rig.service.registry.usable(device) == ["nbd"]
    infos = {info.name: info for info in rig.service.registry.infos()}
    assert infos["ublk"].reason == "the kernel module ublk_drv is not loaded"
    with pytest.raises(errors.NotAvailable, match="ublk_drv is not loaded"):
        await attached(rig, device, "ublk")


async def test_what_is_to_be_tracked_at_boot_has_the_node_it_is_mounted_by(
    rig: Running, fake: FakeDatapath, machine: Machine, tmp_path: Path
) -> None:
    """Its record says what tracked it; without that it is not served by another backend, which has another node."""
    device = replace(machine.disk("sdb"), stable_key="serial-1")
    rig.service.inventory.keep(device)
    rig.service._records = Records(tmp_path / "attach")
    await rig.service.attach(device, Work(), owner_uid=0, backend="", block_size=0, persistent=True)
    record = rig.service._records.named("sdb")
    assert record.backend == "ublk"
    await rig.service.registry.detach(device)
    await greet(rig, fake, ublk=(False, "the kernel module ublk_drv is not loaded"))
    for one in (record, replace(record, backend="")):
        with pytest.raises(errors.NotAvailable, match="ublk_drv is not loaded"):
            await rig.service._attach_record(one)


@pytest.mark.parametrize("name", ["bpf"])
async def test_what_is_not_written_yet_says_so(rig: Running, machine: Machine, name: str) -> None:
    """It is listed, not available, and refuses."""
    info = next(one for one in rig.service.registry.infos() if one.name == name)
    assert (info.available, bool(info.reason)) == (False, True)
    with pytest.raises(errors.NotAvailable, match="does not have it yet"):
        await attached(rig, machine.disk("sdb"), name)


async def test_the_devices_of_a_tracker_are_not_tracked_themselves(
    rig: Running, fake: FakeDatapath, machine: Machine
) -> None:
    """Neither its node, nor what lies between, nor images of it; nor are they storage."""
    between, top = machine.disk("ublkb0"), machine.dm("blksnap-sdb")
    device = machine.disk("sdb")
    await attached(rig, device)
    for mine in (between, top):
        assert rig.service.registry.usable(mine) == []
        with pytest.raises(errors.NotSupported, match=f"part of the tracker of {device.path}"):
            await attached(rig, mine)
        assert mine.identity in rig.service.registry.origins()
    snapshot = await rig.service.snapshots.create([device], MINE)
    path = Path(snapshot.status.images[0].path)
    image = replace(device, name="image", identity=Identity.of(path.stat()))
    with pytest.raises(errors.NotSupported, match=f"an image of snapshot {snapshot.id}"):
        await attached(rig, image)


async def test_a_detach_says_where_the_node_is_mounted(
    rig: Running, fake: FakeDatapath, machine: Machine
) -> None:
    """The data path only knows that it is in use."""
    device = machine.disk("sdb")
    top = machine.dm("blksnap-sdb")
    await attached(rig, device)
    machine.mount(top, "/srv")
    fake.origins[device.origin].clients = 1
    with pytest.raises(errors.Busy, match=r"node /dev/mapper/blksnap-sdb is in use, it is mounted on /srv"):
        await rig.service.detach(device, force=False)
    await rig.service.detach(device, force=True)
    assert device.name not in rig.service.registry


async def test_a_set_may_have_origins_of_both_kinds(
    rig: Running, fake: FakeDatapath, machine: Machine
) -> None:
    """One take; both images are exports, that of the block device is a block device too."""
    device, image = machine.disk("sdb"), await rig.tracked()
    await attached(rig, device)
    snapshot = await rig.service.snapshots.create([device, image], MINE)
    block, export = snapshot.status.images
    assert (bool(block.path), export.path) == (True, "")
    assert all(snapshot.id in one.uri for one in (block, export))
    assert sum(one["op"] == "snapshot.take" for one in fake.requests) == 1


async def test_file_systems_device_mapper_does_not_freeze_are_frozen(
    rig: Running, fake: FakeDatapath, machine: Machine, tmp_path: Path
) -> None:
    """Those on partitions and volumes over the node, not the one right on a device of ours; each once."""
    await greet(rig, fake, dm=(False, "no"))
    between = machine.disk("ublkb0")
    device = machine.disk("sdb")
    await attached(rig, device)
    await greet(rig, fake, dm=(True, ""))
    top, other = machine.dm("blksnap-sdc"), machine.disk("sdc")
    await attached(rig, other)
    volume = machine.dm("vg-home", top)
    places = {}
    for name, below in (("bare", between), ("top", top), ("home", volume)):
        places[name] = tmp_path / name
        places[name].mkdir()
        machine.mount(below, str(places[name]), str(tmp_path))
    await rig.service.snapshots.create([device, other], MINE)
    assert sorted(fake.frozen) == [str(places["bare"]), str(places["home"])]


async def test_a_file_system_that_cannot_be_frozen_fails_the_take(
    rig: Running, fake: FakeDatapath, machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It hangs, is not there, or has another one over it: said with its name, and nothing is left; unmounted it is no obstacle."""
    await greet(rig, fake, dm=(False, "no"))
    between, device = machine.disk("ublkb0"), machine.disk("sdb")
    await attached(rig, device)
    machine.mount(between, str(tmp_path / "missing"))
    with pytest.raises(errors.Failed, match=r"missing cannot be frozen.*no such file"):
        await rig.service.snapshots.create([device], MINE)
    machine.mount(between, str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(freeze, "mounted_device", lambda _: 0)
        with pytest.raises(errors.Failed, match="another one is mounted over it"):
            await rig.service.snapshots.create([device], MINE)
    with monkeypatch.context() as patch:
        answer = threading.Event()

        def hang(_device: int, _targets: object) -> OwnedFd:
            answer.wait()
            raise OSError("too late")

        patch.setattr(freeze, "_open_first", hang)
        patch.setattr(freeze, "OPEN_TIMEOUT_S", 0.0)
        with pytest.raises(errors.TimedOut, match="does not answer"):
            await rig.service.snapshots.create([device], MINE)
        answer.set()
    monkeypatch.setattr(freeze, "MOST", 0)
    with pytest.raises(errors.LimitExceeded, match="1 file systems"):
        await rig.service.snapshots.create([device], MINE)
    assert nothing_left(rig)
    del machine.mounted[between.number]
    await rig.service.snapshots.create([device], MINE)
    assert fake.frozen == []


async def test_a_mount_point_that_is_a_file_is_not_the_one_to_be_opened(
    rig: Running, fake: FakeDatapath, machine: Machine, tmp_path: Path
) -> None:
    """Containers have such mounts; the file system is opened where it is a directory."""
    await greet(rig, fake, dm=(False, "no"))
    (tmp_path / "hosts").touch()
    machine.mount(machine.disk("ublkb0"), str(tmp_path / "hosts"), str(tmp_path))
    device = machine.disk("sdb")
    await attached(rig, device)
    await rig.service.snapshots.create([device], MINE)
    assert fake.frozen == [str(tmp_path)]


async def test_a_restart_finds_trackers_where_they_are(
    tmp_path: Path, fake: FakeDatapath, machine: Machine
) -> None:
    """Backend, node and owner are as before."""
    device = machine.disk("sdb")
    async with running_service(tmp_path, fake) as first:
        before = await attached(first, device)
    async with running_service(tmp_path, fake) as second:
        ((_, after),) = second.service.registry
        assert (after.tracker.backend, after.tracker.node, after.entry) == (
            "ublk", before.tracker.node, before.entry,
        )  # fmt: skip
