# SPDX-License-Identifier: GPL-2.0-or-later
"""What takes snapshots: the protocol every snapshot engine implements, and what it says about a snapshot.

The data path is one, the kernel filter another. Origins are named as in their backend. Owners, holders,
descriptions and storage names are not known here: those are the business of ``snapshots``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from blksnap_service.fds import OwnedFd

EngineState = Literal["created", "taken", "failed"]


@dataclass(frozen=True, slots=True)
class ImageStatus:
    """One origin as it was at the instant; ``number`` is the take's number in ``generation``."""

    origin: str
    size: int
    generation: str
    number: int
    read_only: bool
    error: str
    path: str
    """A device node, or empty."""
    uri: str
    """An NBD URI, or empty."""


@dataclass(frozen=True, slots=True)
class SnapshotStatus:
    """One consistent reading of a snapshot. Sizes in bytes, ``taken_at`` µs since the epoch (0: not taken)."""

    snapshot: str
    state: EngineState
    error: str
    limit: int
    used: int
    allocated: int
    taken_at: int
    images: tuple[ImageStatus, ...]


class SnapshotEngine(Protocol):
    """Takes snapshots of the origins of some backends. All methods raise ``errors.BlksnapError``."""

    @property
    def name(self) -> str:
        """What it is, for people."""

    async def create(
        self, snapshot: str, storage: OwnedFd, *, limit: int, low_space: int, chunk_size: int
    ) -> SnapshotStatus:
        """Begin a snapshot over difference storage, which is consumed. 0 means: the engine's rule."""

    async def take(self, snapshot: str, origins: Sequence[str]) -> Mapping[str, str]:
        """Take all at one instant; returns, for each whose generation ended, why. A failing take leaves no trace."""

    async def status(self, snapshot: str) -> SnapshotStatus:
        """Make a reading."""

    async def destroy(self, snapshot: str) -> None:
        """End it. Raises ``errors.NotFound`` when there is none."""

    def may_hold(self, snapshot: str) -> bool:
        """Return whether it may have one that ``discover`` cannot find now."""

    async def discover(self) -> list[SnapshotStatus]:
        """Return all there are."""
