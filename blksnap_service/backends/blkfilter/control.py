# SPDX-License-Identifier: GPL-2.0-or-later
"""Calls the filter's control node: snapshots as the kernel has them, by its own ids. Everything blocks."""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from collections.abc import Iterator
from typing import Final

from blksnap_service import errors
from blksnap_service.backends.blkfilter import uapi
from blksnap_service.backends.blkfilter.kernel import System, address_of
from blksnap_service.backends.blkfilter.uapi import Event, Generation
from blksnap_service.fds import OwnedFd

NODE: Final = "/dev/blksnap-control"
_SLACK: Final = 8
"""Room for snapshots that others make between counting and listing."""
_ATTEMPTS: Final = 100


class Control:
    """The control node of one generation."""

    def __init__(self, system: System, generation: Generation, node: str = NODE) -> None:
        """Speak to ``node``; it is opened for each call."""
        self._system = system
        self._generation = generation
        self._node = node

    @contextlib.contextmanager
    def opened(self) -> Iterator[int]:
        """Keep the node open. Raises ``errors.NotAvailable`` when it cannot be opened."""
        try:
            fd = self._system.open(self._node, os.O_RDWR)
        except OSError as error:
            raise errors.NotAvailable(f"{self._node} cannot be opened: {_reason(error)}") from error
        with fd:
            yield fd.fileno()

    def create(self, storage: OwnedFd, limit: int) -> str:
        """Create a snapshot over an open file or block device; returns the kernel's id. ``limit`` in bytes.

        Raises ``errors.NoSpace``, ``errors.Busy`` (the device is open elsewhere), ``errors.InvalidArgument``.
        """
        sectors = limit // uapi.SECTOR
        if self._generation.create_by_name:
            # The kernel opens what it is named; this name is of the very file that is open, were its own gone.
            name = bytearray(f"/proc/self/fd/{storage.fileno()}\0".encode())
            argument = bytearray(uapi.CREATE_BY_NAME.pack(sectors, address_of(name), bytes(16)))
        else:
            argument = bytearray(uapi.CREATE_BY_FD.pack(sectors, storage.fileno(), bytes(16)))
        with self.opened() as fd:
            try:
                self._system.ioctl(fd, uapi.IOCTL_CREATE, argument)
            except OSError as error:
                what = f"the kernel did not accept the difference storage: {_reason(error)}"
                match error.errno:
                    case errno.ENOSPC | errno.EDQUOT | errno.EFBIG:
                        raise errors.NoSpace(f"{what}; choose another place, or a lower limit") from error
                    case errno.EBUSY:
                        raise errors.Busy(f"{what}; it is in use") from error
                    case errno.EINVAL | errno.EOPNOTSUPP | errno.EACCES | errno.EPERM | errno.EROFS:
                        raise errors.InvalidArgument(f"{what}; choose another place") from error
                    case _:
                        raise errors.Failed(what) from error
        made = argument[-16:] if self._generation.create_by_name else argument[12:28]
        return str(uuid.UUID(bytes=bytes(made)))

    def take(self, snapshot: str) -> None:
        """Take a snapshot of the devices that were added. Raises ``errors.BlksnapError``: it is of no use any more then."""
        with self.opened() as fd:
            try:
                self._system.ioctl(fd, uapi.IOCTL_TAKE, bytearray(uuid.UUID(snapshot).bytes))
            except OSError as error:
                what = "the kernel could not take the snapshot"
                match error.errno:
                    case errno.ESRCH:
                        raise errors.NotFound(f"the kernel has no snapshot {snapshot} (any more)") from error
                    case errno.ENOMEM:
                        raise errors.Failed(f"{what}: it has no memory for it") from error
                    case errno.EFAULT:
                        raise errors.Corrupted(
                            f"{what}: old bytes could not be kept from the start"
                        ) from error
                    case errno.EALREADY:
                        raise errors.InvalidState(
                            f"{what}: it was taken before, or a take of it failed"
                        ) from error
                    case errno.ENODEV:
                        raise errors.InvalidState(f"{what}: it has no devices") from error
                    case errno.ENOSPC:
                        raise errors.NoSpace(f"{what}: {_reason(error)}") from error
                    case _:
                        raise errors.Failed(f"{what}: {_reason(error)}") from error

    def destroy(self, snapshot: str) -> None:
        """End a snapshot. Raises ``errors.NotFound``. Whoever waits for its events keeps its images and storage."""
        with self.opened() as fd:
            try:
                self._system.ioctl(fd, uapi.IOCTL_DESTROY, bytearray(uuid.UUID(snapshot).bytes))
            except OSError as error:
                if error.errno in {errno.ENODEV, errno.ESRCH}:
                    raise errors.NotFound(f"the kernel has no snapshot {snapshot} (any more)") from error
                raise errors.Failed(f"the kernel could not end the snapshot: {_reason(error)}") from error

    def collect(self) -> list[str]:
        """The ids of all snapshots, whoever made them."""
        with self.opened() as fd:
            for _ in range(_ATTEMPTS):
                argument = bytearray(uapi.COLLECT.pack(0, 0))
                self._collect(fd, argument)
                room = uapi.COLLECT.unpack(argument)[0] + _SLACK
                ids = bytearray(16 * room)
                argument = bytearray(uapi.COLLECT.pack(room, address_of(ids)))
                # A full list and one that did not fit are told by the same errno as a bad pointer: more came meanwhile.
                if self._collect(fd, argument):
                    count = uapi.COLLECT.unpack(argument)[0]
                    return [
                        str(uuid.UUID(bytes=bytes(ids[16 * number : 16 * number + 16])))
                        for number in range(min(count, room))
                    ]
        raise errors.Failed("the kernel's snapshots cannot be listed: there are always more than it said")

    def _collect(self, fd: int, argument: bytearray) -> bool:
        try:
            self._system.ioctl(fd, uapi.IOCTL_COLLECT, argument)
        except OSError as error:
            if error.errno == errno.ENODATA:
                return False
            raise errors.Failed(f"the kernel's snapshots cannot be listed: {_reason(error)}") from error
        return True

    def wait(self, fd: int, snapshot: str, timeout: int) -> Event | None:
        """Wait for an event of a snapshot, on a descriptor of ``opened``; None when there was none, or an unknown one.

        ``timeout`` in the kernel's ticks: 1 to 10 ms each, whatever its name says. Raises ``errors.NotFound`` when the
        snapshot is gone.
        """
        argument = bytearray(uapi.EVENT.pack(uuid.UUID(snapshot).bytes, timeout, 0, 0, b""))
        try:
            self._system.ioctl(fd, uapi.IOCTL_WAIT_EVENT, argument)
        except OSError as error:
            match error.errno:
                case errno.ENOENT | errno.EINTR:
                    return None
                case errno.ESRCH:
                    raise errors.NotFound(f"the kernel has no snapshot {snapshot} (any more)") from error
                case _:
                    raise errors.Failed(f"events cannot be waited for: {_reason(error)}") from error
        return uapi.parse_event(self._generation, argument)


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
