# SPDX-License-Identifier: GPL-2.0-or-later
"""The harness: what comes out of a guest, and that every guest ends."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from tests.vm.machine import DIED, TIMED_OUT, TREE, Disk, Guest, Machine
from tests.vm.selection import KERNELS_VARIABLE, wanted_kernels

KERNEL = wanted_kernels()[0]


def test_the_command_passes_output_and_exit_status_on() -> None:
    """`python -m tests.vm` prints what the command prints and exits as it does."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.vm", KERNEL, "--shell", "uname -r; exit 7"],
        cwd=TREE,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 7
    assert done.stdout.startswith(f"{KERNEL}.")
    console = Path(done.stderr.rsplit("kept ", 1)[1].strip())
    assert "vm: command ended with 7" in console.read_text()
    shutil.rmtree(console.parent)


def test_nothing_is_written_to_the_host_but_where_it_may() -> None:
    """The overlay takes what a guest writes; /run/vm is the host's directory."""
    name = f"written-in-a-guest-{os.getpid()}"
    command = f"echo x >{name} && cat {name} >/run/vm/result && chown 1:1 {name}"
    with Guest(Machine(KERNEL), command) as guest:
        assert guest.wait() == 0
        assert (guest.directory / "result").read_text() == "x\n"
    assert not (TREE / name).exists()
    assert not guest.directory.exists()


def test_a_panic_ends_the_guest_and_keeps_its_console() -> None:
    """It is neither waited for nor taken for a success."""
    with Guest(Machine(KERNEL), "echo c >/proc/sysrq-trigger") as guest:
        assert guest.wait() == DIED
    assert "Kernel panic" in guest.console.read_text()
    guest.remove()


def test_the_time_limit_ends_the_guest() -> None:
    """A guest that does not end by itself, in the boot or in the command, does not hang the run."""
    started = time.monotonic()
    with Guest(Machine(KERNEL, time_limit_s=5), "sleep 1000") as guest:
        assert guest.wait() == TIMED_OUT
    assert time.monotonic() - started < 30
    guest.remove()


def test_a_disk_is_kept_across_a_power_cut(tmp_path: Path) -> None:
    """What was synced before the power went is there at the next boot; the guest that wrote it is gone at once."""
    machine = Machine(KERNEL, disks=(Disk(64 << 20, tmp_path / "disk"),))
    write = "echo kept | dd of=/dev/vda conv=fsync status=none; echo written; sleep 1000"
    with Guest(machine, write) as guest:
        assert next(guest.output) == "written"
        guest.cut_power()
        assert guest.wait() == DIED
    guest.remove()
    with Guest(machine, "head -n 1 /dev/vda") as guest:
        assert list(guest.output) == ["kept"]
        assert guest.wait() == 0


def test_every_test_of_a_guest_is_reported_for_what_it_did() -> None:
    """A failure and a skip with their reasons; a panic fails the test that was running, and no other."""
    done = run_on_host("tests/vm/guest/sabotage.py")
    outcomes = re.findall(rf"^(\w+) \S*sabotage.py::(\w+)\[{KERNEL}\]", done.stdout, re.MULTILINE)
    assert sorted(outcomes) == [
        ("FAILED", "test_fails"),
        ("FAILED", "test_panics"),
        ("PASSED", "test_after_the_panic"),
        ("PASSED", "test_passes"),
    ], done.stdout
    assert "1 skipped" in done.stdout
    assert "the reason" in done.stdout
    assert "printed before" in done.stdout
    assert "Kernel panic" in done.stdout
    remove_kept(done.stdout)


def test_a_guest_that_dies_before_any_test_is_tried_twice() -> None:
    """And then what it said both times is what the tests fail with."""
    done = run_on_host("tests/vm/guest/sabotage_early.py")
    assert re.findall(r"^(\w+) \S*sabotage_early.py::", done.stdout, re.MULTILINE) == ["FAILED"], done.stdout
    assert "and once more" in done.stdout
    assert remove_kept(done.stdout) == 2


def test_options_may_stand_before_what_pytest_is_to_do() -> None:
    """`KERNEL --cpus 1 -- ARGUMENTS`; an argument of pytest's is none of ours."""
    words = [sys.executable, "-m", "tests.vm", KERNEL, "--cpus", "1", "--memory", "2G", "--", "--version"]
    done = subprocess.run(words, cwd=TREE, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()[0]) == (0, "pytest"), done.stderr


def run_on_host(file: str) -> subprocess.CompletedProcess[str]:
    """Run pytest as one does who wants the guest tests of a file."""
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rA", file],
        cwd=TREE,
        env=os.environ | {KERNELS_VARIABLE: KERNEL},
        check=False,
        capture_output=True,
        text=True,
    )


def remove_kept(output: str) -> int:
    """Remove the directories that were kept of failures that were wanted; how many there were."""
    kept = set(re.findall(r"kept (?:in )?(\S+blksnap-vm-\w+)", output))
    for directory in kept:
        shutil.rmtree(directory)
    return len(kept)
