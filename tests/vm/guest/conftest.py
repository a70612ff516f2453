# SPDX-License-Identifier: GPL-2.0-or-later
"""Fixtures of the tests that run in a guest. On the host they are never set up: see tests/vm/conftest.py."""

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from blksnap_service.bus.paths import DEVICE, SNAPSHOT
from tests.bus.daemons import Bus, Client, Daemon, client, scratch
from tests.nbd.datapath import Datapath
from tests.vm.guest import devices, system, ublk
from tests.vm.guest.service import DISK_BYTES, TrackedDevice, attach, listed
from tests.vm.selection import wanted_kernels


@pytest.fixture(scope="session", autouse=True, params=wanted_kernels())
def kernel(request: pytest.FixtureRequest) -> str:
    """The series of the kernel that was asked for."""
    series: str = request.param
    return series


@pytest.fixture(scope="class")
def udevd() -> Iterator[None]:
    """A systemd-udevd for the tests of one class (or one test)."""
    with devices.udevd():
        yield


@pytest.fixture(scope="class")
def rules() -> Iterator[None]:
    """A udevd with our rules."""
    system.install_rules()
    with devices.udevd():
        yield


@pytest.fixture
def datapath() -> Iterator[Datapath]:
    """A running data path, with device-mapper loaded."""
    devices.modprobe("dm-mod")
    with ublk.datapath() as running:
        yield running


@pytest.fixture
def file() -> Iterator[Path]:
    """A sparse file of 64 MiB."""
    with tempfile.NamedTemporaryFile() as one:
        os.truncate(one.name, 64 * system.MIB)
        yield Path(one.name)


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
    with devices.brd(DISK_BYTES) as node:
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
