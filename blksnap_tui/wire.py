# SPDX-License-Identifier: GPL-2.0-or-later
"""
One connection to a message bus, seen from a client: calls, signals, descriptors, nothing about blksnap.

The only module of the clients that imports a D-Bus library: dbus-next 0.2.3, or dbus-fast from Python 3.15
on, where dbus-next cannot be imported. Of either only `MessageBus`, `Message` and `Variant` are used. Three
faults they share are mended here: a full socket (EAGAIN) ends the connection, descriptors attached to any
message stay open, and (dbus-next) a socket that closes while authenticating makes the reader spin.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import importlib
import os
import socket
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

from blksnap_tui.errors import BusUnavailableError, CallTimeoutError, from_dbus

DBUS = "org.freedesktop.DBus"
DBUS_PATH = "/org/freedesktop/DBus"

# A client of either library that sends some 1000 calls at once is thrown off the bus; this many wait for
# their answers together.
CALLS_IN_FLIGHT = 32

_USE_FAST = sys.version_info >= (3, 15) or os.environ.get("BLKSNAP_DBUS_LIBRARY") == "fast"
_library: Any = importlib.import_module("dbus_fast" if _USE_FAST else "dbus_next")
_aio: Any = importlib.import_module(f"{_library.__name__}.aio.message_bus")
Variant: Any = _library.Variant

_CALL, _SIGNAL = _library.MessageType.METHOD_CALL, _library.MessageType.SIGNAL
_ERROR = _library.MessageType.ERROR
_INTERACTIVE = _library.MessageFlag.ALLOW_INTERACTIVE_AUTHORIZATION
_NO_REPLY = _library.MessageFlag.NO_REPLY_EXPECTED
_SILENT = _library.MessageFlag.NONE


@dataclass(frozen=True, slots=True)
class Signal:
    """One signal as it came: `sender` is the unique name of the connection that sent it."""

    sender: str
    path: str
    interface: str
    member: str
    signature: str
    body: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to a call: values without variants, and descriptors, which the caller now owns."""

    sender: str
    signature: str
    body: tuple[Any, ...]
    fds: tuple[int, ...]


class Link(Protocol):
    """What a client needs of a connection; `Connection` is the one to a real bus."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    async def call(
        self,
        destination: str,
        path: str,
        interface: str,
        member: str,
        signature: str = "",
        body: Sequence[Any] = (),
        *,
        fds: Sequence[int] = (),
        timeout_s: float = 25.0,
        interactive: bool = True,
    ) -> Reply:
        """Call a method and wait for its answer; `interactive`: a person may be asked for a password."""

    async def add_match(self, rule: str) -> None:
        """Ask for signals."""


def plain(value: Any) -> Any:
    """Take the variants out of a received value, at every depth."""
    if isinstance(value, Variant):
        return plain(value.value)
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value


def bus_address(bus: str) -> str:
    """
    Give the D-Bus address of `system`, `session`, or of an address itself.

    Raises BusUnavailableError when there is no session bus to speak of.
    """
    if bus == "system":
        return os.environ.get("DBUS_SYSTEM_BUS_ADDRESS") or "unix:path=/run/dbus/system_bus_socket"
    if bus == "session":
        address = os.environ.get("DBUS_SESSION_BUS_ADDRESS")
        runtime = os.environ.get("XDG_RUNTIME_DIR")
        if address:
            return address
        if runtime:
            return f"unix:path={runtime}/bus"
        raise BusUnavailableError(
            "there is no session bus: neither DBUS_SESSION_BUS_ADDRESS nor XDG_RUNTIME_DIR is set"
        )
    return bus


def close_fds(fds: Iterable[int]) -> None:
    """Close descriptors nobody took."""
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)


class _Writer(_aio._MessageWriter):  # type: ignore[misc]  # noqa: SLF001 - the library has no public seam
    """Sends queued messages; a full socket means "wait until it is writable"."""

    buf: memoryview | None
    offset: int

    def write_callback(self, remove_writer: bool = True) -> None:
        """Send what the socket takes."""
        try:
            while (data := self.buf or self._next()) is not None:
                try:
                    self.offset += self._send(data[self.offset :])
                except BlockingIOError:
                    return
                if self.offset < len(data):
                    return
                self.buf = None
                if self.fut is not None and not self.fut.done():
                    self.fut.set_result(None)
            if remove_writer:
                self.loop.remove_writer(self.fd)
        except OSError as error:
            if self.fut is not None and not self.fut.done():
                self.fut.set_exception(error)
            self.bus._finalize(error)  # noqa: SLF001

    def _next(self) -> memoryview | None:
        if not (self.messages if _USE_FAST else self.messages.qsize()):
            return None
        item = self.messages.popleft() if _USE_FAST else self.messages.get_nowait()
        self.buf, self.unix_fds, self.fut = memoryview(item[0]), item[1], item[2]
        self.offset = 0
        return self.buf

    def _send(self, data: memoryview) -> int:
        if not (self.unix_fds and self.negotiate_unix_fd):
            return int(self.sock.send(data))
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", self.unix_fds))]
        sent = int(self.sock.sendmsg([data], rights))
        self.unix_fds = None
        return sent


_aio._MessageWriter = _Writer  # noqa: SLF001 - both libraries look the writer up under this name


class _Bus(_aio.MessageBus):  # type: ignore[misc]
    """The library's connection, closing its socket when it fails or the other side does."""

    if not _USE_FAST:

        def _setup_socket(self) -> None:
            try:
                super()._setup_socket()
            except BaseException:
                self.close_socket()
                raise

        async def _auth_readline(self) -> str:
            line = b""
            while line[-2:] != b"\r\n":
                data = await self._loop.sock_recv(self._sock, 2)
                if not data or len(line) > 16384:
                    raise _library.AuthError("the bus closed the connection during authentication")
                line += data
            return line[:-2].decode()

    def close_socket(self) -> None:
        """Close the socket, once."""
        for part in (getattr(self, "_stream", None), getattr(self, "_sock", None)):
            if part is not None:
                with contextlib.suppress(OSError):
                    part.close()


class Connection:
    """
    A connection to one message bus, owned by whoever entered it.

    `on_signal` gets every signal a match rule lets through; `on_closed` is called once with the reason when
    the connection ends without `close`. Both run in the event loop and must not block.
    """

    def __init__(
        self, bus: str, on_signal: Callable[[Signal], None], on_closed: Callable[[str], None]
    ) -> None:
        self.address = bus_address(bus)
        self._on_signal = on_signal
        self._on_closed = on_closed
        self._bus: Any = None
        self._watcher: asyncio.Task[None] | None = None
        self._pending: dict[int, asyncio.Future[Any]] = {}
        self._slots = asyncio.Semaphore(CALLS_IN_FLIGHT)

    async def __aenter__(self) -> Self:
        """Connect. Raises BusUnavailableError."""
        try:
            self._bus = _Bus(bus_address=self.address, negotiate_unix_fd=True)
            await self._bus.connect()
        except (OSError, EOFError, _library.AuthError, _library.InvalidAddressError) as error:
            if self._bus is not None:
                self._bus.close_socket()
            raise BusUnavailableError(f"no message bus at {self.address}: {error}") from error
        self._bus.add_message_handler(self._receive)
        self._watcher = asyncio.create_task(self._watch(), name="blksnap bus watcher")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Disconnect; calls still waiting fail with BusUnavailableError."""
        self._on_closed = lambda _reason: None
        if self.is_open:
            self._bus.disconnect()
        if self._watcher is not None:
            await self._watcher

    @property
    def is_open(self) -> bool:
        """Say whether the connection still stands."""
        return self._bus is not None and bool(self._bus.connected)

    async def call(
        self,
        destination: str,
        path: str,
        interface: str,
        member: str,
        signature: str = "",
        body: Sequence[Any] = (),
        *,
        fds: Sequence[int] = (),
        timeout_s: float = 25.0,
        interactive: bool = True,
    ) -> Reply:
        """
        Call a method and wait for its answer; a person may be asked for a password unless not `interactive`.

        `fds` are sent (and stay the caller's); values of type `h` in `body` are indexes into them. Raises
        what `from_dbus` makes of an error reply, CallTimeoutError, BusUnavailableError.
        """
        async with self._slots:
            if not self.is_open:
                raise BusUnavailableError(f"the connection to the message bus at {self.address} is closed")
            serial = self._bus.next_serial()
            waiting = self._pending[serial] = asyncio.get_running_loop().create_future()
            message = _library.Message(
                destination=destination,
                path=path,
                interface=interface,
                member=member,
                signature=signature,
                body=list(body),
                unix_fds=list(fds),
                flags=_INTERACTIVE if interactive else _SILENT,
                serial=serial,
            )
            try:
                # The writer's future repeats what the watcher reports; looking at it keeps asyncio quiet.
                self._bus.send(message).add_done_callback(lambda sent: sent.cancelled() or sent.exception())
                async with asyncio.timeout(timeout_s):
                    answer = await waiting
            except TimeoutError:
                raise CallTimeoutError(f"no answer to {member} within {timeout_s:g} s") from None
            except asyncio.CancelledError:
                if waiting.done() and not waiting.cancelled() and waiting.exception() is None:
                    close_fds(waiting.result().unix_fds or ())
                raise
            finally:
                self._pending.pop(serial, None)
        fds_received = tuple(answer.unix_fds or ())
        if answer.message_type is _ERROR:
            close_fds(fds_received)
            text = answer.body[0] if answer.body and isinstance(answer.body[0], str) else ""
            raise from_dbus(answer.error_name, text)
        values = tuple(plain(value) for value in answer.body)
        return Reply(answer.sender or "", answer.signature, values, fds_received)

    async def add_match(self, rule: str) -> None:
        """Ask the bus for signals; the answer means the rule holds."""
        await self.call(DBUS, DBUS_PATH, DBUS, "AddMatch", "s", [rule])

    def _receive(self, message: Any) -> Any:
        """Route one message; runs inside the library's reader."""
        if message.message_type is _CALL:
            close_fds(message.unix_fds or ())
            if message.flags & _NO_REPLY:
                return True
            return _library.Message.new_error(message, f"{DBUS}.Error.UnknownMethod", "this is a client")
        if message.message_type is _SIGNAL:
            close_fds(message.unix_fds or ())
            body = tuple(plain(value) for value in message.body)
            self._on_signal(
                Signal(
                    sender=message.sender or "",
                    path=message.path,
                    interface=message.interface,
                    member=message.member,
                    signature=message.signature,
                    body=body,
                )
            )
            return None
        waiting = self._pending.pop(message.reply_serial, None)
        if waiting is None or waiting.done():
            close_fds(message.unix_fds or ())
        else:
            waiting.set_result(message)
        return True

    async def _watch(self) -> None:
        """Wait for the end of the connection, tell everyone who waits, close the socket."""
        reason = "the message bus closed the connection"
        try:
            await self._bus.wait_for_disconnect()
        except (OSError, EOFError) as error:
            reason = f"{reason}: {error}" if str(error) else reason
        finally:
            self._bus.close_socket()
            for waiting in list(self._pending.values()):
                if not waiting.done():
                    waiting.set_exception(BusUnavailableError(reason))
            self._pending.clear()
        self._on_closed(reason)
