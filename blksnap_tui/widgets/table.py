# SPDX-License-Identifier: GPL-2.0-or-later
"""A table that is given all its rows at once and redraws only what differs, keeping the chosen row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.text import Text
from textual.widgets import DataTable

Cell = str | Text


class RowTable(DataTable[Cell]):
    """Rows are keyed by object path; the cursor stays on its key while that exists."""

    def __init__(self, columns: Sequence[tuple[str, str, int | None]], **kwargs: Any) -> None:
        """Take columns as (key, title, width or None for as wide as needed)."""
        super().__init__(cursor_type="row", zebra_stripes=False, **kwargs)
        self._wanted_columns = tuple(columns)
        self._shown: dict[str, tuple[Cell, ...]] = {}
        self._kept: str | None = None

    def set_columns(self, columns: Sequence[tuple[str, str, int | None]]) -> None:
        """Replace the columns; rows must be shown again."""
        if tuple(columns) == self._wanted_columns and self.columns:
            return
        self._kept = self.chosen or self._kept
        self._wanted_columns = tuple(columns)
        self._shown = {}
        self.clear(columns=True)
        for key, title, width in columns:
            self.add_column(title, width=width, key=key)

    @property
    def chosen(self) -> str | None:
        """Give the key of the row under the cursor."""
        if not self.row_count:
            return None
        return self.coordinate_to_cell_key(self.cursor_coordinate).row_key.value

    def shows(self, key: str) -> bool:
        """Say whether there is a row with a key."""
        return key in self._shown

    def show_rows(self, rows: Mapping[str, tuple[Cell, ...]]) -> None:
        """Show these rows, in this order."""
        if not self.columns:
            self.set_columns(self._wanted_columns)
        if list(rows) == list(self._shown):
            for key, cells in rows.items():
                for (column, _, _), old, new in zip(
                    self._wanted_columns, self._shown[key], cells, strict=True
                ):
                    if old != new:
                        wider = len(old) != len(new)
                        self.update_cell(key, column, new, update_width=wider)
        else:
            chosen, self._kept = self.chosen or self._kept, None
            with self.app.batch_update():
                self.clear()
                for key, cells in rows.items():
                    self.add_row(*cells, key=key)
                if chosen is not None and chosen in rows:
                    self.move_cursor(row=self.get_row_index(chosen), animate=False)
        self._shown = dict(rows)
