# SPDX-License-Identifier: GPL-2.0-or-later
"""
A service inside the process, for looking at the terminal program and testing it without a bus.

`FakeService.connect` stands where `wire.Connection` stands, so the whole client is the real one. It keeps the rules a viewer can see
(numbers, maps, states, order of signals), holds no data and enforces little: the service proper is tested elsewhere.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from blksnap_tui import model
from blksnap_tui.client import OBJECT_MANAGER, PROPERTIES
from blksnap_tui.fakelink import OWNER, FakeLink, Refusal
from blksnap_tui.fakemap import FakeMap
from blksnap_tui.fakesignatures import SIGNATURES, job_properties
from blksnap_tui.model import MANAGER_PATH, ROOT_PATH, SERVICE_NAME, ObjectPath
from blksnap_tui.wire import DBUS, DBUS_PATH, Signal

START_US = 1_790_000_000_000_000
"""The fake's time of day at the beginning: 2026-09-21 14:13:20 UTC."""


@dataclass
class FakeService:
    """The service's objects and what its methods do to them; `refuse` makes the next call of a method fail."""

    bus_up: bool = True
    service_up: bool = True
    objects: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    maps: dict[str, FakeMap] = field(default_factory=dict)
    refuse: dict[str, Refusal] = field(default_factory=dict)
    calls: list[tuple[str, tuple[Any, ...]]] = field(default_factory=list)
    links: list[FakeLink] = field(default_factory=list)
    now_us: int = START_US
    made: int = 0
    locked: bool = False
    answering: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.answering.set()
        backend = {"available": True, "reason": "", "snapshots": True, "live-map": True, "live-attach": False}
        missing = {**backend, "available": False, "reason": "the kernel has no blksnap module"}
        self.objects[MANAGER_PATH] = {
            model.MANAGER: {
                "Version": "0.1.0",
                "Backends": {"nbd": backend, "blkfilter": missing},
                "DefaultStorageDirectory": "/var/lib/blksnap",
            }
        }

    # ---- what a test does

    def connect(
        self, bus: str, on_signal: Callable[[Signal], None], on_closed: Callable[[str], None]
    ) -> FakeLink:
        """Stand in for `wire.Connection`."""
        return FakeLink(self, bus, on_signal, on_closed)

    def add_device(self, path: str, size: int, **properties: Any) -> ObjectPath:
        """Put a device on the bus."""
        name = path.rpartition("/")[2]
        escaped = "".join(c if c.isalnum() else f"_{ord(c):02x}" for c in name)
        where = ObjectPath(f"{ROOT_PATH}/devices/{escaped}")
        while where in self.objects:
            where = ObjectPath(f"{where}_")
        shown = {
            "Path": path,
            "Symlinks": [],
            "DeviceNumber": 0,
            "Size": size,
            "LogicalBlockSize": 512,
            "ReadOnly": False,
            "Model": "",
            "Serial": "",
            "IdType": "ext4",
            "IdLabel": "",
            "IdUUID": "",
            "MountPoints": [],
            "Tracked": False,
            "Snapshots": [],
            "Backends": ["nbd"],
            **properties,
        }
        self._add(where, {model.DEVICE: shown})
        return where

    def track(self, device: str, shown: FakeMap | None = None) -> None:
        """Attach a tracker with a map of its own."""
        properties = self.objects[device][model.DEVICE]
        size = properties["Size"]
        block_size = 65_536
        while size > block_size * 2_097_152 and block_size < 64 << 20:
            block_size *= 2
        blocks = -(-size // block_size)
        self.maps[device] = shown = shown or FakeMap(bytearray(blocks))
        tracker = {
            "Backend": "nbd",
            "Node": f"nbd+unix:///?socket=/run/blksnap/nbd/{device.rpartition('/')[2]}.sock",
            "State": "tracking",
            "MapIsLive": True,
            "Capacity": size,
            "BlockSize": block_size,
            "BlockCount": blocks,
            "GenerationId": "6f1c2a50-3c1e-4a0b-9d55-0c9f6a1be201",
            "ChangesNumber": shown.active - 1,
            "OldestNumber": 0,
            "AttachedAt": self.now_us - 90 * 60_000_000,
            "AttachedByUID": 0,
            "LastReset": "attached for the first time",
        }
        self._add(device, {model.TRACKER: tracker})
        self._change(device, model.DEVICE, Tracked=True)

    def write(self, device: str, first: int, count: int) -> None:
        """Have somebody write to a tracked device."""
        self.maps[device].write(first, count)

    def restart_history(self, device: str, reason: str) -> None:
        """Begin a new generation, as when bytes were missed."""
        self.maps[device] = FakeMap(bytearray(len(self.maps[device].values)))
        generation = f"00000000-0000-4000-8000-{len(self.calls):012d}"
        self.set_tracker(device, GenerationId=generation, ChangesNumber=0, OldestNumber=0, LastReset=reason)
        self._emit(OWNER, device, model.TRACKER, "GenerationStarted", generation, reason)

    def add_job(self, operation: str, devices: Sequence[str], *, progress: float) -> ObjectPath:
        """Have the service be busy with something that can be cancelled."""
        job = ObjectPath(f"{ROOT_PATH}/jobs/{len(self.calls)}")
        self._add(job, {model.JOB: job_properties(operation, devices, progress, self.now_us)})
        return job

    def stop(self) -> None:
        """Take the service off the bus."""
        self.service_up = False
        self._owner(OWNER, "")

    def start(self) -> None:
        """Bring the service to the bus."""
        self.service_up = True
        self._owner("", OWNER)

    def cut(self) -> None:
        """End every connection to the bus, and refuse new ones."""
        self.bus_up = False
        links, self.links = self.links, []
        for link in links:
            link.closed("the message bus closed the connection")

    # ---- signals

    def _emit(self, sender: str, path: str, interface: str, member: str, *body: Any) -> None:
        for link in list(self.links):
            link.on_signal(Signal(sender, path, interface, member, SIGNATURES.get(member, ""), body))

    def _owner(self, old: str, new: str) -> None:
        self._emit(DBUS, DBUS_PATH, DBUS, "NameOwnerChanged", SERVICE_NAME, old, new)

    def _add(self, path: str, interfaces: dict[str, dict[str, Any]]) -> None:
        self.objects.setdefault(path, {}).update(interfaces)
        self._emit(OWNER, ROOT_PATH, OBJECT_MANAGER, "InterfacesAdded", path, interfaces)

    def _remove(self, path: str, *interfaces: str) -> None:
        for name in interfaces:
            del self.objects[path][name]
        if not self.objects[path]:
            del self.objects[path]
        self._emit(OWNER, ROOT_PATH, OBJECT_MANAGER, "InterfacesRemoved", path, list(interfaces))

    def _change(self, path: str, interface: str, **values: Any) -> None:
        self.objects[path][interface].update(values)
        self._emit(OWNER, path, PROPERTIES, "PropertiesChanged", interface, values, [])

    def set_snapshot(self, path: str, **values: Any) -> None:
        """Change what a snapshot shows."""
        self._change(path, model.SNAPSHOT, **values)

    def set_tracker(self, path: str, **values: Any) -> None:
        """Change what a tracker shows."""
        self._change(path, model.TRACKER, **values)

    # ---- methods, by member name

    def answer(self, path: str, member: str, body: Sequence[Any]) -> tuple[tuple[Any, ...], tuple[int, ...]]:
        """Do what a method does; gives body and descriptors of the reply."""
        if member != "GetManagedObjects" and path not in self.objects:
            raise Refusal("NotFound", f"there is no object {path}")
        self.calls.append((member, tuple(body)))
        refusal = self.refuse.pop(member, None)
        if refusal is not None:
            raise refusal
        method: Callable[..., tuple[Any, ...]] = getattr(self, f"_on_{member}")
        if member == "OpenMap":
            fd, info = method(path, *body)
            return (0, info), (fd,)
        return method(path, *body), ()

    def _map(self, path: str) -> FakeMap:
        if path not in self.maps:
            name = self.objects[path][model.DEVICE]["Path"]
            raise Refusal("NotTracked", f"{name} is not tracked: attach it first")
        return self.maps[path]

    def _on_GetManagedObjects(self, _path: str) -> tuple[Any, ...]:  # noqa: N802
        return (
            {
                path: {name: dict(shown) for name, shown in kept.items()}
                for path, kept in self.objects.items()
            },
        )

    def _on_AddImageFile(self, _path: str, name: str, _options: dict[str, Any]) -> tuple[Any, ...]:  # noqa: N802
        if "missing" in name:
            raise Refusal(
                "NotFound", f"{name}: no such file; create it first, e.g. with truncate -s 10G {name}"
            )
        return (self.add_device(name, 1 << 30),)

    def _on_Attach(self, path: str, _options: dict[str, Any]) -> tuple[Any, ...]:  # noqa: N802
        self.track(path)
        return ()

    def _on_Detach(self, path: str, _options: dict[str, Any]) -> tuple[Any, ...]:  # noqa: N802
        self._map(path)
        del self.maps[path]
        self._remove(path, model.TRACKER)
        self._change(path, model.DEVICE, Tracked=False)
        return ()

    def _on_CreateSnapshot(self, _path: str, devices: list[str], options: dict[str, Any]) -> tuple[Any, ...]:  # noqa: N802
        for device in devices:
            self._map(device).take()
            self.set_tracker(device, ChangesNumber=self.maps[device].active - 1)
        self.made += 1
        key = f"{self.made:08x}-1f0e-4d2c-8a11-5f0c2e9b7d{self.made:02x}"
        path = ObjectPath(f"{ROOT_PATH}/snapshots/{key.replace('-', '_')}")
        images = []
        for device in devices:
            image = f"{ROOT_PATH}/images/{key.replace('-', '_')}_{device.rpartition('/')[2]}"
            images.append(image)
            shown = {
                "Path": "",
                "NbdUri": f"nbd+unix:///{key}?socket=/run/blksnap/nbd/{device.rpartition('/')[2]}.sock",
                "Device": device,
                "Snapshot": path,
                "Size": self.objects[device][model.DEVICE]["Size"],
                "ReadOnly": True,
                "GenerationId": self.objects[device][model.TRACKER]["GenerationId"],
                "ChangesNumber": self.maps[device].active - 1,
                "Error": "",
            }
            self._add(image, {model.IMAGE: shown})
        snapshot = {
            "Id": key,
            "State": "taken",
            "Devices": list(devices),
            "Images": images,
            "CreatedAt": self.now_us,
            "TakenAt": self.now_us,
            "StoragePath": options.get("storage", "/var/lib/blksnap"),
            "StorageUsed": 0,
            "StorageAllocated": 128 << 20,
            "StorageLimit": options.get("limit", 10 << 30),
            "OwnerUID": 0,
            "Held": options.get("hold", False),
            "Description": options.get("description", ""),
            "Error": "",
        }
        self._add(path, {model.SNAPSHOT: snapshot})
        self.now_us += 60_000_000
        return (path,)

    def _on_Destroy(self, path: str, _options: dict[str, Any]) -> tuple[Any, ...]:  # noqa: N802
        for image in self.objects[path][model.SNAPSHOT]["Images"]:
            self._remove(image, model.IMAGE)
        self._remove(path, model.SNAPSHOT)
        return ()

    def _on_Summarize(  # noqa: N802
        self, path: str, first: int, count: int, bins: int, mode: str, options: dict[str, Any]
    ) -> tuple[Any, ...]:
        shown = self._map(path)
        return shown.summary(first, count, bins, mode, options.get("since", 0)), shown.sequence

    def _on_ReadMap(  # noqa: N802
        self, path: str, offset: int, length: int, _options: dict[str, Any]
    ) -> tuple[Any, ...]:
        return (bytes(self._map(path).values[offset : offset + length]),)

    def _on_GetInfo(self, path: str, _options: dict[str, Any]) -> tuple[Any, ...]:  # noqa: N802
        shown = self._map(path)
        changed, total = {}, 0
        for number in range(shown.active, 0, -1):
            total += shown.values.count(number)
            changed[str(number - 1)] = total
        counted = {"writes": 18 * shown.sequence, "written-bytes": 1_179_648 * shown.sequence}
        return ({"changes-number": shown.active - 1, "changed-blocks": changed, **counted},)

    def _on_GetChangedRanges(  # noqa: N802
        self, path: str, since: int, offset: int, most: int, options: dict[str, Any]
    ) -> tuple[Any, ...]:
        shown, size = self._map(path), self.objects[path][model.TRACKER]["BlockSize"]
        capacity = self.objects[path][model.DEVICE]["Size"]
        values = shown.values if options.get("view") == "live" else shown.taken
        hits = [
            [at * size, min(size, capacity - at * size)]
            for at in range(offset // size, len(values))
            if values[at] > since
        ]
        page = hits[:most]
        return page, (page[-1][0] + page[-1][1] if len(hits) > most else capacity)

    def _on_OpenMap(self, path: str, options: dict[str, Any]) -> tuple[Any, ...]:  # noqa: N802
        shown = self._map(path)
        fd = os.memfd_create("map", os.MFD_CLOEXEC)
        os.write(fd, shown.taken if options.get("view") == "taken" else shown.values)
        return fd, {"base": 0, "active": shown.active, "block-size": 65_536, "block-count": len(shown.values)}

    def _on_MarkDirty(self, path: str, ranges: list[list[int]], _options: dict[str, Any]) -> tuple[Any, ...]:  # noqa: N802
        size = self.objects[path][model.TRACKER]["BlockSize"]
        for offset, length in ranges:
            if not length or offset + length > self.objects[path][model.DEVICE]["Size"]:
                raise Refusal(
                    "InvalidArgument", f"{offset}:{length} is not inside the device: nothing was marked"
                )
        for offset, length in ranges:
            self._map(path).write(offset // size, -(-(offset + length) // size) - offset // size)
        return ()

    def _on_MarkAllDirty(self, path: str, _options: dict[str, Any]) -> tuple[Any, ...]:  # noqa: N802
        shown = self._map(path)
        shown.write(0, len(shown.values))
        return ()

    def _on_Cancel(self, path: str, _options: dict[str, Any]) -> tuple[Any, ...]:  # noqa: N802
        self._remove(path, model.JOB)
        return ()

    def _on_Export(self, path: str, _options: dict[str, Any]) -> tuple[Any, ...]:  # noqa: N802
        return (self.objects[path][model.IMAGE]["NbdUri"],)
