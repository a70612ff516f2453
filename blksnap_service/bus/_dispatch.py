# SPDX-License-Identifier: GPL-2.0-or-later
"""Answers method calls: finds the method, checks the arguments, runs it, sends what it returns or raises.

What it is: the edge between a hostile bus and our code. Callers get an error name and a text, never a traceback; the
log gets the traceback, and only for defects of ours. What it is not: permission checks, which methods make.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from blksnap_service.bus import _frame, _reading, _values
from blksnap_service.bus._connection import UNKNOWN_OBJECT, Connection
from blksnap_service.bus._frame import Header, Message
from blksnap_service.bus._interfaces import INTROSPECTABLE, OBJECT_MANAGER, PEER, PROPERTIES, STANDARD, Method
from blksnap_service.bus._objects import Implementation, ObjectTable
from blksnap_service.bus._values import FdTable, Value
from blksnap_service.bus._writer import close_all
from blksnap_service.errors import BlksnapError, Cancelled, Failed, LimitExceeded

STANDARD_ERROR: Final = "org.freedesktop.DBus.Error."
# dbus-daemon allows 128 calls without an answer per connection on a system bus (max_replies_per_connection), but
# does not count those that want none.
MAX_CALLS_PER_SENDER: Final = 128
MAX_CALLS: Final = 2048
# One user may have 256 connections to a system bus (max_connections_per_user).
MAX_CALLS_PER_UID: Final = 512
MAX_ERROR_CHARACTERS: Final = 4096
INTERNAL_ERROR: Final = "internal error; see the service's log"
NO_INTERACTION: Final = "auth.no_user_interaction"

_log = logging.getLogger(__name__)


class Identities(Protocol):
    """Who knows the uid of a caller: the connection."""

    async def caller_uid(self, sender: str) -> int:
        """Return the uid of a unique name. Raised when it has left the bus: NotFound."""


@dataclass(frozen=True, slots=True)
class Call:
    """Who calls what.

    `sender` is the caller's unique name. `interactive`: the caller agrees that the user is asked to authenticate (message
    flag ALLOW_INTERACTIVE_AUTHORIZATION, and no option auth.no_user_interaction).
    """

    sender: str
    interactive: bool
    path: str
    interface: str
    member: str
    identities: Identities
    present: Callable[[], bool]
    """Tells whether the object it was called on is there still, and not another one of its name."""

    async def uid(self) -> int:
        """Return the caller's uid. Raised when it has left the bus: NotFound."""
        return await self.identities.caller_uid(self.sender)


class _RefusalError(Exception):
    """Raised when a call is not for us: an error of the D-Bus specification, without its prefix, and a text."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(text)
        self.name = STANDARD_ERROR + name


class Dispatcher:
    """Answers the calls of one connection by one table of objects."""

    def __init__(self, connection: Connection, objects: ObjectTable) -> None:
        """Answer on `connection`; `stop` ends it."""
        self._connection = connection
        self._objects = objects
        self._tasks: set[asyncio.Task[None]] = set()
        self._calls: Counter[str] = Counter()
        self._calls_of_uids: Counter[int] = Counter()
        self._stopping = False

    def __call__(self, message: Message) -> None:
        """Handle a method call; takes its file descriptors."""
        header = message.header
        fds = FdTable(message.fds)
        started = False
        try:
            started = self._handle(header, message.body or b"", fds)
        except _RefusalError as refusal:
            self._connection.reply_error(header, refusal.name, str(refusal))
        except BlksnapError as error:
            self._refuse(header, error)
        except Exception:  # noqa: BLE001 - the edge; logged with its traceback
            _log.exception("%s.%s on %s failed", header.interface, header.member, header.path)
            self._refuse(header, Failed(INTERNAL_ERROR))
        finally:
            if not started:
                fds.close()

    async def stop(self) -> None:
        """Refuse new calls and cancel those that run; they are answered with Cancelled."""
        self._stopping = True
        # A task that is cancelled before its first step would end without an answer.
        await asyncio.sleep(0)
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _handle(self, header: Header, body: bytes, fds: FdTable) -> bool:
        """Answer at once (False) or start a task that does and owns `fds` (True)."""
        interface, method = self._find(header)
        if header.signature != method.signature_in:
            raise _RefusalError(
                "InvalidArgs",
                f"{interface}.{method.name} takes arguments of type {method.signature_in!r}, not {header.signature!r}",
            )
        try:
            arguments = _reading.decode(header.order, header.signature, body, fds)
        except ValueError as error:
            raise _RefusalError("InvalidArgs", str(error)) from error
        if interface in STANDARD:
            self._reply(header, method, self._standard(header.path, interface, method.name, arguments))
            return False
        if self._stopping:
            raise Cancelled("the service is stopping")
        if len(self._tasks) >= MAX_CALLS or self._calls[header.sender] >= MAX_CALLS_PER_SENDER:
            raise LimitExceeded("too many calls are under way; wait for answers before calling again")
        options = arguments[-1] if method.takes_options else {}
        interactive = bool(header.flags & _frame.ALLOW_INTERACTIVE_AUTHORIZATION) and options.get(
            NO_INTERACTION
        ) != Value("b", True)
        implementation = (self._objects.get(header.path) or {})[interface]
        call = Call(
            header.sender,
            interactive,
            header.path,
            interface,
            method.name,
            self._connection,
            lambda: (self._objects.get(header.path) or {}).get(interface) is implementation,
        )
        task = asyncio.get_running_loop().create_task(
            self._run(header, method, implementation, call, arguments, fds),
            name=f"{header.sender} {method.name} {header.path}",
        )
        self._tasks.add(task)
        self._calls[header.sender] += 1
        task.add_done_callback(lambda done: self._forget(done, header.sender, fds))
        return True

    def _forget(self, task: asyncio.Task[None], sender: str, fds: FdTable) -> None:
        fds.close()  # also of a task that was cancelled before it began
        self._tasks.discard(task)
        self._calls[sender] -= 1
        if not self._calls[sender]:
            del self._calls[sender]

    def _find(self, header: Header) -> tuple[str, Method]:
        """Return the interface and method of a call; one without an interface finds the first that has the member."""
        present = self._objects.get(header.path)
        ours = {name: self._objects.interfaces[name] for name in present or ()}
        standard = self._standard_interfaces(header.path)
        candidates = ours | {name: STANDARD[name] for name in standard}
        if header.interface:
            if header.interface not in candidates:
                self._require_node(header.path)
                raise _RefusalError("UnknownInterface", f"{header.path} has no interface {header.interface}")
            candidates = {header.interface: candidates[header.interface]}
        for name, interface in candidates.items():
            if header.member in interface.methods:
                return name, interface.methods[header.member]
        self._require_node(header.path)
        raise _RefusalError("UnknownMethod", f"{header.path} has no method {header.member}")

    def _standard_interfaces(self, path: str) -> list[str]:
        standard = [PEER]
        if self._objects.exists(path):
            standard.append(INTROSPECTABLE)
        if self._objects.get(path) is not None:
            standard.append(PROPERTIES)
        if path == self._objects.root:
            standard.append(OBJECT_MANAGER)
        return standard

    def _require_node(self, path: str) -> None:
        if not self._objects.exists(path):
            raise _RefusalError(UNKNOWN_OBJECT.removeprefix(STANDARD_ERROR), f"there is no object {path}")

    def _standard(self, path: str, interface: str, member: str, arguments: Sequence[Any]) -> Any:
        """Return what a method of a standard interface returns."""
        if interface == PEER:
            return _machine_id() if member == "GetMachineId" else None
        if interface == INTROSPECTABLE:
            return self._objects.introspect(path)
        if interface == OBJECT_MANAGER:
            return self._objects.managed()
        return self._properties(path, member, arguments)

    def _properties(self, path: str, member: str, arguments: Sequence[Any]) -> Any:
        name = arguments[0]
        present = self._objects.get(path) or {}
        if name and name not in present and name not in STANDARD:
            raise _RefusalError("UnknownInterface", f"{path} has no interface {name}")
        chosen = [one for one in present if name in {"", one}]
        if member == "GetAll":
            everything: dict[str, Value] = {}
            for one in chosen:
                everything |= self._objects.values(path, one)
            return everything
        wanted = arguments[1]
        holders = [one for one in chosen if wanted in self._objects.interfaces[one].properties]
        if not holders:
            raise _RefusalError("UnknownProperty", f"{path} has no property {wanted}")
        if member == "Set":
            raise _RefusalError("PropertyReadOnly", f"{wanted} cannot be set: all properties are read-only")
        return self._objects.values(path, holders[0])[wanted]

    async def _run(
        self,
        header: Header,
        method: Method,
        implementation: Implementation,
        call: Call,
        arguments: Sequence[Any],
        fds: FdTable,
    ) -> None:
        """Run a method and answer. Edge: nothing is raised but cancellation."""
        try:
            with self._counted(await call.uid()):
                result = await getattr(implementation, method.name)(call, *arguments)
            self._reply(header, method, result)
        except BlksnapError as error:
            self._refuse(header, error)
        except asyncio.CancelledError:
            self._refuse(header, Cancelled("the service stopped before it was done"))
            raise
        except Exception:  # noqa: BLE001 - the edge; logged with its traceback
            _log.exception("%s on %s failed", method.name, header.path)
            self._refuse(header, Failed(INTERNAL_ERROR))
        finally:
            fds.close()

    @contextlib.contextmanager
    def _counted(self, uid: int) -> Iterator[None]:
        """Keep one user from taking up all calls. Raises ``LimitExceeded``; never for uid 0."""
        if uid and self._calls_of_uids[uid] >= MAX_CALLS_PER_UID:
            raise LimitExceeded(
                f"too many calls of uid {uid} are under way; wait for answers before calling again"
            )
        self._calls_of_uids[uid] += 1
        try:
            yield
        finally:
            self._calls_of_uids -= Counter({uid: 1})

    def _reply(self, call: Header, method: Method, result: Any) -> None:
        """Send what a method returned; file descriptors in it are consumed, also if nobody wants the answer.

        Raised when the result is not what the XML says, a defect of ours: TypeError or ValueError.
        """
        results = [result] if method.results == 1 else list(result or ())
        header = Header(_frame.METHOD_RETURN, reply_serial=call.serial, destination=call.sender)
        if call.flags & _frame.NO_REPLY_EXPECTED:
            fds: list[int] = []
            try:
                _values.encode(method.signature_out, results, fds)
            finally:
                close_all(fds)
            return
        self._connection.send(header, method.signature_out, results)

    def _refuse(self, call: Header, error: BlksnapError) -> None:
        self._connection.reply_error(call, error.dbus_name, str(error)[:MAX_ERROR_CHARACTERS])


def _machine_id() -> str:
    for place in ("/etc/machine-id", "/var/lib/dbus/machine-id"):
        with contextlib.suppress(OSError):
            return Path(place).read_text(encoding="ascii").strip()
    raise _RefusalError("FileNotFound", "this machine has no id")
