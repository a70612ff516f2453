# SPDX-License-Identifier: GPL-2.0-or-later
"""What the service knows about one block device or image file, and what its object is called."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from blksnap_service.storage import Identity

_PLAIN = re.compile(rb"[A-Za-z0-9]")


@dataclass(frozen=True, slots=True)
class Device:
    """A usable block device or an added image file. ``size`` and ``logical_block_size`` in bytes."""

    name: str
    """The last element of its object path; unique, and the same as long as the device is there."""
    kind: Literal["block", "file"]
    path: str
    identity: Identity
    size: int
    logical_block_size: int = 512
    symlinks: tuple[str, ...] = ()
    read_only: bool = False
    model: str = ""
    serial: str = ""
    id_type: str = ""
    id_label: str = ""
    id_uuid: str = ""
    mount_points: tuple[str, ...] = ()
    """Where it is mounted, or a node of its tracker."""
    nodes: tuple[int, ...] = ()
    """The numbers of devices its tracker made that are it to whoever uses them."""
    diskseq: int = 0
    """Another number is another medium or disk under the same name (Documentation/ABI/stable/sysfs-block); 0: not known."""
    stable_key: str = ""
    """What tells it from all others after a boot too (``persistent``); empty for an image file."""
    node_name: str = ""
    """What the name of its node is made of, when that is not to be the kernel's name: that one changes."""

    @property
    def number(self) -> int:
        """The device number; 0 for an image file."""
        return self.identity.device if self.kind == "block" else 0

    @property
    def origin(self) -> str:
        """What its backend calls it."""
        return origin_name(self.path)


def origin_name(path: str) -> str:
    """Return what backends call what is at a path: readable, at most 29 characters, the same for the same path."""
    digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:8]
    readable = re.sub(r"[^A-Za-z0-9]+", "-", Path(path).name)[:20].strip("-")
    return f"{readable}-{digest}" if readable else digest


def escape(text: str) -> str:
    """Write any text with ``[A-Za-z0-9_]`` only, so that different texts stay different.

    Other bytes, ``_`` among them, become ``_`` and two hexadecimal digits; an empty text becomes ``_`` (as
    sd_bus_path_encode(3), but a leading digit stays).
    """
    encoded = os.fsencode(text)
    parts = [chr(byte) if _PLAIN.match(bytes([byte])) else f"_{byte:02x}" for byte in encoded]
    return "".join(parts) or "_"
