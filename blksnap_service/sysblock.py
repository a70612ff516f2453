# SPDX-License-Identifier: GPL-2.0-or-later
"""What the kernel shows of block devices in sysfs: kinds nobody can track, and what lies above and below.

Only reads; the files are in memory, so it takes microseconds. A device that vanishes meanwhile has no properties.
Source: Documentation/ABI/stable/sysfs-block, Documentation/ABI/testing/sysfs-block-dm.
"""

from __future__ import annotations

import os
from pathlib import Path

_SYS = Path("/sys")


def node(number: int) -> Path:
    """Return the directory of a device, which is a directory in its disk's when it is a partition."""
    return (_SYS / "dev" / "block" / f"{os.major(number)}:{os.minor(number)}").resolve()


def kernel_name(number: int) -> str:
    """Return what the kernel calls a device, e.g. ``sdb1``."""
    return node(number).name


def dm_name(number: int) -> str:
    """Return the name of a device-mapper device; empty for any other one."""
    return _read(node(number) / "dm" / "name")


def dm_number(name: str) -> int:
    """Return the number of the device-mapper device of that name; 0 if there is none."""
    for file in _glob(_SYS / "block", "dm-*/dm/name"):
        if _read(file) == name:
            return _number(file.parents[1] / "dev")
    return 0


def ublk_number(ublk_id: int) -> int:
    """Return the number of ``/dev/ublkbN``; 0 if there is none."""
    return _number(_SYS / "block" / f"ublkb{ublk_id}" / "dev")


def has_class(name: str) -> bool:
    """Whether a driver that keeps its number in a class of that name is there."""
    return (_SYS / "class" / name / "major").exists()


def device_path(number: int) -> str:
    """Return where devtmpfs has the node of a device."""
    return "/dev/" + kernel_name(number).replace("!", "/")


def filter_name(number: int) -> str:
    """Return the name of the block device filter on a device; empty if there is none, or the kernel has no filters."""
    return _read(node(number) / "filter")


def filtered(name: str) -> list[int]:
    """Return the devices with the filter of that name."""
    files = [*_glob(_SYS / "block", "*/filter"), *_glob(_SYS / "block", "*/*/filter")]
    return [_number(file.with_name("dev")) for file in files if _read(file) == name]


def written(number: int) -> tuple[int, int, int, int]:
    """Return how many writes, bytes written, discards and bytes discarded a device counted (block/stat.rst).

    Raises ``OSError``, ``ValueError`` when it counts nothing.
    """
    fields = [int(field) for field in (node(number) / "stat").read_text(encoding="ascii").split()]
    if len(fields) < 7:
        raise ValueError("the device has no statistics")
    discards = (fields[11], fields[13] * 512) if len(fields) > 13 else (0, 0)
    return fields[4], fields[6] * 512, *discards


def unsupported(number: int) -> str:
    """Return why no block device can be put over this one (DESIGN section 4, rule 8); empty if one can."""
    directory = node(number)
    disk = directory if (directory / "queue").is_dir() else directory.parent
    if _read(directory / "ro") == "1":
        return "it is read-only"
    if (zoned := _read(disk / "queue" / "zoned")) not in {"", "none"}:
        return f"it is zoned ({zoned})"
    if _read(disk / "queue" / "dax") == "1":
        return "it can be mapped directly (dax), and such writes are not seen"
    if (integrity := _read(disk / "integrity" / "format")) not in {"", "none", "nop"}:
        return f"it keeps integrity data ({integrity})"
    return ""


def partitions(number: int) -> list[int]:
    """Return the partitions of a disk."""
    return [_number(file.with_name("dev")) for file in _glob(node(number), "*/partition")]


def holders(number: int) -> list[int]:
    """Return the devices made of this one: device-mapper, md."""
    return [_number(link / "dev") for link in _glob(node(number), "holders/*")]


def above(number: int) -> set[int]:
    """Return a device, its partitions, and all that is made of them."""
    found: set[int] = set()
    todo = [number]
    while todo:
        device = todo.pop()
        if device and device not in found:
            found.add(device)
            todo += partitions(device) + holders(device)
    return found


def _glob(directory: Path, pattern: str) -> list[Path]:
    # pathlib raises when what it looks into goes away meanwhile.
    try:
        return list(directory.glob(pattern))
    except OSError:
        return []


def _number(file: Path) -> int:
    major, _, minor = _read(file).partition(":")
    return os.makedev(int(major), int(minor)) if major.isdigit() and minor.isdigit() else 0


def _read(file: Path) -> str:
    try:
        return file.read_text(errors="replace").strip()
    except OSError:
        return ""
