# SPDX-License-Identifier: GPL-2.0-or-later
"""The power goes while file systems on tracked nodes are written, with a snapshot held."""

import shlex
import sys
from pathlib import Path

import pytest

from tests.vm.machine import DIED, Disk, Guest, Machine
from tests.vm.records import DISKS
from tests.vm.selection import wanted_kernels

RECORDS = 25


@pytest.mark.parametrize("kernel", wanted_kernels())
def test_what_was_synced_before_a_power_cut_is_there(kernel: str, tmp_path: Path) -> None:
    """On the bare devices, after the file system's own recovery, every record whose sync had returned; nothing to repair."""
    disks = {kind: tmp_path / kind for kind in DISKS}
    machine = Machine(
        kernel,
        memory_mib=2048,
        disks=tuple(Disk(512 << 20, path) for path in disks.values()),
        time_limit_s=400,
    )
    program = shlex.join((sys.executable, "-m", "tests.vm.records"))
    acknowledged = dict.fromkeys(disks, -1)
    with Guest(machine, f"{program} write") as guest:
        for line in guest.output:
            kind, _, number = line.partition(" ")
            # The power may have gone in the middle of a line.
            if kind in disks and number.isdigit():
                acknowledged[kind] = max(acknowledged[kind], int(number))
            elif guest.running:
                print(line)
            if guest.running and min(acknowledged.values()) >= RECORDS:
                guest.cut_power()
        assert guest.wait() == DIED
    guest.remove()
    assert min(acknowledged.values()) >= RECORDS
    checks = " && ".join(
        f"{program} check {disk} {kind} {acknowledged[kind]}" for kind, disk in DISKS.items()
    )
    with Guest(machine, checks) as guest:
        said = list(guest.output)
        print("\n".join(said))
        assert guest.wait() == 0, "\n".join(said)
    assert len([line for line in said if line.startswith("intact")]) == len(disks)
    for path in disks.values():
        path.unlink()
