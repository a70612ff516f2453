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
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path

from blksnap_service.fds import OwnedFd

_log = logging.getLogger(__name__)

_MOUNTINFO = Path("/proc/self/mountinfo")


def mount_points() -> Mapping[int, tuple[str, ...]]:
    """Return where each block device is mounted, by device number (proc_pid_mountinfo(5))."""
    found: defaultdict[int, list[str]] = defaultdict(list)
    with contextlib.suppress(OSError):
        for line in _MOUNTINFO.read_text(errors="replace").splitlines():
            fields = line.split(" ")
            major, minor = fields[2].split(":")
            target = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[4])
            found[os.makedev(int(major), int(minor))].append(target)
    return {number: tuple(dict.fromkeys(targets)) for number, targets in found.items()}


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
