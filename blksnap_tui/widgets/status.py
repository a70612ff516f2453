# SPDX-License-Identifier: GPL-2.0-or-later
"""The line above every screen: whose state is shown, how much there is of it, whether it is fresh."""

from __future__ import annotations

from rich.text import Text

from blksnap_tui.model import Job, State
from blksnap_tui.units import format_age
from blksnap_tui.widgets.steady import SteadyText
from blksnap_tui.widgets.words import style_of


def _plural(count: int, word: str) -> str:
    return f"{count} {word}" + ("" if count == 1 else "s")


def _job(job: Job) -> str:
    return job.operation + (f" {job.progress:.0%}" if job.progress_valid else " …")


class StatusBar(SteadyText):
    """Whose state is shown, how much there is of it, and whether it is fresh."""

    def show(
        self, state: State, *, bus: str, held: int | None = None, note: str = "", silent_s: float = 0.0
    ) -> None:
        """
        Show the sums of a state.

        `held` updates wait for the end of a pause (None: there is none), `note` is an alarm, the service has not answered for `silent_s`.
        """
        tracked = sum(device.tracker is not None for device in state.devices)
        where = f"{bus} bus" if bus in ("system", "session") else "private bus"
        if bus.startswith("recording "):
            where = bus
        version = "" if state.manager is None else f" {state.manager.version}"
        left = Text.assemble(
            (" blksnap", "bold"),
            (f"{version} · {where} · ", "dim"),
            f"{tracked} of {_plural(len(state.devices), 'device')} tracked · ",
            _plural(len(state.snapshots), "snapshot"),
        )
        busy = [_job(job) for job in state.jobs]
        if held is not None:
            right = Text(
                f" PAUSED · {_plural(held, 'update')} held ", style=f"reverse {style_of(self.app, 'busy')}"
            )
        elif silent_s:
            right = Text(
                f" no answer for {format_age(silent_s)}: what you see is that old ",
                style=f"reverse {style_of(self.app, 'bad')}",
            )
        elif busy:
            right = Text(f"◐ {', '.join(busy)} ", style=style_of(self.app, "busy"))
        elif note:
            right = Text(f" {note} ", style=style_of(self.app, "bad"))
        else:
            right = Text("● live ", style=style_of(self.app, "good"))
        room = self.size.width - left.cell_len - right.cell_len
        if room < 1:
            left.truncate(max(0, self.size.width - right.cell_len - 1), overflow="ellipsis")
            room = self.size.width - left.cell_len - right.cell_len
        self.write(Text.assemble(left, " " * max(room, 0), right, no_wrap=True))
