# SPDX-License-Identifier: GPL-2.0-or-later
"""Block devices as udev and the kernel know them.

The only module that imports pyudev. Where there is no udev (containers) or no libudev, there are no devices and a
reason in the log; image files work all the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from blksnap_service.devices import Device, escape
from blksnap_service.storage import Identity

_log = logging.getLogger(__name__)

_SECTOR_BYTES = 512
"""sysfs counts in these whatever the device's own block size is (Documentation/ABI/stable/sysfs-block)."""
_SETTLE_S = 0.2
_NEVER_ORIGINS = re.compile(r"ram\d+|fd\d+|mtdblock\d+|nbd\d+p?\d*$")


class BlockDevices:
    """Lists block devices and tells when the list may have changed."""

    def __init__(self) -> None:
        """Load libudev; without it the list stays empty."""
        self._context: Any = None
        self._monitor: Any = None
        self._timer: asyncio.TimerHandle | None = None
        try:
            import pyudev

            self._context = pyudev.Context()
        except ImportError as error:
            # pyudev raises it from Context() too, when libudev.so.1 cannot be loaded.
            _log.warning("no block devices are listed: udev cannot be used (%s)", error)

    def list(self) -> dict[str, Device]:
        """Return the usable block devices by name. Reads sysfs and udev's database; blocks shortly."""
        if self._context is None:
            return {}
        mounts = mount_points()
        found = {}
        for entry in self._context.list_devices(subsystem="block"):
            # A device may vanish while it is looked at: pyudev then raises or gives None.
            with contextlib.suppress(LookupError, OSError, ValueError):
                device = _device(entry, mounts)
                if device is not None:
                    found[device.name] = device
        return found

    def watch(self, changed: Callable[[], None]) -> None:
        """Call ``changed`` a moment after devices came, went or changed, until ``close``."""
        if self._context is None:
            return
        import pyudev

        # Without a running udevd nobody sends events on udev's own channel.
        source = "udev" if Path("/run/udev/control").exists() else "kernel"
        try:
            self._monitor = pyudev.Monitor.from_netlink(self._context, source=source)
            self._monitor.filter_by("block")
            self._monitor.start()
        except OSError as error:
            self._monitor = None
            _log.warning("new block devices are not noticed: %s", (error.strerror or str(error)).lower())
            return
        loop = asyncio.get_running_loop()

        def settled() -> None:
            self._timer = None
            changed()

        def readable() -> None:
            while self._monitor.poll(timeout=0) is not None:
                pass
            if self._timer is None:
                self._timer = loop.call_later(_SETTLE_S, settled)

        loop.add_reader(self._monitor.fileno(), readable)

    def close(self) -> None:
        """Stop watching."""
        if self._monitor is not None:
            asyncio.get_running_loop().remove_reader(self._monitor.fileno())
            self._monitor = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def mount_points() -> Mapping[int, tuple[str, ...]]:
    """Return where each block device is mounted in this mount namespace, by device number (proc_pid_mountinfo(5))."""
    found: defaultdict[int, list[str]] = defaultdict(list)
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text(errors="replace").splitlines():
            fields = line.split(" ")
            major, minor = fields[2].split(":")
            target = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[4])
            found[os.makedev(int(major), int(minor))].append(target)
    return {number: tuple(dict.fromkeys(targets)) for number, targets in found.items()}


def _device(entry: Any, mounts: Mapping[int, tuple[str, ...]]) -> Device | None:
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
    queue = directory / "queue" if (directory / "queue").is_dir() else directory.parent / "queue"
    model = properties.get("ID_MODEL") or _read(directory / "device" / "model")
    return Device(
        name=escape(name),
        kind="block",
        path=_text(node),
        identity=Identity(number, 0),
        size=size,
        logical_block_size=int(_read(queue / "logical_block_size") or _SECTOR_BYTES),
        symlinks=tuple(sorted(_text(link) for link in entry.device_links)),
        read_only=_read(directory / "ro") == "1",
        model=_text(model).replace("_", " ").strip(),
        serial=_text(
            properties.get("ID_SERIAL_SHORT") or properties.get("ID_SERIAL") or _read(directory / "serial")
        ),
        id_type=_text(properties.get("ID_FS_TYPE", "")),
        id_label=_text(properties.get("ID_FS_LABEL", "")),
        id_uuid=_text(properties.get("ID_FS_UUID", "")),
        mount_points=mounts.get(number, ()),
    )


def _text(value: Any) -> str:
    """Return what the bus can carry: names in /dev and labels may be any bytes."""
    return str(value).encode("utf-8", "replace").decode()


def _read(file: Path) -> str:
    try:
        return file.read_text(errors="replace").strip()
    except OSError:
        return ""
