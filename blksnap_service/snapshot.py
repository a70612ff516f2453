# SPDX-License-Identifier: GPL-2.0-or-later
"""One snapshot as the service knows it, what a caller may ask for, and who is told about it. ``snapshots`` runs its life."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from blksnap_service import errors
from blksnap_service.catalogue import SnapshotEntry
from blksnap_service.devices import Device
from blksnap_service.engines import SnapshotEngine, SnapshotStatus
from blksnap_service.fds import OwnedFd
from blksnap_service.work import Work

_log = logging.getLogger(__name__)

MAX_DEVICES = 64
"""The data path answers a take with three descriptors per device, and one message carries at most 253."""
MAX_HOLDS_PER_UID = 32

State = Literal["created", "taken", "failed", "destroying"]


@dataclass(frozen=True, slots=True)
class Request:
    """What a caller wants of a new snapshot; 0 and empty mean: the rule. ``storage_fd`` is consumed. Sizes in bytes."""

    owner_uid: int
    holder: str = ""
    """The unique name whose leaving the bus ``bus_id`` ends the snapshot."""
    bus_id: str = ""
    description: str = ""
    storage_path: str = ""
    storage_fd: OwnedFd | None = None
    limit: int = 0
    low_space: int = 0
    chunk_size: int = 0
    take: bool = True
    attach: bool = False
    work: Work = field(default_factory=Work, compare=False, repr=False)


@dataclass(eq=False, slots=True)
class Snapshot:
    """One snapshot as the bus shows it. Changed only by ``Snapshots``."""

    entry: SnapshotEntry
    engine: SnapshotEngine = field(repr=False)
    status: SnapshotStatus
    destroying: bool = False
    lock: asyncio.Lock = field(default_factory=asyncio.Lock, repr=False)

    @property
    def id(self) -> str:
        """The uuid."""
        return self.entry.key

    @property
    def state(self) -> State:
        """Where in its life it is."""
        return "destroying" if self.destroying else self.status.state


class Watcher(Protocol):
    """Is told about snapshots; must not raise."""

    def snapshot_added(self, snapshot: Snapshot) -> None:
        """A snapshot is there from now on."""

    def snapshot_changed(self, snapshot: Snapshot) -> None:
        """Something about it is different, perhaps its images."""

    def snapshot_removed(self, snapshot: Snapshot) -> None:
        """It is gone."""

    def low_space(self, snapshot: Snapshot, used: int, limit: int) -> None:
        """Its storage is nearly full."""

    def no_space(self, snapshot: Snapshot, requested: int) -> None:
        """Its storage overflowed."""

    def corrupted(self, snapshot: Snapshot, device: str, errno: int, message: str) -> None:
        """Old bytes of the device of that name could not be kept."""


def distinct(devices: Sequence[Device]) -> list[str]:
    """Return the names of the devices of a snapshot. Raises ``errors.InvalidArgument``, ``errors.LimitExceeded``."""
    names = [device.name for device in devices]
    if not names:
        raise errors.InvalidArgument("a snapshot needs at least one device")
    if len(set(names)) != len(names):
        raise errors.InvalidArgument("a device is named twice")
    if len(names) > MAX_DEVICES:
        raise errors.LimitExceeded(f"a snapshot covers at most {MAX_DEVICES} devices")
    return names


def check_holds(snapshots: Iterable[Snapshot], uid: int) -> None:
    """Raises ``errors.LimitExceeded`` when a user holds as many as it may."""
    held = sum(1 for one in snapshots if one.entry.holder and one.entry.owner_uid == uid)
    if held >= MAX_HOLDS_PER_UID:
        raise errors.LimitExceeded(f"uid {uid} holds {held} snapshots already: destroy or release one")


def note_loss(entry: SnapshotEntry) -> None:
    """Log that a snapshot is not there any more."""
    devices = ", ".join(entry.devices)
    _log.warning("snapshot %s of %s did not survive: what held it has ended", entry.key, devices)


def found(engine: SnapshotEngine, status: SnapshotStatus, devices: tuple[str, ...]) -> SnapshotEntry:
    """Return the entry of a snapshot that an engine holds and nobody wrote down: it is uid 0's."""
    return SnapshotEntry(
        key=status.snapshot,
        devices=devices,
        owner_uid=0,
        description=f"found in {engine.name}",
        storage_path="",
        storage_made="",
        limit=status.limit,
        created_at=status.taken_at or time.time_ns() // 1000,
        holder="",
        bus_id="",
    )
