# SPDX-License-Identifier: GPL-2.0-or-later
"""Opens the file systems that have to be frozen around a take, and that device-mapper does not freeze by itself.

Suspending a device-mapper device freezes the file system right on it, in whatever mount namespace; those on
partitions, on logical volumes above, or on a bare ublk device are frozen through a descriptor (ioctl_fifreeze, fs/ioctl.c).
Opening may hang where a file system does: it happens in threads nobody waits for for ever.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future

from blksnap_service import errors, sysblock
from blksnap_service.datapath.model import OriginReading
from blksnap_service.fds import OwnedFd, close_all
from blksnap_service.mounts import mount_points, mounted_device

OPEN_TIMEOUT_S = 3.0
MOST = 64
"""Descriptors with one request; there are as many as file systems on tracked devices."""


async def open_mounts(readings: Sequence[OriginReading]) -> list[OwnedFd]:
    """Open each file system on the nodes of these origins that needs it, once.

    Raises ``errors.TimedOut``, ``errors.Failed`` (it cannot be opened) and ``errors.LimitExceeded``: what is mounted and not
    frozen would be in the image as after a power cut, and nobody would know.
    """
    found = await asyncio.to_thread(_targets, [reading for reading in readings if reading.front == "ublk"])
    if len(found) > MOST:
        raise errors.LimitExceeded(
            f"{len(found)} file systems would have to be frozen for this snapshot, and at most {MOST} can be: take"
            " fewer devices together"
        )
    opened = await asyncio.gather(
        *(_open(device, targets) for device, targets in found.items()), return_exceptions=True
    )
    fds = [one for one in opened if isinstance(one, OwnedFd)]
    for error in opened:
        if isinstance(error, BaseException):
            close_all(fds)
            raise error
    return fds


def _targets(readings: Sequence[OriginReading]) -> dict[int, tuple[str, ...]]:
    """Return the devices whose file systems are to be opened, and where those are mounted. Blocks shortly."""
    if not readings:
        return {}
    mounts = mount_points()
    found: dict[int, tuple[str, ...]] = {}
    for reading in readings:
        frozen, start = 0, sysblock.ublk_number(reading.ublk_id)
        if name := reading.insert or reading.top:
            frozen = start = sysblock.dm_number(name)
        for device in sysblock.above(start) - {frozen}:
            if targets := mounts.get(device):
                found[device] = targets
    return found


async def _open(device: int, targets: Sequence[str]) -> OwnedFd | None:
    """Return a descriptor on the file system of a device; None when it is not mounted any more."""
    future = _open_in_thread(device, targets)
    what = f"the file system mounted on {targets[0]} cannot be frozen for the snapshot, and nothing was taken"
    try:
        await asyncio.wait([asyncio.wrap_future(future)], timeout=OPEN_TIMEOUT_S)
        if not future.done():
            raise errors.TimedOut(
                f"{what}: it does not answer; see what its disk waits for, or unmount it (umount -l)"
            )
        if isinstance(error := future.exception(), OSError):
            if device not in await asyncio.to_thread(mount_points):
                return None
            reason = (error.strerror or str(error)).lower()
            raise errors.Failed(f"{what}: {reason}; unmount it, or what is mounted over it")
    except BaseException:
        future.add_done_callback(_discard)
        raise
    return future.result()


def _open_in_thread(device: int, targets: Sequence[str]) -> Future[OwnedFd]:
    """Open a directory in a thread that may hang: the program does not wait for it when it ends."""
    future: Future[OwnedFd] = Future()

    def work() -> None:
        try:
            future.set_result(_open_first(device, targets))
        except OSError as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True, name="open-mount").start()
    return future


def _open_first(device: int, targets: Sequence[str]) -> OwnedFd:
    """Open the first directory that is on the device: a mount point may be a file, or have another one over it."""
    failure: OSError | None = None
    for target in targets:
        try:
            fd = OwnedFd(os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        except OSError as error:
            failure = failure or error
            continue
        if mounted_device(fd) == device:
            return fd
        fd.close()
    raise failure or OSError("another one is mounted over it")


def _discard(future: Future[OwnedFd]) -> None:
    if future.exception() is None:
        future.result().close()
