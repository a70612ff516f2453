# SPDX-License-Identifier: GPL-2.0-or-later
"""
A private message bus and a scripted service on it, for tests of what a client makes of good and bad answers.

Not a stand-in for the service: that one is tested for itself, and with the clients, elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, Self

from blksnap_tui import model, wire

# The library, with the clients' patient writer: a stock one would leave the bus under the load some tests make.
library: Any = wire._library
Message: Any = library.Message
Variant: Any = library.Variant

CONFIG = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig><type>session</type><listen>unix:path={socket}</listen><auth>EXTERNAL</auth>
<policy context="default"><allow user="*"/><allow own="*"/><allow send_destination="*" eavesdrop="false"/>
<allow receive_sender="*"/></policy></busconfig>
"""

DISK = model.ObjectPath(f"{model.ROOT_PATH}/devices/disk")

DEVICE_PROPERTIES: dict[str, Any] = {
    "Path": Variant("s", "/srv/disk.img"),
    "Symlinks": Variant("as", []),
    "DeviceNumber": Variant("t", 0),
    "Size": Variant("t", 1 << 30),
    "LogicalBlockSize": Variant("u", 512),
    "ReadOnly": Variant("b", False),
    "Model": Variant("s", ""),
    "Serial": Variant("s", ""),
    "IdType": Variant("s", "ext4"),
    "IdLabel": Variant("s", ""),
    "IdUUID": Variant("s", ""),
    "MountPoints": Variant("as", []),
    "Tracked": Variant("b", False),
    "Snapshots": Variant("ao", []),
    "Backends": Variant("as", ["nbd"]),
}

Handler = Callable[[Any], Any]


@contextlib.asynccontextmanager
async def private_bus(directory: Path) -> AsyncIterator[str]:
    """Run a dbus-daemon of its own; gives its address."""
    config = directory / "bus.conf"
    config.write_text(CONFIG.format(socket=directory / "bus.sock"), encoding="utf8")
    daemon = await asyncio.create_subprocess_exec(
        "dbus-daemon",
        f"--config-file={config}",
        "--nofork",
        "--nopidfile",
        "--print-address=1",
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    assert daemon.stdout is not None
    try:
        line = await asyncio.wait_for(daemon.stdout.readline(), 10)
        yield line.decode().strip()
    finally:
        with contextlib.suppress(ProcessLookupError):
            daemon.terminate()
        await daemon.wait()


class ScriptedService:
    """Owns the service's name and answers with what the test put into `handlers`, keyed by member name."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.objects: dict[str, dict[str, dict[str, Any]]] = {DISK: {model.DEVICE: dict(DEVICE_PROPERTIES)}}
        self.handlers: dict[str, Handler] = {"GetManagedObjects": self._managed}
        self.calls: list[Any] = []
        self._bus: Any = None

    async def __aenter__(self) -> Self:
        """Connect and take the name."""
        self._bus = await wire._Bus(bus_address=self.address, negotiate_unix_fd=True).connect()
        self._bus.add_message_handler(self._receive)
        await self._bus.request_name(model.SERVICE_NAME)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Leave the bus."""
        if self._bus.connected:
            self._bus.disconnect()
        with contextlib.suppress(EOFError):
            await self._bus.wait_for_disconnect()
        self._bus.close_socket()

    def emit(self, path: str, interface: str, member: str, signature: str, body: Sequence[Any]) -> None:
        """Send a signal."""
        self._bus.send(Message.new_signal(path, interface, member, signature, list(body)))

    def change(self, path: str, interface: str, **values: Any) -> None:
        """Change properties and say so."""
        self.objects[path][interface].update(values)
        self.emit(
            path, "org.freedesktop.DBus.Properties", "PropertiesChanged", "sa{sv}as", [interface, values, []]
        )

    def _managed(self, call: Any) -> Any:
        return Message.new_method_return(call, "a{oa{sa{sv}}}", [self.objects])

    def _receive(self, call: Any) -> bool | None:
        if call.message_type is not library.MessageType.METHOD_CALL:
            return None
        self.calls.append(call)
        handler = self.handlers.get(call.member)
        if handler is None:
            reply = Message.new_error(call, "org.freedesktop.DBus.Error.UnknownMethod", call.member)
        else:
            reply = handler(call)
        if reply is not None and not call.flags & library.MessageFlag.NO_REPLY_EXPECTED:
            self._bus.send(reply)
        return True
