# SPDX-License-Identifier: GPL-2.0-or-later
"""One connection to a message bus: calls out, calls in, who is who.

What it is: Hello, names, method calls with their replies, uids of callers, news of callers that leave. What it is
not: dispatch; calls that come in go to the handler a `Publisher` sets.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final, Protocol

from blksnap_service.bus import _frame, _handshake, _reading, _values
from blksnap_service.bus._frame import Header, Message
from blksnap_service.bus._reader import Reader
from blksnap_service.bus._values import FdTable
from blksnap_service.bus._writer import Writer, close_all
from blksnap_service.errors import BlksnapError, Busy, NotAvailable, NotFound, RemoteError, TimedOut

BUS_NAME: Final = "org.freedesktop.DBus"
BUS_PATH: Final = "/org/freedesktop/DBus"
UNKNOWN_OBJECT: Final = "org.freedesktop.DBus.Error.UnknownObject"
LIMITS_EXCEEDED: Final = "org.freedesktop.DBus.Error.LimitsExceeded"

CALL_TIMEOUT_SECONDS: Final = 25.0
# dbus-daemon's limit on a system bus is 32 MiB (max_message_size): it throws off who sends more.
MAX_SENT_BYTES: Final = 16 * 2**20
_CLOSED: Final = "the connection to the bus is closed"
_DO_NOT_QUEUE: Final = 4
_PRIMARY_OWNER, _ALREADY_OWNER = 1, 4
# One rule for all who leave: a connection may have 512, and each caller would need one.
_LEAVING: Final = f"type='signal',sender='{BUS_NAME}',path='{BUS_PATH}',interface='{BUS_NAME}',member='NameOwnerChanged',arg2=''"

_log = logging.getLogger(__name__)


class CallHandler(Protocol):
    """Takes the method calls that come in, with their file descriptors, and does not raise."""

    def __call__(self, message: Message) -> None:
        """Handle `message`, a method call, and own its file descriptors."""


async def connect(address: str) -> Connection:
    """Connect to the bus "system", "session" or one with a D-Bus address.

    Raised when it cannot be reached or is no bus: NotAvailable; when it refuses this user: NotAuthorized.
    """
    address = _handshake.resolve(address)
    connection = Connection(await _handshake.open_bus_socket(address), address)
    try:
        (name,) = await connection.call(BUS_NAME, BUS_PATH, BUS_NAME, "Hello")
        connection.unique_name = name
        await connection.call(BUS_NAME, BUS_PATH, BUS_NAME, "AddMatch", "s", [_LEAVING])
    except BaseException:
        connection.close()
        raise
    return connection


class Connection:
    """A connection to a bus, of one event loop. Made by `connect`, ended by `close` or by the bus."""

    def __init__(self, bus: socket.socket, address: str) -> None:
        """Take over an authenticated socket."""
        self.unique_name = ""
        self._address = address
        self._bus = bus
        self._serial = 0
        self._pending: dict[int, tuple[str, asyncio.Future[tuple[Header, list[Any]]]]] = {}
        self._uids: dict[str, asyncio.Future[int]] = {}
        self._watches: dict[str, list[Callable[[str], None]]] = {}
        self._handler: CallHandler | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._writer = Writer(bus, self._on_pressure, self._end)
        self._reader = Reader(bus, self._on_message, self._end)
        self._reader.resume()

    async def request_name(self, name: str) -> None:
        """Own `name`, from now until the connection ends.

        Raised when another has it: Busy; when the bus does not allow it to this user: RemoteError.
        """
        (result,) = await self.call(BUS_NAME, BUS_PATH, BUS_NAME, "RequestName", "su", [name, _DO_NOT_QUEUE])
        if result not in {_PRIMARY_OWNER, _ALREADY_OWNER}:
            raise Busy(f"the name {name} is taken on this bus: another service is running")

    async def caller_uid(self, sender: str) -> int:
        """Return the uid of a unique name; asked once, remembered until it leaves.

        Raised when it has left: NotFound.
        """
        known = self._uids.get(sender)
        if known is None:
            known = asyncio.get_running_loop().create_future()
            self._uids[sender] = known
            self._spawn(self._ask_uid(sender, known))
        return await asyncio.shield(known)

    def watch_name(self, unique: str, callback: Callable[[str], None]) -> Callable[[], None]:
        """Call `callback(unique)` once, as soon as nobody has the name (any more). Returns how to stop that."""
        callbacks = self._watches.setdefault(unique, [])
        callbacks.append(callback)
        # It may have left before this was called.
        self._spawn(self._check_presence(unique))

        def cancel() -> None:
            with contextlib.suppress(ValueError):
                callbacks.remove(callback)
            if not callbacks and self._watches.get(unique) is callbacks:
                del self._watches[unique]

        return cancel

    async def call(
        self,
        destination: str,
        path: str,
        interface: str,
        member: str,
        signature: str = "",
        arguments: Sequence[Any] = (),
        *,
        timeout: float | None = CALL_TIMEOUT_SECONDS,  # noqa: ASYNC109 - the reply is forgotten, not only the wait
        interactive: bool = False,
    ) -> list[Any]:
        """Call a method and return what it returns, as plain values.

        `interactive`: the called may ask the user. `timeout`: seconds; None waits for ever.
        Raised when the answer is an error: RemoteError; when there is none: TimedOut; when the bus is gone: NotAvailable.
        """
        flags = _frame.ALLOW_INTERACTIVE_AUTHORIZATION if interactive else 0
        header = Header(_frame.METHOD_CALL, flags, 0, path, interface, member, destination=destination)
        reply: asyncio.Future[tuple[Header, list[Any]]] = asyncio.get_running_loop().create_future()
        serial = self.send(header, signature, arguments)
        # Sending may be what finds out that the bus is gone.
        if self._ended.done():
            raise NotAvailable(self._ended.result() or _CLOSED)
        self._pending[serial] = (destination, reply)
        try:
            async with asyncio.timeout(timeout):
                answer, values = await reply
        except TimeoutError as error:
            raise TimedOut(f"{destination} did not answer {member} in {timeout} s") from error
        finally:
            self._pending.pop(serial, None)
        if answer.kind == _frame.ERROR:
            text = values[0] if values and isinstance(values[0], str) else answer.error_name
            raise RemoteError(answer.error_name, text)
        return values

    async def wait_disconnected(self) -> None:
        """Return when `close` was called. Raised when the bus ended the connection: NotAvailable."""
        reason = await asyncio.shield(self._ended)
        if reason:
            raise NotAvailable(reason)

    async def drain(self) -> None:
        """Wait until everything sent so far is with the bus."""
        await self._writer.drained()

    def close(self) -> None:
        """End the connection. Calls under way raise NotAvailable. May be repeated."""
        self._end("")

    # For the publisher.

    def set_call_handler(self, handler: CallHandler | None) -> None:
        """Hand calls that come in to `handler`."""
        self._handler = handler

    def send(
        self, header: Header, signature: str, values: Sequence[Any], fds: list[int] | None = None
    ) -> int:
        """Marshal and queue a message; returns its serial. Descriptors in `values` and `fds` are consumed.

        Raised when a value does not fit the signature (TypeError, ValueError) or the message is too large
        (ValueError): defects of ours.
        """
        owned = [] if fds is None else fds
        try:
            body = _values.encode(signature, values, owned)
            if len(owned) > _values.MAX_FDS:
                raise ValueError(f"{len(owned)} file descriptors in one message")
            self._serial = self._serial % (2**32 - 1) + 1
            header = replace(header, serial=self._serial, signature=signature, fd_count=len(owned))
            frame = _frame.build(header, body)
            if len(frame) > MAX_SENT_BYTES:
                raise ValueError(f"a message of {len(frame)} bytes")
        except BaseException:
            close_all(owned)
            raise
        self._writer.send(frame, owned)
        return self._serial

    def reply_error(self, call: Header, name: str, text: str) -> None:
        """Answer a call with an error, if it wants an answer."""
        if not call.flags & _frame.NO_REPLY_EXPECTED:
            header = Header(_frame.ERROR, error_name=name, reply_serial=call.serial, destination=call.sender)
            self.send(header, "s", [text])

    # What comes in.

    def _on_pressure(self, pressed: bool) -> None:
        if pressed:
            self._reader.pause()
        else:
            self._reader.resume()

    def _on_message(self, message: Message) -> None:
        """Edge: whatever happens in here, the next message is read."""
        try:
            kind = message.header.kind
            if kind == _frame.METHOD_CALL:
                self._on_call(message)
            elif kind in {_frame.METHOD_RETURN, _frame.ERROR}:
                self._on_reply(message)
            elif kind == _frame.SIGNAL:
                self._on_signal(message)
        except Exception:  # noqa: BLE001 - the edge; logged with its traceback
            _log.exception("a message of kind %d could not be handled", message.header.kind)
        finally:
            close_all(message.fds)

    def _on_call(self, message: Message) -> None:
        header = message.header
        if message.body is None:
            self.reply_error(header, LIMITS_EXCEEDED, "the message is larger than any call of this service")
        elif message.fds_lost:
            self.reply_error(
                header, LIMITS_EXCEEDED, "the file descriptors of the message could not be received"
            )
        elif self._handler is None:
            self.reply_error(header, UNKNOWN_OBJECT, f"there is no object {header.path}")
        else:
            self._handler(message)

    def _on_reply(self, message: Message) -> None:
        header = message.header
        destination, reply = self._pending.get(header.reply_serial, ("", None))
        if reply is None or reply.done() or (destination == BUS_NAME and header.sender != BUS_NAME):
            return
        try:
            if message.body is None:
                raise ValueError(f"{destination} sent too large an answer")
            values = _reading.decode(header.order, header.signature, message.body, FdTable(message.fds))
        except ValueError as error:
            reply.set_exception(NotAvailable(str(error)))
        else:
            reply.set_result((header, values))

    def _on_signal(self, message: Message) -> None:
        header = message.header
        if (header.sender, header.member, header.signature) != (BUS_NAME, "NameOwnerChanged", "sss"):
            return
        name, _, owner = _reading.decode(header.order, "sss", message.body or b"", FdTable([]))
        if not owner:
            self._left(name)

    # Who is who.

    def _left(self, name: str) -> None:
        self._uids.pop(name, None)
        for callback in self._watches.pop(name, []):
            try:
                callback(name)
            except Exception:  # noqa: BLE001 - the edge; logged with its traceback
                _log.exception("what follows when %s leaves the bus failed", name)

    async def _ask_uid(self, sender: str, answer: asyncio.Future[int]) -> None:
        try:
            (uid,) = await self.call(BUS_NAME, BUS_PATH, BUS_NAME, "GetConnectionUnixUser", "s", [sender])
            answer.set_result(uid)
        except BlksnapError as error:
            if self._uids.get(sender) is answer:
                del self._uids[sender]
            gone = isinstance(error, RemoteError)
            answer.set_exception(NotFound(f"the caller {sender} has left the bus") if gone else error)
            answer.exception()  # who asked may have been cancelled

    async def _check_presence(self, unique: str) -> None:
        with contextlib.suppress(BlksnapError):
            (present,) = await self.call(BUS_NAME, BUS_PATH, BUS_NAME, "NameHasOwner", "s", [unique])
            if not present:
                self._left(unique)

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _end(self, reason: str) -> None:
        if self._ended.done():
            return
        self._ended.set_result(f"the bus {self._address!r} is gone: {reason}" if reason else "")
        self._reader.close()
        self._writer.close()
        self._bus.close()
        for _, reply in self._pending.values():
            if not reply.done():
                reply.set_exception(NotAvailable(self._ended.result() or _CLOSED))
        self._watches.clear()
