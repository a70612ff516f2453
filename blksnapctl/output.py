# SPDX-License-Identifier: GPL-2.0-or-later
"""
How commands write their results: lines for people, or one JSON document. Data goes to stdout, everything else
to stderr.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from blksnap_tui.model import Device, Image, Snapshot, State
from blksnap_tui.units import format_share, format_size, format_time


def say(text: str) -> None:
    """Write a remark for the person at the terminal."""
    print(f"blksnapctl: {text}", file=sys.stderr)


def put_json(value: object) -> None:
    """
    Write a JSON document. Sizes are bytes, times µs since the epoch, names those of `blksnap_tui.model`.
    """
    print(json.dumps(value, indent=2, default=_plain))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, bytes):
        return value.hex()
    raise TypeError(f"{type(value).__name__} has no JSON")


def put_facts(facts: Mapping[str, object]) -> None:
    """Write names and values in two columns; what is empty is written `-`."""
    width = max(map(len, facts), default=0)
    for name, value in facts.items():
        print(f"{name.ljust(width)}  {'-' if value == '' else value}")


def put_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Write rows under titles, in columns as wide as they need; empty cells are written `-`."""
    lines = [[cell or "-" for cell in row] for row in (titles, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def device_row(device: Device) -> list[str]:
    """Write a device in a table: path, size, state, backend, numbers, node."""
    tracker = device.tracker
    if tracker is None:
        return [device.path, format_size(device.size), "untracked", "", "", ""]
    interval = f"#{tracker.active_number}"
    return [device.path, format_size(device.size), tracker.state, tracker.backend, interval, tracker.node]


DEVICE_TITLES = ("DEVICE", "SIZE", "STATE", "BACKEND", "INTERVAL", "USE")


def device_facts(device: Device, info: Mapping[str, Any] | None) -> dict[str, object]:
    """Write all there is to say about a device; `info` is its tracker's reading."""
    facts: dict[str, object] = {
        "path": device.path,
        "size": f"{format_size(device.size)} ({device.size} bytes)",
        "sector": f"{device.logical_block_size} bytes",
        "read only": "yes" if device.read_only else "no",
        "holds": " ".join(filter(None, (device.id_type, device.id_label, device.id_uuid))),
        "mounted on": ", ".join(device.mount_points),
        "model": " ".join(filter(None, (device.model, device.serial))),
        "backends": ", ".join(device.backends) or "none can track it",
        "tracked": "no" if device.tracker is None else "yes",
    }
    tracker = device.tracker
    if tracker is not None:
        facts |= {
            "state": tracker.state,
            "backend": tracker.backend,
            "use": tracker.node,
            "blocks": f"{tracker.block_count} of {format_size(tracker.block_size)}",
            "generation": tracker.generation_id,
            "why it began": tracker.last_reset,
            "last snapshot": f"#{tracker.changes_number}" if tracker.changes_number else "none yet",
            "oldest number": f"#{tracker.oldest_number}",
            "attached": f"{format_time(tracker.attached_at)} by uid {tracker.attached_by_uid}",
        }
    for name, value in sorted((info or {}).items()):
        if isinstance(value, Mapping):
            facts[name] = ", ".join(f"{key}: {count}" for key, count in value.items())
        elif name not in _SHOWN_ALREADY:
            facts[name] = value
    return facts


_SHOWN_ALREADY = frozenset(
    (
        "backend",
        "node",
        "state",
        "capacity",
        "block-size",
        "block-count",
        "generation-id",
        "changes-number",
        "oldest-number",
    )
)

SNAPSHOT_TITLES = ("SNAPSHOT", "STATE", "TAKEN", "DEVICES", "STORAGE", "DESCRIPTION")


def device_names(state: State, snapshot: Snapshot) -> str:
    """Write the devices of a snapshot by path, with the numbers of their images."""
    numbers = {image.device: f" #{image.changes_number}" for image in state.images_of(snapshot)}
    names = []
    for path in snapshot.devices:
        device = state.device(path)
        name = path.rpartition("/")[2] if device is None else device.path
        names.append(name + numbers.get(path, ""))
    return ", ".join(names)


def snapshot_row(state: State, snapshot: Snapshot) -> list[str]:
    """Write a snapshot in a table."""
    used, limit = snapshot.storage_used, snapshot.storage_limit
    storage = f"{format_size(used)} of {format_size(limit)} ({format_share(used, limit)})"
    words = [
        snapshot.description,
        f"error: {snapshot.error}" if snapshot.error else "",
        "held" if snapshot.held else "",
    ]
    return [
        snapshot.id,
        snapshot.state,
        format_time(snapshot.taken_at),
        device_names(state, snapshot),
        storage,
        "; ".join(filter(None, words)),
    ]


def image_line(state: State, image: Image) -> str:
    """Write where an image is to be had."""
    device = state.device(image.device)
    name = image.device.rpartition("/")[2] if device is None else device.path
    where = image.path or image.nbd_uri or "not served; blksnapctl export serves it"
    return f"{name} #{image.changes_number}: {image.error or where}"
