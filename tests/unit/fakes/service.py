# SPDX-License-Identifier: GPL-2.0-or-later
"""A service over a fake data path and no block devices, and a watcher that writes down what it is told."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from blksnap_service.backends.blkfilter.backend import FilterBackend
from blksnap_service.backends.blkfilter.probe import Sign
from blksnap_service.catalogue import Catalogue
from blksnap_service.datapath.process import Datapath
from blksnap_service.devices import Device
from blksnap_service.service import Service
from blksnap_service.snapshot import Snapshot
from blksnap_service.trackers import Tracked
from blksnap_service.udev import BlockDevices
from tests.unit.fakes.datapath import FakeDatapath

MIB = 1 << 20
BLOCK = 65_536
"""Block size of a device as small as those of the tests."""
BUS_ID = "0123456789abcdef"


class Recorder:
    """A ``service.Watcher`` that keeps what it is told, as short texts in order."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.something = asyncio.Event()

    def _note(self, text: str) -> None:
        self.told.append(text)
        self.something.set()

    def device_added(self, device: Device) -> None:
        """Write it down."""
        self._note(f"+device {device.name}")

    def device_changed(self, device: Device) -> None:
        """Write it down."""
        self._note(f"~device {device.name}")

    def device_removed(self, device: Device) -> None:
        """Write it down."""
        self._note(f"-device {device.name}")

    def tracker_added(self, name: str) -> None:
        """Write it down."""
        self._note(f"+tracker {name}")

    def tracker_changed(self, name: str) -> None:
        """Write it down."""
        self._note(f"~tracker {name}")

    def tracker_removed(self, name: str) -> None:
        """Write it down."""
        self._note(f"-tracker {name}")

    def generation_started(self, name: str, generation: str, reason: str) -> None:
        """Write it down."""
        self._note(f"generation {name}: {reason}")

    def backends_changed(self) -> None:
        """Write it down."""
        self._note("backends")

    def snapshot_added(self, snapshot: Snapshot) -> None:
        """Write it down."""
        self._note(f"+snapshot {snapshot.state}")

    def snapshot_changed(self, snapshot: Snapshot) -> None:
        """Write it down."""
        self._note(f"~snapshot {snapshot.state}")

    def snapshot_removed(self, snapshot: Snapshot) -> None:
        """Write it down."""
        self._note("-snapshot")

    def low_space(self, snapshot: Snapshot, used: int, limit: int) -> None:
        """Write it down."""
        self._note(f"low space {used}/{limit}")

    def no_space(self, snapshot: Snapshot, requested: int) -> None:
        """Write it down."""
        self._note(f"no space {requested}, {snapshot.state}")

    def corrupted(self, snapshot: Snapshot, device: str, errno: int, message: str) -> None:
        """Write it down."""
        self._note(f"corrupted {device} {errno} {message}, {snapshot.state}")


class Blocks(BlockDevices):
    """Block devices as a test wants them."""

    def __init__(self) -> None:
        self.devices: dict[str, Device] = {}

    def list(self) -> dict[str, Device]:
        """Return what the test put in."""
        return dict(self.devices)

    def watch(self, changed: Callable[[], None]) -> None:
        """Never tell."""

    def close(self) -> None:
        """Do nothing."""


class CountingService(Service):
    """A service that counts how often it was brought in step with the data path."""

    reconciled = 0

    async def reconcile(self) -> None:
        """Count when that is done."""
        await super().reconcile()
        self.reconciled += 1


class Running:
    """A started service with everything around it that a test may want to touch."""

    def __init__(
        self,
        directory: Path,
        fake: FakeDatapath,
        catalogue: Catalogue,
        blocks: Blocks,
        kernel_filter: FilterBackend,
    ) -> None:
        self.directory = directory
        self.fake = fake
        self.catalogue = catalogue
        self.watcher = Recorder()
        self.blocks = blocks
        self.storage = directory / "state" / "storage"
        self.storage.mkdir(exist_ok=True)
        self.service = CountingService(
            catalogue,
            Datapath(fake.runtime_dir, Path("/bin/false")),
            self.blocks,
            self.storage,
            self.watcher,
            filter_backend=kernel_filter,
        )

    async def image(self, name: str = "disk.img", size: int = MIB) -> Device:
        """Make an image file if need be, and add it."""
        return await self.service.inventory.add_image(str(image_file(self.directory, name, size)))

    async def tracked(self, name: str = "disk.img", size: int = MIB) -> Device:
        """Make, add and track an image file."""
        device = await self.image(name, size)
        await self.service.registry.attach(device, owner_uid=1000)
        return device

    async def told(self, text: str) -> None:
        """Wait until the watcher was told something that begins so."""
        while not any(told.startswith(text) for told in self.watcher.told):
            self.watcher.something.clear()
            await self.watcher.something.wait()


def image_file(directory: Path, name: str = "disk.img", size: int = MIB) -> Path:
    """Make an image file of ``size`` bytes unless it is there."""
    path = directory / name
    if not path.exists():
        with path.open("wb") as file:
            file.truncate(size)
    return path


def only(rig: Running) -> Tracked:
    """The one tracker there is."""
    ((_, tracked),) = rig.service.registry
    return tracked


async def take(rig: Running, *origins: str) -> None:
    """Take a snapshot behind the service's back, as far as numbers go."""
    for origin in origins:
        rig.fake.origins[origin].map.take(rig.fake.origins[origin].map.generation)


def nothing_left(rig: Running) -> bool:
    """Whether no snapshot is anywhere, and no storage of one."""
    anywhere = (rig.service.snapshots, rig.fake.snapshots, rig.catalogue.snapshots, rig.storage.iterdir())
    return not any(list(one) for one in anywhere) and not (rig.directory / "diff").exists()


@contextlib.asynccontextmanager
async def running_service(
    directory: Path,
    fake: FakeDatapath,
    bus_id: str = BUS_ID,
    blocks: Blocks | None = None,
    kernel_filter: FilterBackend | None = None,
) -> AsyncIterator[Running]:
    """Keep a service for as long as the block lasts; a second one in the same directory is a restart.

    Without a ``kernel_filter`` it is on a kernel that has none.
    """
    kernel_filter = kernel_filter or FilterBackend(look_around=lambda: Sign((), frozenset()))
    with Catalogue(directory / "state") as catalogue:
        running = Running(directory, fake, catalogue, blocks or Blocks(), kernel_filter)
        try:
            await running.service.start(bus_id)
            follower = asyncio.create_task(running.service.run())
            try:
                yield running
            finally:
                follower.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await follower
        finally:
            running.service.close()
