# SPDX-License-Identifier: GPL-2.0-or-later
"""What the demo prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from demo.copies import Increment
from demo.report import Report, table

MIB = 1 << 20


def line(number: int, copied: int, *, verified: bool = True) -> Increment:
    """Make one line of the summary of a 100 MiB image."""
    return Increment(
        number=number,
        written_blocks=copied // 65_536,
        written_bytes=copied // 2,
        ranges=3,
        copied_bytes=copied,
        full_bytes=100 * MIB,
        verified=verified,
    )


def test_the_table_adds_up() -> None:
    """The last line is the sum, the share the mean of what each copied."""
    lines = table([line(2, 1 * MIB), line(3, 3 * MIB)]).splitlines()

    assert [text.split() for text in lines[1:]] == [
        ["2", "16", "0.5", "MiB", "3", "1.0", "MiB", "1.00", "%", "yes"],
        ["3", "48", "1.5", "MiB", "3", "3.0", "MiB", "3.00", "%", "yes"],
        ["all", "64", "2.0", "MiB", "6", "4.0", "MiB", "2.00", "%", "yes"],
    ]
    assert len({len(text) for text in lines}) == 1


def test_one_wrong_copy_spoils_the_sum() -> None:
    """A table with a NO ends with a NO."""
    assert table([line(2, MIB), line(3, MIB, verified=False), line(4, MIB)]).splitlines()[-1].endswith("NO")


def test_a_table_of_nothing_is_its_head() -> None:
    """A story that ended early still prints."""
    assert table([]).split()[0] == "number"


def test_the_report_goes_to_the_file_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was shown inside tmux can be shown again outside."""
    report = Report(tmp_path / "report")

    report.step("tracked")
    report.detail("at a socket")

    printed = capsys.readouterr().out
    assert "s tracked\n" in printed
    assert (tmp_path / "report").read_text() == printed
