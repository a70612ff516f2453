# SPDX-License-Identifier: GPL-2.0-or-later
"""What is under the map's cursor, in words and true counts."""

from __future__ import annotations

from dataclasses import dataclass

from rich.text import Text

from blksnap_tui.heat.grid import age_of
from blksnap_tui.messages import Counts
from blksnap_tui.model import Tracker
from blksnap_tui.units import format_count, format_share, format_size
from blksnap_tui.widgets.steady import SteadyText


@dataclass(frozen=True, slots=True)
class Pointed:
    """
    What the cursor is on: blocks of a tracker, the byte the map has for them, and what they were counted to be.

    In a `timeline` there is no byte but the `age` of the interval of the column; None is the margin.
    """

    tracker: Tracker
    blocks: range
    mode: str
    since: int
    value: int
    timeline: bool = False
    age: int | None = None
    counts: Counts | None = None


class Inspector(SteadyText):
    """Two lines: where, and what changed there when. The second is counted by the service and so follows a little later."""

    def show(self, pointed: Pointed | None) -> None:
        """Describe what the cursor is on."""
        if pointed is None:
            self.write("\n")
            return
        lines = (where(pointed), counted(pointed))
        self.write(Text("\n", no_wrap=True, overflow="ellipsis").join(lines))


def where(pointed: Pointed) -> Text:
    """Say what the map shows of the blocks, and which they are."""
    blocks, tracker = pointed.blocks, pointed.tracker
    offset = blocks.start * tracker.block_size
    length = min(len(blocks) * tracker.block_size, tracker.capacity - offset)
    which = (
        f"block {format_count(blocks.start)}"
        if len(blocks) == 1
        else f"blocks {format_count(blocks.start)} to {format_count(blocks[-1])}"
    )
    return Text.assemble(
        (" ▸ ", "bold"),
        _in_interval(pointed) if pointed.timeline else _shown(pointed),
        (" · ", "dim"),
        f"{format_size(length)} at {format_size(offset)}",
        (" · ", "dim"),
        which,
        no_wrap=True,
        overflow="ellipsis",
    )


def counted(pointed: Pointed) -> Text:
    """Say how many of the blocks changed since the number in question, and how many when."""
    counts, total = pointed.counts, len(pointed.blocks)
    text = Text("   ", no_wrap=True, overflow="ellipsis")
    if counts is None:
        return text
    changed = sum(count for number, count in counts.by_number.items() if number > pointed.since)
    text.append(f"{format_count(changed)} of {format_count(total)} changed since #{pointed.since}")
    numbers = sorted((number for number in counts.by_number if number), reverse=True)
    parts = [f"#{number}: {format_count(counts.by_number[number])}" for number in numbers]
    if counts.by_number.get(0):
        parts.append(f"never: {format_count(counts.by_number[0])}")
    text.append(f" · last changes in {', '.join(parts)}" if numbers else "", "dim")
    return text


def _shown(pointed: Pointed) -> str:
    value, tracker = pointed.value, pointed.tracker
    match pointed.mode:
        case "since":
            return f"{'in' if value else 'not in'} the next increment since #{pointed.since}"
        case "density":
            if not value:
                return f"nothing changed since #{pointed.since}"
            share = "all" if value == 255 else f"about {max(value / 2.55, 1):.0f} %"
            return f"{share} changed since #{pointed.since}"
        case "frequency":
            return (
                f"changed in about {max(value / 2.55, 1):.0f} % of the intervals seen"
                if value
                else "not seen to change"
            )
    age = age_of(value)
    if age is None:
        return "never changed"
    when = "now" if age == 0 else f"{age} snapshot{'' if age == 1 else 's'} ago"
    return f"last changed in interval #{tracker.active_number - age} ({when})"


def _in_interval(pointed: Pointed) -> str:
    if pointed.age is None:
        return "before the first interval"
    number = pointed.tracker.active_number - pointed.age
    if pointed.counts is None:
        return f"interval #{number}"
    count, total = pointed.counts.by_number.get(number, 0), len(pointed.blocks)
    return (
        f"interval #{number}: {format_count(count)} blocks ({format_share(count, total)}) changed last in it"
    )
