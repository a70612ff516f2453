# SPDX-License-Identifier: GPL-2.0-or-later
"""What is written on and in the map's box. Pure: from values to words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from blksnap_tui.heat.grid import Grid
from blksnap_tui.model import Device, State
from blksnap_tui.units import format_count, format_size, format_time

CONNECTING: Final = "looking for the service …"
NO_DEVICES: Final = "no devices yet\n\npress a to add an image file"


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
    state: State, device: Device | None, grid: Grid | None, mode: str, *, now_us: int
) -> tuple[str, str]:
    """Give what is written on the upper and the lower border: what is shown, and at which scale."""
    if device is None or device.tracker is None:
        return ("map" if device is None else device.name), ""
    tracker = device.tracker
    shown = "age of the last change" if mode == "age" else f"share changed since #{tracker.shown_since}"
    title = f"{device.name} · {shown}"
    if not tracker.map_is_live:
        taken = [shot.taken_at for shot in state.snapshots if device.object_path in shot.devices]
        when = f", {format_time(max(taken), now_us=now_us)}" if taken else ""
        title += f" · as of snapshot #{tracker.changes_number}{when}"
    if grid is None:
        return title, ""
    return title, f"{format_size(tracker.capacity)} · {_scale(grid.blocks_per_bin, tracker.block_size)}"


def _scale(blocks_per_dot: float, block_size: int) -> str:
    if blocks_per_dot < 1:
        return f"1 block of {format_size(block_size)} ≈ {1 / blocks_per_dot:.1f} dots"
    blocks = f"{blocks_per_dot:.1f}" if blocks_per_dot < 10 else format_count(round(blocks_per_dot))
    return f"1 dot ≈ {format_size(blocks_per_dot * block_size)} ({blocks} blocks)"
