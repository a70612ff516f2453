# SPDX-License-Identifier: GPL-2.0-or-later
"""Whatever a user without rights calls, in whatever order: nothing changes, nothing leaks, nobody else notices.

BLKSNAP_STORM_CALLS=100000 makes that many calls; BLKSNAP_STORM_SEED others than the usual.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from blksnap_service.bus.paths import DEVICE
from tests.bus.conftest import LIBRARIES
from tests.bus.daemons import REPOSITORY, Bus, Client, Daemon, make_image
from tests.bus.polkitd import NOBODY, Polkit, SystemBus

CALLS = int(os.environ.get("BLKSNAP_STORM_CALLS", "5000"))
SEED = int(os.environ.get("BLKSNAP_STORM_SEED", "1"))
WARM_UP = 2_000
"""Caches fill, and the allocator takes what it keeps."""
MAX_GROWTH_KIB = 10 * 1024


class BusyBus(SystemBus):
    """A bus that lets a caller have more than 128 answers to come: several connections could have them too."""

    config = SystemBus.config.replace(
        "</busconfig>", '  <limit name="max_replies_per_connection">50000</limit>\n</busconfig>'
    )


@pytest.fixture
def bus(directory: Path) -> Any:
    """That one."""
    one = BusyBus(directory)
    yield one
    one.stop()


@pytest.fixture
async def polkit(directory: Path, bus: Bus, root: Client) -> AsyncIterator[Polkit]:
    """The real polkitd, with nothing but our policy."""
    one = Polkit(directory, bus, with_rule=False)
    try:
        await one.wait(root.connection)
        yield one
    finally:
        one.stop()


@pytest.fixture(params=LIBRARIES)
async def daemon(
    directory: Path, bus: Bus, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Daemon]:
    """A service as users run it, on each of the D-Bus libraries."""
    monkeypatch.setenv("BLKSNAP_DBUS_LIBRARY", request.param)
    one = Daemon(directory, bus, "--authority=polkit")
    one.words = tuple(word for word in one.words if word not in {"-X", "dev"})
    try:
        await one.start()
        yield one
        assert "Traceback" not in one.log.read_text()
    finally:
        one.clean_up()


def resources(daemon: Daemon) -> tuple[int, int]:
    """Return how many descriptors and how many KiB of memory the service has."""
    assert daemon.process is not None
    place = Path(f"/proc/{daemon.process.pid}")
    status = (place / "status").read_text().splitlines()
    resident = next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))
    return len(list((place / "fd").iterdir())), resident


async def storm(bus: Bus, seed: int, count: int, objects: dict[str, Any]) -> dict[str, int]:
    """Make that many calls."""
    words = [sys.executable, "-m", "tests.bus.storm", bus.address, str(NOBODY), str(seed), str(count)]
    process = await asyncio.create_subprocess_exec(
        *words, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    given = json.dumps({path: list(interfaces) for path, interfaces in objects.items()})
    output, _ = await process.communicate(given.encode())
    assert process.returncode == 0
    answers: dict[str, int] = json.loads(output)
    return answers


async def ours(root: Client) -> dict[str, Any]:
    """Return all objects but the block devices of this machine, which change by themselves."""
    objects = await root.objects()
    return {path: one for path, one in objects.items() if not one.get(DEVICE, {}).get("DeviceNumber")}


@pytest.mark.timeout(120 + CALLS // 20)
async def test_nothing_comes_of_a_storm_of_calls(
    daemon: Daemon,
    polkit: Polkit,
    root: Client,
    bus: Bus,
    directory: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The service is alive, as large as before, has as many files open, and everything is as it was."""
    device = await root.attach(make_image(directory / "disk.img"))
    await root.add(make_image(directory / "free.img"))
    await root.snapshot(device)
    await root.snapshot(device, take=("b", False))
    before = await ours(root)
    await storm(bus, SEED + 1_000_000, WARM_UP, before)
    fds, memory = resources(daemon)
    answers = await storm(bus, SEED, CALLS, before)
    fds_after, memory_after = resources(daemon)
    with capsys.disabled():
        print(
            f"\n{CALLS} calls: {memory_after - memory} KiB more, {fds_after - fds} descriptors more; answers:"
        )
        for name, count in sorted(answers.items(), key=lambda pair: -pair[1]):
            print(f"{count:8} {name}")
    assert await ours(root) == before
    assert memory_after - memory <= MAX_GROWTH_KIB
    assert fds_after == fds
    assert daemon.process is not None
    assert daemon.process.poll() is None
    for expected in ("NotAuthorizedCanObtain", "OptionNotPermitted", "InvalidArgs", "UnknownMethod", "ok"):
        assert any(name.endswith(expected) for name in answers), expected
