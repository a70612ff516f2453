# SPDX-License-Identifier: GPL-2.0-or-later
"""From a bus address to an authenticated socket.

What it is: address parsing (unix path and abstract sockets), the EXTERNAL mechanism and the negotiation of file
descriptor passing, as in the D-Bus specification ("Server Addresses", "Authentication Protocol"). What it is not:
other transports or mechanisms. A service that hands out file descriptors needs a unix socket.
"""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path
from typing import Final
from urllib.parse import unquote

from blksnap_service.errors import NotAuthorized, NotAvailable

SYSTEM_BUS: Final = "unix:path=/run/dbus/system_bus_socket"
TIMEOUT_SECONDS: Final = 20.0
_MAX_LINE_BYTES: Final = 16384


def resolve(address: str) -> str:
    """Return the D-Bus address for "system", "session" or an address.

    Raised when there is no session bus in the environment: NotAvailable.
    """
    if address == "system":
        return os.environ.get("DBUS_SYSTEM_BUS_ADDRESS") or SYSTEM_BUS
    if address != "session":
        return address
    named = os.environ.get("DBUS_SESSION_BUS_ADDRESS")
    if named:
        return named
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and Path(runtime, "bus").exists():
        return f"unix:path={runtime}/bus"
    raise NotAvailable(
        "there is no session bus: neither DBUS_SESSION_BUS_ADDRESS nor XDG_RUNTIME_DIR names one"
    )


def socket_names(address: str) -> list[str]:
    """Return the names to try for a resolved address, in order; an abstract one begins with NUL.

    Raised when the address has no unix socket: NotAvailable.
    """
    names = []
    for one in address.split(";"):
        transport, _, rest = one.partition(":")
        if transport != "unix":
            continue
        values = dict(pair.split("=", 1) for pair in rest.split(",") if "=" in pair)
        if "path" in values:
            names.append(unquote(values["path"]))
        elif "abstract" in values:
            names.append("\0" + unquote(values["abstract"]))
    if not names:
        raise NotAvailable(
            f"cannot connect to the bus {address!r}: only unix:path= and unix:abstract= are known"
        )
    return names


async def open_bus_socket(address: str) -> socket.socket:
    """Connect to a resolved address and authenticate; the caller owns the non-blocking socket.

    Raised when no socket can be reached or it is no bus that passes file descriptors: NotAvailable; when it refuses
    this user: NotAuthorized.
    """
    failure: OSError | None = None
    for name in socket_names(address):
        bus = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                await asyncio.get_running_loop().sock_connect(bus, name)
                await _authenticate(bus)
        except TimeoutError as error:
            bus.close()
            raise NotAvailable(f"the bus {address!r} did not answer in {TIMEOUT_SECONDS:.0f} s") from error
        except OSError as error:
            bus.close()
            failure = error
        except BaseException:
            bus.close()
            raise
        else:
            return bus
    reason = failure.strerror if failure and failure.strerror else failure
    raise NotAvailable(f"cannot connect to the bus {address!r}: {reason}") from failure


async def _authenticate(bus: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    uid = str(os.geteuid()).encode().hex()
    await loop.sock_sendall(bus, f"\0AUTH EXTERNAL {uid}\r\n".encode())
    answer = await _read_line(bus)
    if not answer.startswith("OK "):
        raise NotAuthorized(f"the bus refused to authenticate uid {os.geteuid()}: {answer!r}")
    await loop.sock_sendall(bus, b"NEGOTIATE_UNIX_FD\r\n")
    answer = await _read_line(bus)
    if answer != "AGREE_UNIX_FD":
        raise NotAvailable(f"the bus does not pass file descriptors: {answer!r}")
    await loop.sock_sendall(bus, b"BEGIN\r\n")


async def _read_line(bus: socket.socket) -> str:
    """Read one line. Raised when the bus hangs up or sends something else: NotAvailable."""
    line = b""
    while not line.endswith(b"\r\n"):
        chunk = await asyncio.get_running_loop().sock_recv(bus, 512)
        if not chunk:
            raise NotAvailable("the bus closed the connection during authentication")
        line += chunk
        if len(line) > _MAX_LINE_BYTES:
            raise NotAvailable("the bus sent an overlong line during authentication")
    return line[:-2].decode("ascii", "replace")
