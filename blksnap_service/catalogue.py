# SPDX-License-Identifier: GPL-2.0-or-later
"""What survives a restart of the service: added image files, trackers, snapshots.

The data path knows what it serves; the catalogue knows whose it is and why. It is written before and after every
change, so after a crash it may name something that is gone, and the data path may hold something it does not name:
``reconcile`` sorts that out. One service at a time: the state directory is locked while it runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import json
import logging
import os
import time
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar, get_type_hints

from blksnap_service import durable, errors
from blksnap_service.fds import OwnedFd
from blksnap_service.savedmaps import SavedMaps

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import TracebackType

_log = logging.getLogger(__name__)
_VERSION = 1


@dataclass(frozen=True, slots=True)
class ImageEntry:
    """An added image file: its object name, where it is, and what the data path calls it."""

    key: str
    path: str


@dataclass(frozen=True, slots=True)
class TrackerEntry:
    """An attached tracker; ``key`` is the device's object name, ``attached_at`` µs since the epoch."""

    key: str
    path: str
    backend: str
    origin: str
    owner_uid: int
    attached_at: int
    persistent: bool
    last_reset: str
    block_size: int
    """As asked for; 0: by the rule."""
    identity: str
    """The file or device that was opened (``storage.Identity`` as text), or empty while it is being attached."""
    top: str = ""
    """As in ``tracker.Placement``, and so the next two."""
    insert: str = ""
    ublk_id: int = -1
    stable_key: str = ""
    """As in ``devices.Device``."""


@dataclass(frozen=True, slots=True)
class SnapshotEntry:
    """A snapshot; ``key`` is its uuid, ``devices`` are object names, times µs since the epoch.

    ``storage_made`` is the identity (``device:inode``) of a file this service created for it, or empty.
    ``holder`` is the bus name whose leaving ends it, or empty, on the bus ``bus_id``.
    """

    key: str
    devices: tuple[str, ...]
    owner_uid: int
    description: str
    storage_path: str
    storage_made: str
    limit: int
    created_at: int
    holder: str
    bus_id: str


@dataclass(frozen=True, slots=True)
class FilterSnapshotEntry:
    """What the kernel filter does not know of one of our snapshots; ``key`` is its uuid here, ``kernel_id`` there.

    ``origins`` are those that were taken, ``taken_at`` is in µs since the epoch (0: not taken), ``limit`` in bytes.
    """

    key: str
    kernel_id: str
    origins: tuple[str, ...]
    taken_at: int
    limit: int


@dataclass(frozen=True, slots=True)
class FilterDeviceEntry:
    """What was in a device when the kernel filter was attached to it; ``key`` is the origin, ``diskseq`` is of that boot."""

    key: str
    boot_id: str
    diskseq: int


_E = TypeVar("_E", ImageEntry, TrackerEntry, SnapshotEntry, FilterSnapshotEntry, FilterDeviceEntry)


def _parse(kind: type[_E], source: object) -> _E:
    """Return the entry in a JSON object. Raises ``ValueError`` for a missing, unknown or wrongly typed field.

    A field with a default may be missing: an older service did not write it.
    """
    known = {field.name: field.default for field in fields(kind)}
    if not isinstance(source, dict) or not source.keys() <= known.keys():
        raise ValueError("an entry has unknown fields")
    values: dict[str, Any] = {}
    for name, wanted in get_type_hints(kind).items():
        value = source.get(name, known[name])
        if wanted == tuple[str, ...]:
            if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
                raise ValueError(f"{name} is no list of strings")
            value = tuple(value)
        elif type(value) is not wanted or (wanted is int and value < 0 and value != known[name]):
            raise ValueError(f"{name} is not of type {wanted.__name__}")
        values[name] = value
    return kind(**values)


class Table(Generic[_E]):
    """The entries of one kind, by key, in one JSON file that is replaced at every change."""

    def __init__(self, path: Path, kind: type[_E]) -> None:
        """Use the file ``path``; ``load`` reads it."""
        self._path = path
        self._kind: type[_E] = kind
        self._entries: dict[str, _E] = {}
        self._lock = asyncio.Lock()

    def __iter__(self) -> Iterator[_E]:
        """Iterate over a copy of the entries, in the order they were added."""
        return iter(list(self._entries.values()))

    def get(self, key: str) -> _E | None:
        """Return an entry or None."""
        return self._entries.get(key)

    def load(self) -> None:
        """Read the file. Blocks. What cannot be read is set aside, with a line in the log; it never stops the service.

        Raises ``OSError`` when the file is there but not readable at all.
        """
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return
        broken = ""
        try:
            source = json.loads(data)
            if not isinstance(source, dict) or source.get("version") != _VERSION:
                raise ValueError("it is not of a known version")
            entries = source.get("entries")
            if not isinstance(entries, list):
                raise ValueError("it has no list of entries")  # noqa: TRY004 - caught just below
        except (ValueError, RecursionError) as error:
            broken, entries = str(error), []
        for item in entries:
            try:
                entry = _parse(self._kind, item)
            except ValueError as error:
                broken = str(error)
            else:
                self._entries[entry.key] = entry
        if broken:
            aside = self._path.with_name(f"{self._path.name}.damaged-{time.time_ns() // 1000}")
            durable.move(self._path, aside)
            _log.error(
                "%s is damaged (%s): kept as %s, going on with %d entries",
                self._path, broken, aside.name, len(self._entries),
            )  # fmt: skip

    async def put(self, entry: _E) -> None:
        """Add or replace an entry. Raises ``errors.NoSpace`` or ``errors.Failed`` when the file cannot be written."""
        before = self._entries.get(entry.key)
        self._entries[entry.key] = entry
        try:
            await self._write()
        except errors.BlksnapError:
            if before is None:
                self._entries.pop(entry.key, None)
            else:
                self._entries[entry.key] = before
            raise

    async def drop(self, key: str) -> None:
        """Remove an entry if it is there. Raises as ``put``."""
        if self._entries.pop(key, None) is not None:
            await self._write()

    async def _write(self) -> None:
        # The lock keeps writes in order; each writes what is true when its turn comes.
        async with self._lock:
            document = {"version": _VERSION, "entries": [asdict(entry) for entry in self._entries.values()]}
            data = json.dumps(document, indent=1).encode() + b"\n"
            try:
                await asyncio.to_thread(durable.replace_bytes, self._path, data)
            except OSError as error:
                kind = errors.NoSpace if error.errno in {errno.ENOSPC, errno.EDQUOT} else errors.Failed
                reason = (error.strerror or str(error)).lower()
                raise kind(f"the service cannot write its catalogue {self._path}: {reason}") from error


class Catalogue:
    """The state directory: its tables and the saved maps. A context manager that holds the lock."""

    def __init__(self, state_dir: Path) -> None:
        """Lock and read ``state_dir``, which is created if missing.

        Raises ``errors.NotAvailable`` when the directory cannot be used, ``errors.Busy`` when another service uses it.
        """
        try:
            state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = OwnedFd(os.open(state_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        except OSError as error:
            raise _unusable(state_dir, error) from error
        with contextlib.ExitStack() as stack:
            stack.callback(self._lock.close)
            try:
                fcntl.flock(self._lock.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
                maps = state_dir / "maps"
                maps.mkdir(mode=0o700, exist_ok=True)
                if not os.access(state_dir, os.W_OK) or not os.access(maps, os.W_OK):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
                self.images = Table(state_dir / "images.json", ImageEntry)
                self.trackers = Table(state_dir / "trackers.json", TrackerEntry)
                self.snapshots = Table(state_dir / "snapshots.json", SnapshotEntry)
                self.filter_snapshots = Table(state_dir / "filter-snapshots.json", FilterSnapshotEntry)
                self.filter_devices = Table(state_dir / "filter-devices.json", FilterDeviceEntry)
                self.images.load()
                self.trackers.load()
                self.snapshots.load()
                self.filter_snapshots.load()
                self.filter_devices.load()
            except BlockingIOError as error:
                raise errors.Busy(
                    f"another blksnapd runs on the state directory {state_dir}: use that one"
                ) from error
            except OSError as error:
                raise _unusable(state_dir, error) from error
            stack.pop_all()
        self.maps = SavedMaps(maps)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.close()


def _unusable(state_dir: Path, error: OSError) -> errors.NotAvailable:
    reason = (error.strerror or str(error)).lower()
    return errors.NotAvailable(f"the state directory {state_dir} cannot be used: {reason}")
