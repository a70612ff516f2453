# SPDX-License-Identifier: GPL-2.0-or-later
"""Opens the file or device that is to be an origin, and takes its fingerprint.

All functions block. The locks that keep others away are the kernel's (``O_EXCL`` on block devices) and the data path's
(on files); what is recorded here tells only afterwards that somebody wrote.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from blksnap_service import errors
from blksnap_service.devices import Device
from blksnap_service.fds import OwnedFd
from blksnap_service.savedmaps import Fingerprint
from blksnap_service.storage import Identity

_BLKGETSIZE64 = 0x80081272
_TICK_S = 0.02
"""File times are as coarse as the kernel's tick (1/100 s at most) before Linux 6.13."""


@dataclass(frozen=True, slots=True)
class Origin:
    """An open origin; the descriptor belongs to the receiver. ``size`` in bytes."""

    fd: OwnedFd
    identity: Identity
    size: int
    fingerprint: Fingerprint


def open_origin(device: Device) -> Origin:
    """Open for exclusive use as the data path wants it.

    Raises ``errors.NotFound``, ``errors.InvalidArgument`` (another kind of file, a bad size), ``errors.Busy`` (in use),
    ``errors.NotAvailable`` (not permitted, read-only).
    """
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    if device.kind == "block":
        flags |= os.O_EXCL | os.O_DIRECT
    try:
        # A fifo or tty must not be opened for its kind to be found out.
        kind = Path(device.path).stat().st_mode
        if not (stat.S_ISBLK(kind) if device.kind == "block" else stat.S_ISREG(kind)):
            raise errors.InvalidArgument(
                f"{device.path} is not what it was: no {_KIND[device.kind]} any more"
            )
        fd = OwnedFd(os.open(device.path, flags))
    except OSError as error:
        _refuse(device, error)
    with contextlib.ExitStack() as stack:
        stack.callback(fd.close)
        status = os.fstat(fd.fileno())
        size = _size(fd, status)
        if size == 0 or size % 512:
            raise errors.InvalidArgument(
                f"{device.path} has {size} bytes; a disk has a multiple of 512 and more than 0"
            )
        if device.kind == "file" and str(Path(f"/proc/self/fd/{fd.fileno()}").readlink()) != device.path:
            # Who may write its directory must not have another file tracked by a link.
            raise errors.NotFound(f"{device.path} is not there any more, or a link that leads elsewhere")
        # O_NONBLOCK is for the open only.
        os.set_blocking(fd.fileno(), True)
        origin = Origin(fd, Identity.of(status), size, _fingerprint(status, size))
        stack.pop_all()
    return origin


def fingerprint_of(path: str, identity: Identity) -> Fingerprint | None:
    """Return the fingerprint of an origin nobody has open any more, or None if it is not at ``path`` (any more)."""
    try:
        with OwnedFd(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)) as fd:
            status = os.fstat(fd.fileno())
            if Identity.of(status) != identity:
                return None
            if time.time_ns() - status.st_mtime_ns < _TICK_S * 1e9:
                # A write in the tick of the last one would leave the same times: let the tick pass first.
                time.sleep(_TICK_S)
                status = os.fstat(fd.fileno())
            return _fingerprint(status, _size(fd, status))
    except OSError:
        return None


_KIND = {"block": "block device", "file": "regular file"}


def _size(fd: OwnedFd, status: os.stat_result) -> int:
    if stat.S_ISBLK(status.st_mode):
        return int.from_bytes(fcntl.ioctl(fd.fileno(), _BLKGETSIZE64, b"\0" * 8), "little")
    return status.st_size


def _fingerprint(status: os.stat_result, size: int) -> Fingerprint:
    if not stat.S_ISBLK(status.st_mode):
        return Fingerprint(
            f"file {status.st_dev}:{status.st_ino}", size, f"{status.st_mtime_ns}:{status.st_ctime_ns}"
        )
    # Disk sequence and I/O counters begin anew at every boot (Documentation/ABI/stable/sysfs-block, block/stat.rst).
    number = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    node = Path(f"/sys/dev/block/{number}")
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    disk = node if (node / "diskseq").exists() else node.resolve().parent
    try:
        sequence = (disk / "diskseq").read_text(encoding="ascii").strip()
        counters = (node / "stat").read_text(encoding="ascii").split()
    except OSError:
        # Without them nothing tells whether somebody wrote: never the same as any other.
        return Fingerprint(f"block {number} {uuid.uuid4()}", size, "")
    written, discarded = counters[6], counters[13] if len(counters) > 13 else "0"
    return Fingerprint(f"block {number} {boot} {sequence}", size, f"{written}:{discarded}")


def _refuse(device: Device, error: OSError) -> NoReturn:
    what = f"{device.path} cannot be opened: {(error.strerror or str(error)).lower()}"
    match error.errno:
        case errno.ENOENT | errno.ENOTDIR | errno.ENXIO | errno.ENODEV | errno.ENOMEDIUM:
            raise errors.NotFound(what) from error
        case errno.EBUSY:
            raise errors.Busy(f"{what}; it is mounted, or belongs to another device") from error
        case errno.EACCES | errno.EPERM | errno.EROFS:
            raise errors.NotAvailable(f"{what}; the service must be able to write it") from error
        case errno.EINVAL:
            raise errors.NotSupported(f"{what}; it does not support direct input and output") from error
        case _:
            raise errors.Failed(what) from error
