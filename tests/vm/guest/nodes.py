# SPDX-License-Identifier: GPL-2.0-or-later
"""Origins under device-mapper devices, and file systems on those, as the tests in a guest handle them. No expectation."""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.nbd.control import opened
from tests.nbd.datapath import Datapath, Origin, new_id
from tests.vm.guest import devices, ublk
from tests.vm.guest.ublk import Tracked

MKFS = {
    "ext4": ("mkfs.ext4", "-q"),
    "xfs": ("mkfs.xfs", "-q", "-f"),
}


def insert(running: Datapath, live: str, **options: Any) -> Tracked:
    """Get under the live device-mapper device ``live``. Raises ``Refused``."""
    name = f"under-{live}"
    running.control.call("origin.add", origin=name, generation=new_id(), front="ublk", insert=live, **options)
    origin = Origin(running, name, Path("/dev/mapper", live))
    return Tracked(running, origin, origin.path, Path(origin.info().node))


def table(name: str) -> str:
    """The table in use."""
    return devices.run("dmsetup", "table", name)


def names() -> set[str]:
    """All device-mapper devices."""
    lines = devices.run("dmsetup", "ls").splitlines()
    return {line.split("\t")[0] for line in lines if "\t" in line}


def mapped_name(node: Path) -> str:
    """The device-mapper name of a node, by whatever path it was found."""
    number = node.stat().st_rdev
    return Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/dm/name").read_text().strip()


def make_file_system(node: Path, kind: str, *options: str) -> None:
    """An empty one, of any size."""
    # Below 300 MiB mkfs.xfs makes one only where it believes to be in a test of its own (validate_supported).
    devices.run("env", "TEST_DIR=/", "TEST_DEV=/", "QA_CHECK_FS=1", *MKFS[kind], *options, str(node))


@contextlib.contextmanager
def mounted(node: Path, directory: Path, *options: str) -> Iterator[Path]:
    """``node`` on a new ``directory``."""
    directory.mkdir()
    devices.run("mount", *options, str(node), str(directory))
    try:
        yield directory
    finally:
        devices.run("umount", str(directory))


def is_clean(node: Path, kind: str) -> bool:
    """Whether the file system there is whole, as it is on the device: without its journal being replayed."""
    if kind == "xfs":
        # Frozen, its log holds a superblock on purpose (xfs_fs_freeze), so that inodes without a name are freed after a
        # crash: the sum of free blocks is not up to date then. All else is looked at as it is on the device.
        said = subprocess.run(["xfs_repair", "-n", node], capture_output=True, text=True, check=False)
        text = said.stdout + said.stderr
        return "Phase 7" in text and "would" not in text and "bad " not in text
    needs = "needs_recovery" in devices.run("dumpe2fs", "-h", str(node))
    checked = subprocess.run(["e2fsck", "-f", "-n", node], capture_output=True, text=True, check=False)
    return checked.returncode == 0 and not needs


@contextlib.contextmanager
def load(target: Path, size_bytes: int, *options: str) -> Iterator[None]:
    """Verified random writes of ``target`` while the block runs. Raises when one was lost or failed."""
    command = [
        "fio",
        "--nice=19",
        "--name=load",
        "--ioengine=psync",
        "--time_based",
        "--runtime=3600",
        "--verify_backlog=64",
    ]
    command += [*ublk.verified_writes(target, size_bytes), "--iodepth=1", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        while not (target.exists() and target.stat().st_blocks):
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.1)
        time.sleep(1)
        yield
        assert process.poll() is None, process.communicate()[0]
    finally:
        process.send_signal(signal.SIGINT)
        try:
            said = process.communicate(timeout=280)[0]
        finally:
            process.kill()
    assert "err= 0" in said, said
    assert "verify:" not in said, said


class Attempt(threading.Thread):
    """Something that may wait, on a thread of its own."""

    def __init__(self, work: Any, *arguments: Any) -> None:
        """Start it."""
        super().__init__(daemon=True)
        self._work, self._arguments = work, arguments
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        """Keep what it raises."""
        try:
            self._work(*self._arguments)
        except BaseException as error:  # noqa: BLE001 # handed to the test
            self.error = error

    def ended(self, within_s: float) -> bool:
        """Wait for its end."""
        self.join(within_s)
        return not self.is_alive()


def tracked_top(running: Datapath, disk: Path, name: str, **options: Any) -> Tracked:
    """An origin with a top of that name. Raises ``Refused``."""
    return ublk.track(running, disk, top=name, **options)


def take_all(tracked: Sequence[Tracked], **options: Any) -> dict[str, Any]:
    """A take with options that ``Snapshot.take`` does not know; the answer with the snapshot's id. Raises ``Refused``."""
    running = tracked[0].datapath
    mounts: Sequence[int] = options.pop("mounts", ())
    control = options.pop("control", None) or running.control
    snapshot = options.pop("snapshot", None) or running.create(limit=ublk.STORAGE_BYTES, control=control)
    members = [{"origin": one.origin.name, "next_generation": new_id()} for one in tracked]
    answer = control.call(
        "snapshot.take", mounts, snapshot=snapshot.name, devices=members, freeze_fds=len(mounts), **options
    )
    return dict(answer) | {"snapshot": snapshot}


def write_synced(path: Path, data: bytes) -> None:
    """Write a file, and return when it is on the disk."""
    with opened(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as fd:
        os.write(fd, data)
        os.fdatasync(fd)


def sync_directory(directory: Path) -> None:
    """Return when the names in a directory are on the disk."""
    with opened(directory, os.O_RDONLY | os.O_DIRECTORY) as fd:
        os.fsync(fd)


def assert_whole(node: Path, kind: str) -> None:
    """Nothing is to be repaired in a file system that was recovered and unmounted."""
    words = ("xfs_repair", "-n", str(node)) if kind == "xfs" else ("e2fsck", "-f", "-n", str(node))
    checked = subprocess.run(words, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
