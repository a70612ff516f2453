# SPDX-License-Identifier: GPL-2.0-or-later
"""When the size of a block device changes, also where nobody announces it.

The kernel makes an event when a disk grows, none when a partition is given another size (``BLKPG``, resizepart(8)), and an
event may be lost. What changed is for others to find out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

_PARTITIONS = Path("/proc/partitions")
"""Every device with a medium, its size in KiB: one small file in memory, whatever the number of devices."""
_LOOK_S = 0.5


class SizeWatch:
    """Tells when block devices came, went or got another size."""

    def __init__(
        self, changed: Callable[[], None], file: Path = _PARTITIONS, every_s: float = _LOOK_S
    ) -> None:
        """Call ``changed`` in the running loop from now on, until ``close``. Without /proc it is never called."""
        self._loop = asyncio.get_running_loop()
        self._changed, self._file, self._every_s = changed, file, every_s
        self._last = self._read()
        self._timer = self._loop.call_later(every_s, self._look)

    def _look(self) -> None:
        self._timer = self._loop.call_later(self._every_s, self._look)
        now = self._read()
        if now != self._last:
            self._last = now
            self._changed()

    def _read(self) -> bytes:
        try:
            return self._file.read_bytes()
        except OSError:
            return b""

    def close(self) -> None:
        """Stop."""
        self._timer.cancel()
