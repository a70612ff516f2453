# SPDX-License-Identifier: GPL-2.0-or-later
"""Sizes, shares and times as people write and read them."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from blksnap_tui.units import (
    MAX_SIZE,
    format_age,
    format_count,
    format_share,
    format_size,
    format_time,
    parse_size,
)

FACTORS = {
    "": 1,
    "B": 1,
    "K": 1024,
    "KiB": 1024,
    "MB": 10**6,
    "MiB": 1 << 20,
    "G": 1 << 30,
    "TB": 10**12,
    "E": 1 << 60,
}


@given(st.integers(0, MAX_SIZE))
def test_a_plain_number_is_bytes(size: int) -> None:
    """Any 64-bit size comes back unchanged."""
    assert parse_size(str(size)) == size


@given(st.integers(0, 15), st.sampled_from(sorted(FACTORS)), st.sampled_from(["", " "]))
def test_a_unit_multiplies(number: int, unit: str, space: str) -> None:
    """With and without a space."""
    assert parse_size(f"{number}{space}{unit}") == number * FACTORS[unit]


def test_fractions_are_exact() -> None:
    """1.5 GiB is a whole number of bytes; a third of a byte is none."""
    assert parse_size("1.5G") == 3 << 29
    assert parse_size("0.1KB") == 100
    with pytest.raises(ValueError, match="whole number of bytes"):
        parse_size("1.3")


@pytest.mark.parametrize(
    "text, named", [("10Q", "'Q'"), ("5gib", "'gib'"), ("1kB", "'kB'"), ("3 Gb", "'Gb'")]
)
def test_a_wrong_unit_is_named(text: str, named: str) -> None:
    """The message says which unit was not understood."""
    with pytest.raises(ValueError, match="is not a unit") as caught:
        parse_size(text)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["", "G", "-1", "+5", "1e3", "0x10", "1 2", "\N{ARABIC-INDIC DIGIT ONE}G", "nan", "1.", ".5G", "1,5G"],
)
def test_what_is_no_size_is_refused(text: str) -> None:
    """Nothing is guessed."""
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


def test_more_than_64_bits_are_refused() -> None:
    """A size must fit the bus."""
    with pytest.raises(ValueError, match="64 bits"):
        parse_size("16E")


@given(st.integers(0, MAX_SIZE))
def test_a_written_size_is_near_the_truth(size: int) -> None:
    """What is shown differs from the size by half a percent at most, or half a unit of the last digit."""
    number, unit = format_size(size).split(" ")
    factor = 1 if unit == "B" else 1 << (10 * (1 + "KMGTPE".index(unit[0])))
    assert abs(float(number) * factor - size) <= max(0.006 * size, 0.0051 * factor if unit != "B" else 0)


@pytest.mark.parametrize(
    "size, text",
    [
        (0, "0 B"),
        (512, "512 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (999 << 20, "999 MiB"),
        (1 << 40, "1.00 TiB"),
    ],
)
def test_sizes_read_as_expected(size: int, text: str) -> None:
    """Three digits and a unit."""
    assert format_size(size) == text


@pytest.mark.parametrize(
    "part, whole, text",
    [(0, 5, "0 %"), (1, 10_000, "<0.1 %"), (1, 3, "33.3 %"), (5, 5, "100 %"), (0, 0, "-"), (3, 0, "-")],
)
def test_shares_never_lie(part: int, whole: int, text: str) -> None:
    """Something is not 0 %, and a share of nothing is unknown."""
    assert format_share(part, whole) == text


def test_counts_are_grouped() -> None:
    """In threes."""
    assert format_count(16_777_216).split("\N{NARROW NO-BREAK SPACE}") == ["16", "777", "216"]


def test_times_of_today_have_no_date(monkeypatch: pytest.MonkeyPatch) -> None:
    """Older ones have; a moment that has not happened is not 1970."""
    day = 86_400_000_000
    now = 20_000 * day
    assert len(format_time(now - 3_600_000_000, now_us=now)) == len("12:34:56")
    assert len(format_time(now - 2 * day, now_us=now)) == len("2024-10-01 12:34")
    assert format_time(0, now_us=now) == "-"


@pytest.mark.parametrize(
    "seconds, text", [(0.2, "now"), (5, "5 s"), (180, "3 min"), (7200, "2 h"), (400_000, "5 d")]
)
def test_ages_have_one_unit(seconds: float, text: str) -> None:
    """As precise as anybody cares."""
    assert format_age(seconds) == text
