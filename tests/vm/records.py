# SPDX-License-Identifier: GPL-2.0-or-later
"""What is written until the power goes, and looked for afterwards. Runs in a guest: `python -m tests.vm.records`.

`write` puts file systems on tracked nodes with a held snapshot, loads them, and prints each record that is on the disk for
certain as `KIND NUMBER`, until the machine ends. `check DEVICE KIND NUMBER` mounts the bare device and prints `intact`.
"""

import hashlib
import itertools
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from tests.nbd.control import opened
from tests.vm.guest import devices, ublk
from tests.vm.guest.nodes import assert_whole, make_file_system, sync_directory, tracked_top, write_synced

DISKS = {"ext4": Path("/dev/vda"), "xfs": Path("/dev/vdb")}
SLOTS = 16
PART = 4096


def record(number: int) -> bytes:
    """A record, 4 KiB that no other number has."""
    return hashlib.shake_128(number.to_bytes(8, "little")).digest(PART)


def write() -> None:
    """Never returns."""
    devices.modprobe("dm-mod")
    with ublk.datapath() as running:
        tracked = [tracked_top(running, disk, f"blksnap-{kind}") for kind, disk in DISKS.items()]
        targets = {}
        for kind, one in zip(DISKS, tracked, strict=True):
            make_file_system(one.node, kind)
            targets[kind] = Path(tempfile.mkdtemp())
            subprocess.run(["mount", one.node, targets[kind]], check=True)
        ublk.take(*tracked)
        print("taken", flush=True)
        threads = [
            threading.Thread(target=work, args=(kind, target))
            for kind, target in targets.items()
            for work in (write_records, write_noise)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def write_records(kind: str, target: Path) -> None:
    """Appended and fsynced, in a file of its own, and over an older one with O_DSYNC: each three times on the disk."""
    (target / "slots").write_bytes(bytes(SLOTS * PART))
    with (
        opened(target / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND) as log,
        opened(target / "slots", os.O_WRONLY | os.O_DSYNC) as slots,
    ):
        os.fsync(slots)
        for number in itertools.count():
            data = record(number)
            os.write(log, data)
            os.fsync(log)
            write_synced(target / "new", data)
            (target / "new").rename(target / f"file-{number}")
            sync_directory(target)
            os.pwrite(slots, data, number % SLOTS * PART)
            # One write: the other file system's lines come between print's.
            os.write(1, f"{kind} {number}\n".encode())


def write_noise(_: str, target: Path) -> None:
    """Files that nobody waits for."""
    for number in itertools.count():
        (target / f"noise-{number % 40}").write_bytes(record(number) * (1 + number % 30))


def check(disk: Path, kind: str, acknowledged: int) -> None:
    """Raises ``AssertionError`` when something that was on the disk for certain is not, or is something else."""
    target = Path(tempfile.mkdtemp())
    subprocess.run(["mount", "-t", kind, disk, target], check=True)
    log, slots = (target / "log").read_bytes(), (target / "slots").read_bytes()
    for number in range(acknowledged + 1):
        assert log[number * PART : (number + 1) * PART] == record(number), f"record {number} of the log"
        assert (target / f"file-{number}").read_bytes() == record(number), f"file {number}"
    for slot in range(SLOTS):
        newest = max((n for n in range(acknowledged + 1) if n % SLOTS == slot), default=None)
        if newest is not None:
            part = slots[slot * PART : (slot + 1) * PART]
            assert part in {record(newest), record(newest + SLOTS)}, f"slot {slot}"
    noise = len(list(target.glob("noise-*")))
    subprocess.run(["umount", target], check=True)
    assert_whole(disk, kind)
    print(f"intact {kind}: {acknowledged + 1} records, beside {noise} files nobody waited for", flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write()
    else:
        check(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
