# SPDX-License-Identifier: GPL-2.0-or-later
"""The service's signals in words, for the log and for notices. Pure."""

from __future__ import annotations

from blksnap_tui import events
from blksnap_tui.history import Severity, snapshot_name
from blksnap_tui.model import State
from blksnap_tui.units import format_size


def announcement(event: events.Event, state: State) -> tuple[Severity, str, str, str] | None:
    """Put a signal of the service into words: how grave, about what, what happened, and what to keep in the status line."""

    def of_snapshot(path: str) -> str:
        snapshot = state.snapshot(path)
        return f"snapshot of {snapshot_name(state, snapshot)}" if snapshot is not None else "a snapshot"

    def of_device(path: str) -> str:
        device = state.device(path)
        return path.rpartition("/")[2] if device is None else device.name

    match event:
        case events.GenerationStarted():
            text = f"history restarted: {event.reason}. the next backup must be full."
            return "warning", of_device(event.device), text, ""
        case events.LowSpace():
            text = f"the difference storage is nearly full: {format_size(event.used)} of {format_size(event.limit)} used"
            return "warning", of_snapshot(event.snapshot), text, "a snapshot's storage is nearly full"
        case events.NoSpace():
            text = "failed: its difference storage is full. devices are not touched."
            return "error", of_snapshot(event.snapshot), text, "a snapshot overflowed"
        case events.Corrupted():
            text = f"failed for {of_device(event.device)}: {event.message}"
            return "error", of_snapshot(event.snapshot), text, "a snapshot failed"
        case events.JobCompleted() if not event.success:
            return "error", "a job", f"failed: {event.message}", ""
    return None
