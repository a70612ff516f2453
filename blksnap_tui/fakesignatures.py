# SPDX-License-Identifier: GPL-2.0-or-later
"""What the fake service needs of the interface description: types of answers and signals, properties of a job."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from blksnap_tui.client import OBJECTS

SIGNATURES: Final = {
    "GetManagedObjects": OBJECTS,
    "AddImageFile": "o",
    "CreateSnapshot": "o",
    "Summarize": "ayt",
    "ReadMap": "ay",
    "GetInfo": "a{sv}",
    "GetChangedRanges": "a(tt)t",
    "OpenMap": "ha{sv}",
    "Export": "s",
    "InterfacesAdded": "oa{sa{sv}}",
    "InterfacesRemoved": "oas",
    "PropertiesChanged": "sa{sv}as",
    "GenerationStarted": "ss",
}
"""Of methods their answers, of signals their bodies; members not named have nothing."""


def job_properties(operation: str, devices: Sequence[str], progress: float, now_us: int) -> dict[str, Any]:
    """Give the properties of a job that is under way."""
    return {
        "Operation": operation,
        "Progress": progress,
        "ProgressValid": True,
        "Bytes": 1 << 30,
        "Rate": 0,
        "StartTime": now_us,
        "ExpectedEndTime": 0,
        "Objects": list(devices),
        "StartedByUID": 0,
        "Cancelable": True,
    }
