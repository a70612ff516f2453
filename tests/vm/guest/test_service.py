# SPDX-License-Identifier: GPL-2.0-or-later
"""blksnapd on a private bus, over real block devices: what a user and a backup program see."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from blksnap_service.bus.paths import DEVICE, IMAGE, MANAGER, MANAGER_PATH, SNAPSHOT, TRACKER
from tests.bus.daemons import BLOCK, Client, make_image, refused, write
from tests.vm.guest import devices
from tests.vm.guest.service import (
    DISK_BYTES as SIZE,
    TrackedDevice,
    attach,
    listed,
    mounted,
    resolve,
    scatter,
)
from tests.vm.guest.ublk import differing, read

MIB = 1 << 20
UBLK = ("s", "ublk")


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
