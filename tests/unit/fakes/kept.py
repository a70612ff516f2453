# SPDX-License-Identifier: GPL-2.0-or-later
"""What the fake data path keeps of an origin and of a snapshot. Their rules are in ``datapath``."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from blksnap_service.changemap import ChangeMap


@dataclass
class Origin:
    """An origin: its open file and its map."""

    fd: int
    label: str
    map: ChangeMap
    identity: tuple[int, int]
    live: int
    """The memory file of the live map, brought up to date by ``FakeDatapath.sync``."""
    page: int
    """The state page."""
    epoch: tuple[str, int]
    """Generation and base of ``live``."""
    live_sequence: int = 1
    clients: int = 0
    state: str = "tracking"
    reason: str = ""
    takes: int = 0
    front: str = "nbd"
    top: str = ""
    insert: str = ""
    ublk_id: int = -1
    reset: str = ""
    counters: dict[str, int] = field(default_factory=lambda: {"writes": 0, "marks": 0})

    def close(self) -> None:
        """Close its descriptors."""
        for fd in (self.fd, self.live, self.page):
            os.close(fd)


@dataclass
class Snapshot:
    """A snapshot: its storage and, once taken, its images."""

    fd: int
    limit: int
    chunk_size: int
    state: str = "created"
    error: str = ""
    errno: int = 0
    used: int = 0
    taken_at: int = 0
    low: bool = False
    images: list[dict[str, Any]] = field(default_factory=list)
