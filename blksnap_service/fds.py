# SPDX-License-Identifier: GPL-2.0-or-later
"""A file descriptor with exactly one owner.

Descriptors cross three borders in this service (bus, data path, disk). Every one of them is held by an ``OwnedFd``
that closes it unless it is handed on with ``release``. This is not a file object: it neither reads nor writes.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import warnings
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import TracebackType


class OwnedFd:
    """Owns one open file descriptor; a context manager that closes it."""

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        """Take over ``fd``; nobody else may close it from now on."""
        self._fd = fd

    def __repr__(self) -> str:
        """Show the number, or that it is closed."""
        return f"OwnedFd({'closed' if self._fd < 0 else self._fd})"

    def __enter__(self) -> Self:
        """Return itself; the descriptor is closed at the end of the block unless released."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the descriptor."""
        self.close()

    def __del__(self) -> None:
        """Close a descriptor that was forgotten, with a warning."""
        if getattr(self, "_fd", -1) >= 0:
            warnings.warn(
                f"file descriptor {self._fd} was not closed", ResourceWarning, stacklevel=1, source=self
            )
            self.close()

    def fileno(self) -> int:
        """Return the number without giving it away. Raises ``ValueError`` when closed or released."""
        if self._fd < 0:
            raise ValueError("the file descriptor is closed")
        return self._fd

    @property
    def closed(self) -> bool:
        """True once closed or released."""
        return self._fd < 0

    def release(self) -> int:
        """Give the number to a new owner."""
        fd = self.fileno()
        self._fd = -1
        return fd

    def dup(self) -> OwnedFd:
        """Return a second descriptor (close-on-exec) of the same open file description."""
        return OwnedFd(fcntl.fcntl(self.fileno(), fcntl.F_DUPFD_CLOEXEC, 3))

    def close(self) -> None:
        """Close; does nothing the second time."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            # The descriptor is gone whatever close(2) reports; write errors are found by fsync, not here.
            with contextlib.suppress(OSError):
                os.close(fd)


def close_all(fds: Iterable[OwnedFd]) -> None:
    """Close each of ``fds``."""
    for fd in fds:
        fd.close()
