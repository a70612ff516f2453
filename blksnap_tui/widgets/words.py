# SPDX-License-Identifier: GPL-2.0-or-later
"""How states and fill levels are written: always a word or number with the glyph, never colour alone."""

from __future__ import annotations

from typing import Any, Final, Literal

from rich.text import Text
from textual.app import App

from blksnap_tui.model import Device, Snapshot
from blksnap_tui.units import format_share, format_size

Tone = Literal["good", "busy", "bad", "dim", "plain"]

_VARIABLES: Final[dict[Tone, str]] = {"good": "text-success", "busy": "text-warning", "bad": "text-error"}

TRACKER_STATES: Final[dict[str, tuple[str, Tone]]] = {
    "tracking": ("●", "good"),
    "recovering": ("◐", "busy"),
    "broken": ("✕", "bad"),
}

SNAPSHOT_STATES: Final[dict[str, tuple[str, Tone]]] = {
    "created": ("○", "dim"),
    "taken": ("●", "good"),
    "failed": ("✕", "bad"),
    "destroying": ("◐", "busy"),
}

UNTRACKED: Final = ("○", "dim")

# From here on a difference storage is worth a warning, and an alarm. The service raises LowSpace at nine tenths by default.
LOW_SHARE, FULL_SHARE = 0.75, 0.9


def style_of(app: App[Any], tone: Tone) -> str:
    """Give the Rich style for a tone in the present theme."""
    if tone == "dim":
        return "dim"
    value = app.theme_variables.get(_VARIABLES.get(tone, ""), "")
    return value if value.startswith("#") else ""


def device_state(device: Device) -> tuple[str, str, Tone]:
    """Give glyph, word and tone of a device's tracker."""
    if device.tracker is None:
        return UNTRACKED[0], "untracked", "dim"
    glyph, tone = TRACKER_STATES.get(device.tracker.state, ("?", "busy"))
    return glyph, device.tracker.state, tone


def snapshot_state(snapshot: Snapshot) -> tuple[str, str, Tone]:
    """Give glyph, word and tone of a snapshot."""
    glyph, tone = SNAPSHOT_STATES.get(snapshot.state, ("?", "busy"))
    return glyph, snapshot.state, tone


def fill_tone(used: int, limit: int) -> Tone:
    """Give the tone of a storage that is `used` of `limit` full."""
    if limit <= 0:
        return "plain"
    share = used / limit
    return "bad" if share >= FULL_SHARE else "busy" if share >= LOW_SHARE else "good"


def fill_bar(share: float, width: int) -> tuple[str, str]:
    """Draw a share as a line of `width` cells: the full part and the empty part, which differ without colour too.

    Something is never drawn as nothing, nor less than all as all.
    """
    full = round(min(max(share, 0.0), 1.0) * width)
    if share > 0:
        full = max(full, 1)
    if share < 1:
        full = min(full, width - 1)
    return "━" * full, "╌" * (width - full)


def storage(app: App[Any], snapshot: Snapshot, width: int, *, brief: bool) -> Text:
    """Write how full a snapshot's difference storage is: bar, share, and bytes used unless `brief`."""
    used, limit = snapshot.storage_used, snapshot.storage_limit
    if limit <= 0:
        return Text(f"{format_size(used)} used")
    style = style_of(app, fill_tone(used, limit))
    full, empty = fill_bar(used / limit, width)
    amount = "" if brief else f" {format_size(used)}"
    words = f" {format_share(used, limit):>6}{amount} of {format_size(limit)}"
    alarming = used >= LOW_SHARE * limit
    return Text.assemble((full, style), (empty, "dim"), (words, style if alarming else ""))
