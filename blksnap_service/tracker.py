# SPDX-License-Identifier: GPL-2.0-or-later
"""What a backend implements: ``Tracker`` sees every write to one origin, ``Backend`` makes trackers. ``trackers`` owns them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from blksnap_service import errors
from blksnap_service.cbt import View
from blksnap_service.devices import Device
from blksnap_service.fds import OwnedFd
from blksnap_service.storage import Identity

TrackerState = Literal["tracking", "recovering", "broken"]


@dataclass(frozen=True, slots=True)
class TrackerReading:
    """One consistent reading of a tracker. Sizes in bytes; numbers as in ``cbt``."""

    state: TrackerState
    reason: str
    """Why it is broken; empty otherwise."""
    capacity: int
    block_size: int
    block_count: int
    generation: str
    base: int
    active: int
    oldest: int
    clients: int
    snapshots: tuple[str, ...]
    counters: Mapping[str, int]
    reset: str = ""
    """Why the backend began this generation by itself; empty when it did not."""

    @property
    def changes(self) -> int:
        """The number of the last take; 0 before the first."""
        return self.active - 1


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a tracker sits among the system's devices; written down, so that it can be put there again."""

    top: str = ""
    """The device-mapper device made on top, or empty."""
    insert: str = ""
    """The live device-mapper device it is under, or empty."""
    ublk_id: int = -1
    """The ``N`` of ``/dev/ublkbN``, or -1."""


NOWHERE = Placement()


@dataclass(frozen=True, slots=True)
class OpenMap:
    """A map and what its bytes mean, read together; the descriptor (read-only, sealed) belongs to the receiver.

    ``base`` is what the bytes of *this* view count from. ``sequence`` is different for another memory file.
    """

    reading: TrackerReading
    view: View
    base: int
    sequence: int
    fd: OwnedFd


class Tracker(Protocol):
    """Sees every write to one origin. All methods raise ``errors.BlksnapError``."""

    @property
    def backend(self) -> str:
        """The name of the backend."""

    @property
    def origin(self) -> str:
        """The name of the origin in its backend."""

    @property
    def node(self) -> str:
        """What to mount or use, so that writes are seen: a device path or an NBD URI."""

    @property
    def map_is_live(self) -> bool:
        """Whether the map shows a write at once."""

    @property
    def identity(self) -> Identity:
        """The file or device that is open as the origin."""

    @property
    def devices(self) -> Collection[Identity]:
        """All that shows the origin's bytes: itself, the node, and what lies between."""

    @property
    def placement(self) -> Placement:
        """Where it sits."""

    @property
    def last(self) -> TrackerReading:
        """The last reading made; needs no I/O."""

    async def read(self) -> TrackerReading:
        """Make a reading now."""

    async def open_map(self, view: View) -> OpenMap:
        """Open a map, consistently with a reading."""

    async def mark(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Mark byte ranges (offset, length) that were validated; in the live and the taken map."""

    async def mark_all(self) -> None:
        """Mark everything."""

    async def resize(self) -> None:
        """Go by the present size of the origin, which has grown. Raises ``errors.InvalidState`` when the kernel cannot."""

    def note_away(self, reason: str) -> None:
        """Note in the last reading that nobody can be asked now, and that it is hoped that this passes."""


@dataclass(frozen=True, slots=True)
class BackendInfo:
    """What a backend can do here; ``reason`` says why it is not available."""

    name: str
    available: bool
    reason: str
    snapshots: bool
    live_map: bool
    live_attach: bool


@dataclass(frozen=True, slots=True)
class Attached:
    """A fresh tracker and why its generation began (or what it was before, when it continues)."""

    tracker: Tracker
    last_reset: str


class Backend(Protocol):
    """A way to track."""

    @property
    def info(self) -> BackendInfo:
        """What it can do now."""

    def rank(self, device: Device) -> int:
        """Return how good it is for a device, less being better; among those that can track it at all."""

    def refusal(self, device: Device) -> errors.BlksnapError | None:
        """Return why it cannot track this device now, as far as one can tell without trying; None if it can."""

    async def attach(self, device: Device, block_size: int, before: Placement = NOWHERE) -> Attached:
        """Track a device; ``block_size`` 0: by the rule.

        ``before`` is where its tracker was, when that ended and what is left of it may still be there: it is taken over where
        that is possible, and its history ends in any case. Raises ``errors.BlksnapError``; nothing is left behind then.
        """

    async def detach(self, tracker: Tracker, last_reset: str, *, force: bool) -> None:
        """Stop tracking and save the map. Raises ``errors.Busy`` when in use, unless forced."""

    async def discover(self, known: Mapping[str, Identity]) -> list[tuple[Tracker, str]]:
        """Return the trackers that run, each with the path of its device. For adoption after a restart.

        ``known`` says what was opened for which origin, as far as it was written down.
        """
