# SPDX-License-Identifier: GPL-2.0-or-later
"""blksnapd on a private bus, over real block devices: what a user and a backup program see."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from blksnap_service.bus.paths import DEVICE, IMAGE, MANAGER, MANAGER_PATH, SNAPSHOT, TRACKER
from tests.bus.daemons import BLOCK, Bus, Client, Daemon, client, make_image, refused, scratch, write
from tests.nbd.load import running
from tests.vm.guest import devices
from tests.vm.guest.service import TrackedDevice, attach, mounted, resolve, scatter
from tests.vm.guest.ublk import differing, read, verified_writes, verifying

MIB = 1 << 20
SIZE = 128 * MIB
UBLK = ("s", "ublk")
SERVICE_DEATHS = 20


# Starting Python takes half a minute in a guest: one service for all tests, each of which leaves nothing in it.


@pytest.fixture(scope="module")
def rig() -> Iterator[tuple[Bus, Daemon]]:
    """A bus and a service."""
    with scratch() as directory:
        bus = Bus(directory)
        one = Daemon(directory, bus)
        try:
            asyncio.run(one.start())
            yield bus, one
            assert "Traceback" not in one.log.read_text()
            assert "Warning" not in one.log.read_text()
        finally:
            one.clean_up()
            bus.stop()


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory of the test's own."""
    with scratch() as one:
        yield one


@pytest.fixture
def driver() -> None:
    """The kernel's part."""
    devices.modprobe("ublk_drv")
    devices.modprobe("dm-mod")


@pytest.fixture
async def user(rig: tuple[Bus, Daemon], driver: None) -> AsyncIterator[Client]:
    """A client of the service."""
    async with client(rig[0]) as one:
        yield one


@pytest.fixture
def disk() -> Iterator[Path]:
    """A disk nobody uses."""
    with devices.brd(SIZE) as node:
        yield node


@pytest.fixture
async def tracked(disk: Path, user: Client) -> AsyncIterator[TrackedDevice]:
    """That disk, tracked."""
    await listed(user, disk)
    one = await attach(user, disk)
    yield one
    for snapshot in await one.user.get(one.path, DEVICE, "Snapshots"):
        await one.user.call(snapshot, SNAPSHOT, "Destroy", "")
    if await one.user.get(one.path, DEVICE, "Tracked"):
        await one.detach()


async def listed(user: Client, disk: Path) -> None:
    """Wait until the service knows a disk that has just appeared."""
    async with asyncio.timeout(20):
        while True:
            objects = (await user.objects()).values()
            if str(disk) in [one[DEVICE]["Path"] for one in objects if DEVICE in one]:
                return
            await asyncio.sleep(0.1)


async def test_an_increment_is_what_changed_on_a_file_system(tracked: TrackedDevice, directory: Path) -> None:
    """No block that differs between two images is missing from the ranges; images stay as they are."""
    assert await tracked.get("Backend") == "ublk"
    assert await tracked.user.get(tracked.path, DEVICE, "Backends") is not None
    # Without what the kernel would write later: zeros over zeros.
    devices.run("mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", str(tracked.node))
    with mounted(tracked.node, directory / "mnt") as target:
        scatter(target, 60, seed=1)
        (target / "kept").write_bytes(b"as it was" * 5000)
        first = await tracked.snapshot()
        before = await asyncio.to_thread(read, first.node)
        scatter(target, 60, seed=2)
        (target / "kept").write_bytes(b"something else")
        second = await tracked.snapshot()
        after = await asyncio.to_thread(read, second.node)
        different = differing(before, after, await tracked.get("BlockSize"))
        marked = await tracked.changed_since(first.number)
        assert different
        assert different <= marked
        print(f"{len(different)} blocks differ, {len(marked)} are marked")
        assert len(marked) <= 2 * len(different) + 16
        scatter(target, 60, seed=3)
        with mounted(first.node, directory / "image", "ro,noload") as image:
            assert (image / "kept").read_bytes() == b"as it was" * 5000
        assert await asyncio.to_thread(read, first.node) == before
        assert await asyncio.to_thread(read, second.node) == after


async def test_an_image_is_a_file_system_that_is_whole(tracked: TrackedDevice, directory: Path) -> None:
    """Frozen around the instant, under load: nothing is left to be repaired."""
    devices.run("mkfs.ext4", "-q", str(tracked.node))
    with mounted(tracked.node, directory / "mnt") as target:
        load = asyncio.create_task(asyncio.to_thread(scatter, target, 200, 4))
        await asyncio.sleep(1)
        taken = await tracked.snapshot()
        await load
        devices.run("fsck.ext4", "-n", "-f", str(taken.node))


async def test_an_image_is_opened_by_the_service(tracked: TrackedDevice) -> None:
    """A read-only descriptor of its block device, which is as large as the disk was; its NBD export has the same bytes."""
    taken = await tracked.snapshot()
    connection_fd = await tracked.user.call(taken.image, IMAGE, "Open", "")
    with connection_fd as fd:
        assert os.lseek(fd.fileno(), 0, os.SEEK_END) == SIZE
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.write(fd.fileno(), b"x" * 512)
    assert (await tracked.user.call(taken.image, IMAGE, "Export", "")).startswith("nbd+unix:///")


async def test_what_is_in_use_is_not_detached(tracked: TrackedDevice, directory: Path) -> None:
    """Which snapshot, and where it is mounted; forced it goes, and then the disk is as it was written."""
    devices.run("mkfs.ext4", "-q", str(tracked.node))
    target = directory / "mnt"
    with mounted(tracked.node, target):
        with refused("Busy", f"mounted on {target}"):
            await tracked.detach()
        taken = await tracked.snapshot()
        with refused("Busy", taken.path.rpartition("/")[2].replace("_", "-")):
            await tracked.detach()
        await taken.destroy()
        (target / "last").write_bytes(b"words")
    await tracked.detach()
    with mounted(await disk_of(tracked), target):
        assert (target / "last").read_bytes() == b"words"


async def disk_of(tracked: TrackedDevice) -> Path:
    """The device below."""
    return Path(await tracked.user.get(tracked.path, DEVICE, "Path"))


async def test_a_mounted_disk_is_refused_with_what_to_do(disk: Path, user: Client, directory: Path) -> None:
    """Nothing changes for it, and unmounted it can be tracked."""
    await listed(user, disk)
    devices.run("mkfs.ext4", "-q", str(disk))
    with mounted(disk, directory / "mnt") as target:
        with refused("Busy", rf"{disk} is in use, it is mounted on {target}.*mount the Node"):
            await attach(user, disk)
        (target / "file").write_bytes(b"goes on")
    tracked = await attach(user, disk)
    await tracked.detach()


async def test_a_read_only_disk_is_refused(disk: Path, user: Client) -> None:
    """Nothing on it can change."""
    await listed(user, disk)
    devices.run("blockdev", "--setro", str(disk))
    try:
        with refused("NotSupported", "read-only"):
            await attach(user, disk, backend=UBLK)
    finally:
        devices.run("blockdev", "--setrw", str(disk))


async def test_a_zoned_disk_is_refused(user: Client) -> None:
    """It is not to be written in any order."""
    with devices.null_blk(SIZE, zoned=True) as disk:
        await listed(user, disk)
        with refused("NotSupported", "zoned"):
            await attach(user, disk, backend=UBLK)


async def test_a_disk_with_a_mounted_partition_is_refused(user: Client, directory: Path) -> None:
    """And the partition itself, with where it is mounted and what to do; unmounted the partition can be tracked."""
    with devices.null_blk(SIZE) as disk:
        devices.run("addpart", str(disk), "1", str(MIB // 512), str((SIZE - 2 * MIB) // 512))
        partition = devices.wait_for(Path(f"{disk}p1"))
        await listed(user, partition)
        devices.run("mkfs.ext4", "-q", str(partition))
        with mounted(partition, directory / "mnt") as target:
            with refused("Busy", rf"{partition} is in use, it is mounted on {target}.*mount the Node"):
                await attach(user, partition)
            with refused("Busy", rf"its partition {partition.name} is mounted on {target}"):
                await attach(user, disk)
        tracked = await attach(user, partition)
        assert await tracked.get("Capacity") == SIZE - 2 * MIB
        await tracked.detach()


async def test_the_node_is_no_device_of_its_own(tracked: TrackedDevice, directory: Path) -> None:
    """It leads to the disk it belongs to, and neither it nor an image is tracked; storage on it is refused."""
    assert await resolve(tracked.user, tracked.node) == tracked.path
    with refused("AlreadyTracked"):
        await attach(tracked.user, tracked.node)
    taken = await tracked.snapshot()
    with refused("NotFound"):
        await attach(tracked.user, taken.node)
    devices.run("mkfs.ext4", "-q", str(tracked.node))
    target = directory / "mnt"
    with mounted(tracked.node, target), refused("InvalidArgument", "lies on a tracked device"):
        await tracked.snapshot(storage=("s", str(target / "storage")))


async def test_a_disk_and_a_file_are_taken_together(tracked: TrackedDevice, directory: Path) -> None:
    """Different backends, one instant, one snapshot."""
    image = make_image(directory / "disk.img", 16 * BLOCK)
    other = await tracked.user.attach(image)
    assert await tracked.user.get(other, TRACKER, "Backend") == "nbd"
    await write(await tracked.user.get(other, TRACKER, "Node"), (0x55, 0, BLOCK))
    snapshot = await tracked.user.snapshot(tracked.path, other)
    one, two = await tracked.user.get(snapshot, SNAPSHOT, "Images")
    assert (await tracked.user.get(one, IMAGE, "Path")).startswith("/dev/")
    assert await tracked.user.get(two, IMAGE, "Path") == ""
    await tracked.user.call(snapshot, SNAPSHOT, "Destroy", "")


async def test_without_the_driver_the_backend_says_why(user: Client, disk: Path) -> None:
    """And it is found again when the module is loaded."""
    await listed(user, disk)
    devices.run("modprobe", "--remove", "ublk_drv")
    with refused("NotAvailable", "ublk_drv"):
        await attach(user, disk, backend=UBLK)
    backends = await user.get(MANAGER_PATH, MANAGER, "Backends")
    assert not backends["ublk"]["available"].value
    assert "ublk_drv" in backends["ublk"]["reason"].value
    devices.modprobe("ublk_drv")
    tracked = await attach(user, disk, backend=UBLK)
    await tracked.detach()


async def test_discards_are_told_apart_from_writes(user: Client) -> None:
    """In GetInfo."""
    with devices.null_blk(SIZE, discard=True) as disk:
        await listed(user, disk)
        tracked = await attach(user, disk)
        before = await tracked.info()
        devices.run("blkdiscard", "--offset", "0", "--length", str(4 * MIB), str(tracked.node))
        after = await tracked.info()
        assert after["discards"] > before["discards"]
        assert after["writes"] == before["writes"]
        await tracked.detach()


@pytest.mark.timeout(1500)
async def test_killing_the_service_stops_no_io(tracked: TrackedDevice, rig: tuple[Bus, Daemon]) -> None:
    """Under verified writes, with a held snapshot: no error, one generation, no change missed, the image as it was.

    Most of the twenty deaths are somewhere on its way to being ready, some after it was.
    """
    bus, daemon = rig
    chance = random.Random(3)
    taken = await tracked.snapshot()
    before = await asyncio.to_thread(read, taken.node)
    generation = await tracked.get("GenerationId")
    with running(verifying(tracked.node, 16 * MIB)) as going:
        await daemon.end(signal.SIGKILL)
        started = time.monotonic()
        await daemon.start()
        takes_s = time.monotonic() - started
        for number in range(1, SERVICE_DEATHS):
            assert going()
            await daemon.end(signal.SIGKILL)
            daemon.launch()
            if number % 5 == 4:
                await daemon.ready()
            else:
                await asyncio.sleep(chance.uniform(0.3, 1) * takes_s)
        await daemon.ready()
    async with client(bus) as user:
        again = TrackedDevice(user, tracked.path, tracked.node)
        assert await again.get("GenerationId") == generation
        assert await again.get("Node") == str(tracked.node)
        assert await user.get(taken.image, IMAGE, "Path") == str(taken.node)
        assert await asyncio.to_thread(read, taken.node) == before
        later = await again.snapshot()
        after = await asyncio.to_thread(read, later.node)
        different = differing(before, after, await again.get("BlockSize"))
        assert different
        assert different <= await again.changed_since(taken.number)
        await later.destroy()
        await user.call(taken.path, SNAPSHOT, "Destroy", "")
        await again.detach()


async def test_killing_the_data_path_fails_no_io(tracked: TrackedDevice, rig: tuple[Bus, Daemon]) -> None:
    """Under verified writes, with a held snapshot: no error, no new generation, no change missed, the image as it was."""
    _, daemon = rig
    first = await tracked.snapshot()
    before = await asyncio.to_thread(read, first.node)
    generation = await tracked.get("GenerationId")
    load = fio(tracked.node)
    for _ in range(3):
        await asyncio.sleep(2)
        daemon.kill_datapath()
        async with asyncio.timeout(60):
            while await tracked.get("State") != "recovering":  # noqa: ASYNC110 - this is what a client may do
                await asyncio.sleep(0.02)
            while await tracked.get("State") != "tracking":  # noqa: ASYNC110 - the same
                await asyncio.sleep(0.1)
    await succeeds(load)
    assert await tracked.get("GenerationId") == generation
    assert await tracked.user.get(first.path, SNAPSHOT, "State") == "taken"
    assert await asyncio.to_thread(read, first.node) == before
    second = await tracked.snapshot()
    after = await asyncio.to_thread(read, second.node)
    assert differing(before, after, await tracked.get("BlockSize")) <= await tracked.changed_since(
        first.number
    )


async def test_losing_all_that_keeps_the_maps_stops_no_file_system(
    tracked: TrackedDevice, rig: tuple[Bus, Daemon], directory: Path
) -> None:
    """The data path and its holder are killed, also with the service: a new generation and why, snapshots are gone."""
    _, daemon = rig
    devices.run("mkfs.ext4", "-q", str(tracked.node))
    with mounted(tracked.node, directory / "mnt") as target:
        for with_service in (False, True):
            taken = await tracked.snapshot()
            generation = await tracked.get("GenerationId")
            load = asyncio.create_task(asyncio.to_thread(scatter, target, 200, 8))
            await asyncio.sleep(1)
            if with_service:
                await daemon.end(signal.SIGKILL)
            daemon.lose_datapath()
            if with_service:
                await daemon.start()
            async with asyncio.timeout(60):
                while await tracked.get("GenerationId") == generation:  # noqa: ASYNC110 - as clients may
                    await asyncio.sleep(0.1)
            await load
            assert await tracked.get("State") == "tracking"
            assert await tracked.get("Node") == str(tracked.node)
            assert "killed together" in await tracked.get("LastReset")
            async with asyncio.timeout(20):
                while taken.path in await tracked.user.objects():  # noqa: ASYNC110 - the same
                    await asyncio.sleep(0.1)
        first = await tracked.snapshot()
        before = await asyncio.to_thread(read, first.node)
        scatter(target, 30, seed=9)
        second = await tracked.snapshot()
        after = await asyncio.to_thread(read, second.node)
        assert differing(before, after, await tracked.get("BlockSize")) <= await tracked.changed_since(
            first.number
        )
        await first.destroy()
        await second.destroy()
    devices.run("fsck.ext4", "-n", "-f", str(tracked.node))


async def test_a_mounted_logical_volume_is_tracked_where_it_is(
    disk: Path, user: Client, directory: Path
) -> None:
    """The tracker comes and goes under a file system that is being written."""
    await listed(user, disk)
    with devices.lvm_lv(disk, 64 * MIB) as volume:
        devices.run("mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", str(volume))
        node = Path(f"/dev/dm-{os.minor(volume.stat().st_rdev)}")
        with mounted(volume, directory / "mnt") as target:
            await listed(user, node)
            load = asyncio.create_task(asyncio.to_thread(scatter, target, 150, 5))
            tracked = await attach(user, node)
            assert tracked.node.stat().st_rdev == node.stat().st_rdev
            first = await tracked.snapshot()
            before = await asyncio.to_thread(read, first.node)
            await load
            scatter(target, 30, seed=6)
            second = await tracked.snapshot()
            after = await asyncio.to_thread(read, second.node)
            size = await tracked.get("BlockSize")
            assert differing(before, after, size) <= await tracked.changed_since(first.number)
            devices.run("fsck.ext4", "-n", "-f", str(second.node))
            await first.destroy()
            await second.destroy()
            load = asyncio.create_task(asyncio.to_thread(scatter, target, 50, 7))
            await tracked.detach()
            await load
        devices.run("fsck.ext4", "-n", "-f", str(volume))


async def test_a_forced_detach_leaves_the_file_system_alone(tracked: TrackedDevice, directory: Path) -> None:
    """It goes on untracked, and the next tracker gets under the node that was left: as a new generation."""
    devices.run("mkfs.ext4", "-q", str(tracked.node))
    generation, disk = await tracked.get("GenerationId"), await disk_of(tracked)
    with mounted(tracked.node, directory / "mnt") as target:
        await tracked.detach(force=("b", True))
        (target / "untracked").write_bytes(b"written")
        os.sync()
        again = await attach(tracked.user, disk)
        assert again.node == tracked.node
        assert await again.get("GenerationId") != generation
        (target / "tracked").write_bytes(b"written")
        os.sync()
        assert await again.info()
        await again.detach()
    devices.run("fsck.ext4", "-n", "-f", str(tracked.node))
    devices.run("dmsetup", "remove", "--retry", tracked.node.name)


def fio(node: Path) -> subprocess.Popen[bytes]:
    """Write and verify the whole node at random; ends by itself."""
    words = ("fio", "--name=load", "--ioengine=io_uring", "--direct=1", *verified_writes(node, SIZE))
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


async def succeeds(load: subprocess.Popen[bytes]) -> None:
    """The load ends well."""
    output, _ = await asyncio.to_thread(load.communicate)
    assert load.returncode == 0, output.decode(errors="replace")
