# SPDX-License-Identifier: GPL-2.0-or-later
"""blksnapd on a bus like the system's, which asks the real polkitd. Root only: polkitd and the callers change their uid."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from blksnap_service.bus import wire
from tests.bus.daemons import Bus, Client, Daemon, client, make_image, scratch
from tests.bus.polkitd import NOBODY, Agent, Polkit, SystemBus, Unprivileged


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory of the test's own."""
    if os.geteuid() != 0:
        pytest.skip("not root")
    with scratch() as one:
        yield one


@pytest.fixture
def bus(directory: Path) -> Iterator[Bus]:
    """A bus as a system bus is configured."""
    one = SystemBus(directory)
    yield one
    one.stop()


@pytest.fixture
async def root(bus: Bus) -> AsyncIterator[Client]:
    """Root, with a connection of its own."""
    async with client(bus) as one:
        yield one


@pytest.fixture
async def polkit(directory: Path, bus: Bus, root: Client) -> AsyncIterator[Polkit]:
    """The real polkitd, on the bus."""
    one = Polkit(directory, bus)
    try:
        await one.wait(root.connection)
        yield one
    finally:
        one.stop()


@pytest.fixture
async def daemon(directory: Path, bus: Bus) -> AsyncIterator[Daemon]:
    """A running service; in the end it has never printed a traceback."""
    one = Daemon(directory, bus, "--authority=polkit")
    try:
        await one.start()
        yield one
        assert "Traceback" not in one.log.read_text()
        assert "Warning" not in one.log.read_text()
    finally:
        one.clean_up()


@pytest.fixture
def nobody(bus: Bus) -> Iterator[Unprivileged]:
    """A user without rights."""
    one = Unprivileged(bus)
    yield one
    one.leave()


@pytest.fixture
async def agent(bus: Bus, polkit: Polkit, nobody: Unprivileged) -> AsyncIterator[Agent]:
    """An agent that answers for ``nobody`` once it is registered."""
    connection = await wire.connect(bus.address)
    yield Agent(connection)
    connection.close()


@pytest.fixture
def image(directory: Path) -> Path:
    """An image file of 16 blocks that belongs to ``nobody``."""
    path = make_image(directory / "disk.img")
    os.chown(path, NOBODY, NOBODY)
    return path
