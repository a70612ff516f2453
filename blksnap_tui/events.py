# SPDX-License-Identifier: GPL-2.0-or-later
"""What a client is told without asking, as frozen values, and the map file it can ask for."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from blksnap_tui import model
from blksnap_tui.model import ObjectPath


@dataclass(frozen=True, slots=True)
class StateChanged:
    """Something the service shows is different now."""


@dataclass(frozen=True, slots=True)
class ServiceLost:
    """The service left the bus; `Client.state` is empty until ServiceFound."""


@dataclass(frozen=True, slots=True)
class ServiceFound:
    """The service is on the bus (again) and its state has been read."""


@dataclass(frozen=True, slots=True)
class BusLost:
    """The connection to the bus ended; this client will not come back."""

    reason: str


@dataclass(frozen=True, slots=True)
class GenerationStarted:
    """A device's map restarted: numbers and increments of the old generation are void."""

    device: ObjectPath
    generation_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class LowSpace:
    """A snapshot's difference storage is nearly full."""

    snapshot: ObjectPath
    used: int
    limit: int


@dataclass(frozen=True, slots=True)
class NoSpace:
    """A snapshot's difference storage could not grow; the snapshot has failed."""

    snapshot: ObjectPath
    requested: int


@dataclass(frozen=True, slots=True)
class Corrupted:
    """A snapshot is no longer true for one of its devices."""

    snapshot: ObjectPath
    device: ObjectPath
    errno: int
    message: str


@dataclass(frozen=True, slots=True)
class JobCompleted:
    """A job ended."""

    job: ObjectPath
    success: bool
    message: str


Event = (
    StateChanged
    | ServiceLost
    | ServiceFound
    | BusLost
    | GenerationStarted
    | LowSpace
    | NoSpace
    | Corrupted
    | JobCompleted
)

_SIGNALS: dict[tuple[str, str], tuple[Callable[..., Event], tuple[type, ...]]] = {
    (model.TRACKER, "GenerationStarted"): (GenerationStarted, (str, str)),
    (model.SNAPSHOT, "LowSpace"): (LowSpace, (int, int)),
    (model.SNAPSHOT, "NoSpace"): (NoSpace, (int,)),
    (model.SNAPSHOT, "Corrupted"): (Corrupted, (str, int, str)),
    (model.JOB, "Completed"): (JobCompleted, (bool, str)),
}


def event_from(path: str, interface: str, member: str, body: tuple[Any, ...]) -> Event | None:
    """Make an event of a service's signal; None for a signal this program does not know or cannot read."""
    known = _SIGNALS.get((interface, member))
    if known is None:
        return None
    make, kinds = known
    values = body[: len(kinds)]
    if len(values) < len(kinds) or not all(
        isinstance(value, kind) for value, kind in zip(values, kinds, strict=True)
    ):
        return None
    return make(ObjectPath(path), *values)


class MapFile:
    """
    A map handed over as a file: sealed, read only, one byte per block. Who got it owns it.

    `info` is what the service says about it (`generation-id`, `changes-number`, `block-size`, …).
    """

    def __init__(self, fd: int, info: Mapping[str, Any]) -> None:
        self.fd = fd
        self.info = info

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def size(self) -> int:
        """Give the number of blocks, which is the file's size in bytes."""
        return os.fstat(self.fd).st_size

    def close(self) -> None:
        """Close the descriptor; a second time is nothing."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)
