# SPDX-License-Identifier: GPL-2.0-or-later
"""A data path that serves no I/O: its operations, and its maps by the rules of ``changemap``; the socket is ``control``'s.

For what the real one cannot be made to do at a given moment: refuse, answer late or wrong, vanish. Tests with the real
one are in tests/bus/test_service_process.py and tests/nbd.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import struct
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blksnap_service.cbt import GenerationId, Geometry, Number, Numbers, Reading, View
from blksnap_service.changemap import ChangeMap
from tests.unit.fakes.control import ControlServer, Refusal
from tests.unit.fakes.kept import Origin, Snapshot

__all__ = ["FakeDatapath", "Refusal", "running"]


class FakeDatapath(ControlServer):
    """Keeps origins and snapshots; everything a test may want to make true is an attribute."""

    def __init__(self, runtime_dir: Path) -> None:
        self.origins: dict[str, Origin] = {}
        self.snapshots: dict[str, Snapshot] = {}
        self.bypassed: dict[str, str] = {}
        """Origins whose generation ends with the next take, and why."""
        self.abilities: dict[str, tuple[bool, str]] = {"ublk": (True, ""), "dm": (True, "")}
        """What ``hello`` says of parts of the kernel: available, reason."""
        self.live: dict[str, int] = {}
        """Sizes of live device-mapper devices one can get under."""
        self.frozen: list[str] = []
        """What the descriptors of the last take were open on."""
        super().__init__(runtime_dir)

    def close(self) -> None:
        """Vanish, as a killed process does: connections end, files are closed."""
        super().close()
        for origin in self.origins.values():
            origin.close()
        for snapshot in self.snapshots.values():
            os.close(snapshot.fd)
        self.origins.clear()
        self.snapshots.clear()

    def write(self, origin: str, offset: int, length: int) -> None:
        """Do to the map what a client's write does."""
        self.origins[origin].map.record_write(offset, length)
        self.origins[origin].counters["writes"] += 1
        self.sync(origin)

    def take_over(self, origin: str, path: Path, *, top: str, reset: str) -> None:
        """Have an origin that a data path before this one has left, with a new generation."""
        fd = os.open(path, os.O_RDWR)
        try:
            _, maps = self._origin_add(
                [fd],
                origin,
                0,
                str(uuid.uuid4()),
                0,
                1,
                read_only=False,
                label=str(path),
                front="ublk",
                top=top,
            )
        finally:
            os.close(fd)
        for one in maps:
            os.close(one)
        self.origins[origin].reset = reset

    def sync(self, origin: str) -> None:
        """Bring memory files in step with the map, as the engine does at once."""
        one = self.origins[origin]
        numbers, geometry, data = one.map.numbers, one.map.geometry, one.map.read(View.LIVE).data
        if one.epoch == (one.map.generation, numbers.base):
            os.pwrite(one.live, data, 0)
        else:
            os.close(one.live)
            one.live, one.epoch = _memory(data), (one.map.generation, numbers.base)
            one.live_sequence += 1
        generation = uuid.UUID(one.map.generation).int
        words = (numbers.base << 32 | numbers.active, generation >> 64, generation & (1 << 64) - 1)
        sizes = (geometry.size, geometry.block_size, one.live_sequence, 1 + one.takes)
        os.pwrite(one.page, struct.pack("<8s7Q", b"BLKSNAP1", *words, *sizes), 0)

    def fail(self, snapshot: str, origin: str, errno: int, message: str) -> None:
        """Fail a snapshot as the engine does, and tell."""
        one = self.snapshots[snapshot]
        one.state, one.error, one.errno = "failed", message, errno
        self.tell(event="snapshot.failed", snapshot=snapshot, origin=origin, errno=errno, message=message)

    # Operations; each returns what is "ok" and the descriptors that go with it.

    def _hello(self, _fds: list[int], protocol: int) -> tuple[Any, list[int]]:
        if protocol != 1:
            raise Refusal("protocol", f"protocol {protocol} is not spoken here")
        abilities = {
            name: {"available": available, "reason": reason}
            for name, (available, reason) in self.abilities.items()
        }
        return {"protocol": 1, "version": "fake", "pid": os.getpid(), "features": ["nbd"], **abilities}, []

    def _subscribe(self, _fds: list[int]) -> tuple[Any, list[int]]:
        return {}, []

    def _list(self, _fds: list[int]) -> tuple[Any, list[int]]:
        return {
            "origins": [self._reading(name) for name in self.origins],
            "snapshots": [self._snapshot(name) for name in self.snapshots],
        }, []

    def _origin_add(
        self,
        fds: list[int],
        origin: str,
        block_size: int,
        generation: str,
        base: int,
        active: int,
        read_only: bool,
        label: str,
        front: str = "nbd",
        top: str = "",
        insert: str = "",
    ) -> tuple[Any, list[int]]:
        if insert:
            fds.insert(0, _memory(bytes(self.live[insert])))
        status = os.fstat(fds[0])
        identity = (status.st_dev, status.st_ino)
        if origin in self.origins or any(one.identity == identity for one in self.origins.values()):
            raise Refusal("exists", f"{label} is already an origin")
        geometry = Geometry.of(status.st_size, block_size)
        if len(fds) == 2:
            data = os.pread(fds[1], geometry.block_count + 1, 0)
            if len(data) != geometry.block_count or max(data) > active - base:
                raise Refusal("invalid", "the saved map does not fit")
            reading = Reading(GenerationId(generation), geometry, Numbers(base, Number(active)), data)
            kept = ChangeMap.restore(reading)
        else:
            kept = ChangeMap(status.st_size, GenerationId(generation), block_size)
        self.origins[origin] = Origin(
            os.dup(fds[0]),
            label,
            kept,
            identity,
            live=_memory(kept.read(View.LIVE).data),
            page=_memory(bytes(4096)),
            epoch=(kept.generation, kept.numbers.base),
            front=front,
            top=top,
            insert=insert,
            ublk_id=len(self.origins) if front == "ublk" else -1,
        )
        return self._reading(origin), self._maps(origin)

    def _origin_info(self, _fds: list[int], origin: str) -> tuple[Any, list[int]]:
        return self._reading(origin), []

    def _origin_maps(self, _fds: list[int], origin: str) -> tuple[Any, list[int]]:
        return self._reading(origin), self._maps(origin)

    def _origin_mark(self, _fds: list[int], origin: str, ranges: list[list[int]]) -> tuple[Any, list[int]]:
        one = self._origin(origin)
        one.counters["marks"] += 1
        return {"blocks": one.map.mark_dirty([(offset, length) for offset, length in ranges])}, []

    def _origin_mark_all(self, _fds: list[int], origin: str) -> tuple[Any, list[int]]:
        return {"blocks": self._origin(origin).map.mark_all_dirty()}, []

    def _origin_remove(self, _fds: list[int], origin: str, force: bool) -> tuple[Any, list[int]]:
        one = self._origin(origin)
        held = self._held(origin)
        if (held or one.clients) and not force:
            raise Refusal("busy", f"origin {origin} has {len(held)} snapshots and {one.clients} clients")
        live, taken, page = self._maps(origin)
        os.close(page)
        answer = self._reading(origin), [live, taken]
        for snapshot in held:
            self.snapshots[snapshot].state, self.snapshots[snapshot].error = (
                "failed",
                "the origin was removed",
            )
        self.origins.pop(origin).close()
        return answer

    def _snapshot_create(
        self, fds: list[int], snapshot: str, limit: int, low_space: int, step: int, chunk_size: int
    ) -> tuple[Any, list[int]]:
        status = os.fstat(fds[0])
        if (status.st_dev, status.st_ino) in [one.identity for one in self.origins.values()]:
            raise Refusal("invalid", "the storage is an origin")
        assert stat.S_ISREG(status.st_mode)
        assert fcntl.fcntl(fds[0], fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
        self.snapshots[snapshot] = Snapshot(os.dup(fds[0]), limit, chunk_size or 65_536)
        return self._snapshot(snapshot), []

    def _snapshot_take(
        self,
        _fds: list[int],
        snapshot: str,
        devices: list[dict[str, Any]],
        timeout_ms: int,
        freeze_fds: int = 0,
    ) -> tuple[Any, list[int]]:
        one, out, images = self._held_snapshot(snapshot), list[int](), []
        for device in devices:
            self._origin(device["origin"])
        assert len(_fds) == freeze_fds
        self.frozen = [str(Path(f"/proc/self/fd/{fd}").readlink()) for fd in _fds]
        for device in devices:
            name = device["origin"]
            origin, reset = self.origins[name], self.bypassed.pop(name, "")
            if reset:
                origin.map = ChangeMap(origin.map.geometry.size, GenerationId(device["next_generation"]))
            origin.map.take(GenerationId("unused"))
            origin.takes += 1
            numbers = origin.map.numbers
            images.append(
                {
                    "origin": name,
                    "size": origin.map.geometry.size,
                    "generation": origin.map.generation,
                    "number": numbers.changes,
                    "base": numbers.base,
                    "oldest": numbers.oldest,
                    "writable": device["writable"],
                    "chunk_size": one.chunk_size,
                    "chunk_count": 1,
                    "reset": reset,
                }
            )
            out += self._maps(name)
        one.state, one.taken_at = "taken", time.time_ns() // 1000
        hidden = ("chunk_count", "reset")
        one.images = [
            {key: value for key, value in image.items() if key not in hidden}
            | {"error": "", "path": self._image_path(image["origin"])}
            for image in images
        ]
        return {"taken_at": one.taken_at, "images": images}, out

    def _image_path(self, origin: str) -> str:
        """Make something for an image's device: a file, of which a test knows the name."""
        if self.origins[origin].front == "nbd":
            return ""
        path = self.runtime_dir / f"ublkb-image-{len(list(self.runtime_dir.glob('ublkb-image-*')))}"
        path.write_bytes(b"as it was")
        return str(path)

    def _snapshot_info(self, _fds: list[int], snapshot: str) -> tuple[Any, list[int]]:
        return self._snapshot(snapshot), []

    def _snapshot_destroy(self, _fds: list[int], snapshot: str) -> tuple[Any, list[int]]:
        self._held_snapshot(snapshot)
        os.close(self.snapshots.pop(snapshot).fd)
        return {}, []

    # What answers are made of.

    def _origin(self, name: str) -> Origin:
        if name not in self.origins:
            raise Refusal("not-found", f"origin {name} is not tracked")
        return self.origins[name]

    def _held_snapshot(self, name: str) -> Snapshot:
        if name not in self.snapshots:
            raise Refusal("not-found", f"there is no snapshot {name}")
        return self.snapshots[name]

    def _held(self, origin: str) -> list[str]:
        return [
            name
            for name, one in self.snapshots.items()
            if origin in [image["origin"] for image in one.images]
        ]

    def _maps(self, origin: str) -> list[int]:
        one = self._origin(origin)
        self.sync(origin)
        return [os.dup(one.live), _memory(one.map.read(View.TAKEN).data), os.dup(one.page)]

    def _reading(self, origin: str) -> dict[str, Any]:
        one = self._origin(origin)
        self.sync(origin)
        numbers, geometry = one.map.numbers, one.map.geometry
        return {
            "origin": origin,
            "label": one.label,
            "kind": "file" if one.front == "nbd" else "block",
            "state": one.state,
            "reason": one.reason,
            "size": geometry.size,
            "logical_block_size": 512,
            "read_only": False,
            "block_size": geometry.block_size,
            "block_count": geometry.block_count,
            "generation": one.map.generation,
            "base": numbers.base,
            "active": numbers.active,
            "changes": numbers.changes,
            "oldest": numbers.oldest,
            "live_sequence": one.live_sequence,
            "taken_sequence": 1 + one.takes,
            "taken_base": numbers.base,
            "nbd_socket": str(self.runtime_dir / "nbd" / f"{origin}.sock"),
            "clients": one.clients,
            "snapshots": self._held(origin),
            "counters": one.counters,
            "front": one.front,
            "node": self._node(one),
            "ublk_id": one.ublk_id,
            "top": one.top,
            "insert": one.insert,
            "reset": one.reset,
        }

    def _node(self, one: Origin) -> str:
        if one.front == "nbd":
            return ""
        name = one.insert or one.top
        return f"/dev/mapper/{name}" if name else f"/dev/ublkb{one.ublk_id}"

    def _snapshot(self, snapshot: str) -> dict[str, Any]:
        one = self._held_snapshot(snapshot)
        return {
            "snapshot": snapshot,
            "state": one.state,
            "error": one.error,
            "errno": one.errno,
            "limit": one.limit,
            "used": one.used,
            "allocated": one.limit // 8,
            "low_space": one.limit // 10,
            "chunk_size": one.chunk_size,
            "low": one.low,
            "taken_at": one.taken_at,
            "images": one.images,
        }


def _memory(data: bytes) -> int:
    fd = os.memfd_create("fake-map", os.MFD_CLOEXEC)
    os.write(fd, data)
    return fd


@contextlib.contextmanager
def running(runtime_dir: Path) -> Iterator[FakeDatapath]:
    """Keep a fake data path for as long as the block lasts."""
    fake = FakeDatapath(runtime_dir)
    try:
        yield fake
    finally:
        fake.close()
