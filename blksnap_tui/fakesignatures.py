# SPDX-License-Identifier: GPL-2.0-or-later
"""The types of what the fake service answers and signals, as in the interface description."""

from __future__ import annotations

from typing import Final

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
