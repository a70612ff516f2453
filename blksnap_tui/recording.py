# SPDX-License-Identifier: GPL-2.0-or-later
"""
What the service showed over a time, written to a file, and played from it. No Textual.

A recording is JSON lines. The first names the format; each other has `t`, seconds from the beginning, and one of: `objects` (all of them, when
they differ from before), `signal`, `map` (age bytes of a device at a fixed resolution, deflated) and `info`. The map is recorded coarsely where a
device has more blocks than MOST_CELLS, so zooming into a recording ends sooner than on the device.
"""

from __future__ import annotations

import asyncio
import base64
import json
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, TextIO

from blksnap_tui import model
from blksnap_tui.client import Client
from blksnap_tui.errors import BlksnapError
from blksnap_tui.events import Event
from blksnap_tui.fakelink import OWNER, Refusal
from blksnap_tui.fakemap import FakeMap
from blksnap_tui.model import ROOT_PATH
from blksnap_tui.testing import FakeService

FORMAT: Final = "blksnap recording 1"
MOST_CELLS: Final = 65_536
PERIOD_S: Final = 1.0

_SIGNALS: Final = {
    "GenerationStarted": model.TRACKER,
    "LowSpace": model.SNAPSHOT,
    "NoSpace": model.SNAPSHOT,
    "Corrupted": model.SNAPSHOT,
    "JobCompleted": model.JOB,
}


class RecordingError(Exception):
    """Raised when a recording cannot be written or played; the text says which file and why."""


class Recorder:
    """Writes a recording; `close` ends it."""

    def __init__(self, path: Path) -> None:
        """Begin a new file. Raises RecordingError, also when there is one already."""
        try:
            self._file: TextIO = path.open("x", encoding="utf8")
        except OSError as error:
            raise RecordingError(f"{path}: cannot be written: {error.strerror}") from None
        self._begun = time.monotonic()
        self._last: dict[str, object] = {}
        self._file.write(json.dumps({"format": FORMAT, "at_us": time.time_ns() // 1000}) + "\n")

    def close(self) -> None:
        """End the file."""
        self._file.close()

    def event(self, event: Event) -> None:
        """Write a signal of the service; what only says that the state differs is seen in the objects."""
        name = type(event).__name__
        if name in _SIGNALS:
            fields = [getattr(event, field) for field in event.__dataclass_fields__]
            member = "Completed" if name == "JobCompleted" else name
            self._put(
                signal={"path": fields[0], "interface": _SIGNALS[name], "member": member, "body": fields[1:]}
            )

    async def follow(self, client: Client) -> None:
        """Write what the service shows, until cancelled."""
        while True:
            if client.available:
                self._put_changed("objects", "", client.objects)
                for device in client.state.devices:
                    if device.tracker is not None:
                        await self._write_map(client, device, device.tracker)
                self._file.flush()
            await asyncio.sleep(PERIOD_S)

    async def _write_map(self, client: Client, device: model.Device, tracker: model.Tracker) -> None:
        path, blocks = device.object_path, max(tracker.block_count, 1)
        try:
            ages, _ = await client.summarize(path, 0, blocks, min(blocks, MOST_CELLS), ask=False)
            info = await client.get_info(path, ask=False)
        except BlksnapError:
            # It was detached, or may not be read: then it is not in the recording.
            return
        shown = {"blocks": blocks, "active": tracker.active_number, "ages": _packed(ages)}
        self._put_changed("map", path, {"path": path, **shown})
        self._put_changed("info", path, {"path": path, "info": info})

    def _put_changed(self, kind: str, about: str, value: object) -> None:
        text = json.dumps(value)
        if self._last.get(kind + about) != text:
            self._last[kind + about] = text
            self._put(**{kind: value})

    def _put(self, **what: object) -> None:
        if not self._file.closed:
            self._file.write(json.dumps({"t": round(time.monotonic() - self._begun, 3), **what}) + "\n")


class Replay(FakeService):
    """
    A service that shows what was recorded, and does nothing: `play` moves it on.

    `started_us` is when the recording was begun.
    """

    def __init__(self, path: Path) -> None:
        """Read a recording. Raises RecordingError."""
        super().__init__(service_up=False)
        self.objects.clear()
        self._infos: dict[str, dict[str, Any]] = {}
        self._steps = list(_read(path))
        self.started_us = int(self._steps[0].get("at_us", 0))
        self._at = 1
        self.played_s = 0.0
        # What is there at the beginning is there at once.
        self._until(self._steps[1].get("t", 0.0) + 0.001 if len(self._steps) > 1 else 0.0)

    @property
    def over(self) -> bool:
        """Say whether all of it has been played."""
        return self._at >= len(self._steps)

    async def play(self) -> None:
        """Let it happen at the pace it did."""
        begun = time.monotonic() - self.played_s
        while not self.over:
            await asyncio.sleep(max(0.0, self._steps[self._at]["t"] - (time.monotonic() - begun)))
            self._until(time.monotonic() - begun)

    def client(self) -> Client:
        """Make a client of what is played."""
        return Client("recording", wait_for_service=True, transport=self.connect)

    def clock_us(self) -> int:
        """Give the time of day of what is shown."""
        return self.started_us + int(self.played_s * 1e6)

    def _until(self, time_s: float) -> None:
        while not self.over and self._steps[self._at]["t"] <= time_s:
            self._do(self._steps[self._at])
            self._at += 1
        self.played_s = max(self.played_s, time_s)

    def _do(self, step: Mapping[str, Any]) -> None:
        if "objects" in step:
            self._become(step["objects"])
        elif "map" in step:
            shown = step["map"]
            sequence = self.maps[shown["path"]].sequence + 1 if shown["path"] in self.maps else 1
            self.maps[shown["path"]] = ReplayMap.of(shown, sequence)
        elif "info" in step:
            self._infos[step["info"]["path"]] = step["info"]["info"]
        elif "signal" in step:
            signal = step["signal"]
            self._emit(OWNER, signal["path"], signal["interface"], signal["member"], *signal["body"])

    def _become(self, objects: dict[str, dict[str, dict[str, Any]]]) -> None:
        """Show other objects, and send the signals that say so."""
        for path in [path for path in self.objects if path not in objects]:
            self._remove(path, *list(self.objects[path]))
        for path, interfaces in objects.items():
            gone = [name for name in self.objects.get(path, {}) if name not in interfaces]
            if gone:
                self._remove(path, *gone)
            for name, values in interfaces.items():
                if name not in self.objects.get(path, {}):
                    self._add(path, {name: values})
                elif values != self.objects[path][name]:
                    self._change(path, name, **values)
        if not self.service_up:
            self.start()

    def answer(self, path: str, member: str, body: Any) -> tuple[tuple[Any, ...], tuple[int, ...]]:
        """Answer what only looks; nothing can be done to a recording."""
        if member == "GetInfo" and path in self._infos:
            return (self._infos[path],), ()
        if member not in ("GetManagedObjects", "Summarize", "ReadMap"):
            raise Refusal("NotSupported", "this is a recording: nothing can be done to it")
        if member != "GetManagedObjects" and path not in self.maps:
            raise Refusal("NotAvailable", f"the recording has no map of {path.removeprefix(ROOT_PATH)}")
        shown = self.maps.get(path)
        if member == "ReadMap" and isinstance(shown, ReplayMap):
            oldest = self.objects[path][model.TRACKER]["OldestNumber"]
            return (shown.bytes_of(body[0], body[1], max(oldest - 1, 0)),), ()
        return super().answer(path, member, body)


class ReplayMap(FakeMap):
    """A recorded map: cells that each stand for one block or for several."""

    blocks = 0

    @classmethod
    def of(cls, shown: Mapping[str, Any], sequence: int) -> ReplayMap:
        """Make it of a line of a recording. Map bytes are numbers less a base, so that they fit."""
        ages, active = _unpacked(shown["ages"]), int(shown["active"])
        made = cls(bytearray(ages), active=active, sequence=sequence)
        made.blocks = int(shown["blocks"])
        return made

    def summary(self, first: int, count: int, bins: int, mode: str, since: int) -> bytes:
        """Fold cells into bins: age and density; how often something changed is not in a recording."""
        cells, total, folded = len(self.values), self.blocks, bytearray(bins)
        if mode == "frequency":
            return bytes(bins)
        least = 255 - (self.active - since) + 1
        for index in range(bins):
            begin = (first + index * count // bins) * cells // total
            end = max(-(-(first + (index + 1) * count // bins) * cells // total), begin + 1)
            part = self.values[begin:end]
            if mode == "age":
                folded[index] = max(part)
            else:
                changed = sum(value >= max(least, 1) for value in part)
                folded[index] = -(-255 * changed // len(part))
        return bytes(folded)

    def bytes_of(self, first: int, count: int, base: int) -> bytes:
        """Give the map bytes of blocks, as far as cells tell them apart."""
        table = bytes(1) + bytes(max(1, self.active - (255 - age) - base) & 0xFF for age in range(1, 256))
        cells, total = len(self.values), self.blocks
        return bytes(table[self.values[block * cells // total]] for block in range(first, first + count))


def _packed(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data)).decode()


def _unpacked(text: str) -> bytes:
    return zlib.decompress(base64.b64decode(text))


def _read(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open(encoding="utf8") as file:
            first = json.loads(file.readline())
            if not isinstance(first, dict) or first.get("format") != FORMAT:
                raise RecordingError(f"{path}: not a recording of blksnap-tui, or of another version")
            yield first
            for line in file:
                step = json.loads(line)
                if isinstance(step, dict) and "t" in step:
                    yield step
    except OSError as error:
        raise RecordingError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, UnicodeDecodeError):
        raise RecordingError(f"{path}: not a recording of blksnap-tui, or a damaged one") from None
