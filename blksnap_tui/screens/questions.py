# SPDX-License-Identifier: GPL-2.0-or-later
"""Questions about one device: how to track it, where to go in its map, what to mark, where to write its changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from textual import on
from textual.app import ComposeResult
from textual.widgets import Button, Input, Select, Static

from blksnap_tui.model import Device, Manager
from blksnap_tui.screens.dialogs import Dialog, buttons, field, yes_or_no
from blksnap_tui.units import parse_size

Read = TypeVar("Read")


@dataclass(frozen=True, slots=True)
class TrackWish:
    """How to track a device; "" and 0 leave the choice to the service."""

    backend: str
    block_size: int
    persistent: bool


class AskTrack(Dialog[TrackWish]):
    """Asks whether to track a device, by what, and whether again at boot. Cancel is at hand."""

    def __init__(self, device: Device, manager: Manager | None, meaning: str) -> None:
        super().__init__()
        self.TITLE_TEXT = f"track {device.name}"
        self._device, self._manager, self._meaning = device, manager, meaning

    def compose(self) -> ComposeResult:
        """Lay it out."""
        known = {} if self._manager is None else {backend.name: backend for backend in self._manager.backends}
        choices, others = [], []
        for name in self._device.backends:
            backend = known.get(name)
            can = [] if backend is None else backend.abilities
            choices.append((f"{name}: {', '.join(can)}" if can else name, name))
        for name, backend in known.items():
            if name not in self._device.backends:
                why = backend.reason or f"not for {self._device.path} as it is now"
                others.append(f"○ {name}: {why}")
        yield self.box(
            Static(f"record from now on what changes on {self._device.path}? {self._meaning}", markup=False),
            field("backend", Select(choices, value=choices[0][1], allow_blank=False, id="backend", compact=True), first=True),
            field("block size", Input(placeholder="chosen by the size of the device", id="block-size", compact=True)),
            field("at boot", yes_or_no("persistent", "only now", "again at every boot")),
            Static("\n".join(others), classes="aside", markup=False),
            Static("", id="problem", classes="problem"),
            buttons("track"),
        )  # fmt: skip

    def on_mount(self) -> None:
        """Stand on "cancel"."""
        self.query_one("#no").focus()

    @on(Input.Submitted)
    @on(Button.Pressed, "#yes")
    def accept(self) -> None:
        """Answer, unless the block size cannot be read."""
        text = self.query_one("#block-size", Input).value.strip()
        try:
            block_size = parse_size(text) if text else 0
        except ValueError as error:
            self.query_one("#problem", Static).update(str(error))
            return
        backend = str(self.query_one("#backend", Select).value)
        # The first is the service's own choice.
        chosen = "" if backend == self._device.backends[0] else backend
        self.dismiss(TrackWish(chosen, block_size, self.query_one("#persistent", Select).value is True))

    @on(Button.Pressed, "#no")
    def refuse(self) -> None:
        """Answer with nothing."""
        self.dismiss(None)


class AskLine(Dialog[Read]):
    """Asks for one line, and does not go before it can be read: `read` raises ValueError with what is wrong."""

    def __init__(
        self,
        title: str,
        text: str,
        read: Callable[[str], Read],
        *,
        value: str = "",
        example: str = "",
        yes: str,
    ) -> None:
        super().__init__()
        self.TITLE_TEXT = title
        self._text, self._read, self._value, self._example, self._yes = text, read, value, example, yes

    def compose(self) -> ComposeResult:
        """Lay it out."""
        yield self.box(
            Static(self._text, markup=False),
            Input(value=self._value, placeholder=self._example, id="line", compact=True),
            Static("", id="problem", classes="problem", markup=False),
            buttons(self._yes),
        )

    def on_mount(self) -> None:
        """Begin to write."""
        self.query_one("#line").focus()

    @on(Input.Submitted)
    @on(Button.Pressed, "#yes")
    def accept(self) -> None:
        """Answer with what was read."""
        try:
            self.dismiss(self._read(self.query_one("#line", Input).value.strip()))
        except ValueError as error:
            self.query_one("#problem", Static).update(str(error))

    @on(Button.Pressed, "#no")
    def refuse(self) -> None:
        """Answer with nothing."""
        self.dismiss(None)
