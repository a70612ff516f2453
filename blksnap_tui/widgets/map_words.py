# SPDX-License-Identifier: GPL-2.0-or-later
"""What is written on and in the map's box. Pure: from values to words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from blksnap_tui.heat.grid import Window
from blksnap_tui.messages import Wanted
from blksnap_tui.model import Device, State, Tracker
from blksnap_tui.units import format_count, format_share, format_size, format_time
from blksnap_tui.widgets.facts import changed_blocks

CONNECTING: Final = "looking for the service …"
NO_DEVICES: Final = "no devices yet\n\npress a to add an image file"


@dataclass(frozen=True, slots=True)
class Shown:
    """What the map shows: its mode and layout, the number increments are counted from, which part, and what was asked for."""

    mode: str
    layout: str
    since: int
    window: Window
    wanted: Wanted | None


def hint(state: State | None, device: Device | None, failure: str, info: Mapping[str, Any] | None) -> str:
    """
    Say why there is no map of the chosen device, and what to do about it; "" when there is one.

    `state` is None before the service was found, `failure` why the map could not be read, `info` the last reading.
    """
    if state is None:
        return CONNECTING
    if device is None:
        return "choose a device" if state.devices else NO_DEVICES
    if device.tracker is None:
        return f"{device.name} is not tracked\n\npress t to record what changes on it"
    if device.tracker.state == "broken":
        reason = (info or {}).get("reason") or device.tracker.last_reset
        return f"the tracker of {device.name} is broken\n\n{reason}\n\nd ends it, t begins again"
    if failure:
        return f"the map of {device.name} cannot be read\n\n{failure}"
    return ""


def titles(
    state: State | None,
    device: Device | None,
    shown: Shown,
    info: Mapping[str, Any] | None,
    *,
    restarted: str = "",
    now_us: int,
) -> tuple[str, str]:
    """Give what is written on the upper and the lower border: what is shown, and at which scale."""
    if device is None or device.tracker is None:
        return ("map" if device is None else device.name), ""
    tracker = device.tracker
    title = f"{device.name} · {_what(shown, tracker, info)}"
    if shown.layout == "hilbert":
        title += " · hilbert"
    if not tracker.map_is_live:
        snapshots = () if state is None else state.snapshots
        taken = [shot.taken_at for shot in snapshots if device.object_path in shot.devices]
        when = f", {format_time(max(taken), now_us=now_us)}" if taken else ""
        title += f" · as of snapshot #{tracker.changes_number}{when}"
    if restarted:
        title += f" · history restarted: {restarted}"
    if shown.wanted is None:
        return title, ""
    extent = format_size(tracker.capacity)
    window, size = shown.window, tracker.block_size
    if window.count < tracker.block_count:
        extent = f"{format_size(window.count * size)} at {format_size(window.first * size)} of {extent}"
    rows = shown.wanted.grid.rows
    per_dot = window.count / rows if shown.layout == "time" else shown.wanted.grid.blocks_per_bin
    return title, f"{extent} · {_scale(per_dot, size, 'row' if shown.layout == 'time' else 'dot')}"


def _what(shown: Shown, tracker: Tracker, info: Mapping[str, Any] | None) -> str:
    if shown.layout == "time":
        return "what changed last in which interval (newest right)"
    match shown.mode:
        case "since":
            changed = changed_blocks(info, shown.since)
            words = f"next increment since #{shown.since}"
            if changed is None:
                return words
            amount = format_size(changed * tracker.block_size)
            return f"{words}: {amount}, {format_share(changed, tracker.block_count)}"
        case "density":
            return f"share changed since #{shown.since}"
        case "frequency":
            return "how often it changed"
    return "age of the last change"


def _scale(blocks_per_dot: float, block_size: int, dot: str) -> str:
    if blocks_per_dot < 1:
        return f"1 block of {format_size(block_size)} ≈ {1 / blocks_per_dot:.1f} {dot}s"
    blocks = f"{blocks_per_dot:.1f}" if blocks_per_dot < 10 else format_count(round(blocks_per_dot))
    return f"1 {dot} ≈ {format_size(blocks_per_dot * block_size)} ({blocks} blocks)"
