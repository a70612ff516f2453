# SPDX-License-Identifier: GPL-2.0-or-later
"""
What the service shows on the bus, as frozen values: one class per interface, one field per property.

Sizes and offsets are bytes, times microseconds since the epoch (0 = has not happened), as on the bus. Reading
is strict: a property that is missing or of another type raises ProtocolError rather than becoming a false 0.
Nothing here talks to the bus.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NewType, TypeVar, get_args, get_origin, get_type_hints

from blksnap_tui.errors import ProtocolError

ObjectPath = NewType("ObjectPath", str)

SERVICE_NAME = "org.blksnap.Blksnap1"
ROOT_PATH = ObjectPath("/org/blksnap/Blksnap1")
MANAGER_PATH = ObjectPath(f"{ROOT_PATH}/Manager")

MANAGER, DEVICE, TRACKER, SNAPSHOT, IMAGE, JOB = (
    f"{SERVICE_NAME}.{name}" for name in ("Manager", "Device", "Tracker", "Snapshot", "Image", "Job")
)

_Value = TypeVar("_Value")


def _property(name: str) -> Any:
    """Name the property of a field whose name is not its CamelCase."""
    return field(metadata={"property": name})


@dataclass(frozen=True, slots=True)
class Backend:
    """One way to track, and whether it works on this machine (`reason` says why not)."""

    name: str
    available: bool
    reason: str
    snapshots: bool
    live_map: bool
    live_attach: bool

    @property
    def abilities(self) -> list[str]:
        """Say what it can do."""
        words = {
            "snapshots": self.snapshots,
            "live map": self.live_map,
            "attaches under a device in use": self.live_attach,
        }
        return [word for word, true in words.items() if true]


@dataclass(frozen=True, slots=True)
class Manager:
    """The service itself."""

    version: str
    backends: tuple[Backend, ...]
    default_storage_directory: str


@dataclass(frozen=True, slots=True)
class Tracker:
    """What sees every write to one origin; `node` is what to mount or use instead of the origin."""

    backend: str
    node: str
    state: str
    map_is_live: bool
    capacity: int
    block_size: int
    block_count: int
    generation_id: str
    changes_number: int
    oldest_number: int
    attached_at: int
    attached_by_uid: int = _property("AttachedByUID")
    last_reset: str = ""

    @property
    def active_number(self) -> int:
        """Give the number of the interval being written now."""
        return self.changes_number + 1

    @property
    def shown_since(self) -> int:
        """Give the number whose changes are newest in the map: a map that is not live has none after the last take."""
        if self.map_is_live:
            return self.changes_number
        return max(self.changes_number - 1, self.oldest_number)


@dataclass(frozen=True, slots=True)
class Device:
    """One block device or added image file, with its tracker while attached."""

    object_path: ObjectPath
    path: str
    symlinks: tuple[str, ...]
    device_number: int
    size: int
    logical_block_size: int
    read_only: bool
    model: str
    serial: str
    id_type: str
    id_label: str
    id_uuid: str = _property("IdUUID")
    mount_points: tuple[str, ...] = ()
    tracked: bool = False
    snapshots: tuple[ObjectPath, ...] = ()
    backends: tuple[str, ...] = ()
    tracker: Tracker | None = None

    @property
    def name(self) -> str:
        """Give the last part of the path, which is what people call it."""
        return self.path.rstrip("/").rpartition("/")[2] or self.path


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One instant over one or more origins."""

    object_path: ObjectPath
    id: str
    state: str
    devices: tuple[ObjectPath, ...]
    images: tuple[ObjectPath, ...]
    created_at: int
    taken_at: int
    storage_path: str
    storage_used: int
    storage_allocated: int
    storage_limit: int
    owner_uid: int = _property("OwnerUID")
    held: bool = False
    description: str = ""
    error: str = ""


@dataclass(frozen=True, slots=True)
class Image:
    """A snapshot of one origin, as a device node or an NBD export ("" = not there)."""

    object_path: ObjectPath
    path: str
    nbd_uri: str
    device: ObjectPath
    snapshot: ObjectPath
    size: int
    read_only: bool
    generation_id: str
    changes_number: int
    error: str = ""


@dataclass(frozen=True, slots=True)
class Job:
    """A long act under way."""

    object_path: ObjectPath
    operation: str
    progress: float
    progress_valid: bool
    bytes: int
    rate: int
    start_time: int
    expected_end_time: int
    objects: tuple[ObjectPath, ...]
    started_by_uid: int = _property("StartedByUID")
    cancelable: bool = False


@dataclass(frozen=True, slots=True)
class State:
    """
    All the service shows at one moment.

    Devices and snapshots are in the order people read them: devices by path, snapshots and images by time,
    oldest first.
    """

    manager: Manager | None = None
    devices: tuple[Device, ...] = ()
    snapshots: tuple[Snapshot, ...] = ()
    images: tuple[Image, ...] = ()
    jobs: tuple[Job, ...] = ()

    def device(self, path: str) -> Device | None:
        """Find a device by object path."""
        return next((device for device in self.devices if device.object_path == path), None)

    def snapshot(self, path: str) -> Snapshot | None:
        """Find a snapshot by object path."""
        return next((snapshot for snapshot in self.snapshots if snapshot.object_path == path), None)

    def images_of(self, snapshot: Snapshot) -> tuple[Image, ...]:
        """Give the images of a snapshot."""
        return tuple(image for image in self.images if image.snapshot == snapshot.object_path)


@cache
def _fields(kind: Any) -> tuple[tuple[str, str, Any], ...]:
    """List (field, property, type) of a class above, without the fields that are no property of their own."""
    hints = get_type_hints(kind)
    return tuple(
        (item.name, item.metadata.get("property") or item.name.title().replace("_", ""), hints[item.name])
        for item in dataclasses.fields(kind)
        if item.name not in ("object_path", "tracker")
    )


def read(kind: Callable[..., _Value], path: str, properties: Mapping[str, Any], **extra: Any) -> _Value:
    """
    Build one of the classes above from an interface's properties; `extra` are the fields that are none.

    Raises ProtocolError naming object and property when one is missing or of the wrong type.
    """
    values = dict(extra)
    for name, key, wanted in _fields(kind):
        if key not in properties:
            raise ProtocolError(f"{path} has no property {key}: is the service of another version?")
        value = properties[key]
        if get_origin(wanted) is tuple:
            element = get_args(wanted)[0]
            good = isinstance(value, list) and all(isinstance(item, str) for item in value)
            values[name] = tuple(map(element, value)) if good else value
        else:
            good = type(value) is wanted or (wanted not in (int, float, bool, str) and isinstance(value, str))
            values[name] = value
        if not good:
            raise ProtocolError(f"{path}: property {key} is {value!r}, not {wanted}")
    return kind(**values)


def _backends(properties: Mapping[str, Any]) -> tuple[Backend, ...]:
    return tuple(
        Backend(
            name=name,
            available=bool(facts.get("available", False)),
            reason=str(facts.get("reason", "")),
            snapshots=bool(facts.get("snapshots", False)),
            live_map=bool(facts.get("live-map", False)),
            live_attach=bool(facts.get("live-attach", False)),
        )
        for name, facts in sorted(properties.get("Backends", {}).items())
    )


def state_from(objects: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> State:
    """
    Build the state from what GetManagedObjects says: path → interface → property → value.

    Raises ProtocolError.
    """
    manager: Manager | None = None
    devices: list[Device] = []
    snapshots: list[Snapshot] = []
    images: list[Image] = []
    jobs: list[Job] = []
    for name, interfaces in objects.items():
        path = ObjectPath(name)
        if MANAGER in interfaces:
            shown = interfaces[MANAGER]
            manager = Manager(
                version=str(shown.get("Version", "")),
                backends=_backends(shown),
                default_storage_directory=str(shown.get("DefaultStorageDirectory", "")),
            )
        if DEVICE in interfaces:
            tracker = read(Tracker, path, interfaces[TRACKER]) if TRACKER in interfaces else None
            devices.append(read(Device, path, interfaces[DEVICE], object_path=path, tracker=tracker))
        if SNAPSHOT in interfaces:
            snapshots.append(read(Snapshot, path, interfaces[SNAPSHOT], object_path=path))
        if IMAGE in interfaces:
            images.append(read(Image, path, interfaces[IMAGE], object_path=path))
        if JOB in interfaces:
            jobs.append(read(Job, path, interfaces[JOB], object_path=path))
    return State(
        manager=manager,
        devices=tuple(sorted(devices, key=lambda device: device.path)),
        snapshots=tuple(sorted(snapshots, key=lambda snapshot: (snapshot.created_at, snapshot.id))),
        images=tuple(sorted(images, key=lambda image: image.object_path)),
        jobs=tuple(sorted(jobs, key=lambda job: (job.start_time, job.object_path))),
    )
