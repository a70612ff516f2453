# SPDX-License-Identifier: GPL-2.0-or-later
"""What there is to say about the chosen device, as words and values one under the other."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from rich.text import Text

from blksnap_tui.model import Device
from blksnap_tui.units import format_count, format_share, format_size, format_time
from blksnap_tui.widgets.steady import SteadyText
from blksnap_tui.widgets.words import device_state, style_of

LABEL_WIDTH = 9

# Rows whose end matters as much as their beginning: they go on in the next line.
FOLDED = ("history", "use", "path")


class Facts(SteadyText):
    """A reading of one device; what is not known is written `-`."""

    def show(self, device: Device | None, info: Mapping[str, Any] | None, *, now_us: int) -> None:
        """Show a device and, when there is one, its tracker's reading (as GetInfo gives it)."""
        if device is None:
            self.write("")
            return
        glyph, word, tone = device_state(device)
        rows: list[tuple[str, str | Text]] = [
            ("state", Text.assemble((f"{glyph} {word}", style_of(self.app, tone)))),
            ("size", format_size(device.size) + (", read only" if device.read_only else "")),
        ]
        holds = " ".join(part for part in (device.id_type, device.id_label) if part)
        if holds or device.mount_points:
            rows.append(("holds", ", ".join(filter(None, (holds, *device.mount_points)))))
        tracker = device.tracker
        if tracker is None:
            rows.append(("can use", ", ".join(device.backends) or "no backend: see ? for why"))
        else:
            changed = changed_blocks(info, tracker.changes_number)
            rows += [
                ("interval", f"#{tracker.active_number} now, oldest #{tracker.oldest_number}"),
                (
                    "changed",
                    "-" if changed is None else _changed(changed, tracker.block_count, tracker.block_size),
                ),
                ("written", _written(info)),
                ("blocks", f"{format_count(tracker.block_count)} of {format_size(tracker.block_size)}"),
                ("since", f"{format_time(tracker.attached_at, now_us=now_us)} by {tracker.backend}"),
                ("history", f"{tracker.generation_id[:8]} {tracker.last_reset}"),
                ("use", tracker.node),
            ]
        rows.append(("path", device.path))
        text = Text(no_wrap=True, overflow="ellipsis")
        room = max(self.size.width - LABEL_WIDTH, 8)
        for label, value in rows:
            text.append(label.ljust(LABEL_WIDTH), "dim")
            folded = [value]
            if isinstance(value, str) and label in FOLDED:
                folded = [*textwrap.wrap(value, room, break_on_hyphens=False)]
            for at, line in enumerate(folded):
                text.append(f"\n{' ' * LABEL_WIDTH}" if at else "")
                text.append(line)
            text.append("\n")
        text.rstrip()
        self.write(text)


def changed_blocks(info: Mapping[str, Any] | None, since: int) -> int | None:
    """Find in a reading how many blocks changed after a number; None when it does not say."""
    counts = (info or {}).get("changed-blocks")
    if not isinstance(counts, Mapping):
        return None
    count = counts.get(str(since), counts.get(since))
    return count if isinstance(count, int) else None


def _written(info: Mapping[str, Any] | None) -> str:
    """Say what programs have written since the attach; `-` when the reading does not tell."""
    count, size = (info or {}).get("writes"), (info or {}).get("written-bytes")
    if not isinstance(count, int) or not isinstance(size, int):
        return "-"
    return f"{format_size(size)} in {format_count(count)} writes"


def _changed(blocks: int, of: int, block_size: int) -> str:
    return f"{format_size(blocks * block_size)} · {format_share(blocks, of)}"
