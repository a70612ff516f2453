# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest itself: what every other test in a guest takes for granted."""

import os
import platform
import shutil
import stat
import sys
from pathlib import Path

import pytest

from tests.vm.guest import devices
from tests.vm.machine import TREE

MIB = 1 << 20


def check_disk(node: Path, size_bytes: int) -> None:
    """`node` is a block device of that size that keeps the last 4096 bytes written to it."""
    assert stat.S_ISBLK(node.stat().st_mode)
    pattern = os.urandom(4096)
    with node.open("r+b", buffering=0) as file:
        assert file.seek(0, os.SEEK_END) == size_bytes
        file.seek(-len(pattern), os.SEEK_END)
        file.write(pattern)
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(-len(pattern), os.SEEK_END)
        assert file.read(len(pattern)) == pattern


def queue_limit(node: Path, name: str) -> int:
    """`/sys/class/block/…/queue/<name>`."""
    return int(Path("/sys/class/block", node.name, "queue", name).read_text())


def test_the_kernel_is_the_one_asked_for(kernel: str) -> None:
    """A stock Debian kernel of the series."""
    assert platform.release().startswith(f"{kernel}.")
    assert "+deb" in platform.release()


def test_the_guest_is_root_in_the_tree_with_its_own_programs() -> None:
    """Programs are at the paths they have on the host."""
    assert os.geteuid() == 0
    assert Path.cwd() == TREE
    assert shutil.which("blksnapd") == str(Path(sys.executable).with_name("blksnapd"))


def test_ublk_is_there() -> None:
    """The module is not loaded by itself: nothing opens the node before it is there."""
    devices.modprobe("ublk_drv")
    assert stat.S_ISCHR(devices.wait_for(Path("/dev/ublk-control")).stat().st_mode)


@pytest.mark.parametrize("disk", ["/dev/vda", "/dev/vdb"])
def test_an_empty_disk_is_there(disk: str) -> None:
    """Two disks of 8 GiB, as the harness makes them when nothing else is asked for."""
    check_disk(Path(disk), 8 << 30)


@pytest.mark.parametrize("size_bytes", [16 * MIB, 32 * MIB])
def test_brd(size_bytes: int) -> None:
    """A RAM disk has the size asked for, the second time too."""
    with devices.brd(size_bytes) as node:
        check_disk(node, size_bytes)
    assert not node.exists()


@pytest.mark.parametrize("discard", [False, True])
def test_null_blk(discard: bool) -> None:
    """A null_blk device keeps what is written and discards when it was asked to."""
    with devices.null_blk(64 * MIB, discard=discard) as node:
        check_disk(node, 64 * MIB)
        assert (queue_limit(node, "discard_max_bytes") > 0) is discard
    assert not node.exists()


def test_scsi_debug() -> None:
    """A SCSI disk that discards, and is gone afterwards."""
    with devices.scsi_debug(32 * MIB, lbpu=1) as node:
        check_disk(node, 32 * MIB)
        assert queue_limit(node, "discard_max_bytes") > 0
    assert not node.exists()


def test_loop(tmp_path: Path) -> None:
    """A loop device over a file in memory."""
    file = tmp_path / "image"
    with file.open("wb") as image:
        image.truncate(16 * MIB)
    with devices.loop(file) as node:
        check_disk(node, 16 * MIB)


def test_lvm() -> None:
    """A logical volume without udevd."""
    with devices.brd(64 * MIB) as disk, devices.lvm_lv(disk, 32 * MIB) as volume:
        check_disk(volume, 32 * MIB)
    assert not volume.exists()


@pytest.mark.parametrize(
    "name", ["dm-era", "dm-snapshot", "dm-log-writes", "dm-crypt", "dm-flakey", "dm-delay", "nbd"]
)
def test_a_module_loads(name: str) -> None:
    """What the tests of the data path compare with or break things by."""
    devices.modprobe(name)
    assert Path("/sys/module", name.replace("-", "_")).exists()


@pytest.mark.parametrize("kind, force", [("ext4", "-F"), ("xfs", "-f")])
def test_a_file_system_mounts(kind: str, force: str, tmp_path: Path) -> None:
    """The file systems the tests use, with the host's mkfs."""
    with devices.brd(512 * MIB) as disk:
        devices.run(f"mkfs.{kind}", "-q", force, str(disk))
        devices.run("mount", "-t", kind, str(disk), str(tmp_path))
        try:
            (tmp_path / "file").write_bytes(b"x" * MIB)
            assert devices.run("findmnt", "-no", "FSTYPE", str(tmp_path)) == f"{kind}\n"
        finally:
            devices.run("umount", str(tmp_path))


@pytest.mark.usefixtures("udevd")
class TestWithUdev:
    """The same with a systemd-udevd."""

    def test_udev_knows_the_disks(self) -> None:
        """Devices from before it was started are there too."""
        assert "E: DEVNAME=/dev/vda\n" in devices.run("udevadm", "info", "/dev/vda")

    def test_lvm(self) -> None:
        """LVM leaves the nodes to udev and waits for them."""
        with devices.brd(64 * MIB) as disk, devices.lvm_lv(disk, 32 * MIB) as volume:
            check_disk(volume, 32 * MIB)
            assert volume.is_symlink()

    def test_dm(self) -> None:
        """A device-mapper device whose node comes by the rules."""
        with devices.brd(64 * MIB) as disk, devices.dm("vm-test", f"0 65536 linear {disk} 0") as node:
            check_disk(node, 32 * MIB)
