# SPDX-License-Identifier: GPL-2.0-or-later
"""
The service seen from a client: its state as frozen values, its events, its methods as coroutines.

Shared by the terminal program, `blksnapctl` and the demo; imports no Textual and nothing of the service. In
short::

    async with Client("system") as client:            # "system", "session" or a D-Bus address
        disk = await client.add_image_file("/srv/disk.img")     # → object path
        await client.attach(disk)
        shot = await client.create_snapshot([disk], limit=10 << 30)
        device = client.state.device(disk)            # frozen: model.Device, .tracker, .snapshots …
        async for offset, length in client.changed_ranges(disk, since=1):
            ...
        with await client.open_map(disk, view="taken") as map_file:    # map_file.fd, map_file.info
            ...

`state` follows the service's signals. `subscribe` hands out events: `StateChanged` (look at `state` again),
`ServiceLost` and `ServiceFound` (the name's owner went or came; the connection stands), `BusLost` (the
connection is gone: make a new Client), and the service's own signals as values. Callbacks run in the event
loop and must not block. A method called right after another sees the state its predecessor left: replies and
signals of the service come in order.

Errors: `errors.ServiceError` (with `.kind`, `.text`) and its subclasses, ServiceUnavailableError,
BusUnavailableError, CallTimeoutError, ProtocolError. Calls that may wait for a person's password or for a big
take have long time limits.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

from blksnap_tui import model
from blksnap_tui.calls import READ_TIMEOUT_S, Calls, checked
from blksnap_tui.errors import BlksnapError, ServiceUnavailableError
from blksnap_tui.events import BusLost, Event, ServiceFound, ServiceLost, StateChanged, event_from
from blksnap_tui.model import ROOT_PATH, SERVICE_NAME
from blksnap_tui.wire import DBUS, DBUS_PATH, Connection, Link, Signal

PROPERTIES = f"{DBUS}.Properties"
OBJECT_MANAGER = f"{DBUS}.ObjectManager"

OBJECTS = "a{oa{sa{sv}}}"

Transport = Callable[[str, Callable[[Signal], None], Callable[[str], None]], Link]

_Objects = dict[str, dict[str, dict[str, Any]]]


class Client(Calls):
    """
    The service on one bus, for as long as the `async with` lasts.

    Entering connects and reads the state. Raises BusUnavailableError; ServiceUnavailableError unless
    `wait_for_service`, with which an absent service is just one that has not come yet (`available` tells,
    ServiceFound announces it).
    """

    def __init__(
        self, bus: str = "system", *, wait_for_service: bool = False, transport: Transport = Connection
    ) -> None:
        self.bus = bus
        self._wait_for_service = wait_for_service
        super().__init__(transport(bus, self._on_signal, self._on_closed))
        self._owner = ""
        self._objects: _Objects | None = None
        self._early: list[Signal] = []
        self._state: model.State | None = None
        self._subscribers: list[Callable[[Event], None]] = []
        self._stale = asyncio.Event()
        self._loading = False
        self._loader: asyncio.Task[None] | None = None
        self._stack = contextlib.AsyncExitStack()

    # ---- life

    async def __aenter__(self) -> Self:
        """Connect, listen, read the state."""
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(self._connection)
            # Listening first: what happens while the objects are being read arrives as signals and is applied
            # afterwards.
            await self._connection.add_match(
                f"type='signal',sender='{DBUS}',path='{DBUS_PATH}',interface='{DBUS}',"
                f"member='NameOwnerChanged',arg0='{SERVICE_NAME}'"
            )
            await self._connection.add_match(
                f"type='signal',sender='{SERVICE_NAME}',path_namespace='{ROOT_PATH}'"
            )
            try:
                await self._load()
            except ServiceUnavailableError:
                if not self._wait_for_service:
                    raise
            self._stack = stack.pop_all()
        self._loader = asyncio.create_task(self._keep_loaded(), name="blksnap client loader")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Disconnect. Snapshots created with `hold` end here."""
        if self._loader is not None:
            self._loader.cancel()
            await asyncio.wait([self._loader])
        await self._stack.aclose()

    @property
    def available(self) -> bool:
        """Say whether the service is there and its state has been read."""
        return self._objects is not None

    @property
    def state(self) -> model.State:
        """
        Give what the service shows now; empty while it is away.

        Raises ProtocolError when it cannot be read.
        """
        if self._state is None:
            self._state = model.state_from(self._objects or {})
        return self._state

    @property
    def objects(self) -> Mapping[str, Mapping[str, Mapping[str, Any]]]:
        """Give all objects as they are on the bus: path → interface → property → value."""
        return self._objects or {}

    def subscribe(self, callback: Callable[[Event], None]) -> Callable[[], None]:
        """Hand every event to `callback` from now on; returns what ends it."""
        self._subscribers.append(callback)
        return lambda: self._subscribers.remove(callback)

    # ---- signals

    def _tell(self, event: Event) -> None:
        for callback in tuple(self._subscribers):
            callback(event)

    def _on_closed(self, reason: str) -> None:
        self._objects, self._state = None, None
        self._tell(BusLost(reason))

    def _on_signal(self, signal: Signal) -> None:
        if signal.interface == DBUS and signal.member == "NameOwnerChanged" and signal.sender == DBUS:
            self._on_owner(str(signal.body[2]))
        elif self._objects is None or self._loading:
            self._early.append(signal)
        elif signal.sender == self._owner:
            self._apply(signal, self._objects)

    def _on_owner(self, owner: str) -> None:
        if owner == self._owner:
            return
        had_state, self._owner = self._objects is not None, owner
        self._objects, self._state = None, None
        self._early.clear()
        if had_state:
            self._tell(ServiceLost())
        if owner:
            self._stale.set()

    def _apply(self, signal: Signal, objects: _Objects) -> None:
        """Change the kept objects as one signal says, and tell the subscribers."""
        body = signal.body
        kind = signal.interface, signal.member, signal.signature
        if kind == (OBJECT_MANAGER, "InterfacesAdded", "oa{sa{sv}}"):
            objects.setdefault(body[0], {}).update(body[1])
        elif kind == (OBJECT_MANAGER, "InterfacesRemoved", "oas"):
            interfaces = objects.get(body[0], {})
            for name in body[1]:
                interfaces.pop(name, None)
            if not interfaces:
                objects.pop(body[0], None)
        elif kind == (PROPERTIES, "PropertiesChanged", "sa{sv}as"):
            objects.setdefault(signal.path, {}).setdefault(body[0], {}).update(body[1])
            if body[2]:
                self._stale.set()
        else:
            event = event_from(signal.path, signal.interface, signal.member, body)
            if event is not None:
                self._tell(event)
            return
        self._state = None
        self._tell(StateChanged())

    async def _load(self) -> None:
        """Read all objects anew and apply the signals that came meanwhile."""
        # What was read last stays until then: nobody is shown an empty service that only is being read.
        self._loading = True
        try:
            reply = await self._connection.call(
                SERVICE_NAME, ROOT_PATH, OBJECT_MANAGER, "GetManagedObjects", timeout_s=READ_TIMEOUT_S
            )
            objects: _Objects = checked(reply, OBJECTS)[0]
        except BlksnapError:
            self._objects, self._state = None, None
            raise
        finally:
            self._loading = False
        self._owner, self._objects, self._state = reply.sender, objects, None
        early, self._early = self._early, []
        for signal in early:
            if signal.sender == self._owner:
                self._apply(signal, objects)

    async def _keep_loaded(self) -> None:
        """Read the objects again whenever the service came back or named properties without their values."""
        while True:
            await self._stale.wait()
            self._stale.clear()
            back = self._objects is None
            try:
                await self._load()
            except BlksnapError:
                # It left again, or the bus did: NameOwnerChanged or the end of the connection says so by
                # itself.
                continue
            self._tell(ServiceFound() if back else StateChanged())
