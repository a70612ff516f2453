# SPDX-License-Identifier: GPL-2.0-or-later
"""
The service's methods as coroutines with plain arguments; `client.Client` adds state and events to them.

Each raises `errors.ServiceError` or a subclass when the service refuses, and the errors of the connection.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Literal

from blksnap_tui import model
from blksnap_tui.errors import ProtocolError
from blksnap_tui.events import MapFile
from blksnap_tui.model import MANAGER_PATH, SERVICE_NAME, ObjectPath
from blksnap_tui.wire import Link, Reply, Variant, close_fds

READ_TIMEOUT_S = 25.0
ACT_TIMEOUT_S = 180.0  # a person may be typing a password
TAKE_TIMEOUT_S = 900.0  # and difference storage may have to be allocated

RANGES_PER_CALL = 16_384
"""Not more than the service gives at most: a page that is not full is then the last."""

View = Literal["taken", "live"]


def checked(reply: Reply, signature: str, *, fds: int = 0) -> tuple[Any, ...]:
    """
    Give the values of a reply that is as the interface says.

    Raises ProtocolError for other types or another number of descriptors; those that came are closed.
    """
    if reply.signature == signature and len(reply.fds) == fds:
        return reply.body
    close_fds(reply.fds)
    raise ProtocolError(
        f"the service answered with values of type {reply.signature!r} and {len(reply.fds)} descriptors"
        f" instead of {signature!r} and {fds}: is it of another version?"
    )


def _options(**values: tuple[str, Any]) -> dict[str, Any]:
    """Build an `a{sv}` without what is 0, "" or False: `block_size=("u", 4096)` becomes `block-size`."""
    return {key.replace("_", "-"): Variant(kind, value) for key, (kind, value) in values.items() if value}


def absolute(path: str) -> str:
    """Make a path mean the same in the service's working directory; the service follows links."""
    return os.path.abspath(path)  # noqa: PTH100 - `resolve` would follow links in another mount namespace


class Calls:
    """The methods of every interface, called on object paths."""

    def __init__(self, connection: Link) -> None:
        self._connection = connection

    async def _call(
        self,
        path: str,
        interface: str,
        member: str,
        signature: str,
        *body: object,
        fds: Sequence[int] = (),
        timeout_s: float = ACT_TIMEOUT_S,
        ask: bool = True,
    ) -> Reply:
        return await self._connection.call(
            SERVICE_NAME,
            path,
            interface,
            member,
            signature,
            body,
            fds=fds,
            timeout_s=timeout_s,
            interactive=ask,
        )

    async def _manager(
        self,
        member: str,
        signature: str,
        *body: object,
        fds: Sequence[int] = (),
        timeout_s: float = ACT_TIMEOUT_S,
    ) -> Reply:
        return await self._call(
            MANAGER_PATH, model.MANAGER, member, signature, *body, fds=fds, timeout_s=timeout_s
        )

    async def resolve_device(self, path: str) -> ObjectPath:
        """Find the device object of a device node, a link to one, or an added image file."""
        reply = await self._manager("ResolveDevice", "sa{sv}", absolute(path), {}, timeout_s=READ_TIMEOUT_S)
        return ObjectPath(checked(reply, "o")[0])

    async def add_image_file(self, path: str) -> ObjectPath:
        """Make a device object of a regular file, so that it can be tracked."""
        reply = await self._manager("AddImageFile", "sa{sv}", absolute(path), {})
        return ObjectPath(checked(reply, "o")[0])

    async def create_snapshot(
        self,
        devices: Sequence[str],
        *,
        limit: int = 0,
        storage: str = "",
        storage_fd: int | None = None,
        chunk_size: int = 0,
        take: bool = True,
        attach: bool = False,
        description: str = "",
        hold: bool = False,
    ) -> ObjectPath:
        """
        Create a snapshot of one instant over `devices` (object paths), and take it unless told otherwise.

        `limit` is the most bytes its difference storage may grow to, `storage` a file, directory or device
        for it, or `storage_fd` an open one (sent, not consumed). `attach` starts tracking where it is not on
        yet, `hold` ties the snapshot to this connection.
        """
        options = _options(
            limit=("t", limit),
            storage=("s", absolute(storage) if storage else ""),
            chunk_size=("u", chunk_size),
            attach=("b", attach),
            description=("s", description),
            hold=("b", hold),
        )
        if not take:
            options["take"] = Variant("b", False)
        fds = () if storage_fd is None else (storage_fd,)
        if fds:
            options["storage-fd"] = Variant("h", 0)
        reply = await self._manager(
            "CreateSnapshot", "aoa{sv}", list(devices), options, fds=fds, timeout_s=TAKE_TIMEOUT_S
        )
        return ObjectPath(checked(reply, "o")[0])

    async def collect(self) -> tuple[ObjectPath, ...]:
        """Have the service adopt snapshots it does not know yet; returns them."""
        reply = await self._manager("Collect", "a{sv}", {})
        return tuple(map(ObjectPath, checked(reply, "ao")[0]))

    async def attach(
        self, device: str, *, backend: str = "", block_size: int = 0, persistent: bool = False
    ) -> None:
        """Start tracking; "" and 0 leave the choice to the service, `persistent` repeats it at boot."""
        options = _options(backend=("s", backend), block_size=("u", block_size), persistent=("b", persistent))
        await self._call(device, model.DEVICE, "Attach", "a{sv}", options)

    async def detach(self, device: str, *, force: bool = False) -> None:
        """Stop tracking a device; its history ends."""
        await self._call(device, model.DEVICE, "Detach", "a{sv}", _options(force=("b", force)))

    async def get_info(self, device: str, *, ask: bool = True) -> Mapping[str, Any]:
        """
        Take one consistent reading of a tracker: numbers, counters, blocks changed since each number.

        Here and below: unless `ask`, nobody is asked for a password for it.
        """
        reply = await self._call(
            device,
            model.TRACKER,
            "GetInfo",
            "a{sv}",
            {},
            timeout_s=ACT_TIMEOUT_S if ask else READ_TIMEOUT_S,
            ask=ask,
        )
        info: dict[str, Any] = checked(reply, "a{sv}")[0]
        return info

    async def summarize(
        self,
        device: str,
        first: int,
        count: int,
        bins: int,
        mode: str = "age",
        *,
        since: int = 0,
        ask: bool = True,
    ) -> tuple[bytes, int]:
        """
        Have `count` blocks from `first` drawn together into `bins` bytes.

        `age`: 0 never, 255 changed in the current interval, 254 in the one before, …; the newest of a bin
        counts. `density`: share of the bin's blocks changed after number `since`, 255 = all. `frequency`: at how many of the takes
        that the service has seen the bin had changed, 255 = all. Returns the bytes and a number that changes when the map does.
        """
        options = {"since": Variant("u", since)} if mode == "density" else {}
        reply = await self._call(
            device,
            model.TRACKER,
            "Summarize",
            "ttusa{sv}",
            first,
            count,
            bins,
            mode,
            options,
            timeout_s=READ_TIMEOUT_S,
            ask=ask,
        )
        levels, sequence = checked(reply, "ayt")
        if len(levels) != bins:
            raise ProtocolError(f"asked for a summary of {bins} bins, got {len(levels)}")
        return bytes(levels), int(sequence)

    async def read_map(self, device: str, offset: int, length: int, *, ask: bool = True) -> bytes:
        """
        Read `length` bytes of the map, at most 1 MiB, from block `offset` on; `open_map` gives all of it.
        """
        reply = await self._call(device, model.TRACKER, "ReadMap", "tua{sv}", offset, length, {}, ask=ask)
        return bytes(checked(reply, "ay")[0])

    async def open_map(self, device: str, *, view: View = "taken") -> MapFile:
        """Get the map as a file: the one frozen at the last take, or a reading of the live one."""
        reply = await self._call(device, model.TRACKER, "OpenMap", "a{sv}", _options(view=("s", view)))
        _, info = checked(reply, "ha{sv}", fds=1)
        return MapFile(reply.fds[0], info)

    async def changed_ranges(
        self, device: str, since: int, *, generation_id: str = "", view: View = "taken"
    ) -> AsyncIterator[tuple[int, int]]:
        """
        Yield (offset, length) in bytes of everything changed after number `since`, in order.

        Raises GenerationChangedError when `since` or `generation_id` no longer compare with the map, also in
        the middle.
        """
        options = _options(generation_id=("s", generation_id), view=("s", view))
        offset = 0
        pending: tuple[int, int] | None = None
        while True:
            reply = await self._call(
                device,
                model.TRACKER,
                "GetChangedRanges",
                "utua{sv}",
                since,
                offset,
                RANGES_PER_CALL,
                options,
            )
            ranges, following = checked(reply, "a(tt)t")
            for start, length in ranges:
                if pending is not None and pending[0] + pending[1] == start:
                    pending = (pending[0], pending[1] + length)
                    continue
                if pending is not None:
                    yield pending
                pending = (start, length)
            if len(ranges) < RANGES_PER_CALL or following <= offset:
                break
            offset = following
        if pending is not None:
            yield pending

    async def mark_dirty(self, device: str, ranges: Sequence[tuple[int, int]]) -> None:
        """Mark byte ranges as changed; all or, when one is wrong, none."""
        pairs = [list(pair) for pair in ranges]
        await self._call(device, model.TRACKER, "MarkDirty", "a(tt)a{sv}", pairs, {})

    async def mark_all_dirty(self, device: str) -> None:
        """Mark the whole device as changed."""
        await self._call(device, model.TRACKER, "MarkAllDirty", "a{sv}", {})

    async def add_to_snapshot(self, snapshot: str, device: str) -> None:
        """Add a device to a snapshot that is created but not taken."""
        await self._call(snapshot, model.SNAPSHOT, "AddDevice", "oa{sv}", device, {})

    async def take_snapshot(self, snapshot: str) -> None:
        """Take a snapshot that was created without."""
        await self._call(snapshot, model.SNAPSHOT, "Take", "a{sv}", {}, timeout_s=TAKE_TIMEOUT_S)

    async def destroy_snapshot(self, snapshot: str) -> None:
        """Destroy a snapshot with its images; what was not copied from them is gone."""
        await self._call(snapshot, model.SNAPSHOT, "Destroy", "a{sv}", {}, timeout_s=TAKE_TIMEOUT_S)

    async def release_snapshot(self, snapshot: str) -> None:
        """Untie a snapshot from the connection that holds it."""
        await self._call(snapshot, model.SNAPSHOT, "Release", "a{sv}", {})

    async def open_image(self, image: str) -> int:
        """Get a read-only descriptor of an image, which the caller owns."""
        reply = await self._call(image, model.IMAGE, "Open", "a{sv}", {})
        checked(reply, "h", fds=1)
        return reply.fds[0]

    async def export_image(self, image: str) -> str:
        """Have an image served over NBD; returns its URI."""
        reply = await self._call(image, model.IMAGE, "Export", "a{sv}", {})
        return str(checked(reply, "s")[0])

    async def cancel_job(self, job: str) -> None:
        """Ask a job to stop."""
        await self._call(job, model.JOB, "Cancel", "a{sv}", {})
