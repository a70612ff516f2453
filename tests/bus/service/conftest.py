# SPDX-License-Identifier: GPL-2.0-or-later
"""blksnapd as a process on a private bus, with the real data path."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.bus.daemons import Bus, Client, Daemon, Signals, client, make_image, scratch


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory of the test's own."""
    with scratch() as one:
        yield one


@pytest.fixture
def bus(directory: Path) -> Iterator[Bus]:
    """A private bus."""
    one = Bus(directory)
    yield one
    one.stop()


@pytest.fixture
async def daemon(directory: Path, bus: Bus) -> AsyncIterator[Daemon]:
    """A running service; in the end it has never printed a traceback."""
    one = Daemon(directory, bus)
    try:
        await one.start()
        yield one
        assert "Traceback" not in one.log.read_text()
        assert "Warning" not in one.log.read_text()
    finally:
        one.clean_up()


@pytest.fixture
async def user(daemon: Daemon, bus: Bus) -> AsyncIterator[Client]:
    """A client of the running service."""
    async with client(bus) as one:
        yield one


@pytest.fixture
def signals(daemon: Daemon, bus: Bus) -> Iterator[Signals]:
    """What the service tells."""
    one = Signals(bus)
    yield one
    one.close()


@pytest.fixture
def image(directory: Path) -> Path:
    """An image file of 16 blocks."""
    return make_image(directory / "disk.img")
