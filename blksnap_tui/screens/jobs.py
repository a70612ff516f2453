# SPDX-License-Identifier: GPL-2.0-or-later
"""What the service is busy with, and a key to stop it."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Static

from blksnap_tui.model import Job, ObjectPath, State
from blksnap_tui.screens.board import Desk
from blksnap_tui.units import format_age, format_size
from blksnap_tui.widgets.table import Cell, RowTable

_COLUMNS = (
    ("operation", "operation", None),
    ("about", "about", None),
    ("progress", "progress", None),
    ("rate", "rate", None),
    ("left", "left", None),
)


class JobsScreen(ModalScreen[ObjectPath | None]):
    """Lists jobs; the answer is the one to cancel."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q,J", "dismiss(None)", "close", id="jobs.close"),
        Binding("x,delete", "cancel_job", "cancel the job", id="jobs.cancel"),
    ]

    def __init__(self, desk: Desk) -> None:
        super().__init__()
        self._desk = desk

    def compose(self) -> ComposeResult:
        """Lay it out."""
        box = Vertical(RowTable(_COLUMNS, id="jobs"), Static("", id="no-jobs"), classes="box wide")
        box.border_title = "what the service is busy with"
        box.border_subtitle = "escape closes" if self._desk.read_only else "x cancels · escape closes"
        yield box

    def on_mount(self) -> None:
        """Show the jobs, and follow them."""
        self._show()
        self.set_interval(0.5, self._show)

    def _show(self) -> None:
        state, now_us = self._desk.state, self._desk.now_us()
        table = self.query_one(RowTable)
        table.show_rows({job.object_path: _row(state, job, now_us) for job in state.jobs})
        table.display = bool(state.jobs)
        self.query_one("#no-jobs", Static).update("" if state.jobs else "nothing: no operation is under way")

    def action_cancel_job(self) -> None:
        """Answer with the chosen job, if it can be cancelled."""
        chosen = self.query_one(RowTable).chosen
        job = next((job for job in self._desk.state.jobs if job.object_path == chosen), None)
        if job is None or self._desk.read_only:
            return
        if not job.cancelable:
            self.notify(f"{job.operation} cannot be cancelled", severity="warning", markup=False)
            return
        self.dismiss(job.object_path)


def _row(state: State, job: Job, now_us: int) -> tuple[Cell, ...]:
    names = []
    for path in job.objects:
        device = state.device(path)
        names.append(path.rpartition("/")[2] if device is None else device.name)
    progress = f"{job.progress:.0%}" if job.progress_valid else "under way"
    if job.progress_valid and job.bytes:
        progress += f" of {format_size(job.bytes)}"
    left_s = (job.expected_end_time - now_us) / 1e6
    left = format_age(left_s) if job.expected_end_time and left_s > 0 else "-"
    rate = f"{format_size(job.rate)}/s" if job.rate else "-"
    return job.operation, ", ".join(names) or "-", progress, rate, left
