# SPDX-License-Identifier: GPL-2.0-or-later
"""What is observed over time: rates, forecasts, events."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, strategies as st

from blksnap_tui import model
from blksnap_tui.fakemap import FakeMap
from blksnap_tui.history import (
    EVENTS_KEPT,
    RATES_KEPT,
    Entry,
    EventLog,
    RateBook,
    StorageBook,
    differences,
    sparkline,
)
from blksnap_tui.model import State
from blksnap_tui.testing import FakeService


@pytest.fixture
def state() -> State:
    """A tracked disk with one snapshot of at most 1000 bytes, and an untracked disk."""
    service = FakeService()
    disk = service.add_device("/srv/a.img", 1 << 20)
    service.add_device("/srv/b.img", 1 << 20)
    service.track(disk, FakeMap(bytearray(16)))
    service.answer(model.MANAGER_PATH, "CreateSnapshot", ([disk], {"limit": 1000}))
    return model.state_from(service.objects)


def filled(state: State, used: int) -> State:
    """Give the state with the snapshot's storage filled so far."""
    return replace(state, snapshots=(replace(state.snapshots[0], storage_used=used),))


def test_the_first_reading_is_no_rate() -> None:
    """A counter that has run for weeks must not look like a burst."""
    book = RateBook()
    book.note("a", {"written-bytes": 10**12}, 5.0)
    assert book.latest("a") is None
    book.note("a", {"written-bytes": 10**12 + 500}, 10.0)
    assert book.latest("a") == 100.0


@pytest.mark.parametrize("info", [{}, {"written-bytes": "much"}])
def test_a_reading_without_the_counter_is_unknown(info: dict[str, object]) -> None:
    """Never 0, and no rate is worked out across it."""
    book = RateBook()
    book.note("a", {"written-bytes": 100}, 1.0)
    book.note("a", info, 2.0)
    book.note("a", {"written-bytes": 900}, 3.0)
    assert book.rates("a") == ()


def test_a_counter_that_began_anew_is_unknown_for_once() -> None:
    """After a restart of the data path it counts from 0."""
    book = RateBook()
    for at_s, written in ((1.0, 100), (2.0, 50), (3.0, 60)):
        book.note("a", {"written-bytes": written}, at_s)
    assert book.rates("a") == (None, 10.0)


def test_an_interruption_is_a_gap() -> None:
    """What was written while the service was away is no rate of any moment."""
    book = RateBook()
    for at_s, written in ((1.0, 0), (2.0, 10)):
        book.note("a", {"written-bytes": written}, at_s)
    book.interrupt()
    for at_s, written in ((90.0, 10**9), (91.0, 10**9 + 7)):
        book.note("a", {"written-bytes": written}, at_s)
    assert book.rates("a") == (10.0, None, 7.0)


def test_rates_do_not_grow_without_end() -> None:
    """Days of watching take the memory of minutes; devices that went are forgotten."""
    book = RateBook()
    for second in range(RATES_KEPT * 3):
        book.note("a", {"written-bytes": second}, float(second))
    assert len(book.rates("a")) == RATES_KEPT
    book.keep_only({"b"})
    assert book.rates("a") == ()


@given(st.lists(st.none() | st.floats(0, 1e12), max_size=80), st.integers(1, 60))
def test_a_spark_line_has_its_width_and_shows_whatever_there_is(
    rates: list[float | None], width: int
) -> None:
    """Unknown is a dot, nothing is the lowest bar, and something is never drawn as nothing."""
    line = sparkline(tuple(rates), width)
    shown = rates[-width:]
    assert len(line) == width
    for rate, bar in zip(reversed(shown), reversed(line), strict=False):
        assert (rate is None) == (bar == "·")
        assert (rate == 0) == (bar == "▁")


def test_a_forecast_follows_the_growth(state: State) -> None:
    """100 bytes in 10 seconds, 400 to go: 40 seconds."""
    book = StorageBook()
    book.note(filled(state, 500), 0.0)
    book.note(filled(state, 600), 10.0)
    assert book.full_in_s(filled(state, 600).snapshots[0]) == pytest.approx(40.0)


def test_a_forecast_waits_until_it_has_seen_enough(state: State) -> None:
    """One look, or two in a second, say nothing."""
    book = StorageBook()
    book.note(filled(state, 500), 0.0)
    assert book.full_in_s(filled(state, 500).snapshots[0]) is None
    book.note(filled(state, 900), 1.0)
    assert book.full_in_s(filled(state, 900).snapshots[0]) is None


def test_a_storage_that_does_not_grow_is_never_full(state: State) -> None:
    """Infinity, which is not the same as unknown."""
    book = StorageBook()
    book.note(filled(state, 500), 0.0)
    book.note(filled(state, 500), 60.0)
    assert book.full_in_s(filled(state, 500).snapshots[0]) == math.inf


def test_old_growth_is_forgotten(state: State) -> None:
    """A burst an hour ago says nothing about now."""
    book = StorageBook()
    book.note(filled(state, 0), 0.0)
    book.note(filled(state, 900), 10.0)
    book.note(filled(state, 900), 3000.0)
    book.note(filled(state, 900), 3600.0)
    assert book.full_in_s(filled(state, 900).snapshots[0]) == math.inf


def test_the_log_does_not_grow_without_end() -> None:
    """The oldest go, and how many there were is known."""
    log = EventLog()
    for number in range(10_000):
        log.add(Entry(number, "information", "sda", "something"))
    assert (len(log), log.count) == (EVENTS_KEPT, 10_000)
    assert [entry.at_us for entry in log][-1] == 9_999


@pytest.mark.parametrize("words, found", [("", True), ("SDA full", True), ("error", True), ("sdb", False)])
def test_an_entry_is_found_by_all_its_words(words: str, found: bool) -> None:
    """In any order and case, severity too."""
    assert Entry(0, "error", "sda", "the storage is full").matches(words) is found


def test_what_became_different_is_told(state: State) -> None:
    """Devices and snapshots that came, went or changed; nothing for what stayed."""
    assert list(differences(state, state)) == []
    assert [text for _, _, text in differences(State(), state)] == [
        "the device appeared",
        "tracking began, by nbd",
        "the device appeared",
        "the snapshot is taken",
    ]
    assert [text for _, _, text in differences(state, State())] == [
        "the device is gone",
        "the device is gone",
        "the snapshot is gone",
    ]
    failed = replace(state, snapshots=(replace(state.snapshots[0], state="failed", error="full"),))
    assert list(differences(state, failed)) == [("error", "a.img #1", "the snapshot failed: full")]


def test_a_tracker_that_breaks_is_an_error(state: State) -> None:
    """And its end a warning: the history ends with it."""
    device = state.devices[0]
    assert device.tracker is not None
    broken = replace(device, tracker=replace(device.tracker, state="broken"))
    ended = replace(device, tracker=None)
    assert [found[0] for found in differences(state, replace(state, devices=(broken, state.devices[1])))] == [
        "error"
    ]
    assert [found[0] for found in differences(state, replace(state, devices=(ended, state.devices[1])))] == [
        "warning"
    ]
