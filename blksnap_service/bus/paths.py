# SPDX-License-Identifier: GPL-2.0-or-later
"""Names and object paths of this service (DESIGN section 6)."""

from __future__ import annotations

from typing import Final

from blksnap_service import errors

BUS_NAME: Final = "org.blksnap.Blksnap1"
ROOT: Final = "/org/blksnap/Blksnap1"
MANAGER_PATH: Final = f"{ROOT}/Manager"

MANAGER: Final = f"{BUS_NAME}.Manager"
DEVICE: Final = f"{BUS_NAME}.Device"
TRACKER: Final = f"{BUS_NAME}.Tracker"
SNAPSHOT: Final = f"{BUS_NAME}.Snapshot"
IMAGE: Final = f"{BUS_NAME}.Image"
JOB: Final = f"{BUS_NAME}.Job"

_DEVICES: Final = f"{ROOT}/devices/"


def device_path(name: str) -> str:
    """Return the object path of a device by its name."""
    return _DEVICES + name


def device_name(path: str) -> str:
    """Return the name in the object path of a device. Raises ``errors.NotFound`` for any other path."""
    if not path.startswith(_DEVICES):
        raise errors.NotFound(f"{path} is no device of this service")
    return path.removeprefix(_DEVICES)


def snapshot_path(snapshot_id: str) -> str:
    """Return the object path of a snapshot by its uuid."""
    return f"{ROOT}/snapshots/{snapshot_id.replace('-', '_')}"


def job_path(number: int) -> str:
    """Return the object path of a job."""
    return f"{ROOT}/jobs/{number}"


def image_path(snapshot_id: str, name: str) -> str:
    """Return the object path of a snapshot's image of a device."""
    return f"{ROOT}/images/{snapshot_id.replace('-', '_')}_{name}"
