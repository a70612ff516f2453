# SPDX-License-Identifier: GPL-2.0-or-later
"""Block devices as udev and the kernel know them, and when that changes.

The only module that imports pyudev. Where no udevd runs (containers) the kernel's own events and sysfs do, with fewer
names; without libudev there are no devices and a reason in the log. Image files work all the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import socket
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from blksnap_service.devices import Device, escape
from blksnap_service.mounts import MountWatch, mount_points
from blksnap_service.persistent import Record, Records, stable_key
from blksnap_service.sizes import SizeWatch
from blksnap_service.storage import Identity
from blksnap_service.udevfiles import OurDevice, read_ours

__all__ = ["BlockDevices", "mount_points"]

_log = logging.getLogger(__name__)

_SECTOR_BYTES = 512
"""sysfs counts in these whatever the device's own block size is (Documentation/ABI/stable/sysfs-block)."""
_SETTLE_S = 0.1
"""One change of a disk makes an event for each of its partitions: they are looked at together."""
_UDEV_S = 0.5
"""How long udevd has, after the kernel's event, to find out what a device is."""
_EVENTS_AT_ONCE = 64
_BUFFER_BYTES = 128 << 10
_NEVER_ORIGINS = re.compile(r"(fd|mtdblock|zram)\d+|nbd\d+(p\d+)?|blksnap-(image_)?\d+[:-]\d+")
"""The last are images of the kernel filter."""


class BlockDevices:
    """Lists block devices and tells when the list may have changed."""

    def __init__(self, ours: Path | None = None, records: Records | None = None) -> None:
        """Load libudev; without it the list stays empty.

        ``ours`` is the directory in which the data path says which devices are its own (``udevfiles``), ``records`` says
        which devices are tracked after every boot.
        """
        self._context: Any = None
        self._ours = ours
        self._records = records
        self._monitors: list[Any] = []
        self._others: list[MountWatch | SizeWatch] = []
        self._timer: asyncio.TimerHandle | None = None
        try:
            import pyudev

            self._context = pyudev.Context()
        except ImportError as error:
            # pyudev raises it from Context() too, when libudev.so.1 cannot be loaded.
            _log.warning("no block devices are listed: udev cannot be used (%s)", error)

    def list(self) -> dict[str, Device]:
        """Return the usable block devices by escaped kernel name. Reads sysfs and udev's database; blocks shortly.

        The data path's own devices are none of them; where such a node is mounted, its origin is.
        """
        if self._context is None:
            return {}
        ours = read_ours(self._ours)
        records = self._records.all() if self._records is not None else {}
        mounts = mount_points()
        nodes: defaultdict[str, list[int]] = defaultdict(list)
        found = {}
        for entry in self._context.list_devices(subsystem="block"):
            # A device may vanish while it is looked at: pyudev then raises or gives None.
            with contextlib.suppress(LookupError, OSError, ValueError):
                if (own := _own(entry, ours)) is not None:
                    if own.role in {"device", "node"}:
                        nodes[escape(own.origin)].append(entry.device_number)
                    continue
                device = _device(entry, mounts, records)
                if device is not None:
                    found[device.name] = device
        for name, numbers in nodes.items():
            if (device := found.get(name)) is not None:
                targets = [
                    target for number in (device.number, *numbers) for target in mounts.get(number, ())
                ]
                found[name] = replace(
                    device, nodes=tuple(sorted(numbers)), mount_points=tuple(dict.fromkeys(targets))
                )
        return found

    def watch(self, changed: Callable[[], None]) -> None:
        """Call ``changed`` a moment after devices or mounts came, went or changed, until ``close``."""
        loop = asyncio.get_running_loop()

        def settled() -> None:
            self._timer = None
            changed()

        def soon(delay_s: float) -> None:
            due = loop.time() + delay_s
            if self._timer is not None:
                if self._timer.when() <= due:
                    return
                self._timer.cancel()
            self._timer = loop.call_at(due, settled)

        def readable(monitor: Any, delay_s: float) -> None:
            drain(monitor)
            soon(delay_s)

        self._others.append(MountWatch(lambda: soon(_SETTLE_S)))
        if self._context is None:
            return
        self._others.append(SizeWatch(lambda: soon(_SETTLE_S)))
        # Both: udevd may be stopped, started or stuck at any time, and in a container its events do not arrive.
        for source in ("kernel", "udev"):
            if (monitor := self._monitor(source)) is not None:
                with_udev = source == "kernel" and Path("/run/udev/control").exists()
                delay_s = _UDEV_S if with_udev else _SETTLE_S
                self._monitors.append(monitor)
                loop.add_reader(monitor.fileno(), readable, monitor, delay_s)

    def _monitor(self, source: str) -> Any:
        import pyudev

        try:
            monitor = pyudev.Monitor.from_netlink(self._context, source=source)
            monitor.filter_by("block")
            with contextlib.suppress(OSError):
                # libudev asks for 128 MiB. What does not fit is looked up anew.
                monitor.set_receive_buffer_size(_BUFFER_BYTES)
            monitor.start()
        except OSError as error:
            _log.warning(
                "events of the %s about block devices are not heard: %s",
                source, (error.strerror or str(error)).lower(),
            )  # fmt: skip
            return None
        return monitor

    def close(self) -> None:
        """Stop watching."""
        loop = asyncio.get_running_loop() if self._monitors else None
        for monitor in self._monitors:
            if loop is not None:
                loop.remove_reader(monitor.fileno())
        self._monitors.clear()
        for other in self._others:
            other.close()
        self._others.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def drain(monitor: Any) -> None:
    """Take events from a monitor; what they say is looked up anew anyway, so a lost one (ENOBUFS) matters as little.

    A flood is left for the next time, so that others have their turn.
    """
    try:
        for _ in range(_EVENTS_AT_ONCE):
            if monitor.poll(timeout=0) is None:
                return
    except OSError:
        # pyudev sees that there is an error and does not take it, so it would be there for ever (netlink(7), ENOBUFS).
        with socket.socket(fileno=os.dup(monitor.fileno())) as same:
            same.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)


def _own(entry: Any, ours: Mapping[str, OurDevice]) -> OurDevice | None:
    """Return what a device is to the data path if it is one of its own, or a partition or device-mapper device of one."""
    name, directory = str(entry.sys_name), Path(entry.sys_path)
    if _read(directory / "dm" / "uuid").startswith("BLKSNAP-"):
        # Over a ublk device of ours; without a tracker (``boot``) right over the origin.
        below = [link.name for link in directory.glob("slaves/*")]
        return next(
            (ours[one] for one in below if one in ours and ours[one].role != "origin"), None
        ) or OurDevice("node", below[0] if below else "")
    if (directory / "partition").exists() and name not in ours:
        name = directory.parent.name
        return ours.get(name) if name.startswith("ublkb") else None
    own = ours.get(name)
    return own if own is not None and own.role != "origin" else None


def _device(
    entry: Any, mounts: Mapping[int, tuple[str, ...]], records: Mapping[str, Record]
) -> Device | None:
    """Return what is known about a device, or None if nobody would ever track it."""
    name, node = str(entry.sys_name), entry.device_node
    if node is None or _NEVER_ORIGINS.fullmatch(name):
        return None
    directory = Path(entry.sys_path)
    size = int(_read(directory / "size") or 0) * _SECTOR_BYTES
    if size == 0 or _read(directory / "hidden") == "1":
        return None
    number = entry.device_number
    properties = entry.properties
    disk = directory if (directory / "queue").is_dir() else directory.parent
    model = properties.get("ID_MODEL") or _read(directory / "device" / "model")
    key = stable_key(properties, name)
    record = records.get(key)
    return Device(
        name=escape(name),
        kind="block",
        path=_text(node),
        identity=Identity(number, 0),
        size=size,
        logical_block_size=int(_read(disk / "queue" / "logical_block_size") or _SECTOR_BYTES),
        symlinks=tuple(sorted(_text(link) for link in entry.device_links)),
        read_only=_read(directory / "ro") == "1",
        model=_text(model).replace("_", " ").strip(),
        serial=_text(
            properties.get("ID_SERIAL_SHORT") or properties.get("ID_SERIAL") or _read(directory / "serial")
        ),
        # Of an origin, ID_FS_TYPE is for others to keep away (62-blksnap.rules).
        id_type=_text(properties.get("BLKSNAP_FS_TYPE") or properties.get("ID_FS_TYPE", "")),
        id_label=_text(properties.get("ID_FS_LABEL", "")),
        id_uuid=_text(properties.get("ID_FS_UUID", "")),
        mount_points=mounts.get(number, ()),
        # The table of a device-mapper device may be another one any time; that is no other device.
        diskseq=0 if (directory / "dm").is_dir() else int(_read(disk / "diskseq") or 0),
        stable_key=key,
        node_name=record.name if record is not None else "",
    )


def _text(value: Any) -> str:
    """Return what the bus can carry: names in /dev and labels may be any bytes."""
    return str(value).encode("utf-8", "replace").decode()


def _read(file: Path) -> str:
    try:
        return file.read_text(errors="replace").strip()
    except OSError:
        return ""
