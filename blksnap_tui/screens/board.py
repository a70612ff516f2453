# SPDX-License-Identifier: GPL-2.0-or-later
"""What the full screens have in common: the status line, the footer, the keys that lead from one to another, the acts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from textual.binding import Binding, BindingType
from textual.screen import Screen
from textual.widgets import Footer

from blksnap_tui.history import EventLog, RateBook, StorageBook
from blksnap_tui.model import Device, Snapshot, State
from blksnap_tui.widgets.status import StatusBar

# From this width on the keys in the footer are set apart.
ROOMY_FOOTER = 100

ACTS: Final = frozenset(
    ("add_file", "track", "untrack", "snapshot", "destroy", "release", "mark", "cancel_job", "unlock")
)
"""What changes something on the service, or asks for a password: not to be had with --read-only."""

ACT_BINDINGS: Final[tuple[BindingType, ...]] = (
    Binding("a", "app.add_file", "add", id="device.add", tooltip="add an image file to the devices"),
    Binding("t", "app.track", "track", id="device.track", tooltip="record what changes on the chosen device"),
    Binding("d", "app.untrack", "untrack", id="device.untrack", tooltip="stop recording; the history ends"),
    Binding(
        "s", "app.snapshot", "snapshot", id="snapshot.take", tooltip="take a snapshot of one or more devices"
    ),
    Binding("x", "app.destroy", "destroy", id="snapshot.destroy", tooltip="destroy the chosen snapshot"),
)


BOARD_BINDINGS: Final[tuple[BindingType, ...]] = (
    Binding("question_mark,f1", "app.help", "help", id="app.help", tooltip="show this"),
    Binding("q", "app.quit", "quit", id="app.quit", tooltip="leave; trackers and snapshots stay"),
    Binding("1", "app.board('map')", "map", show=False, id="go.map", tooltip="go to the map"),
    Binding(
        "2",
        "app.board('overview')",
        "overview",
        show=False,
        id="go.overview",
        tooltip="go to the overview of all devices",
    ),
    Binding(
        "3",
        "app.board('snapshots')",
        "snapshots",
        show=False,
        id="go.snapshots",
        tooltip="go to the snapshots, with their images and forecasts",
    ),
    Binding(
        "4",
        "app.board('events')",
        "events",
        show=False,
        id="go.events",
        tooltip="go to the log of events",
    ),
    Binding("tab", "app.focus_next", "next part", show=False, id="focus.next", tooltip="go to the next part"),
    Binding("C", "app.ramp", "colours", show=False, id="view.ramp", tooltip="draw with other colours"),
    Binding(
        "J", "app.jobs", "jobs", show=False, id="jobs.show", tooltip="show what the service is busy with"
    ),
)
"""Every board ends its own with these: the footer has them in this order."""


@dataclass
class Desk:
    """
    What every screen can look up: the newest state, what has been observed over time, and the clock.

    `bus` is the one we are on, `note` an alarm for the status line, `silent_s` how long the service has not answered, `changed` how many
    blocks of each device changed since its last snapshot, as far as it was read, `source` the recording that is played.
    """

    bus: str
    now_us: Callable[[], int]
    state: State = field(default_factory=State)
    known: bool = False
    note: str = ""
    silent_s: float = 0.0
    read_only: bool = False
    source: str = ""
    changed: dict[str, int] = field(default_factory=dict)
    rates: RateBook = field(default_factory=RateBook)
    storage: StorageBook = field(default_factory=StorageBook)
    log: EventLog = field(default_factory=EventLog)


class Board(Screen[None]):
    """One of the full screens. It looks things up on the desk when told that they are different."""

    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (60, "-normal"), (120, "-wide")]  # noqa: RUF012 - Textual declares it for instances
    VERTICAL_BREAKPOINTS = [(0, "-low"), (20, "-medium"), (40, "-tall")]  # noqa: RUF012 - Textual declares it for instances

    def __init__(self, desk: Desk) -> None:
        super().__init__()
        self.desk = desk

    # ---- what the acts are about

    @property
    def device(self) -> Device | None:
        """Give the device that is chosen here."""
        return None

    @property
    def snapshot(self) -> Snapshot | None:
        """Give the snapshot that is chosen here."""
        return None

    # ---- showing

    def show_news(self) -> None:
        """Show what is different on the desk."""
        raise NotImplementedError

    def show_status(self) -> None:
        """Write the status line."""
        self.query_one(StatusBar).show(
            self.desk.state,
            bus=self.desk.source or self.desk.bus,
            note=self.desk.note,
            silent_s=self.desk.silent_s,
        )

    def on_resize(self) -> None:
        """Let what depends on the size be written again."""
        self.call_after_refresh(self._resized)

    def _resized(self) -> None:
        if self.is_mounted:
            self.query_one(Footer).compact = self.app.size.width < ROOMY_FOOTER
            self.show_news()
