# SPDX-License-Identifier: GPL-2.0-or-later
"""A model of the kernel filter, to be put in place of ioctl(2): numbers, structures and user memory are the real ones.

Written from the patch sets (v6, 6.9, 6.15): what they do right, what they do wrong, and with which errno. User memory that a
request points to is read and written through /proc/self/mem, so that a bad pointer is an errno here too. Files stand for
block devices.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from blksnap_service import sysblock
from blksnap_service.backends.blkfilter import control
from blksnap_service.fds import OwnedFd
from tests.unit.blkfilter.model_map import KernelError, ModelMap, Oops

NAME = b"blksnap".ljust(32, b"\0")
CHUNK = 512  # sectors
OLD, NEW = "old", "6.15"


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
    attach_error: int = 0


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


class ModelKernel:
    """A kernel with the filter; a ``kernel.System``. ``generation`` is v6, v7 or 6.15."""

    def __init__(self, directory: Path, generation: str = "6.15", tick_s: float = 0.001) -> None:
        self.generation = generation
        self.tick_s = tick_s
        self.growth = 2_097_152
        self.disks: dict[int, Disk] = {}
        self.snapshots: list[ModelSnapshot] = []
        self.requests: list[int] = []
        self.commands: list[int] = []
        """Of CTL."""
        self.fail: dict[int, list[int]] = {}
        """Errnos to answer to requests of a number, one by one, in place of doing them; 0: do it."""
        self.fail_take_after: int | None = None
        """The disk of that index cannot be taken: those before it were (defect 34)."""
        self.fail_images = 0
        """An errno for making images, when all is taken already (defect S3)."""
        self.hook: Callable[[int], None] = lambda _: None
        """Called before each CTL."""
        self.storage_device = 0
        """The number of the device the file system of all storage is on."""
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._node = directory / "blksnap-control"
        self._node.touch()
        self._scratch = directory / "scratch"
        self._scratch.write_bytes(bytes(4096))
        self._memory = OwnedFd(os.open("/proc/self/mem", os.O_RDWR | os.O_CLOEXEC))

    def close(self) -> None:
        """Let go of the window into memory."""
        self._memory.close()

    # What a test does to it.

    def add(self, path: str, number: int, size: int) -> Disk:
        """A disk without a filter."""
        disk = Disk(Path(path), number, size // 512)
        self.disks[number] = disk
        self._show(disk)
        return disk

    def write(self, disk: Disk, offset: int, length: int) -> None:
        """A write to the device."""
        with self._lock:
            if (tracker := disk.tracker) is None:
                return
            if not tracker.map.record(offset // 512, length // 512):
                return  # defect 8: the old bytes are not kept either
            if tracker.taken and not tracker.error and tracker.snapshot is not None:
                self._copy(tracker, offset // 512, length // 512)

    def write_image(self, disk: Disk, offset: int, length: int) -> None:
        """A write to the image of a device."""
        with self._lock:
            assert disk.tracker is not None
            disk.tracker.map.mark(offset // 512, length // 512)

    def tell(self, snapshot: ModelSnapshot, code: int, payload: bytes) -> None:
        """An event."""
        with self._changed:
            snapshot.events.append((code, payload))
            self._changed.notify_all()

    def corrupt(self, tracker: ModelTracker, error: int) -> None:
        """Old bytes could not be kept."""
        assert tracker.snapshot is not None
        tracker.error = -error
        number = tracker.disk.number
        self.tell(tracker.snapshot, 0, struct.pack("=IIi", os.major(number), os.minor(number), error))

    def pull(self, disk: Disk) -> None:
        """The device goes away; so does its filter."""
        disk.alive = False
        disk.tracker = None
        disk.path.unlink()
        self.disks.pop(disk.number)

    def _copy(self, tracker: ModelTracker, start: int, count: int) -> None:
        snapshot = tracker.snapshot
        assert snapshot is not None
        for chunk in range(start // CHUNK, (start + count - 1) // CHUNK + 1):
            if chunk in tracker.chunks:
                continue
            size = min(CHUNK, tracker.disk.sectors - chunk * CHUNK)
            if snapshot.filled + size > snapshot.requested:
                self.corrupt(tracker, errno.ENOSPC)
                return
            tracker.chunks.add(chunk)
            snapshot.filled += size
            left = snapshot.requested - snapshot.filled
            if left <= self.growth // 2 and not snapshot.no_space and not snapshot.is_block:
                if snapshot.capacity < snapshot.limit:
                    snapshot.requested += min(self.growth, snapshot.limit - snapshot.capacity)
                    snapshot.capacity = snapshot.requested
                else:
                    snapshot.no_space = True
                    if self.generation == NEW:
                        self.tell(snapshot, 1, struct.pack("=Q", snapshot.requested))

    def _show(self, disk: Disk) -> None:
        name = "blksnap" if disk.tracker else "other" if disk.other_filter else ""
        with contextlib.suppress(FileNotFoundError):
            (sysblock.node(disk.number) / "filter").write_text(name + "\n")

    # kernel.System

    def open(self, path: str, flags: int) -> OwnedFd:
        """Open a disk's file, or the control node's."""
        if path == control.NODE:
            path = str(self._node)
        return OwnedFd(os.open(path, flags | os.O_CLOEXEC))

    @contextlib.contextmanager
    def scratch(self) -> Iterator[OwnedFd]:
        """A loop device for a probe."""
        with OwnedFd(os.open(self._scratch, os.O_RDONLY | os.O_CLOEXEC)) as fd:
            yield fd

    def ioctl(self, fd: int, request: int, argument: bytearray) -> None:
        """Do it. Raises ``OSError``."""
        try:
            with self._lock:
                self.requests.append(request)
                if (planned := self.fail.get(request)) and (number := planned.pop(0)):
                    raise KernelError(number)
            name = Path(f"/proc/self/fd/{fd}").readlink()
            if name == self._node:
                self._control(request, argument)
            else:
                disk = next((one for one in self.disks.values() if one.path == name), None)
                with self._lock:
                    self._block(disk, name == self._scratch, request, argument)
        except KernelError as error:
            raise OSError(error.errno, os.strerror(error.errno)) from None

    def _block(self, disk: Disk | None, scratch: bool, request: int, argument: bytearray) -> None:
        if scratch:
            disk = Disk(self._scratch, 0, 8)
        if disk is None or not disk.alive:
            raise KernelError(errno.ENODEV)
        if request == 0x80081272:
            argument[:] = (disk.sectors * 512).to_bytes(8, "little")
            return
        if request == 0x80081280:
            argument[:] = disk.diskseq.to_bytes(8, "little")
            return
        if self.generation == NEW:
            numbers = {0xC030128E: self._attach, 0xC020128F: self._detach, 0xC0301290: self._ctl}
        else:
            numbers = {0xC020128C: self._attach, 0xC020128D: self._detach, 0xC030128E: self._ctl}
        if request not in numbers:
            # What a loop device says; others say ENOTTY.
            raise KernelError(errno.EINVAL if scratch else errno.ENOTTY)
        numbers[request](disk, argument)

    def _attach(self, disk: Disk, argument: bytearray) -> None:
        if argument[:32] != NAME:
            raise KernelError(errno.ENOENT)
        if disk.tracker is not None or disk.other_filter:
            raise KernelError(errno.EALREADY if disk.tracker else errno.EBUSY)
        disk.tracker = ModelTracker(disk, ModelMap(disk.sectors))
        self._show(disk)

    def _detach(self, disk: Disk, argument: bytearray) -> None:
        if disk.tracker is None and not disk.other_filter:
            raise KernelError(errno.ENOENT)
        if disk.other_filter or argument[:32] != NAME:
            raise KernelError(errno.EINVAL)
        disk.tracker = None  # defect 20: in a snapshot, too
        self._show(disk)

    def _ctl(self, disk: Disk, argument: bytearray) -> None:
        name, command, length, address = struct.unpack("=32sIIQ", argument)
        self.commands.append(command)
        self.hook(command)
        tracker = disk.tracker
        if tracker is None and not disk.other_filter:
            raise KernelError(errno.ENOENT)
        if tracker is None or name != NAME:
            raise KernelError(errno.EINVAL if self.generation == NEW else errno.ENOENT)
        if command == 5 and self.generation == "v6":
            raise Oops("defect 1: a call through what is behind the table")
        handlers = (self._cbtinfo, self._cbtmap, self._cbtdirty, self._snapshotadd, self._snapshotinfo)
        if command >= len(handlers):
            raise KernelError(errno.ENOTTY)
        handlers[command](tracker, length, address)

    def _cbtinfo(self, tracker: ModelTracker, length: int, address: int) -> None:
        self._need(length, 40)
        found = tracker.map
        info = struct.pack(
            "=QII16sB7s", found.capacity * 512, 1 << found.shift, found.count, found.generation.bytes,
            found.previous & 255, b"\xaa" * 7,
        )  # fmt: skip
        self._put(address, info, errno.ENODATA)

    def _cbtmap(self, tracker: ModelTracker, length: int, address: int) -> None:
        if tracker.map.corrupted:
            raise KernelError(errno.EFAULT)
        self._need(length, 16)
        offset, count, buffer = struct.unpack("=IIQ", self._get(address, 16))
        self._put(buffer, tracker.map.part(offset, count), errno.EINVAL)

    def _cbtdirty(self, tracker: ModelTracker, length: int, address: int) -> None:
        self._need(length, 16)
        count, ranges = struct.unpack("=I4xQ", self._get(address, 16))
        for index in range(count):
            # Defect 2: the first one each time.
            at = ranges + (16 * index if self.generation == NEW else 0)
            tracker.map.mark(*struct.unpack("=QQ", self._get(at, 16)))

    def _snapshotadd(self, tracker: ModelTracker, length: int, address: int) -> None:
        self._need(length, 16)
        self._add(tracker, self._get(address, 16))

    def _snapshotinfo(self, tracker: ModelTracker, length: int, address: int) -> None:
        self._need(length, 36)
        image = self._get(address, 36)[4:]
        if tracker.image:
            image = tracker.image.encode().ljust(32, b"\0")
        self._put(address, struct.pack("=i32s", tracker.error, image), errno.ENODATA)

    def _need(self, length: int, least: int) -> None:
        if length < least:
            raise KernelError(errno.EINVAL)

    def _get(self, address: int, length: int) -> bytes:
        try:
            data = os.pread(self._memory.fileno(), length, address)
        except (OSError, OverflowError):
            data = b""
        if len(data) != length:
            raise KernelError(errno.ENODATA)
        return data

    def _put(self, address: int, data: bytes, number: int) -> None:
        try:
            if data and os.pwrite(self._memory.fileno(), data, address) != len(data):
                raise KernelError(number)
        except (OSError, OverflowError):
            raise KernelError(number) from None

    # The control node.

    def _control(self, request: int, argument: bytearray) -> None:
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
            try:
                name = os.pread(self._memory.fileno(), 4096, pointer)
            except (OSError, OverflowError):
                raise KernelError(errno.EFAULT) from None
            try:
                with OwnedFd(os.open(name.split(b"\0", 1)[0], os.O_RDWR | os.O_CLOEXEC)) as opened:
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

    def _add(self, tracker: ModelTracker, snapshot: bytes) -> None:
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
                self._put(address + 16 * count, snapshot.id, errno.ENODATA)
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
