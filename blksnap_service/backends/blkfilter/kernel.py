# SPDX-License-Identifier: GPL-2.0-or-later
"""Calls the filter on one block device: attach, detach, map, marks, snapshots.

Everything blocks, some of it for as long as a file system takes to be frozen. An errno that says something here becomes an
``errors.BlksnapError`` that names the device; ``System`` is where the kernel begins, and where tests put a model of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Protocol

from blksnap_service import errors
from blksnap_service.backends.blkfilter import uapi
from blksnap_service.backends.blkfilter.uapi import CbtInfo, Generation, SnapshotInfo
from blksnap_service.fds import OwnedFd
from blksnap_service.storage import Identity

BLKGETSIZE64: Final = 0x80081272
BLKGETDISKSEQ: Final = 0x80081280
MAP_PAGE: Final = 1 << 20
"""Bytes of a map in one call: a generation before 6.9 keeps the device's queue referenced while it copies."""


_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_LIBC.ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)


class System(Protocol):
    """What is asked of the kernel."""

    def open(self, path: str, flags: int) -> OwnedFd:
        """Open a device. Raises ``OSError``."""

    def ioctl(self, fd: int, request: int, argument: bytearray) -> None:
        """Call a driver, which changes the argument in place. Raises ``OSError``."""


class RealSystem:
    """The kernel this runs on."""

    def open(self, path: str, flags: int) -> OwnedFd:
        """Open; never inherited."""
        return OwnedFd(os.open(path, flags | os.O_CLOEXEC))

    def ioctl(self, fd: int, request: int, argument: bytearray) -> None:
        """Call; other threads run meanwhile.

        fcntl.ioctl keeps them all waiting when the argument has more than 1024 bytes, as that of waiting for an event has.
        """
        if _LIBC.ioctl(fd, request, address_of(argument)) < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))


def address_of(buffer: bytearray | memoryview) -> int:
    """Where a writable buffer is; valid as long as the caller keeps it, unchanged in size."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


@dataclass(frozen=True, slots=True)
class Target:
    """A device and what tells it from another one of the same name."""

    path: str
    identity: Identity
    diskseq: int = 0
    """0: not known, or of a kind that changes it by itself."""


class FilteredDevice:
    """One block device, opened for each call: an open descriptor would keep it from being taken apart."""

    def __init__(self, system: System, generation: Generation, target: Target) -> None:
        """Speak to ``target`` the way of ``generation``."""
        self._system = system
        self._generation = generation
        self.target = target

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        path = self.target.path
        try:
            with self._system.open(path, os.O_RDONLY | os.O_NONBLOCK) as fd:
                status = os.fstat(fd.fileno())
                if stat.S_ISBLK(status.st_mode) and Identity.of(status) != self.target.identity:
                    raise errors.NotFound(f"{path} is another device now")
                yield fd.fileno()
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            if error.errno in {errno.ENOENT, errno.ENXIO, errno.ENODEV, errno.ENOMEDIUM}:
                raise errors.NotFound(f"{path} is not there any more: {reason}") from error
            if error.errno in {errno.EACCES, errno.EPERM}:
                raise errors.NotAvailable(f"the service may not open {path}: {reason}") from error
            raise errors.Failed(f"{path} cannot be used: {reason}") from error

    def attach(self) -> None:
        """Start tracking. Raises ``errors.AlreadyTracked`` when this filter is there already, ``errors.Busy`` (another one)."""
        path = self.target.path
        with self._opened() as fd:
            try:
                self._system.ioctl(fd, self._generation.attach, self._generation.attach_argument())
            except OSError as error:
                match error.errno:
                    case errno.EALREADY:
                        raise errors.AlreadyTracked(
                            f"{path} is already tracked by the kernel filter, started by another program"
                        ) from error
                    case errno.EBUSY:
                        raise errors.Busy(
                            f"{path} has another block device filter; it must be detached first"
                        ) from error
                    case errno.ENOENT:
                        raise errors.NotAvailable(
                            f"{path} cannot be tracked by blkfilter: the kernel module blksnap is gone"
                        ) from error
                    case errno.ENOMEM:
                        raise errors.Failed(
                            f"{path} cannot be tracked by blkfilter: the kernel has no memory for its map"
                        ) from error
                    case errno.ENODEV | errno.ENXIO:
                        raise errors.NotFound(f"{path} is not there any more") from error
                    case _:
                        raise _failed(f"{path} cannot be tracked by blkfilter", error) from error

    def detach(self) -> None:
        """Stop tracking. Raises ``errors.NotTracked`` when this filter is not there."""
        argument = bytearray(uapi.NAME.size)
        uapi.NAME.pack_into(argument, 0, uapi.FILTER_NAME.encode())
        with self._opened() as fd:
            try:
                self._system.ioctl(fd, self._generation.detach, argument)
            except OSError as error:
                if error.errno in {errno.ENOENT, errno.EINVAL, errno.ENODEV}:
                    raise errors.NotTracked(
                        f"{self.target.path} has no filter of blksnap any more"
                    ) from error
                raise _failed(f"{self.target.path} cannot be detached", error) from error

    def info(self) -> CbtInfo:
        """What map there is. Raises ``errors.NotFound`` when the device or its filter is gone, ``errors.Corrupted``."""
        argument = bytearray(uapi.CBTINFO.size)
        self._ctl(uapi.CTL_CBTINFO, argument, "its map cannot be asked about")
        info = CbtInfo.parse(argument)
        size = info.block_size
        whole = (
            size >= uapi.SECTOR and not size & (size - 1) and info.block_count == -(-info.capacity // size)
        )
        if not whole or not info.capacity:
            raise errors.Corrupted(
                f"the kernel's map of {self.target.path} cannot be right: {info.block_count} blocks of {size} bytes for"
                f" {info.capacity} bytes; detach and attach it again"
            )
        return info

    def is_trusted(self) -> bool:
        """Whether the kernel still trusts its map."""
        return self._map_page(0, 0, 0)

    def read_map(self, into: memoryview) -> bool:
        """Read as much of the map as fits into a buffer that is in memory; False when the kernel does not trust it."""
        start = address_of(into)
        for offset in range(0, len(into), MAP_PAGE):
            if not self._map_page(offset, min(MAP_PAGE, len(into) - offset), start + offset):
                return False
        return True

    def _map_page(self, offset: int, length: int, address: int) -> bool:
        # Callers stay inside the map they were told of: the kernel takes an offset past its end for one inside.
        argument = bytearray(uapi.CBTMAP.pack(offset, length, address))
        try:
            self._ctl(uapi.CTL_CBTMAP, argument, "its map cannot be read")
        except _MapCorruptedError:
            return False
        return True

    def mark(self, offset: int, length: int) -> None:
        """Mark a range of bytes that lies inside the map; one range, since older kernels take the first for all others.

        Raises ``errors.InvalidState`` when the kernel does not trust its map: then nothing can be marked.
        """
        first, last = offset // uapi.SECTOR, (offset + length - 1) // uapi.SECTOR
        if length <= 0 or offset < 0:
            raise errors.InvalidArgument(f"a range of {length} bytes at {offset} cannot be marked")
        ranges = bytearray(uapi.SECTORS.pack(first, last - first + 1))
        argument = bytearray(uapi.CBTDIRTY.pack(1, address_of(ranges)))
        self._ctl(uapi.CTL_CBTDIRTY, argument, "it cannot be marked")

    def add_to(self, snapshot: str) -> int:
        """Make it part of a snapshot; returns 0 or the errno that tells which snapshot it is in: EALREADY, EBUSY.

        0 is also what the kernel says of a device that holds the snapshot's storage, and which it leaves out.
        Raises ``errors.NotFound`` when there is no such snapshot.
        """
        argument = bytearray(uuid.UUID(snapshot).bytes)
        with self._opened() as fd:
            try:
                self._call(fd, uapi.CTL_SNAPSHOTADD, argument)
            except OSError as error:
                match error.errno:
                    case errno.EALREADY | errno.EBUSY:
                        return error.errno
                    case errno.ESRCH:
                        raise errors.NotFound(f"the kernel has no snapshot {snapshot} (any more)") from error
                    case errno.EPERM:
                        raise errors.NotSupported(
                            f"{self.target.path} cannot be part of a snapshot: it keeps integrity data or encrypts in"
                            " hardware"
                        ) from error
                    case _:
                        raise self._explain("it cannot be added to a snapshot", error) from error
        return 0

    def snapshot_info(self) -> SnapshotInfo:
        """What image it has. Raises ``errors.NotFound`` when the device or its filter is gone."""
        # All zero: the kernel gives back what it was given where it has nothing to say.
        argument = bytearray(uapi.SNAPSHOTINFO.size)
        self._ctl(uapi.CTL_SNAPSHOTINFO, argument, "its image cannot be asked about")
        return SnapshotInfo.parse(argument)

    def size(self) -> int:
        """Its size now, in bytes."""
        argument = bytearray(8)
        with self._opened() as fd:
            self._system.ioctl(fd, BLKGETSIZE64, argument)
        return int.from_bytes(argument, "little")

    def is_same(self) -> bool:
        """Whether it is the medium it was; true where that cannot be told."""
        if not self.target.diskseq:
            return True
        return self.diskseq() in {0, self.target.diskseq}

    def diskseq(self) -> int:
        """The number that another medium changes (Linux 5.15); 0 where there is none."""
        argument = bytearray(8)
        with self._opened() as fd, contextlib.suppress(OSError):
            self._system.ioctl(fd, BLKGETDISKSEQ, argument)
        return int.from_bytes(argument, "little")

    def _ctl(self, command: int, argument: bytearray, what: str) -> None:
        with self._opened() as fd:
            try:
                self._call(fd, command, argument)
            except OSError as error:
                if command == uapi.CTL_CBTMAP and error.errno == errno.EFAULT:
                    raise _MapCorruptedError from error
                if command == uapi.CTL_CBTDIRTY and error.errno == errno.EINVAL:
                    raise errors.InvalidState(
                        f"{self.target.path} cannot be marked: the kernel does not trust its map any more; the next snapshot"
                        " begins a new one, of which everything has to be copied"
                    ) from error
                raise self._explain(what, error) from error

    def _call(self, fd: int, command: int, argument: bytearray) -> None:
        ctl = bytearray(
            uapi.CTL.pack(uapi.FILTER_NAME.encode(), command, len(argument), address_of(argument))
        )
        self._system.ioctl(fd, self._generation.ctl, ctl)

    def _explain(self, what: str, error: OSError) -> errors.BlksnapError:
        path = self.target.path
        match error.errno:
            case errno.ENOENT | errno.EINVAL:
                # The second: another filter is there now (6.15). What is passed here is never wrong.
                return errors.NotFound(f"{path} has no filter of blksnap any more")
            case errno.ENODEV | errno.ENXIO:
                return errors.NotFound(f"{path} is not there any more")
            case errno.ESRCH:
                return errors.Corrupted(f"the kernel has no map of {path}: detach and attach it again")
            case _:
                return _failed(f"{path}: {what}", error)


class _MapCorruptedError(Exception):
    """Raised when the kernel does not give its map out."""


def _failed(what: str, error: OSError) -> errors.Failed:
    return errors.Failed(f"{what}: the kernel says {(error.strerror or str(error)).lower()}")
