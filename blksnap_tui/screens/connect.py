# SPDX-License-Identifier: GPL-2.0-or-later
"""The screen for when there is nothing to show: no bus, no service, or one that cannot be read. It goes by itself."""

from __future__ import annotations

from typing import ClassVar, Final

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import Screen
from textual.widgets import Footer, Static

from blksnap_tui.messages import Link, LinkChanged

_TITLES: Final = {
    Link.NO_BUS: "✕ no connection to the message bus",
    Link.NO_SERVICE: "○ the service is not running",
    Link.FOREIGN: "✕ the service cannot be understood",
    Link.UP: "connected",
}


def advice(link: Link, bus: str) -> str:
    """Say what to do next."""
    if link is Link.NO_SERVICE and bus == "system":
        return "start it with: systemctl start blksnapd\nor look at what went wrong: journalctl -u blksnapd"
    if link is Link.NO_SERVICE:
        return f"start it with: blksnapd --bus {bus}"
    if link is Link.NO_BUS:
        return "is the address right? another bus is chosen with --bus system, --bus session or --bus ADDRESS"
    if link is Link.FOREIGN:
        return "the service and this program should be of the same version"
    return ""


class ConnectScreen(Screen[None]):
    """Says what is missing, what to do, and that it is being tried again."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("r", "app.retry", "retry now", id="connect.retry"),
        Binding("q", "app.quit", "quit", id="app.quit"),
    ]

    def __init__(self, bus: str, link: LinkChanged) -> None:
        super().__init__()
        self._bus, self._link = bus, link
        self._laid_out = False

    def compose(self) -> ComposeResult:
        """Lay it out."""
        yield Vertical(
            Static("", id="connect-title", markup=False),
            Static("", id="connect-reason", markup=False),
            Static("", id="connect-advice", markup=False),
            Static("", id="connect-retry", markup=False),
            id="connect-box",
        )
        yield Footer(compact=True, show_command_palette=False)

    def on_mount(self) -> None:
        """Show how things stood when it came up."""
        self._laid_out = True
        self.show(self._link)

    def show(self, message: LinkChanged) -> None:
        """Show how things stand."""
        self._link, link = message, message.link
        if not self._laid_out:
            return
        again = "waiting for it; this screen goes by itself"
        if message.retry_s:
            again = f"trying again every {message.retry_s:g} s"
        for name, text in (
            ("title", _TITLES[link]),
            ("reason", message.reason),
            ("advice", advice(link, self._bus)),
            ("retry", again),
        ):
            self.query_one(f"#connect-{name}", Static).update(text)
        self.query_one("#connect-box").set_class(link in (Link.NO_BUS, Link.FOREIGN), "trouble")
