# SPDX-License-Identifier: GPL-2.0-or-later
"""Questions and notices over the main screen. Escape always means "nothing happens"."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from rich.segment import Segment
from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.content import Content
from textual.screen import ModalScreen
from textual.strip import Strip
from textual.widgets import Button, Input, Select, SelectionList, Static
from textual.widgets.selection_list import Selection

from blksnap_tui.model import Device, ObjectPath
from blksnap_tui.units import format_size, parse_size

Answer = TypeVar("Answer")


class Dialog(ModalScreen[Answer | None]):
    """A box in the middle; escape dismisses it with None."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "dismiss(None)", "cancel", id="dialog.cancel"),
        Binding("left", "app.focus_previous", show=False, id="dialog.previous"),
        Binding("right", "app.focus_next", show=False, id="dialog.next"),
    ]

    TITLE_TEXT = ""

    def box(self, *children: Static | Input | SelectionList[ObjectPath] | Horizontal) -> Vertical:
        """Make the box."""
        made = Vertical(*children, classes="box")
        made.border_title = Content(self.TITLE_TEXT).markup
        return made


class Confirm(Dialog[bool]):
    """A yes or no before something that cannot be taken back; the answer at hand is no."""

    def __init__(self, title: str, text: str, yes: str) -> None:
        super().__init__()
        self.TITLE_TEXT = title
        self._text, self._yes = text, yes

    def compose(self) -> ComposeResult:
        """Lay it out."""
        yield self.box(
            Static(self._text, markup=False),
            Horizontal(
                Button("cancel", id="no", compact=True),
                Button(self._yes, id="yes", variant="error", compact=True),
                classes="buttons",
            ),
        )

    def on_mount(self) -> None:
        """Stand on "cancel"."""
        self.query_one("#no").focus()

    def on_button_pressed(self, event: Button.Pressed) -> None:
        """Answer."""
        self.dismiss(event.button.id == "yes")


class Notice(Dialog[bool]):
    """Something to read: what the service refused or could not do, in its own words, or (not `trouble`) what came out."""

    def __init__(self, title: str, text: str, *, trouble: bool = True) -> None:
        super().__init__()
        self.TITLE_TEXT = title
        self._text, self._trouble = text, trouble

    def compose(self) -> ComposeResult:
        """Lay it out."""
        yield self.box(
            Static(self._text, markup=False),
            Horizontal(Button("close", id="close", compact=True), classes="buttons"),
        )

    def on_mount(self) -> None:
        """Look like trouble where it is, and close with enter."""
        self.set_class(self._trouble, "trouble")
        self.query_one("#close").focus()

    def on_button_pressed(self) -> None:
        """Close."""
        self.dismiss(None)


class AskFile(Dialog[str]):
    """Asks for the path of an image file."""

    TITLE_TEXT = "add an image file"

    def compose(self) -> ComposeResult:
        """Lay it out."""
        yield self.box(
            Static(
                "the path of a disk image; programs then use it through the NBD socket that tracking opens"
            ),
            Input(placeholder="/srv/disk.img", id="path", compact=True),
            Static("", id="problem", classes="problem"),
            buttons("add"),
        )

    @on(Input.Submitted)
    @on(Button.Pressed, "#yes")
    def accept(self) -> None:
        """Answer with the path, if there is one."""
        path = self.query_one("#path", Input).value.strip()
        if path:
            self.dismiss(path)
        else:
            self.query_one("#problem", Static).update("write a path first")

    @on(Button.Pressed, "#no")
    def refuse(self) -> None:
        """Answer with nothing."""
        self.dismiss(None)


@dataclass(frozen=True, slots=True)
class SnapshotWish:
    """What snapshot to take: `limit` in bytes, "" as storage for the service's default."""

    devices: tuple[ObjectPath, ...]
    limit: int
    storage: str
    description: str
    hold: bool = False


class Choices(SelectionList[ObjectPath]):
    """A list of choices whose boxes are empty when they are not chosen; Textual's differ in colour only."""

    def render_line(self, y: int) -> Strip:
        """Draw one line."""
        strip = super().render_line(y)
        index = self.scroll_offset.y + y
        if index >= self.option_count or self.get_option_at_index(index).value in self.selected:
            return strip
        segments = [Segment(" ", part.style) if part.text == "X" else part for part in strip]
        return Strip(segments, strip.cell_length)


class AskSnapshot(Dialog[SnapshotWish]):
    """Asks what to take a snapshot of, and how much may be kept for it."""

    TITLE_TEXT = "take a snapshot"

    def __init__(self, devices: Sequence[Device], chosen: Device, storage: str) -> None:
        super().__init__()
        self._devices, self._chosen, self._storage = devices, chosen, storage

    def compose(self) -> ComposeResult:
        """Lay it out."""
        choices = [
            Selection(
                Content(f"{device.name}  {format_size(device.size)}"),
                device.object_path,
                device == self._chosen,
            )
            for device in self._devices
        ]
        shown = Choices(*choices, id="devices", compact=True)
        shown.styles.height = min(len(choices), 5)
        place = self._storage or "the service's own directory"
        yield self.box(
            Static("of these devices, all at one instant:"),
            shown,
            field(
                "limit", Input(value=default_limit(self._chosen.size), id="limit", compact=True), first=True
            ),
            field("keep in", Input(placeholder=place, id="storage", compact=True)),
            field("description", Input(placeholder="before the upgrade", id="description", compact=True)),
            field("kept", yes_or_no("hold", "until it is destroyed", "until this program leaves")),
            Static(
                "limit: the most bytes to keep for it. beyond that the snapshot fails; the devices go on.",
                classes="aside",
            ),
            Static("", id="problem", classes="problem"),
            buttons("take"),
        )

    def on_mount(self) -> None:
        """Begin at the description: the rest has its defaults."""
        self.query_one("#description").focus()

    @on(Input.Submitted)
    @on(Button.Pressed, "#yes")
    def accept(self) -> None:
        """Answer, unless something is not right."""
        devices = tuple(self.query_one("#devices", Choices).selected)
        problem = self.query_one("#problem", Static)
        if not devices:
            problem.update("choose at least one device (space)")
            return
        try:
            limit = parse_size(self.query_one("#limit", Input).value)
        except ValueError as error:
            problem.update(str(error))
            return
        storage = self.query_one("#storage", Input).value.strip()
        description = self.query_one("#description", Input).value.strip()
        hold = self.query_one("#hold", Select).value is True
        self.dismiss(SnapshotWish(devices, limit, storage, description, hold))

    @on(Button.Pressed, "#no")
    def refuse(self) -> None:
        """Answer with nothing."""
        self.dismiss(None)


def field(label: str, content: Input | Select[str] | Select[bool], *, first: bool = False) -> Horizontal:
    """Put a label before a field; `first` keeps it apart from what is above."""
    return Horizontal(Static(label, classes="label"), content, classes="field first" if first else "field")


def buttons(yes: str) -> Horizontal:
    """Make the buttons of a question that can be cancelled."""
    return Horizontal(
        Button("cancel", id="no", compact=True),
        Button(yes, id="yes", variant="primary", compact=True),
        classes="buttons",
    )


def yes_or_no(name: str, no: str, yes: str) -> Select[bool]:
    """Let one of two be chosen, in words: Textual's own boxes show it by colour only."""
    return Select([(no, False), (yes, True)], value=False, allow_blank=False, id=name, compact=True)


def default_limit(size: int) -> str:
    """Propose a fifth of the device, at least 64 MiB, as text."""
    proposed = max(size // 5, 64 << 20)
    gib = 1 << 30
    return f"{proposed // gib}GiB" if proposed >= 4 * gib else f"{-(-proposed // (1 << 20))}MiB"
