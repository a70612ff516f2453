# SPDX-License-Identifier: GPL-2.0-or-later
"""
A connection to a fake service (`testing`): stands where `wire.Connection` stands, with the same promises.

A service that is `locked` lets maps be read only after somebody could be asked for a password, who then gives it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from blksnap_tui.errors import ERROR_PREFIX, BusUnavailableError, from_dbus
from blksnap_tui.fakesignatures import SIGNATURES
from blksnap_tui.model import SERVICE_NAME
from blksnap_tui.wire import DBUS, Reply, Signal, plain

if TYPE_CHECKING:
    from blksnap_tui.testing import FakeService

OWNER = ":1.7"


class Refusal(Exception):
    """Raised inside the fake to answer a call with a D-Bus error of that kind."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.name = f"{ERROR_PREFIX}{kind}"
        self.text = text


class FakeLink:
    """One connection to a FakeService."""

    def __init__(
        self,
        service: FakeService,
        bus: str,
        on_signal: Callable[[Signal], None],
        on_closed: Callable[[str], None],
    ) -> None:
        self.service = service
        self.address = bus
        self.on_signal = on_signal
        self.closed = on_closed

    async def __aenter__(self) -> Self:
        """Connect."""
        await asyncio.sleep(0)
        if not self.service.bus_up:
            raise BusUnavailableError(f"no message bus at {self.address}: no such file or directory")
        self.service.links.append(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Disconnect."""
        with contextlib.suppress(ValueError):
            self.service.links.remove(self)

    async def call(
        self,
        destination: str,
        path: str,
        interface: str,  # noqa: ARG002 - members differ in name
        member: str,
        signature: str = "",  # noqa: ARG002
        body: Sequence[Any] = (),
        *,
        fds: Sequence[int] = (),  # noqa: ARG002
        timeout_s: float = 25.0,  # noqa: ARG002
        interactive: bool = True,
    ) -> Reply:
        """Have the service answer."""
        await asyncio.sleep(0)
        await self.service.answering.wait()
        if self not in self.service.links:
            raise BusUnavailableError("the connection to the message bus is closed")
        if destination == DBUS:
            return Reply(DBUS, "", (), ())
        if not self.service.service_up:
            raise from_dbus(f"{DBUS}.Error.ServiceUnknown", f"The name {SERVICE_NAME} is not on the bus")
        if self.service.locked and member in ("Summarize", "GetInfo", "ReadMap"):
            if not interactive:
                raise from_dbus(
                    f"{ERROR_PREFIX}NotAuthorizedCanObtain", "a password is needed to read the map"
                )
            self.service.locked = False
        try:
            values, sent = self.service.answer(path, member, plain(list(body)))
        except Refusal as refusal:
            raise from_dbus(refusal.name, refusal.text) from None
        return Reply(OWNER, SIGNATURES.get(member, ""), values, sent)

    async def add_match(self, rule: str) -> None:
        """Signals always come."""
