# SPDX-License-Identifier: GPL-2.0-or-later
"""What was measured, against what it has to be: one figure per line, as Markdown for people or JSON for programs."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from itertools import groupby
from pathlib import Path
from statistics import quantiles


class Sense(StrEnum):
    """Which side of its bar a figure has to be on."""

    AT_LEAST = "≥"
    AT_MOST = "≤"


@dataclass(frozen=True, slots=True)
class Bar:
    """What a figure has to reach."""

    sense: Sense
    value: float


@dataclass(frozen=True, slots=True)
class Spread:
    """The middle of several readings and the quartiles around it."""

    middle: float
    low: float
    high: float
    readings: int

    @classmethod
    def of(cls, readings: Sequence[float]) -> Spread:
        """Sum up at least one reading."""
        if len(readings) == 1:
            return cls(readings[0], readings[0], readings[0], 1)
        low, middle, high = quantiles(readings, n=4, method="inclusive")
        return cls(middle, low, high, len(readings))


@dataclass(frozen=True, slots=True)
class Figure:
    """One thing measured; without a bar it only informs."""

    part: str
    what: str
    unit: str
    spread: Spread
    bar: Bar | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the middle is on the right side of the bar; None without a bar."""
        if self.bar is None:
            return None
        if self.bar.sense is Sense.AT_LEAST:
            return self.spread.middle >= self.bar.value
        return self.spread.middle <= self.bar.value

    @property
    def verdict(self) -> str:
        """The word in the table."""
        return {None: "", True: "met", False: "missed"}[self.met]


def ratios(part: str, what: str, above: Sequence[float], below: Sequence[float], bar: Bar | None) -> Figure:
    """Divide readings taken side by side, pair by pair: what disturbs both of a pair cancels out."""
    pairs = [over / under for over, under in zip(above, below, strict=True)]
    return Figure(part, what, "", Spread.of(pairs), bar)


def surroundings(directory: Path) -> dict[str, str]:
    """What the figures depend on and the reader cannot see: processor, kernel, file system, load."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    return {
        "processor": f"{os.cpu_count()} of {model}",
        "kernel": platform.release(),
        "file system": _file_system(directory),
        "load before": f"{os.getloadavg()[0]:.1f} (running threads; 0 is a quiet machine)",
    }


def _file_system(directory: Path) -> str:
    """The type of the file system a directory is on (proc_pid_mountinfo(5)): the last mount with the longest name."""
    best, kind = "", "unknown"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        point = left.split()[4]
        if directory.resolve().is_relative_to(point) and len(point) >= len(best):
            best, kind = point, right.split()[0]
    return kind


def document(figures: Sequence[Figure], around: Mapping[str, str]) -> str:
    """Lay everything out as docs/performance.md has it: Markdown that reads well in a terminal too."""
    rows = [("", "measured", "quartiles", "bar", "")]
    for part, group in groupby(figures, lambda figure: figure.part):
        rows.append((f"**{part}**", "", "", "", ""))
        rows += map(_row, group)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join([*(f"- {name}: {value}" for name, value in around.items()), "", *lines])


def _row(figure: Figure) -> tuple[str, str, str, str, str]:
    spread = figure.spread
    around = "" if spread.readings == 1 else f"{_number(spread.low)} … {_number(spread.high)}"
    bar = "" if figure.bar is None else f"{figure.bar.sense} {_number(figure.bar.value)}"
    value = f"{_number(spread.middle)} {figure.unit}".rstrip()
    what = f"{figure.what} ({figure.note})" if figure.note else figure.what
    return what, value, around, bar, figure.verdict


def as_json(figures: Sequence[Figure], around: Mapping[str, str]) -> dict[str, object]:
    """Everything in the table, unrounded."""
    return {
        "surroundings": dict(around),
        "figures": [{**asdict(figure), "met": figure.met} for figure in figures],
    }


def _number(value: float) -> str:
    """Three digits that matter, and no exponent."""
    size = abs(value)
    if size >= 100 or value == 0:
        return f"{value:,.0f}".replace(",", " ")
    if size >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if size >= 0.1 else f"{value:.3f}"
