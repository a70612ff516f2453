# SPDX-License-Identifier: GPL-2.0-or-later
"""Where tests of the kernel filter run: over the model, or on a kernel that has the filter, with loop devices.

A test that uses nothing but ``Lab`` says the same of both.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

from blksnap_service import errors
from blksnap_service.backends.blkfilter import probe, uapi
from blksnap_service.backends.blkfilter.backend import FilterBackend
from blksnap_service.backends.blkfilter.engine import FilterEngine, SnapshotEvent
from blksnap_service.backends.blkfilter.kernel import FilteredDevice, RealSystem, Target
from blksnap_service.backends.blkfilter.probe import Found, Sign
from blksnap_service.backends.blkfilter.tracker import FilterTracker
from blksnap_service.catalogue import FilterDeviceEntry, FilterSnapshotEntry, Table
from blksnap_service.cbt import View
from blksnap_service.devices import Device
from blksnap_service.engines import SnapshotStatus
from blksnap_service.fds import OwnedFd
from blksnap_service.storage import Identity
from tests.unit.blkfilter.model import ModelKernel
from tests.unit.fakes.machine import Machine

MIB = 1 << 20
BLOCK = 65_536
SIZE = 16 * MIB
BLOCKS = SIZE // BLOCK
SIGN = Sign((("blksnap-control", 1),), frozenset())


def real_kernel() -> bool:
    """Whether this kernel has the filter, and this process may use it."""
    return os.geteuid() == 0 and any(name == "blksnap-control" for name, _ in probe.look().nodes)


class Lab(ABC):
    """A kernel, its disks, and one service's part of it. ``again`` is that service started anew."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.events: list[SnapshotEvent] = []
        self.told = asyncio.Event()
        self.names = 0

    backend: FilterBackend
    engine: FilterEngine

    @abstractmethod
    def make_backend(self, table: Table[FilterDeviceEntry]) -> FilterBackend:
        """A backend over this kernel."""

    @abstractmethod
    def disk(self, size: int = SIZE) -> Device:
        """A disk nobody uses."""

    @abstractmethod
    def write(self, device: Device, offset: int, length: int) -> None:
        """Write to it; whole sectors."""

    @abstractmethod
    def grow(self, device: Device, size: int) -> Device:
        """Make it larger."""

    @abstractmethod
    def clean(self) -> None:
        """Take disks away."""

    async def start(self, state: str = "state") -> None:
        """Start the service's part, with its own state directory."""
        devices = Table(self.directory / f"{state}-devices.json", FilterDeviceEntry)
        devices.load()
        self.backend = self.make_backend(devices)
        await self.backend.refresh()
        table = Table(self.directory / f"{state}.json", FilterSnapshotEntry)
        table.load()
        self.engine = FilterEngine(self.backend, table, self._note)

    async def again(self, state: str = "state") -> None:
        """End the service and start it again; with another state it knows nothing of what was before."""
        self.stop()
        await self.start(state)
        await self.backend.discover({})

    def stop(self) -> None:
        """End the service."""
        self.engine.close()
        self.backend.close()

    def _note(self, event: SnapshotEvent) -> None:
        self.events.append(event)
        self.told.set()

    async def event(self) -> SnapshotEvent:
        """Wait for the first event that is not fetched yet."""
        while not self.events:
            self.told.clear()
            await self.told.wait()
        return self.events.pop(0)

    async def attach(self, device: Device) -> FilterTracker:
        """Attach the filter."""
        attached = await self.backend.attach(device, 0)
        assert isinstance(attached.tracker, FilterTracker)
        return attached.tracker

    def storage(self) -> OwnedFd:
        """An empty file for difference storage."""
        self.names += 1
        path = self.directory / f"difference-{self.names}"
        return OwnedFd(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))

    async def create(self, name: str, limit: int = 64 * MIB) -> SnapshotStatus:
        """Create a snapshot, not yet taken."""
        return await self.engine.create(name, self.storage(), limit=limit, low_space=0, chunk_size=0)

    async def take(self, name: str, *trackers: FilterTracker, limit: int = 64 * MIB) -> dict[str, str]:
        """Create a snapshot and take it."""
        await self.create(name, limit)
        return dict(await self.engine.take(name, [tracker.origin for tracker in trackers]))

    async def take_elsewhere(self, tracker: FilterTracker, times: int = 1) -> None:
        """Take and end snapshots as another program does."""

        def work() -> None:
            control = self.backend.control()
            with self.storage() as storage:
                for _ in range(times):
                    kernel_id = control.create(storage, 64 * MIB)
                    tracker.device.add_to(kernel_id)
                    control.take(kernel_id)
                    control.destroy(kernel_id)

        await asyncio.to_thread(work)

    async def held(self) -> list[str]:
        """The kernel's snapshots."""
        return await asyncio.to_thread(self.backend.control().collect)

    async def map(self, tracker: FilterTracker) -> bytes:
        """The map as a client gets it."""
        opened = await tracker.open_map(View.LIVE)
        with opened.fd:
            assert opened.view is View.TAKEN
            return os.pread(opened.fd.fileno(), opened.reading.block_count + 1, 0)


class ModelLab(Lab):
    """Over the model; ``kernel`` is it, and ``machine`` has what is not the filter's."""

    def __init__(self, directory: Path, machine: Machine, generation: str) -> None:
        super().__init__(directory)
        self.machine = machine
        self.kernel = ModelKernel(directory, generation)
        self._found = Found({one.name: one for one in uapi.GENERATIONS}[generation], "")

    def make_backend(self, table: Table[FilterDeviceEntry]) -> FilterBackend:
        """Over the model."""
        return FilterBackend(table, self.kernel, lambda: SIGN, lambda _: self._found)

    def disk(self, size: int = SIZE) -> Device:
        """A file, and a disk of the model."""
        self.names += 1
        name = f"sd{'abcdefgh'[self.names - 1]}"
        device = self.machine.disk(name)
        self.kernel.add(device.path, device.number, size)
        return replace(device, path=f"/dev/{name}", size=size)

    def write(self, device: Device, offset: int, length: int) -> None:
        """Tell the model."""
        self.kernel.write(self.kernel.disks[device.number], offset, length)

    def grow(self, device: Device, size: int) -> Device:
        """Tell the model."""
        self.kernel.disks[device.number].sectors = size // 512
        return replace(device, size=size)

    def clean(self) -> None:
        """Nothing but a descriptor."""
        self.kernel.close()


class RealLab(Lab):
    """On this kernel, with loop devices."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._loops: dict[str, Path] = {}

    def make_backend(self, table: Table[FilterDeviceEntry]) -> FilterBackend:
        """Over this kernel."""
        return FilterBackend(table)

    def disk(self, size: int = SIZE) -> Device:
        """A loop device."""
        self.names += 1
        file = self.directory / f"disk-{self.names}"
        with file.open("wb") as made:
            made.truncate(size)
        path = _run("losetup", "--find", "--show", str(file))
        self._loops[path] = file
        number = Path(path).stat().st_rdev
        return Device(Path(path).name, "block", path, Identity(number, 0), size)

    def write(self, device: Device, offset: int, length: int) -> None:
        """Write past the page cache's delays."""
        fd = os.open(device.path, os.O_RDWR | os.O_DSYNC)
        try:
            os.pwrite(fd, os.urandom(length), offset)
        finally:
            os.close(fd)

    def grow(self, device: Device, size: int) -> Device:
        """Lengthen the file."""
        os.truncate(self._loops[device.path], size)
        _run("losetup", "--set-capacity", device.path)
        return replace(device, size=size)

    def clean(self) -> None:
        """End all snapshots and take the loop devices away."""
        backend = FilterBackend()
        asyncio.run(backend.refresh())
        control = backend.control()
        for snapshot in control.collect():
            control.destroy(snapshot)
        assert backend.generation is not None
        for path in self._loops:
            target = Target(path, Identity(Path(path).stat().st_rdev, 0))
            device = FilteredDevice(RealSystem(), backend.generation, target)
            with contextlib.suppress(errors.BlksnapError):
                # Threads of a service that has ended may still wait for events, and keep images for that long.
                end = time.monotonic() + 10
                while device.snapshot_info().image and time.monotonic() < end:
                    time.sleep(0.05)
                # It would stay on the loop device, and be there when that is used again.
                device.detach()
            with contextlib.suppress(subprocess.CalledProcessError):
                _run("losetup", "--detach", path)


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@contextlib.asynccontextmanager
async def running(lab: Lab) -> AsyncIterator[Lab]:
    """A lab with its service started."""
    try:
        await lab.start()
        try:
            yield lab
        finally:
            lab.stop()
    finally:
        await asyncio.to_thread(lab.clean)
