# SPDX-License-Identifier: GPL-2.0-or-later
"""The control node of the model in ``model``: snapshots, and the events of each."""

from __future__ import annotations

import errno
import os
import struct
import threading
import time
import uuid
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path

from blksnap_service.fds import OwnedFd
from tests.unit.blkfilter.model_map import KernelError, ModelMap, Oops

NEW = "6.15"


@dataclass(eq=False)
class Disk:
    """A block device: its file, and its size in sectors."""

    path: Path
    number: int
    sectors: int
    diskseq: int = 1
    alive: bool = True
    integrity: bool = False
    other_filter: bool = False
    tracker: ModelTracker | None = None
    writes: int = 0
    written: int = 0


@dataclass(eq=False)
class ModelTracker:
    """The filter on a disk."""

    disk: Disk
    map: ModelMap
    snapshot: ModelSnapshot | None = None
    taken: bool = False
    image: str = ""
    error: int = 0
    chunks: set[int] = field(default_factory=set)


@dataclass(eq=False)
class ModelSnapshot:
    """A snapshot and its difference storage, in sectors."""

    id: bytes
    storage: tuple[int, int]
    """The file, and the device it lies on."""
    is_block: bool
    limit: int
    capacity: int
    requested: int
    filled: int
    trackers: list[ModelTracker] = field(default_factory=list)
    taken: bool = False
    no_space: bool = False
    events: list[tuple[int, bytes]] = field(default_factory=list)
    waiters: int = 0
    destroyed: bool = False


class ModelControl(ABC):
    """Snapshots of a kernel of one generation: v6, v7 or 6.15."""

    def __init__(self, generation: str, tick_s: float) -> None:
        self.generation = generation
        self.tick_s = tick_s
        self.growth = 2_097_152
        """Sectors by which difference storage grows."""
        self.snapshots: list[ModelSnapshot] = []
        self.fail_take_after: int | None = None
        """The disk of that index cannot be taken: those before it were (defect 34)."""
        self.fail_images = 0
        """An errno for making images, when all is taken already (defect S3)."""
        self.storage_device = 0
        """The number of the device the file system of all storage is on."""
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)

    @abstractmethod
    def get(self, address: int, length: int) -> bytes:
        """Copy from user memory."""

    @abstractmethod
    def put(self, address: int, data: bytes, number: int) -> None:
        """Copy to user memory; ``number`` is the errno for a bad address."""

    @abstractmethod
    def name_at(self, address: int) -> bytes:
        """The string in user memory."""

    def tell(self, snapshot: ModelSnapshot, code: int, payload: bytes) -> None:
        """An event."""
        with self._changed:
            snapshot.events.append((code, payload))
            self._changed.notify_all()

    def control(self, request: int, argument: bytearray) -> None:
        """A request on the node."""
        if request == 0x90005605:
            self._wait(argument)
            return
        with self._changed:
            match request:
                case 0x80085600:
                    argument[:] = struct.pack("=4H", 2, 0, 0, 0)
                case 0xC0205601:
                    self._create(argument)
                case 0x40105602:
                    self._destroy(bytes(argument))
                case 0x40105603:
                    self._take(self._find(bytes(argument)))
                case 0x80105604:
                    self._collect(argument)
                case _:
                    raise KernelError(errno.ENOTTY)

    def _create(self, argument: bytearray) -> None:
        if self.generation == "v6":
            limit, fd = struct.unpack_from("=QI", argument)
            try:
                status = os.fstat(fd)
            except (OSError, OverflowError):
                raise KernelError(errno.EINVAL) from None
        else:
            limit, pointer = struct.unpack_from("=QQ", argument)
            name = self.name_at(pointer)
            try:
                with OwnedFd(os.open(name, os.O_RDWR | os.O_CLOEXEC)) as opened:
                    status = os.fstat(opened.fileno())
            except OSError as error:
                raise KernelError(error.errno or errno.EIO) from None
        capacity = requested = status.st_size // 512
        if requested <= self.growth // 2 and capacity != limit:
            if capacity > limit:
                raise KernelError(errno.ENOSPC)
            requested += min(self.growth, limit - capacity)
            capacity = requested
        made = ModelSnapshot(
            uuid.uuid4().bytes, (status.st_ino, self.storage_device), False, limit, capacity, requested,
            4096 if self.generation == NEW else 0,
        )  # fmt: skip
        self.snapshots.append(made)
        at = 12 if self.generation == "v6" else 16
        argument[at : at + 16] = made.id

    def _find(self, snapshot: bytes) -> ModelSnapshot:
        found = next((one for one in self.snapshots if one.id == snapshot), None)
        if found is None:
            raise KernelError(errno.ESRCH)
        return found

    def add_tracker(self, tracker: ModelTracker, snapshot: bytes) -> None:
        """SNAPSHOTADD."""
        if tracker.disk.integrity:
            raise Oops("defect S1: a snapshot that was not looked for yet is unlocked")
        found = self._find(snapshot)
        if tracker.disk.number == found.storage[1]:
            return  # defect S2
        if tracker in found.trackers:
            raise KernelError(errno.EALREADY)
        if tracker.snapshot is not None:
            raise KernelError(errno.EBUSY)
        tracker.snapshot = found  # defect S4: whether it was taken or not
        found.trackers.append(tracker)

    def _take(self, snapshot: ModelSnapshot) -> None:
        if snapshot.taken:
            raise KernelError(errno.EALREADY)
        if not snapshot.trackers:
            raise KernelError(errno.ENODEV)
        for index, tracker in enumerate(snapshot.trackers):
            if index == self.fail_take_after:
                raise KernelError(errno.ENOMEM)
            if tracker.map.corrupted or tracker.map.capacity != tracker.disk.sectors:
                tracker.map = ModelMap(tracker.disk.sectors)
            tracker.map.switch()
            tracker.taken = True
        snapshot.taken = True  # defect S3: what fails from here on leaves it so
        if self.fail_images:
            for tracker in snapshot.trackers:
                tracker.taken = False
            raise KernelError(self.fail_images)
        for tracker in snapshot.trackers:
            major, minor = os.major(tracker.disk.number), os.minor(tracker.disk.number)
            new = self.generation == NEW
            tracker.image = f"blksnap-{major}-{minor}" if new else f"blksnap-image_{major}:{minor}"

    def _destroy(self, snapshot: bytes) -> None:
        try:
            found = self._find(snapshot)
        except KernelError:
            raise KernelError(errno.ENODEV) from None
        self.snapshots.remove(found)
        found.destroyed = True
        self._release(found)

    def _release(self, snapshot: ModelSnapshot) -> None:
        if snapshot.destroyed and not snapshot.waiters:
            for tracker in snapshot.trackers:
                tracker.snapshot, tracker.taken, tracker.image, tracker.error = None, False, "", 0
                tracker.chunks.clear()
            snapshot.trackers.clear()

    def _collect(self, argument: bytearray) -> None:
        room, address = struct.unpack("=I4xQ", argument)
        count, full = 0, False
        for snapshot in self.snapshots:
            if address:
                if count >= room:
                    full = True
                    break
                self.put(address + 16 * count, snapshot.id, errno.ENODATA)
            count += 1
        argument[:] = struct.pack("=I4xQ", count, address)
        if full:
            raise KernelError(errno.ENODATA)

    def _wait(self, argument: bytearray) -> None:
        # Of what is passed the kernel looks at no more than this; the timeout is in ticks (defect S6).
        snapshot, ticks = struct.unpack_from("=16sI", argument)
        with self._changed:
            found = self._find(snapshot)
            found.waiters += 1
            end = time.monotonic() + ticks * self.tick_s
            try:
                while not found.events:
                    if (left := end - time.monotonic()) <= 0:
                        raise KernelError(errno.ENOENT)
                    self._changed.wait(left)
                code, payload = found.events.pop(0)
            finally:
                found.waiters -= 1
                self._release(found)
            argument[:] = struct.pack("=16sIIq4064s", snapshot, ticks, code, time.monotonic_ns(), payload)
