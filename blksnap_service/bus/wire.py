# SPDX-License-Identifier: GPL-2.0-or-later
"""D-Bus for the service: the one module its other parts use of this layer.

    connection = await wire.connect("system")
    publisher = wire.Publisher(connection, "/org/blksnap/Blksnap1", wire.load_interfaces())
    publisher.export("/org/blksnap/Blksnap1/Manager", {"org.blksnap.Blksnap1.Manager": manager})
    await connection.request_name("org.blksnap.Blksnap1")  # last: from here on callers come
    await connection.wait_disconnected()

What it is: the names to use. Everything runs in the event loop that connected and is called from there only.
Values are plain Python, by the table in `_values`. What it is not: an interface of ours; those are the modules
beside it.

Why not the library's own connection: any local user can throw a service off the bus that uses it (a full socket is
taken for the end; two pipelined floods suffice), exhaust its file descriptors (those attached to any message stay
open), or read its tracebacks. dbus-next 0.2.3 and dbus-fast 5.2 alike; tests/bus has the attacks.
"""

from __future__ import annotations

from typing import Any

from blksnap_service.bus._connection import Connection, connect
from blksnap_service.bus._dispatch import Call
from blksnap_service.bus._interfaces import Interface, load_interfaces, parse_interfaces
from blksnap_service.bus._library import LIBRARY_NAME
from blksnap_service.bus._objects import Implementation
from blksnap_service.bus._publisher import Publisher
from blksnap_service.bus._values import Value
from blksnap_service.fds import OwnedFd

__all__ = [
    "LIBRARY_NAME",
    "Call",
    "Connection",
    "Implementation",
    "Interface",
    "OwnedFd",
    "Publisher",
    "Value",
    "connect",
    "load_interfaces",
    "parse_interfaces",
    "variant",
]


def variant(signature: str, value: Any) -> Value:
    """Return `value` as a variant of one complete type, for an a{sv} that goes out."""
    return Value(signature, value)
