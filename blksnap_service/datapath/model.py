# SPDX-License-Identifier: GPL-2.0-or-later
"""What the data path's replies say, as frozen dataclasses (docs/datapath-protocol.md, READING, SNAPSHOT, take).

Every field is checked when it is parsed: a reply of the wrong shape is an error here and not a surprise later. Unknown
keys are ignored, so an older service can read a newer data path. Sizes and offsets are bytes, times µs since the epoch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from blksnap_service import errors

if TYPE_CHECKING:
    from collections.abc import Mapping

Front = Literal["nbd", "ublk"]
OriginState = Literal["tracking", "broken"]
SnapshotState = Literal["created", "taken", "failed"]


class Fields:
    """Typed access to one JSON object. Raises ``errors.Failed`` when a key is missing or of the wrong type."""

    def __init__(self, source: object, what: str) -> None:
        """Wrap ``source``; ``what`` names it in errors."""
        if not isinstance(source, dict):
            raise errors.Failed(f"the data path sent a {what} that is no object")
        self._source: dict[str, object] = source
        self._what = what

    def _wrong(self, key: str) -> errors.Failed:
        return errors.Failed(f"the data path sent a {self._what} without a valid {key!r}")

    def __contains__(self, key: str) -> bool:
        """Whether there is such a key: a data path that was started by an older service does not say everything."""
        return key in self._source

    def number(self, key: str) -> int:
        """Return a non-negative integer."""
        value = self._source.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self._wrong(key)
        return value

    def text(self, key: str) -> str:
        """Return a string."""
        value = self._source.get(key)
        if not isinstance(value, str):
            raise self._wrong(key)
        return value

    def flag(self, key: str) -> bool:
        """Return a boolean."""
        value = self._source.get(key)
        if not isinstance(value, bool):
            raise self._wrong(key)
        return value

    def items(self, key: str) -> list[object]:
        """Return a list."""
        value = self._source.get(key)
        if not isinstance(value, list):
            raise self._wrong(key)
        return value

    def object(self, key: str) -> Fields:
        """Return an object."""
        return Fields(self._source.get(key), f"{self._what}.{key}")

    def strings(self, key: str) -> tuple[str, ...]:
        """Return a list of strings as a tuple."""
        values = self.items(key)
        if not all(isinstance(value, str) for value in values):
            raise self._wrong(key)
        return tuple(str(value) for value in values)

    def counters(self, key: str) -> Mapping[str, int]:
        """Return an object of non-negative integers."""
        value = self._source.get(key)
        if not isinstance(value, dict):
            raise self._wrong(key)
        inner = Fields(value, f"{self._what}.{key}")
        return {name: inner.number(name) for name in value}


@dataclass(frozen=True, slots=True)
class Ability:
    """Whether the data path can use a part of the kernel, and why not."""

    available: bool
    reason: str

    @classmethod
    def parse(cls, fields: Fields, key: str) -> Ability:
        """Parse one of those in ``hello``. Raises ``errors.Failed``."""
        if key not in fields:
            return cls(False, f"the data path that runs is older than this service and does not know {key}")
        inner = fields.object(key)
        return cls(inner.flag("available"), inner.text("reason"))


@dataclass(frozen=True, slots=True)
class Hello:
    """What the data path says of itself."""

    version: str
    pid: int
    ublk: Ability
    dm: Ability
    freezes: bool
    """Whether it freezes file systems around a take."""

    NOTHING: ClassVar[Hello]

    @classmethod
    def parse(cls, source: object) -> Hello:
        """Parse the answer to ``hello``. Raises ``errors.Failed``."""
        fields = Fields(source, "hello")
        return cls(
            version=fields.text("version"),
            pid=fields.number("pid"),
            ublk=Ability.parse(fields, "ublk"),
            dm=Ability.parse(fields, "dm"),
            freezes="dm" in fields,
        )


_UNHEARD = Ability(False, "the service is not connected to the data path")
Hello.NOTHING = Hello("", 0, _UNHEARD, _UNHEARD, freezes=False)


@dataclass(frozen=True, slots=True)
class OriginReading:
    """One consistent reading of an origin."""

    origin: str
    label: str
    kind: str
    state: OriginState
    reason: str
    size: int
    logical_block_size: int
    read_only: bool
    block_size: int
    block_count: int
    generation: str
    base: int
    active: int
    changes: int
    oldest: int
    live_sequence: int
    taken_sequence: int
    taken_base: int
    nbd_socket: str
    clients: int
    snapshots: tuple[str, ...]
    counters: Mapping[str, int]
    front: Front
    node: str
    """What to mount or use; empty for NBD."""
    ublk_id: int
    """-1 for NBD."""
    top: str
    """The device-mapper device the data path made on top, or empty."""
    insert: str
    """The live device-mapper device it was put under, or empty."""
    reset: str
    """Why the data path began this generation by itself; empty when it did not."""

    @classmethod
    def parse(cls, source: object) -> OriginReading:
        """Parse a READING. Raises ``errors.Failed``."""
        fields = Fields(source, "reading")
        ublk = "front" in fields and fields.text("front") == "ublk"
        return cls(
            origin=fields.text("origin"),
            label=fields.text("label"),
            kind=fields.text("kind"),
            state="tracking" if fields.text("state") == "tracking" else "broken",
            reason=fields.text("reason"),
            size=fields.number("size"),
            logical_block_size=fields.number("logical_block_size"),
            read_only=fields.flag("read_only"),
            block_size=fields.number("block_size"),
            block_count=fields.number("block_count"),
            generation=fields.text("generation"),
            base=fields.number("base"),
            active=fields.number("active"),
            changes=fields.number("changes"),
            oldest=fields.number("oldest"),
            live_sequence=fields.number("live_sequence"),
            taken_sequence=fields.number("taken_sequence"),
            taken_base=fields.number("taken_base"),
            nbd_socket=fields.text("nbd_socket"),
            clients=fields.number("clients"),
            snapshots=fields.strings("snapshots"),
            counters=fields.counters("counters"),
            front="ublk" if ublk else "nbd",
            node=fields.text("node") if ublk else "",
            ublk_id=fields.number("ublk_id") if ublk else -1,
            top=fields.text("top") if ublk else "",
            insert=fields.text("insert") if ublk else "",
            reset=fields.text("reset") if "reset" in fields else "",
        )


@dataclass(frozen=True, slots=True)
class ImageReading:
    """One image of a snapshot: the origin it is of, and the take's generation and number."""

    origin: str
    size: int
    generation: str
    number: int
    base: int
    oldest: int
    writable: bool
    chunk_size: int
    error: str
    reset: str
    """Why this take began a new generation; empty when it did not, or in a SNAPSHOT, which does not say."""
    path: str
    """The image's block device; empty for NBD."""

    @classmethod
    def parse(cls, source: object) -> ImageReading:
        """Parse an image of a SNAPSHOT (with ``error``) or of a take (with ``reset``). Raises ``errors.Failed``."""
        fields = Fields(source, "image")
        return cls(
            origin=fields.text("origin"),
            size=fields.number("size"),
            generation=fields.text("generation"),
            number=fields.number("number"),
            base=fields.number("base"),
            oldest=fields.number("oldest"),
            writable=fields.flag("writable"),
            chunk_size=fields.number("chunk_size"),
            error=fields.text("error") if "error" in fields else "",
            reset=fields.text("reset") if "reset" in fields else "",
            path=fields.text("path") if "path" in fields else "",
        )


@dataclass(frozen=True, slots=True)
class SnapshotReading:
    """One consistent reading of a snapshot and its difference storage."""

    snapshot: str
    state: SnapshotState
    error: str
    errno: int
    limit: int
    used: int
    allocated: int
    low_space: int
    low: bool
    chunk_size: int
    taken_at: int
    images: tuple[ImageReading, ...]

    @classmethod
    def parse(cls, source: object) -> SnapshotReading:
        """Parse a SNAPSHOT. Raises ``errors.Failed``."""
        fields = Fields(source, "snapshot")
        states: dict[str, SnapshotState] = {"created": "created", "taken": "taken", "failed": "failed"}
        state = states.get(fields.text("state"))
        if state is None:
            raise errors.Failed(f"the data path sent a snapshot in an unknown state {fields.text('state')!r}")
        return cls(
            snapshot=fields.text("snapshot"),
            state=state,
            error=fields.text("error"),
            errno=fields.number("errno"),
            limit=fields.number("limit"),
            used=fields.number("used"),
            allocated=fields.number("allocated"),
            low_space=fields.number("low_space"),
            low=fields.flag("low"),
            chunk_size=fields.number("chunk_size"),
            taken_at=fields.number("taken_at"),
            images=tuple(ImageReading.parse(item) for item in fields.items("images")),
        )


@dataclass(frozen=True, slots=True)
class Taken:
    """The answer to a take: when it was, and the image of each origin in the order asked for."""

    taken_at: int
    images: tuple[ImageReading, ...]

    @classmethod
    def parse(cls, source: object) -> Taken:
        """Parse the answer to ``snapshot.take``. Raises ``errors.Failed``."""
        fields = Fields(source, "take")
        return cls(
            taken_at=fields.number("taken_at"),
            images=tuple(ImageReading.parse(item) for item in fields.items("images")),
        )


@dataclass(frozen=True, slots=True)
class Event:
    """Something the data path tells without being asked: its name and what comes with it."""

    name: str
    fields: Fields
