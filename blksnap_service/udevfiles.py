# SPDX-License-Identifier: GPL-2.0-or-later
"""Which block devices are the data path's own, as it says in files that udev's rules read too.

``RUNTIME_DIR/udev/KERNELNAME`` has lines ``KEY=value`` (docs/datapath-protocol.md, "What udev is told"). They are written
before the device appears, so that no rule and no listing ever takes it for a disk of the user's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

DIRECTORY = "udev"
"""In the runtime directory."""
ROLES = ("origin", "device", "node", "lower", "image")


@dataclass(frozen=True, slots=True)
class OurDevice:
    """What a device is for: ``role`` is one of ``ROLES``, ``origin`` the kernel name of the origin it belongs to."""

    role: str
    origin: str


def read_ours(directory: Path | None) -> dict[str, OurDevice]:
    """Return what the data path says, by kernel name; nothing without a directory. Blocks shortly."""
    found: dict[str, OurDevice] = {}
    try:
        files = list(directory.iterdir()) if directory is not None else []
    except OSError:
        return found
    for file in files:
        try:
            lines = file.read_text(errors="replace").splitlines()
        except OSError:
            continue
        values = dict(line.split("=", 1) for line in lines if "=" in line)
        if (role := values.get("BLKSNAP_ROLE", "")) in ROLES:
            found[file.name] = OurDevice(role, values.get("BLKSNAP_ORIGIN", ""))
    return found
