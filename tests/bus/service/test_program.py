# SPDX-License-Identifier: GPL-2.0-or-later
"""The program blksnapd: whom it serves, beside whom it runs, how it starts and ends."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from blksnap_service.bus import paths
from blksnap_service.bus.paths import DEVICE, TRACKER
from tests.bus.daemons import REPOSITORY, Bus, Client, Daemon, client, program, run_daemon, scratch


async def test_only_the_owner_may_do_anything(user: Client, bus: Bus, image: Path) -> None:
    """Another user may look, not touch."""
    if os.geteuid() != 0:
        pytest.skip("not root")
    device = await user.attach(image)
    caller = (
        "setpriv",
        "--reuid=65534",
        "--regid=65534",
        "--clear-groups",
        "busctl",
        f"--address={bus.address}",
    )
    shown = await program(*caller, "get-property", paths.BUS_NAME, device, TRACKER, "State")
    assert shown.strip() == 's "tracking"'
    process = await asyncio.create_subprocess_exec(
        *caller, "call", paths.BUS_NAME, device, DEVICE, "Detach", "a{sv}", "0",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    output, _ = await process.communicate()
    assert process.returncode != 0
    assert f"uid 65534 may not do this ({image})" in output.decode()


async def test_a_second_service_on_one_state_directory_is_refused(
    user: Client, daemon: Daemon, bus: Bus, directory: Path
) -> None:
    """The first does not notice."""
    words = [f"--bus={bus.address}", "--authority=owner", f"--state-dir={daemon.state}"]
    done = await asyncio.to_thread(run_daemon, [*words, f"--runtime-dir={directory / 'run2'}"])
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"blksnapd: CRITICAL: another blksnapd runs on the state directory {daemon.state}: use that one\n"
    )
    await user.objects()


async def test_a_second_service_on_one_bus_is_refused(daemon: Daemon, bus: Bus, directory: Path) -> None:
    """And the data path it started for nothing is gone again."""
    run = directory / "run2"
    words = [f"--bus={bus.address}", "--authority=owner", f"--state-dir={directory / 'state2'}"]
    done = await asyncio.to_thread(run_daemon, [*words, f"--runtime-dir={run}"])
    assert done.returncode == 1
    assert "another service is running" in done.stderr
    other = Daemon(directory, bus)
    other.run = run
    async with asyncio.timeout(10):
        while other.datapath_pid() is not None:  # noqa: ASYNC110 - asks another process
            await asyncio.sleep(0.02)


async def test_two_services_on_one_runtime_directory_share_the_data_path(
    user: Client, daemon: Daemon, directory: Path, image: Path
) -> None:
    """It is adopted, not started twice: what it serves is found."""
    device = await user.attach(image)
    pid = daemon.datapath_pid()
    with scratch() as place:
        other_bus = Bus(place)
        other = Daemon(place, other_bus, f"--runtime-dir={daemon.run}")
        try:
            await other.start()
            assert daemon.datapath_pid() == pid
            async with client(other_bus) as second:
                assert (await second.objects())[device][DEVICE]["Tracked"]
            assert await other.end() == 0
        finally:
            other.clean_up()
            other_bus.stop()


async def test_losing_the_bus_ends_the_service_with_one_line(daemon: Daemon, bus: Bus) -> None:
    """Whoever started it starts it again; the data path goes on."""
    pid = daemon.datapath_pid()
    bus.stop()
    assert await daemon.ended() == 1
    lines = [line for line in daemon.log.read_text().splitlines() if "CRITICAL" in line]
    assert lines == [f"blksnapd: CRITICAL: the bus '{bus.address}' is gone: the bus closed the connection"]
    assert daemon.datapath_pid() == pid


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_stop_is_clean(daemon: Daemon, number: signal.Signals) -> None:
    """Status 0, the data path goes on."""
    assert await daemon.end(number) == 0
    assert daemon.datapath_pid() is not None


BAD_STARTS = {
    "no bus": (["--bus=unix:path={dir}/nope"], 1, "cannot connect to the bus"),
    "bad bus": (["--bus=garbage"], 1, "garbage"),
    "state is a file": (["--state-dir={dir}/file"], 1, "state directory {dir}/file cannot be used"),
    "runtime is a file": (["--runtime-dir={dir}/file"], 1, "runtime directory {dir}/file cannot be used"),
    "no permission": (["--state-dir=/proc/x"], 1, "state directory /proc/x cannot be used"),
    "open to all": (["--runtime-dir={dir}/open"], 1, "others may write to it"),
    "long name": (["--runtime-dir={dir}/" + "x" * 90], 1, "choose a shorter one with --runtime-dir"),
    "no data path": (["--datapath={dir}/nope"], 1, "{dir}/nope is missing or not executable"),
    "not a data path": (
        ["--datapath={dir}/fails"],
        1,
        "ended with status 7 instead of getting ready: out of luck",
    ),
    "unknown option": (["--colour=red"], 2, "unrecognized arguments: --colour=red"),
    "unknown authority": (["--authority=king"], 2, "invalid choice: 'king'"),
}


@pytest.mark.parametrize("case", BAD_STARTS)
def test_a_start_that_cannot_work_says_why(directory: Path, bus: Bus, case: str) -> None:
    """In one line, with a status, and without a traceback."""
    (directory / "file").write_text("")
    (directory / "open").mkdir()
    (directory / "open").chmod(0o777)
    (directory / "fails").write_text("#!/bin/sh\necho out of luck >&2\nexit 7\n")
    (directory / "fails").chmod(0o700)
    extra, status, text = BAD_STARTS[case]
    words = [
        f"--bus={bus.address}",
        "--authority=owner",
        f"--state-dir={directory}/s",
        f"--runtime-dir={directory}/r",
    ]
    done = run_daemon([*words, *(one.format(dir=directory) for one in extra)])
    assert done.returncode == status
    assert text.format(dir=directory) in done.stderr
    assert "Traceback" not in done.stderr
    assert sum("CRITICAL" in line for line in done.stderr.splitlines()) == (1 if status == 1 else 0)
    assert not (directory / "r" / "datapath.sock").exists()


def test_the_program_says_its_version() -> None:
    """Without a bus."""
    done = subprocess.run(
        [sys.executable, "-m", "blksnap_service", "--version"],
        capture_output=True,
        text=True,
        check=True,
        cwd=REPOSITORY,
    )
    assert done.stdout.startswith("blksnapd ")
