# SPDX-License-Identifier: GPL-2.0-or-later
"""Which block devices are to be tracked after every boot, written where udev and early boot can read it.

One file per device in ``/etc/blksnap/attach``; its name is what tells the device from all others (``stable_key``), its
lines are ``KEY=value``. dbus/udev/62-blksnap.rules looks for the same names, takes in the lines, hides the device and
starts the unit that attaches it. /etc, because /var may be on a disk that is mounted later. What only the service needs
to know is in its catalogue. All functions block.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from blksnap_service import durable, errors
from blksnap_service.devices import Device

_log = logging.getLogger(__name__)

SYSTEM_DIR = Path("/etc/blksnap/attach")
_KEY_CHARACTERS = re.compile(r"[A-Za-z0-9_.:+-]{1,200}")
"""What a file name and a value of udev carry as they are."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,63}")
"""Part of the name of a device-mapper device and of a unit, unescaped; leaves room for ``blksnap-`` and a suffix."""
_PROPERTIES = (
    ("DM_UUID", "dm"),
    ("ID_PART_ENTRY_UUID", "partuuid"),
    ("MD_UUID", "md"),
    ("ID_WWN_WITH_EXTENSION", "wwn"),
    ("ID_SERIAL", "serial"),
    ("ID_FS_UUID_ENC", "fsuuid"),
)
"""udev properties that outlive a boot, best first, in the order of 62-blksnap.rules."""
_WORDS = {True: "yes", False: "no"}
_DISK_ONLY = {"ID_WWN_WITH_EXTENSION", "ID_SERIAL", "MD_UUID"}
"""Partitions have them from their disk."""


@dataclass(frozen=True, slots=True)
class Record:
    """A device to be tracked always. ``name`` names its node and its unit; ``block_size`` 0: by the rule."""

    key: str
    name: str
    owner_uid: int
    backend: str
    block_size: int
    bypass: bool = True
    """Whether it is to be used untracked when it cannot be tracked at boot, rather than not at all."""


def stable_key(properties: Mapping[str, str], kernel_name: str) -> str:
    """Return what tells a block device from all others after a boot too, as far as udev knows.

    Without anything better that is its kernel name, which is right where disks are always found in the same order.
    """
    whole = properties.get("DEVTYPE", "disk") == "disk"
    for name, prefix in _PROPERTIES:
        value = properties.get(name, "")
        if (whole or name not in _DISK_ONLY) and _KEY_CHARACTERS.fullmatch(value):
            return f"{prefix}-{value}"
    return f"name-{kernel_name}"


class Records:
    """The directory of records."""

    def __init__(self, directory: Path = SYSTEM_DIR) -> None:
        """Use ``directory``, which need not be there."""
        self._directory = directory

    def all(self) -> dict[str, Record]:
        """Return all records by key. What is no record is left alone, with a line in the log."""
        found = {}
        try:
            files = sorted(self._directory.iterdir())
        except OSError:
            return {}
        for file in files:
            if file.name.startswith(".") or not _KEY_CHARACTERS.fullmatch(file.name):
                continue
            try:
                found[file.name] = _parse(file.name, file.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                _log.error("%s is not used: %s", file, error)
        return found

    def named(self, name: str) -> Record:
        """Return the record of that name. Raises ``errors.NotFound``."""
        for record in self.all().values():
            if record.name == name:
                return record
        raise errors.NotFound(
            f"no device is to be tracked as {name}: there is no file in {self._directory} that says"
            f" BLKSNAP_ATTACH={name}; attach it with the option persistent"
        )

    def remember(self, device: Device, *, owner_uid: int, backend: str, block_size: int) -> Record:
        """Write down that a device is to be tracked always; one that is written down keeps its name.

        Raises ``errors.NotSupported`` for a device without a name that can be kept, ``errors.Failed``.
        """
        if not device.stable_key:
            raise errors.NotSupported(f"{device.path} is no block device: it needs no record")
        known = self.all()
        if (before := known.get(device.stable_key)) is not None:
            record = replace(before, owner_uid=owner_uid, backend=backend, block_size=block_size)
        else:
            name = _free_name(device, {record.name for record in known.values()})
            record = Record(device.stable_key, name, owner_uid, backend, block_size)
        text = (
            f"# {device.path} is tracked after every boot. Written by blksnapd; see blksnapctl(8).\n"
            f"BLKSNAP_ATTACH={record.name}\nBLKSNAP_ATTACH_UID={record.owner_uid}\n"
            f"BLKSNAP_ATTACH_BACKEND={record.backend}\nBLKSNAP_ATTACH_BLOCK_SIZE={record.block_size}\n"
            f"BLKSNAP_ATTACH_BYPASS={_WORDS[record.bypass]}\n"
        )
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            durable.replace_bytes(self._directory / record.key, text.encode())
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise errors.Failed(
                f"{self._directory} cannot be written, so {device.path} cannot be tracked after a boot: {reason}"
            ) from error
        return record

    def forget(self, key: str) -> None:
        """Remove a record if it is there. Raises ``errors.Failed``."""
        if not key:
            return
        try:
            (self._directory / key).unlink(missing_ok=True)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise errors.Failed(f"{self._directory / key} cannot be removed: {reason}") from error


def _free_name(device: Device, taken: set[str]) -> str:
    mapped = [
        link.removeprefix("/dev/mapper/") for link in device.symlinks if link.startswith("/dev/mapper/")
    ]
    base = re.sub(r"[^A-Za-z0-9_.:]+", "-", mapped[0] if mapped else Path(device.path).name).strip("-.:_")[
        :56
    ]
    base = base or "disk"
    name, count = base, 1
    while name in taken:
        count += 1
        name = f"{base}-{count}"
    return name


def _parse(key: str, text: str) -> Record:
    """Return the record in a file. Raises ``ValueError`` with what is wrong."""
    values = {}
    for line in text.splitlines():
        name, _, value = line.partition("=")
        if line and not line.startswith("#"):
            values[name] = value
    name = values.get("BLKSNAP_ATTACH", "")
    if not _NAME.fullmatch(name):
        raise ValueError(f"BLKSNAP_ATTACH={name!r} is no name for a node")
    numbers = {}
    for field in ("BLKSNAP_ATTACH_UID", "BLKSNAP_ATTACH_BLOCK_SIZE"):
        value = values.get(field, "0")
        if not value.isascii() or not value.isdigit():
            raise ValueError(f"{field}={value!r} is no number")
        numbers[field] = int(value)
    bypass = values.get("BLKSNAP_ATTACH_BYPASS", "yes")
    if bypass not in _WORDS.values():
        raise ValueError(f"BLKSNAP_ATTACH_BYPASS={bypass!r} is neither yes nor no")
    return Record(
        key,
        name,
        numbers["BLKSNAP_ATTACH_UID"],
        values.get("BLKSNAP_ATTACH_BACKEND", ""),
        numbers["BLKSNAP_ATTACH_BLOCK_SIZE"],
        bypass == _WORDS[True],
    )
