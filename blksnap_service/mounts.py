# SPDX-License-Identifier: GPL-2.0-or-later
"""Where block devices are mounted, and when that changes, in the mount namespace of this process.

Nothing here looks at a file system: a mount whose disk hangs keeps nobody waiting.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import select
import stat
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from blksnap_service.fds import OwnedFd

_log = logging.getLogger(__name__)

_MOUNTINFO = Path("/proc/self/mountinfo")


def mount_points() -> Mapping[int, tuple[str, ...]]:
    """Return where each block device is mounted, by device number."""
    found: defaultdict[int, list[str]] = defaultdict(list)
    for _, number, target in _mounts():
        found[number].append(target)
    return {number: tuple(dict.fromkeys(targets)) for number, targets in found.items()}


def mounted_device(fd: OwnedFd) -> int:
    """Return the number of the block device whose file system an open file is on; 0 if there is none.

    Its mount decides: what was opened by the name of a mount point may be another one's, mounted over it.
    """
    try:
        info = Path(f"/proc/self/fdinfo/{fd.fileno()}").read_text(encoding="ascii")
    except OSError:
        return 0
    mount_id = dict(line.split(":\t", 1) for line in info.splitlines() if ":\t" in line).get("mnt_id")
    return next((number for one, number, _ in _mounts() if one == mount_id), 0)


def _mounts() -> Iterator[tuple[str, int, str]]:
    """Each mount's id, device number and mount point (proc_pid_mountinfo(5))."""
    with contextlib.suppress(OSError):
        for line in _MOUNTINFO.read_text(errors="replace").splitlines():
            fields = line.split(" ")
            major, minor = (int(part) for part in fields[2].split(":"))
            number = os.makedev(major, minor)
            if major == 0 and (source := _plain(fields[fields.index("-") + 2])).startswith("/dev/"):
                # btrfs: its own number is none of a device.
                with contextlib.suppress(OSError):
                    status = Path(source).stat()
                    number = status.st_rdev if stat.S_ISBLK(status.st_mode) else number
            yield fields[0], number, _plain(fields[4])


def _plain(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


class MountWatch:
    """Tells when something was mounted or unmounted."""

    def __init__(self, changed: Callable[[], None]) -> None:
        """Call ``changed`` in the running loop from now on, until ``close``. Without /proc it is never called."""
        self._loop = asyncio.get_running_loop()
        self._file: OwnedFd | None = None
        self._epoll: select.epoll | None = None
        try:
            self._file = OwnedFd(os.open(_MOUNTINFO, os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            _log.warning("mounts are not noticed at once: %s", (error.strerror or str(error)).lower())
            return
        # The file is always readable; a change is POLLPRI. The loop asks for nothing but readable, which an epoll of our
        # own is when what it waits for has come.
        self._epoll = select.epoll()
        self._epoll.register(self._file.fileno(), select.EPOLLPRI)
        self._loop.add_reader(self._epoll.fileno(), self._readable, changed)

    def _readable(self, changed: Callable[[], None]) -> None:
        if self._epoll is not None:
            # Asking is what ends the state of being readable (fs/proc_namespace.c, mounts_poll).
            self._epoll.poll(0)
            changed()

    def close(self) -> None:
        """Stop."""
        if self._epoll is not None:
            self._loop.remove_reader(self._epoll.fileno())
            self._epoll.close()
            self._epoll = None
        if self._file is not None:
            self._file.close()
            self._file = None
