# SPDX-License-Identifier: GPL-2.0-or-later
"""
What has been observed over time: rates of writing, the filling of storages, events. Pure, and bounded whatever happens.

Nothing here is guessed: what was not observed is None, and the first reading of a counter is no rate.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from blksnap_tui.model import Snapshot, State

RATES_KEPT: Final = 120
FILLS_KEPT: Final = 240
EVENTS_KEPT: Final = 1000

# A forecast looks back this far, and says nothing before it has seen this much.
FORECAST_S: Final = 600.0
FORECAST_LEAST_S: Final = 5.0

_SPARKS: Final = " ▁▂▃▄▅▆▇█"


class RateBook:
    """Bytes written per second to each device, as far as its counters were read."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[float, int]] = {}
        self._rates: dict[str, deque[float | None]] = {}

    def note(self, device: str, info: Mapping[str, Any], at_s: float) -> None:
        """Take a reading of a device's counters, made at `at_s`."""
        written = info.get("written-bytes")
        if not isinstance(written, int):
            self._last.pop(device, None)
            return
        last = self._last.get(device)
        if last is not None and at_s <= last[0]:
            return
        self._last[device] = (at_s, written)
        if last is not None:
            # A counter that went back began anew: no rate is known for that time.
            rate = (written - last[1]) / (at_s - last[0]) if written >= last[1] else None
            self._rates.setdefault(device, deque(maxlen=RATES_KEPT)).append(rate)

    def latest(self, device: str) -> float | None:
        """Give the last rate; None when it is not known."""
        rates = self._rates.get(device)
        return rates[-1] if rates else None

    def rates(self, device: str) -> tuple[float | None, ...]:
        """Give the rates that are remembered, oldest first."""
        return tuple(self._rates.get(device, ()))

    def keep_only(self, devices: set[str]) -> None:
        """Forget the others."""
        for kept in (self._last, self._rates):
            for device in [device for device in kept if device not in devices]:
                del kept[device]

    def interrupt(self) -> None:
        """Note that there was a time nothing was read, so that no rate is worked out across it."""
        self._last.clear()
        for rates in self._rates.values():
            rates.append(None)


def sparkline(rates: tuple[float | None, ...], width: int) -> str:
    """
    Draw the last `width` rates as a line of bars, highest = the greatest of them; `·` where nothing is known.

    What is not 0 is never drawn as nothing.
    """
    shown = rates[-width:]
    most = max((rate for rate in shown if rate), default=0.0)
    bars = ("·" if rate is None else "▁" if rate <= 0 else _spark(rate / most) for rate in shown)
    return "".join(bars).rjust(width)


def _spark(share: float) -> str:
    return _SPARKS[max(2, round(share * 8))]


class StorageBook:
    """How full each snapshot's difference storage was, and when."""

    def __init__(self) -> None:
        self._fills: dict[str, deque[tuple[float, int]]] = {}

    def note(self, state: State, at_s: float) -> None:
        """Take the readings of a state."""
        for snapshot in state.snapshots:
            fills = self._fills.setdefault(snapshot.object_path, deque(maxlen=FILLS_KEPT))
            if not fills or at_s > fills[-1][0]:
                fills.append((at_s, snapshot.storage_used))
        present = {snapshot.object_path for snapshot in state.snapshots}
        for path in [path for path in self._fills if path not in present]:
            del self._fills[path]

    def growth(self, snapshot: Snapshot) -> float | None:
        """Give bytes per second over the last minutes; None before enough has been seen."""
        fills = self._fills.get(snapshot.object_path)
        if not fills:
            return None
        last_s, last = fills[-1]
        first_s, first = next((at_s, used) for at_s, used in fills if at_s >= last_s - FORECAST_S)
        if last_s - first_s < FORECAST_LEAST_S:
            return None
        return max(0.0, (last - first) / (last_s - first_s))

    def full_in_s(self, snapshot: Snapshot) -> float | None:
        """Give in how many seconds the storage is full when it goes on like this; None when that is not known, inf for never."""
        growth = self.growth(snapshot)
        if growth is None or snapshot.storage_limit <= 0:
            return None
        left = max(snapshot.storage_limit - snapshot.storage_used, 0)
        return left / growth if growth else float("inf")


Severity = Literal["information", "warning", "error"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the log."""

    at_us: int
    severity: Severity
    subject: str
    text: str

    def matches(self, words: str) -> bool:
        """Say whether all the words occur in it."""
        line = f"{self.severity} {self.subject} {self.text}".casefold()
        return all(word in line for word in words.casefold().split())


class EventLog:
    """The last events, oldest first; `count` is how many there have been in all."""

    def __init__(self) -> None:
        self.count = 0
        self._entries: deque[Entry] = deque(maxlen=EVENTS_KEPT)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, entry: Entry) -> None:
        """Append an event; the oldest goes when there are too many."""
        self.count += 1
        self._entries.append(entry)


def differences(before: State, now: State) -> Iterator[tuple[Severity, str, str]]:
    """Say what became different from one state to the next: (severity, what it is about, what happened)."""
    old = {device.object_path: device for device in before.devices}
    for device in now.devices:
        last = old.pop(device.object_path, None)
        had, has = None if last is None else last.tracker, device.tracker
        if last is None:
            yield "information", device.name, "the device appeared"
        if has is not None and had is None:
            yield "information", device.name, f"tracking began, by {has.backend}"
        elif has is None and had is not None:
            yield "warning", device.name, "tracking ended"
        elif has is not None and had is not None and has.state != had.state:
            yield (
                "error" if has.state == "broken" else "information",
                device.name,
                f"the tracker is {has.state}",
            )
    for device in old.values():
        yield "warning", device.name, "the device is gone"
    shots = {snapshot.object_path: snapshot for snapshot in before.snapshots}
    for snapshot in now.snapshots:
        was = shots.pop(snapshot.object_path, None)
        if was is None or was.state != snapshot.state:
            why = f": {snapshot.error}" if snapshot.error else ""
            severity: Severity = "error" if snapshot.state == "failed" else "information"
            became = "failed" if snapshot.state == "failed" else f"is {snapshot.state}"
            yield severity, snapshot_name(now, snapshot), f"the snapshot {became}{why}"
    for snapshot in shots.values():
        yield "information", snapshot_name(before, snapshot), "the snapshot is gone"


def snapshot_name(state: State, snapshot: Snapshot) -> str:
    """Name a snapshot by its devices with their numbers."""
    numbers = {image.device: f" #{image.changes_number}" for image in state.images_of(snapshot)}
    names = []
    for path in snapshot.devices:
        device = state.device(path)
        names.append((path.rpartition("/")[2] if device is None else device.name) + numbers.get(path, ""))
    return ", ".join(names) or "a snapshot"
