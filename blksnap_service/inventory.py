# SPDX-License-Identifier: GPL-2.0-or-later
"""Which devices there are: block devices from udev and image files that were added.

It names them and finds them; whether they are tracked is for ``trackers``. Watchers are told of every device that
comes, goes or changes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import stat
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from blksnap_service import errors
from blksnap_service.catalogue import ImageEntry, Table
from blksnap_service.devices import Device, escape
from blksnap_service.fds import OwnedFd
from blksnap_service.storage import Identity
from blksnap_service.udev import BlockDevices

_log = logging.getLogger(__name__)


class Watcher(Protocol):
    """Is told about devices; must not raise."""

    def device_added(self, device: Device) -> None:
        """A device is there from now on."""

    def device_changed(self, device: Device) -> None:
        """Something about a device is different; its name and path are not."""

    def device_removed(self, device: Device) -> None:
        """A device is gone."""


class Follower(Protocol):
    """Is told what happened to block devices that are or should be tracked; must not raise."""

    def device_found(self, device: Device) -> None:
        """A device that is to be tracked always is there."""

    def device_lost(self, device: Device) -> None:
        """The device is gone, or another medium is in its place; its object stays."""

    def device_resized(self, device: Device) -> None:
        """The device has another size than before."""


class Inventory:
    """All devices by object name."""

    def __init__(
        self,
        table: Table[ImageEntry],
        blocks: BlockDevices,
        watcher: Watcher,
        pinned: Callable[[], Collection[str]] = tuple,
        follower: Follower | None = None,
    ) -> None:
        """Keep added image files in ``table``; nothing is listed before ``load``.

        ``pinned`` gives the names of devices that stay listed even when they are gone: those that are tracked.
        ``follower`` is told about those, and about devices that are to be tracked always.
        """
        self._table = table
        self._pinned = pinned
        self._follower = follower
        self._blocks = blocks
        self._watcher = watcher
        self._devices: dict[str, Device] = {}
        self._block_names: dict[str, str] = {}
        """Object names by what ``BlockDevices`` calls them: an image file may have had a name first."""
        self._lost: set[str] = set()
        self._lock = asyncio.Lock()
        self._blocks_lock = asyncio.Lock()
        """Its own, so that an image file on a disk that hangs holds up no block device."""
        self._stale = False
        self._refreshing: asyncio.Task[None] | None = None

    def __iter__(self) -> Iterator[Device]:
        """Iterate over a copy of all devices."""
        return iter(list(self._devices.values()))

    def get(self, name: str) -> Device:
        """Return a device by object name. Raises ``errors.NotFound``."""
        device = self._devices.get(name)
        if device is None:
            raise errors.NotFound(f"there is no device {name} (any more)")
        return device

    def by_key(self, key: str) -> Device:
        """Return the block device of that ``stable_key``. Raises ``errors.NotFound``."""
        for device in self._devices.values():
            if device.stable_key == key:
                return device
        raise errors.NotFound(f"there is no block device {key} (any more)")

    async def load(self, needed: frozenset[str]) -> None:
        """List everything and start watching for new block devices.

        Image files that are missing are forgotten, unless their names are ``needed``: those stay in the catalogue.
        """
        for entry in self._table:
            try:
                device = await asyncio.to_thread(_image_file_at, entry.key, entry.path)
            except errors.BlksnapError as error:
                _log.warning("%s", error)
                if entry.key not in needed:
                    await self._table.drop(entry.key)
            else:
                self._put(device)
        # First, so that nothing comes unseen between the first look and the first event.
        self._blocks.watch(self.refresh_soon)
        await self.refresh()

    def close(self) -> None:
        """Stop watching."""
        self._blocks.close()
        if self._refreshing is not None:
            self._refreshing.cancel()

    def keep(self, device: Device) -> None:
        """List a device as it was last known: it is tracked, although its name is gone."""
        if device.kind == "block":
            self._block_names.setdefault(device.name, device.name)
        self._put(device)

    async def add_image(self, path: str, fd: OwnedFd | None = None) -> Device:
        """List a regular file as a device; the same file again is the same device. ``fd`` is consumed.

        With ``fd``, the file is the one the caller opened (read-write), and an empty ``path`` means its name.
        Raises ``errors.NotFound``, ``errors.InvalidArgument`` (no absolute path, not a regular file, a size that cannot
        be tracked), ``errors.NotAvailable`` (the service may not write it).
        """
        opened = None
        if fd is not None:
            with fd:
                path, opened = await asyncio.to_thread(_name_of, fd, path)
        if not path.startswith("/") or "\0" in path:
            raise errors.InvalidArgument(f"the image file {path!r} is no absolute path")
        async with self._lock:
            new = await asyncio.to_thread(_image_file, "", path)
            if opened not in {None, new.identity}:
                raise errors.InvalidArgument(f"{path} is not the file that was opened any more")
            for device in list(self._devices.values()):
                if device.kind == "file" and await asyncio.to_thread(_same_file, device, new):
                    if device.path == new.path:
                        self._put(replace(new, name=device.name))
                    return self._devices[device.name]
            new = replace(new, name=self._free_name(escape(Path(new.path).name)))
            await self._table.put(ImageEntry(key=new.name, path=new.path))
            self._put(new)
        return new

    async def resolve(self, path: str) -> Device:
        """Return the device a node, a link to one, or an added image file is; the node of a tracker is its origin.

        Raises ``errors.NotFound``.
        """
        status = None
        real = path
        if path.startswith("/") and "\0" not in path:
            real = await asyncio.to_thread(os.path.realpath, path)
            with contextlib.suppress(OSError):
                status = await asyncio.to_thread(os.stat, real)
        found = self._find(path, real, status)
        if found is None and status is not None and stat.S_ISBLK(status.st_mode):
            # It may be younger than the last look: a node is used as soon as it is there.
            await self._refresh_blocks()
            found = self._find(path, real, status)
        if found is None:
            raise errors.NotFound(
                f"{path} is no block device this service can use and no added image file; an image file has to be"
                " added first"
            )
        return found

    def _find(self, path: str, real: str, status: os.stat_result | None) -> Device | None:
        """Return the device at ``real``, where ``path`` leads to, or the one that is called so."""
        for device in self._devices.values():
            if status is not None and (
                device.identity == Identity.of(status) or status.st_rdev in device.nodes
            ):
                return device
        for device in self._devices.values():
            if device.path in {path, real} or path in device.symlinks:
                return device
        return None

    async def refresh(self) -> None:
        """Look again at block devices and at the image files' sizes; tell what changed."""
        await self._refresh_blocks()
        async with self._lock:
            for device in list(self._devices.values()):
                if device.kind == "file":
                    await self._refresh_image(device)

    def refresh_soon(self) -> None:
        """Look again at block devices, once for any number of calls until that is done."""
        self._stale = True
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.get_running_loop().create_task(self._refresh_while_stale())

    async def _refresh_while_stale(self) -> None:
        while self._stale:
            self._stale = False
            await self._refresh_blocks()

    async def _refresh_blocks(self) -> None:
        async with self._blocks_lock:
            blocks = await asyncio.to_thread(self._blocks.list)
            pinned = self._pinned()
            for listed, name in list(self._block_names.items()):
                device = self._devices.get(name)
                if listed in blocks or device is None:
                    continue
                if name in pinned:
                    self._note_lost(device)
                    continue
                del self._block_names[listed], self._devices[name]
                self._lost.discard(name)
                self._watcher.device_removed(device)
            for listed, found in blocks.items():
                if listed not in self._block_names:
                    self._block_names[listed] = self._name_of_block(listed)
                name = self._block_names[listed]
                self._put_block(replace(found, name=name), tracked=name in pinned)

    def _name_of_block(self, listed: str) -> str:
        holder = self._devices.get(listed)
        taken = self._table.get(listed) is not None or (holder is not None and holder.kind == "file")
        return self._free_name(listed) if taken else listed

    def _put_block(self, now: Device, *, tracked: bool) -> None:
        before = self._devices.get(now.name)
        if tracked and before is not None and before.diskseq and now.diskseq not in {0, before.diskseq}:
            self._note_lost(before)
        self._put(now)
        if not tracked:
            self._lost.discard(now.name)
            if self._follower is not None and before is None and now.node_name:
                self._follower.device_found(now)
        elif self._follower is not None and before is not None and before.size != now.size:
            self._follower.device_resized(now)

    def _note_lost(self, device: Device) -> None:
        if device.name not in self._lost:
            self._lost.add(device.name)
            if self._follower is not None:
                self._follower.device_lost(device)

    async def _refresh_image(self, device: Device) -> None:
        try:
            now = await asyncio.to_thread(_image_file_at, device.name, device.path)
        except errors.BlksnapError:
            # A tracked file is still open in the data path; an untracked one says so when it is attached.
            return
        self._put(now)

    def _put(self, device: Device) -> None:
        before = self._devices.get(device.name)
        self._devices[device.name] = device
        if before is None:
            self._watcher.device_added(device)
        elif before != device:
            self._watcher.device_changed(device)

    def _free_name(self, base: str) -> str:
        name, count = base, 1
        while name in self._devices or self._table.get(name) is not None:
            # "__" comes out of no escaping.
            count += 1
            name = f"{base}__{count}"
        return name


def _same_file(device: Device, new: Device) -> bool:
    """Whether a listed file is the new one, by the same name or another. Blocks."""
    if device.path == new.path:
        return True
    if device.identity != new.identity:
        return False
    # The number of a removed file is given to the next one: is it still there?
    try:
        return Identity.of(Path(device.path).stat()) == new.identity
    except OSError:
        return False


def _image_file(name: str, path: str) -> Device:
    """Return the regular file ``path`` as a device. Blocks. Raises as ``Inventory.add_image``."""
    path = os.path.realpath(path)
    try:
        status = Path(path).stat()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise errors.NotFound(f"the image file {path} cannot be used: {reason}") from error
    if any("\ud800" <= character <= "\udfff" for character in path):
        # Neither the bus nor the data path's protocol could carry it.
        raise errors.InvalidArgument(f"the image file {path!r} has a name that is not UTF-8")
    if not stat.S_ISREG(status.st_mode):
        raise errors.InvalidArgument(f"{path} is not a regular file; block devices need not be added")
    if status.st_size == 0 or status.st_size % 512:
        raise errors.InvalidArgument(
            f"the image file {path} has {status.st_size} bytes; a disk has a multiple of 512 and more than 0"
        )
    return Device(
        name=name,
        kind="file",
        path=path,
        identity=Identity.of(status),
        size=status.st_size,
        read_only=not os.access(path, os.R_OK | os.W_OK),
    )


def _image_file_at(name: str, path: str) -> Device:
    """Return what is known now of a listed file. Blocks. Raises as ``_image_file``.

    Links were followed when it was added: who may write its directory must not have another file tracked by a link.
    """
    device = _image_file(name, path)
    if device.path != path:
        raise errors.NotFound(f"the image file {path} is not there any more: the name leads to {device.path}")
    return device


def _name_of(fd: OwnedFd, path: str) -> tuple[str, Identity]:
    """Return the name of the file a caller opened, and which it is. Blocks. Raises ``errors.InvalidArgument``."""
    import fcntl

    if fcntl.fcntl(fd.fileno(), fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDWR:
        raise errors.InvalidArgument("path-fd is not open for reading and writing")
    name = path or str(Path(f"/proc/self/fd/{fd.fileno()}").readlink())
    # The service opens the name when it attaches: it must lead to what the caller could open.
    identity = Identity.of(os.fstat(fd.fileno()))
    try:
        same = Identity.of(Path(name).stat()) == identity
    except (OSError, ValueError):
        same = False
    if not same:
        raise errors.InvalidArgument(f"path-fd is not the file {name}")
    return name, identity
