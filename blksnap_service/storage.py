# SPDX-License-Identifier: GPL-2.0-or-later
"""Opens difference storage: where a snapshot keeps old chunks.

From a path (a file to be made, an existing file, a directory for an unnamed file, a block device) or from a descriptor
the caller opened. Storage that a tracked origin lies under, or is, would have to be copied into itself and is refused.
How it fills is the data path's business. All functions block.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import uuid
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from blksnap_service import errors
from blksnap_service.fds import OwnedFd

_BLKGETSIZE64 = 0x80081272


@dataclass(frozen=True, slots=True)
class Identity:
    """What a storage or origin is: a file by device and inode, or a block device by its number (``inode`` is 0)."""

    device: int
    inode: int

    @classmethod
    def of(cls, status: os.stat_result) -> Identity:
        """Return the identity of an open file."""
        if stat.S_ISBLK(status.st_mode):
            return cls(status.st_rdev, 0)
        return cls(status.st_dev, status.st_ino)

    @property
    def is_device(self) -> bool:
        """True for a block device."""
        return self.inode == 0

    @classmethod
    def parse(cls, text: str) -> Identity:
        """Return what ``str`` wrote. Raises ``ValueError``."""
        device, _, inode = text.partition(":")
        return cls(int(device), int(inode))

    def __str__(self) -> str:
        return f"{self.device}:{self.inode}"


@dataclass(frozen=True, slots=True)
class Storage:
    """Open difference storage. ``path`` is for people; ``made`` tells whether this service created that name."""

    fd: OwnedFd
    path: str
    identity: Identity
    made: bool
    capacity: int
    """Most bytes it can hold now: the size of a block device; of a file, its own blocks and its file system's free ones."""

    def limit(self, wanted: int, sizes: int) -> int:
        """Return the limit to ask an engine for, in bytes; by default everything of ``sizes`` bytes is kept if there is room.

        Raises ``errors.NoSpace``.
        """
        limit = wanted or min(sizes, self.capacity)
        if limit == 0:
            raise errors.NoSpace(f"there is no space left for difference storage at {self.path}")
        return limit

    def discard(self) -> None:
        """Close it, and remove the file if it was made here."""
        self.fd.close()
        if self.made:
            remove_made(self.path, str(self.identity))


def remove_made(path: str, identity: str) -> bool:
    """Remove a storage file this service made, if the name still belongs to it; returns whether it is gone."""
    try:
        status = os.lstat(path)
        if str(Identity.of(status)) != identity:
            return False
        Path(path).unlink()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def is_at(path: str, opened: Storage) -> bool:
    """Whether the file or device at ``path`` is the one that is open."""
    try:
        return Identity.of(Path(path).stat()) == opened.identity
    except (OSError, ValueError):
        return False


def open_path(path: str, origins: Collection[Identity]) -> Storage:
    """Open storage by name; links are followed. ``origins`` are the tracked files and devices.

    Raises ``errors.InvalidArgument`` (no absolute path, or of a kind that cannot be storage), ``errors.NotFound`` (its
    directory is missing), ``errors.Busy`` (device in use), ``errors.NoSpace``, ``errors.NotAvailable`` (read-only).
    """
    if not path.startswith("/") or "\0" in path:
        raise errors.InvalidArgument(f"difference storage {path!r} is no absolute path")
    real = os.path.realpath(path)
    if _shown(real) != real:
        raise errors.InvalidArgument(f"difference storage {path} leads to a name that is not UTF-8")
    try:
        try:
            status = Path(real).stat()
        except FileNotFoundError:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
            fd, made = OwnedFd(os.open(real, flags, 0o600)), True
        else:
            fd, made = _open_existing(real, status), False
    except OSError as error:
        _refuse(path, error)
    return _accept(fd, real, made=made, origins=origins)


def open_fd(fd: OwnedFd, origins: Collection[Identity]) -> Storage:
    """Use storage the caller opened; ``fd`` is consumed. Raises ``errors.InvalidArgument`` and as ``open_path``."""
    with contextlib.ExitStack() as stack:
        stack.callback(fd.close)
        flags = fcntl.fcntl(fd.fileno(), fcntl.F_GETFL)
        if flags & os.O_PATH or flags & os.O_ACCMODE != os.O_RDWR:
            raise errors.InvalidArgument("storage-fd is not open for reading and writing")
        if flags & os.O_APPEND:
            raise errors.InvalidArgument(
                "storage-fd is open for appending: writes would not go where they belong"
            )
        stack.pop_all()
    return _accept(fd, name_of(fd), made=False, origins=origins)


def name_of(fd: OwnedFd) -> str:
    """Return what an open file is called, for people: it may end in " (deleted)" or be of another mount namespace."""
    return _shown(str(Path(f"/proc/self/fd/{fd.fileno()}").readlink()))


def _shown(path: str) -> str:
    """Return what the bus can carry."""
    return path.encode("utf-8", "replace").decode()


def inside(path: str, directory: Path) -> str:
    """Return ``path`` with links followed if that is ``directory`` or lies in it, else nothing.

    The result is what to open: a link of the caller's may lead elsewhere by then.
    """
    real = "" if "\0" in path else os.path.realpath(path)
    return real if real and Path(real).is_relative_to(os.path.realpath(directory)) else ""


def _open_existing(real: str, status: os.stat_result) -> OwnedFd:
    if stat.S_ISDIR(status.st_mode):
        return _open_unnamed(real)
    if stat.S_ISREG(status.st_mode):
        # O_NONBLOCK: what is there now may be a fifo by the time it is opened.
        return OwnedFd(os.open(real, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK))
    if stat.S_ISBLK(status.st_mode):
        # O_EXCL: fails while the device is mounted or belongs to another device (open(2)).
        return OwnedFd(os.open(real, os.O_RDWR | os.O_CLOEXEC | os.O_EXCL))
    raise errors.InvalidArgument(
        f"difference storage {real} is neither a regular file, a directory nor a block device"
    )


def _open_unnamed(directory: str) -> OwnedFd:
    try:
        return OwnedFd(os.open(directory, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600))
    except OSError as error:
        # File systems without O_TMPFILE say EOPNOTSUPP; kernels where the driver ignores it, EISDIR (open(2)).
        if error.errno not in {errno.EOPNOTSUPP, errno.EISDIR}:
            raise
    name = Path(directory) / f".blksnap-{uuid.uuid4()}"
    fd = OwnedFd(os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    name.unlink()
    return fd


def _accept(fd: OwnedFd, path: str, *, made: bool, origins: Collection[Identity]) -> Storage:
    with contextlib.ExitStack() as stack:
        stack.callback(fd.close)
        status = os.fstat(fd.fileno())
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISBLK(status.st_mode):
            raise errors.InvalidArgument(
                f"difference storage {path} is neither a regular file nor a block device"
            )
        storage = Storage(fd, path, Identity.of(status), made, _capacity(fd, status))
        if made:
            stack.callback(remove_made, path, str(storage.identity))
        if storage.identity in origins:
            raise errors.InvalidArgument(f"difference storage {path} is itself tracked: choose another place")
        below = origins_below(status, origins)
        if below:
            raise errors.InvalidArgument(
                f"difference storage {path} lies on a tracked device: old data would be copied into itself;"
                " choose a place on another device"
            )
        stack.pop_all()
    return storage


def _capacity(fd: OwnedFd, status: os.stat_result) -> int:
    if stat.S_ISBLK(status.st_mode):
        answer = fcntl.ioctl(fd.fileno(), _BLKGETSIZE64, b"\0" * 8)
        return int.from_bytes(answer, "little")
    space = os.fstatvfs(fd.fileno())
    return space.f_bavail * space.f_frsize + status.st_blocks * 512


def origins_below(status: os.stat_result, origins: Collection[Identity]) -> set[Identity]:
    """The tracked origins a file or device lies on: through partitions, device-mapper and loop devices."""
    number = status.st_rdev if stat.S_ISBLK(status.st_mode) else status.st_dev
    found: set[Identity] = set()
    todo, seen = [number], set[int]()
    while todo:
        device = todo.pop()
        if device in seen:
            continue
        seen.add(device)
        if (identity := Identity(device, 0)) in origins:
            found.add(identity)
        node = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
        todo += _device_numbers([*node.glob("slaves/*/dev"), node.parent / "dev"])
        with contextlib.suppress(OSError):
            backing = Path((node / "loop" / "backing_file").read_text().rstrip("\n")).stat()
            if (identity := Identity.of(backing)) in origins:
                found.add(identity)
            todo.append(backing.st_rdev if stat.S_ISBLK(backing.st_mode) else backing.st_dev)
    return found


def _device_numbers(files: list[Path]) -> list[int]:
    numbers = []
    for file in files:
        with contextlib.suppress(OSError, ValueError):
            major, minor = file.read_text().strip().split(":")
            numbers.append(os.makedev(int(major), int(minor)))
    return numbers


def _refuse(path: str, error: OSError) -> NoReturn:
    reason = (error.strerror or str(error)).lower()
    what = f"difference storage {path} cannot be opened: {reason}"
    match error.errno:
        case errno.ENOENT | errno.ENOTDIR:
            raise errors.NotFound(f"{what}; its directory must exist") from error
        case errno.EBUSY:
            raise errors.Busy(f"{what}; it is mounted or belongs to another device") from error
        case errno.ENOSPC | errno.EDQUOT:
            raise errors.NoSpace(what) from error
        case errno.EROFS | errno.EACCES | errno.EPERM:
            raise errors.NotAvailable(f"{what}; choose another place with the option storage") from error
        case errno.EEXIST | errno.ELOOP | errno.ENAMETOOLONG | errno.ENXIO:
            raise errors.InvalidArgument(what) from error
        case _:
            raise errors.Failed(what) from error
