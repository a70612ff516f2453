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
from collections.abc import Callable, Iterator
from pathlib import Path

from blksnap_service import sysblock
from blksnap_service.backends.blkfilter import control
from blksnap_service.fds import OwnedFd
from tests.unit.blkfilter.model_control import NEW, Disk, ModelControl, ModelTracker
from tests.unit.blkfilter.model_map import KernelError, ModelMap, Oops

NAME = b"blksnap".ljust(32, b"\0")
CHUNK = 512  # sectors


class ModelKernel(ModelControl):
    """A kernel with the filter; a ``kernel.System``. ``generation`` is v6, v7 or 6.15."""

    def __init__(self, directory: Path, generation: str = "6.15", tick_s: float = 0.0002) -> None:
        super().__init__(generation, tick_s)
        self.disks: dict[int, Disk] = {}
        self.requests: list[int] = []
        self.commands: list[int] = []
        """Of CTL."""
        self.fail: dict[int, list[int]] = {}
        """Errnos to answer to requests of a number, one by one, in place of doing them; 0: do it."""
        self.hook: Callable[[int], None] = lambda _: None
        """Called before each CTL."""
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
            disk.writes += 1
            disk.written += length // 512
            stat = [0, 0, 0, 0, disk.writes, 0, disk.written, *[0] * 10]
            (sysblock.node(disk.number) / "stat").write_text(" ".join(map(str, stat)) + "\n")
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
        elif path.startswith("/dev/"):
            path = str(self._node.with_name(path.removeprefix("/dev/")))
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
                self.control(request, argument)
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
        self.put(address, info, errno.ENODATA)

    def _cbtmap(self, tracker: ModelTracker, length: int, address: int) -> None:
        if tracker.map.corrupted:
            raise KernelError(errno.EFAULT)
        self._need(length, 16)
        offset, count, buffer = struct.unpack("=IIQ", self.get(address, 16))
        self.put(buffer, tracker.map.part(offset, count), errno.EINVAL)

    def _cbtdirty(self, tracker: ModelTracker, length: int, address: int) -> None:
        self._need(length, 16)
        count, ranges = struct.unpack("=I4xQ", self.get(address, 16))
        for index in range(count):
            # Defect 2: the first one each time.
            at = ranges + (16 * index if self.generation == NEW else 0)
            tracker.map.mark(*struct.unpack("=QQ", self.get(at, 16)))

    def _snapshotadd(self, tracker: ModelTracker, length: int, address: int) -> None:
        self._need(length, 16)
        self.add_tracker(tracker, self.get(address, 16))

    def _snapshotinfo(self, tracker: ModelTracker, length: int, address: int) -> None:
        self._need(length, 36)
        image = self.get(address, 36)[4:]
        if tracker.image:
            image = tracker.image.encode().ljust(32, b"\0")
        self.put(address, struct.pack("=i32s", tracker.error, image), errno.ENODATA)

    def _need(self, length: int, least: int) -> None:
        if length < least:
            raise KernelError(errno.EINVAL)

    def get(self, address: int, length: int) -> bytes:
        """Copy from user memory."""
        try:
            data = os.pread(self._memory.fileno(), length, address)
        except (OSError, OverflowError):
            data = b""
        if len(data) != length:
            raise KernelError(errno.ENODATA)
        return data

    def put(self, address: int, data: bytes, number: int) -> None:
        """Copy to user memory."""
        try:
            if data and os.pwrite(self._memory.fileno(), data, address) != len(data):
                raise KernelError(number)
        except (OSError, OverflowError):
            raise KernelError(number) from None

    def name_at(self, address: int) -> bytes:
        """The string in user memory."""
        try:
            return os.pread(self._memory.fileno(), 4096, address).split(b"\0", 1)[0]
        except (OSError, OverflowError):
            raise KernelError(errno.EFAULT) from None
