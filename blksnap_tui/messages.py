# SPDX-License-Identifier: GPL-2.0-or-later
"""What the feed tells the screen, as Textual messages around frozen values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from textual.message import Message

from blksnap_tui import events, model
from blksnap_tui.heat.grid import Grid
from blksnap_tui.model import ObjectPath


class Link(Enum):
    """How the program stands to the service."""

    NO_BUS = "no message bus"
    NO_SERVICE = "no service"
    FOREIGN = "unreadable"
    UP = "connected"


@dataclass(frozen=True, slots=True)
class Wanted:
    """
    What the screen wants drawn: a device's blocks in a grid, as Summarize's `mode` says, density since a number.

    `strip` bins of the whole device are wanted besides, for the minimap.
    """

    device: ObjectPath
    grid: Grid
    mode: str = "age"
    since: int = 0
    strip: Grid | None = None


@dataclass(frozen=True, slots=True)
class Spot:
    """Blocks to look at closely: those under the cursor."""

    device: ObjectPath
    blocks: range


@dataclass(frozen=True, slots=True)
class Counts:
    """How many of a spot's blocks changed last in which interval; 0 is never in this generation."""

    spot: Spot
    generation_id: str
    by_number: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class Frame:
    """A summary as it came: one byte per bin of what was wanted, and of the strip that was."""

    wanted: Wanted
    values: bytes
    sequence: int
    strip: bytes = b""


class LinkChanged(Message):
    """The service was found or lost; `reason` is the last error's text, `retry_s` when the next attempt is made."""

    def __init__(self, link: Link, reason: str = "", retry_s: float = 0.0) -> None:
        super().__init__()
        self.link, self.reason, self.retry_s = link, reason, retry_s

    def can_replace(self, message: Message) -> bool:
        """Only the last one matters."""
        return isinstance(message, LinkChanged)


class StateUpdated(Message):
    """What the service shows is different."""

    def __init__(self, state: model.State) -> None:
        super().__init__()
        self.state = state

    def can_replace(self, message: Message) -> bool:
        """Only the last one matters."""
        return isinstance(message, StateUpdated)


class FrameReady(Message):
    """There is something new to draw."""

    def __init__(self, frame: Frame) -> None:
        super().__init__()
        self.frame = frame

    def can_replace(self, message: Message) -> bool:
        """Only the last one matters."""
        return isinstance(message, FrameReady)


class FrameFailed(Message):
    """The map could not be read; `text` is the service's, `locked` says that a person may be asked for a password."""

    def __init__(self, device: ObjectPath, text: str, *, locked: bool = False) -> None:
        super().__init__()
        self.device, self.text, self.locked = device, text, locked


class CountsReady(Message):
    """What is under the cursor has been counted."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def can_replace(self, message: Message) -> bool:
        """Only the last one matters."""
        return isinstance(message, CountsReady)


class Silence(Message):
    """The service has not answered for this many seconds; 0 when it has again."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def can_replace(self, message: Message) -> bool:
        """Only the last one matters."""
        return isinstance(message, Silence)


class InfoReady(Message):
    """A reading of a tracker, made at `at_s` of the event loop's clock."""

    def __init__(self, device: ObjectPath, info: Mapping[str, Any], at_s: float) -> None:
        super().__init__()
        self.device, self.info, self.at_s = device, info, at_s

    def can_replace(self, message: Message) -> bool:
        """Only the last one of a device matters."""
        return isinstance(message, InfoReady) and message.device == self.device


class Happened(Message):
    """The service sent one of its signals."""

    def __init__(self, event: events.Event) -> None:
        super().__init__()
        self.event = event
