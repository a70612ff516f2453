# SPDX-License-Identifier: GPL-2.0-or-later
"""The state of the service printed once, for scripts and for looking without a screen. No Textual."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
from typing import Any

from blksnap_tui.client import Client
from blksnap_tui.errors import BlksnapError
from blksnap_tui.model import State
from blksnap_tui.units import format_share, format_size, format_time


def state_as_json(state: State) -> dict[str, Any]:
    """Give the state as plain values: field names of `model`, sizes in bytes, times in µs since the epoch."""
    return dataclasses.asdict(state)


def state_as_text(state: State) -> str:
    """Give the state as lines for people."""
    version = "" if state.manager is None else f"blksnapd {state.manager.version}"
    lines = [version, ""] if version else []
    lines.append("devices" if state.devices else "no devices")
    for device in state.devices:
        tracker = device.tracker
        words = "not tracked"
        if tracker is not None:
            words = (
                f"{tracker.state} by {tracker.backend}, interval #{tracker.active_number}, use {tracker.node}"
            )
        lines.append(f"  {device.path}  {format_size(device.size)}  {words}")
    lines += ["", "snapshots" if state.snapshots else "no snapshots"]
    for snapshot in state.snapshots:
        names = ", ".join(
            path.rpartition("/")[2] if device is None else device.path
            for path, device in ((path, state.device(path)) for path in snapshot.devices)
        )
        used = f"{format_size(snapshot.storage_used)} of {format_size(snapshot.storage_limit)}"
        share = format_share(snapshot.storage_used, snapshot.storage_limit)
        lines.append(
            f"  {snapshot.id}  {snapshot.state}  {format_time(snapshot.taken_at)}  {names}  "
            f"storage {used} ({share})" + (f"  {snapshot.error}" if snapshot.error else "")
        )
        lines += [f"    {image.path or image.nbd_uri or image.error}" for image in state.images_of(snapshot)]
    return "\n".join(lines).strip("\n")


def print_state(bus: str, *, as_json: bool) -> int:
    """Connect, print, leave; gives the exit status."""

    async def read() -> State:
        async with Client(bus) as client:
            return client.state

    try:
        state = asyncio.run(read())
    except BlksnapError as error:
        sys.stderr.write(f"blksnap-tui: {error}\n")
        return 1
    sys.stdout.write((json.dumps(state_as_json(state), indent=2) if as_json else state_as_text(state)) + "\n")
    return 0
