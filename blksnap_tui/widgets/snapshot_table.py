# SPDX-License-Identifier: GPL-2.0-or-later
"""The list of snapshots: state, instant, devices with their numbers, and how full the difference storage is."""

from __future__ import annotations

from rich.text import Text

from blksnap_tui.model import Snapshot, State
from blksnap_tui.units import format_time
from blksnap_tui.widgets.table import Cell, RowTable
from blksnap_tui.widgets.words import snapshot_state, storage, style_of

WIDE = 120

_COMMON = (("taken", "taken", None), ("devices", "devices", None))
_STORAGE = ("storage", "difference storage", None)
_WIDE = (
    ("state", "state", 12),
    *_COMMON,
    _STORAGE,
    ("images", "images", None),
    ("description", "description", None),
)
_NARROW = (("state", "state", 10), *_COMMON, _STORAGE)


class SnapshotTable(RowTable):
    """One row per snapshot, newest first."""

    HELP = (
        "Snapshots of all devices, newest first. The bar tells how full the difference storage is: when it "
        "overflows the snapshot fails, never the device. x destroys the chosen one."
    )

    def __init__(self, *, id: str) -> None:  # noqa: A002 - Textual's name for it
        super().__init__(_NARROW, id=id)
        self._wide = False

    def show(self, state: State, *, now_us: int, width: int) -> None:
        """Show the snapshots of a state, with the columns a terminal of `width` cells has room for."""
        self._wide = width >= WIDE
        self.set_columns(_WIDE if self._wide else _NARROW)
        rows: dict[str, tuple[Cell, ...]] = {
            snapshot.object_path: self._row(state, snapshot, now_us) for snapshot in reversed(state.snapshots)
        }
        self.show_rows(rows)

    def _row(self, state: State, snapshot: Snapshot, now_us: int) -> tuple[Cell, ...]:
        glyph, word, tone = snapshot_state(snapshot)
        numbers = {image.device: image.changes_number for image in state.images_of(snapshot)}
        names = []
        for path in snapshot.devices:
            device = state.device(path)
            name = path.rpartition("/")[2] if device is None else device.name
            names.append(f"{name} #{numbers[path]}" if path in numbers else name)
        cells: tuple[Cell, ...] = (
            Text.assemble((glyph, style_of(self.app, tone)), " ", word, " held" if snapshot.held else ""),
            format_time(snapshot.taken_at or snapshot.created_at, now_us=now_us),
            Text(", ".join(names) or "-"),
        )
        if snapshot.error:
            fill = Text(snapshot.error, style=style_of(self.app, "bad"))
        else:
            fill = storage(self.app, snapshot, 20 if self._wide else 8, brief=not self._wide)
        if not self._wide:
            return *cells, fill
        return *cells, fill, str(len(snapshot.images)), Text(snapshot.description or "-")
