# SPDX-License-Identifier: GPL-2.0-or-later
"""What the demo prints: one line per step with the time it happened, and a table at the end. Knows no bus and no disk."""

from __future__ import annotations

import contextlib
import shutil
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

from demo.copies import Increment

_INDENT = " " * 9


def mebibytes(count: int) -> str:
    """Write a number of bytes in MiB."""
    return f"{count / (1 << 20):.1f} MiB"


def table(increments: Sequence[Increment]) -> str:
    """Lay out the summary: one line per increment, then their sum."""
    head = ("number", "blocks written", "bytes written", "ranges", "copied", "of full", "verified")
    rows = [
        (
            str(item.number),
            str(item.written_blocks),
            mebibytes(item.written_bytes),
            str(item.ranges),
            mebibytes(item.copied_bytes),
            f"{100 * item.copied_bytes / item.full_bytes:.2f} %",
            "yes" if item.verified else "NO",
        )
        for item in increments
    ]
    if rows:
        rows.append(
            (
                "all",
                str(sum(item.written_blocks for item in increments)),
                mebibytes(sum(item.written_bytes for item in increments)),
                str(sum(item.ranges for item in increments)),
                mebibytes(sum(item.copied_bytes for item in increments)),
                f"{100 * sum(item.copied_bytes / item.full_bytes for item in increments) / len(rows):.2f} %",
                "yes" if all(item.verified for item in increments) else "NO",
            )
        )
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)
    )


class Report:
    """
    Prints as the story goes, and keeps everything in a file too when one is given.

    A terminal that goes away is no reason to stop: the story has a file system to unmount.
    """

    def __init__(self, copy_to: Path | None = None) -> None:
        self._start = time.monotonic()
        self._copy_to = copy_to
        self._width = min(110, shutil.get_terminal_size((100, 24)).columns)
        self.last_step = ""

    def step(self, text: str) -> None:
        """Say what happens now."""
        self.last_step = text
        stamp = f"{time.monotonic() - self._start:6.1f} s "
        self._print(
            textwrap.fill(stamp + text, self._width, subsequent_indent=_INDENT, break_on_hyphens=False)
        )

    def detail(self, text: str) -> None:
        """Say more about the last step."""
        indented = textwrap.fill(
            text, self._width, initial_indent=_INDENT, subsequent_indent=_INDENT, break_on_hyphens=False
        )
        self._print(indented)

    def plain(self, text: str) -> None:
        """Print as it is."""
        self._print(text)

    def _print(self, text: str) -> None:
        with contextlib.suppress(OSError):
            print(text, flush=True)
        if self._copy_to is not None:
            with self._copy_to.open("a") as file:
                file.write(text + "\n")


def fail(text: str) -> None:
    """Say on standard error why it ends."""
    with contextlib.suppress(OSError):
        print(f"demo: {text}", file=sys.stderr, flush=True)
