# SPDX-License-Identifier: GPL-2.0-or-later
"""Files that are either the old one or the new one after a crash, never a mixture.

Write to a temporary name in the same directory, fsync, rename, fsync the directory. All functions block: call them in
a thread. What the files mean is the business of ``catalogue`` and ``savedmaps``.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from blksnap_service.fds import OwnedFd

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


def sync_directory(directory: Path) -> None:
    """Make renames and unlinks in ``directory`` survive a power cut. Raises ``OSError``."""
    with OwnedFd(os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as fd:
        os.fsync(fd.fileno())


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[int]:
    """Yield a writable descriptor of a new file that becomes ``path`` when the block ends without an error.

    Raises ``OSError``; the old file is then untouched and the temporary one is gone.
    """
    temporary = path.with_name(f".{path.name}.new")
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        with OwnedFd(os.open(temporary, flags, 0o600)) as fd:
            yield fd.fileno()
            os.fsync(fd.fileno())
        temporary.rename(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_directory(path.parent)


def replace_bytes(path: Path, data: bytes) -> None:
    """Replace the content of ``path``. Raises ``OSError``."""
    with replacing(path) as fd:
        write_all(fd, data)


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write all of ``data`` at the file position. Raises ``OSError``."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def move(source: Path, target: Path) -> None:
    """Rename within a directory, durably. Raises ``OSError``."""
    source.rename(target)
    sync_directory(target.parent)


def remove(path: Path) -> None:
    """Unlink durably; a missing file is fine. Raises ``OSError``."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
        sync_directory(path.parent)


def copy_stream(source: int, target: int, length: int, each: Callable[[memoryview], None]) -> int:
    """Copy up to ``length`` bytes from offset 0 of ``source`` on, show every part to ``each``; returns how many came.

    Reads with pread in pieces of 1 MiB, so that a map of 1 GiB does not become resident here. Raises ``OSError``.
    """
    buffer = memoryview(bytearray(min(1 << 20, max(length, 1))))
    done = 0
    while done < length:
        count = os.preadv(source, [buffer[: min(len(buffer), length - done)]], done)
        if count == 0:
            break
        each(buffer[:count])
        write_all(target, buffer[:count])
        done += count
    return done
