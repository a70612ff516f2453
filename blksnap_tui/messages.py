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
    """What the screen wants drawn: a device's blocks in a grid, by age or by density since a number."""

    device: ObjectPath
    grid: Grid
    mode: str = "age"
    since: int = 0


@dataclass(frozen=True, slots=True)
class Frame:
    """A summary as it came: one byte per bin of what was wanted."""

    wanted: Wanted
    values: bytes
    sequence: int


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
    """The map could not be read; `text` is the service's."""

    def __init__(self, device: ObjectPath, text: str) -> None:
        super().__init__()
        self.device, self.text = device, text


class InfoReady(Message):
    """A reading of the chosen device's tracker."""

    def __init__(self, device: ObjectPath, info: Mapping[str, Any]) -> None:
        super().__init__()
        self.device, self.info = device, info

    def can_replace(self, message: Message) -> bool:
        """Only the last one of a device matters."""
        return isinstance(message, InfoReady) and message.device == self.device


class Happened(Message):
    """The service sent one of its signals."""

    def __init__(self, event: events.Event) -> None:
        super().__init__()
        self.event = event
