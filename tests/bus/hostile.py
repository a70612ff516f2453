# SPDX-License-Identifier: GPL-2.0-or-later
"""A caller that writes its messages byte by byte, so that it can write wrong ones.

Nothing of it is shared with the service: messages are built here and answers are read by dbus-fast.
"""

from __future__ import annotations

import array
import io
import os
import select
import socket
import struct
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from dbus_fast import Message, MessageType
from dbus_fast._private import unmarshaller

DBUS = "org.freedesktop.DBus"
PEER = f"{DBUS}.Peer"
PROPERTIES = f"{DBUS}.Properties"
INTROSPECTABLE = f"{DBUS}.Introspectable"
OBJECT_MANAGER = f"{DBUS}.ObjectManager"
NO_REPLY = 0x1
INTERACTIVE = 0x4
NO_OPTIONS = struct.pack("<I", 0) + bytes(4)


def text(value: str, order: str = "<") -> bytes:
    """Return a string, without padding."""
    raw = value.encode()
    return struct.pack(f"{order}I", len(raw)) + raw + b"\0"


def padded(raw: bytes, size: int) -> bytes:
    """Return `raw` with zeros up to a multiple of `size`."""
    return raw + bytes(-len(raw) % size)


def strings(*values: str) -> bytes:
    """Return the body of a message with strings."""
    body = b""
    for value in values:
        body = padded(body, 4) + text(value)
    return body


def options(body: bytes = b"", **given: tuple[str, bytes]) -> bytes:
    """Return `body` with an a{sv} behind it; a value is (signature, its bytes, aligned as at a multiple of 8)."""
    start = padded(padded(body, 4) + bytes(4), 8)
    length_at = len(padded(body, 4))
    raw = start
    for name, (signature, value) in given.items():
        raw = padded(raw, 8) + text(name.replace("__", "."))
        raw += bytes([len(signature)]) + signature.encode() + b"\0"
        raw = padded(raw, {"t": 8, "(": 8, "v": 1}.get(signature[0], 4)) + value
    return raw[:length_at] + struct.pack("<I", len(raw) - len(start)) + raw[length_at + 4 :]


def build(
    serial: int,
    destination: str,
    path: str,
    interface: str,
    member: str,
    signature: str = "",
    body: bytes = b"",
    *,
    flags: int = 0,
    kind: int = 1,
    order: str = "<",
    fds: int = 0,
    extra: bytes = b"",
) -> bytes:
    """Return a whole message; `extra` is appended to the header fields as it is."""
    fields = b""

    def add(code: int, type_code: str, raw: bytes) -> None:
        nonlocal fields
        fields = padded(fields, 8) + bytes([code, 1]) + type_code.encode() + b"\0" + raw

    for code, type_code, value in (
        (1, "o", path),
        (2, "s", interface),
        (3, "s", member),
        (6, "s", destination),
    ):
        if value:
            add(code, type_code, text(value, order))
    if signature:
        add(8, "g", bytes([len(signature)]) + signature.encode() + b"\0")
    if fds:
        add(9, "u", struct.pack(f"{order}I", fds))
    if extra:
        fields = padded(fields, 8) + extra
    fixed = struct.pack(
        f"{order}BBBBIII", ord("l" if order == "<" else "B"), kind, flags, 1, len(body), serial, len(fields)
    )
    return padded(fixed + fields, 8) + body


def zeros(signature: str) -> bytes:
    """Return the bytes of zero values of fixed-size types, one after the other."""
    sizes = {"y": 1, "n": 2, "q": 2, "b": 4, "i": 4, "u": 4, "x": 8, "t": 8, "d": 8}
    raw = b""
    for code in signature:
        raw = padded(raw, sizes[code]) + bytes(sizes[code])
    return raw


def parse(frame: bytes) -> Message:
    """Return a whole message as dbus-fast reads it."""
    reader: Any = unmarshaller.Unmarshaller
    message = reader(io.BytesIO(frame)).unmarshall()
    assert isinstance(message, Message)
    return message


@dataclass(frozen=True)
class Answer:
    """What came back: `error` is empty for a method return; `fds` belong to who has it."""

    error: str
    body: list[Any]
    fds: tuple[int, ...] = ()


class Caller:
    """A connection that authenticated and said Hello, as any local user can."""

    def __init__(self, address: str, destination: str, path: str, interface: str) -> None:
        self.destination, self.path, self.interface = destination, path, interface
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(60)
        self.socket.connect(address.removeprefix("unix:path="))
        uid = str(os.getuid()).encode().hex()
        self.socket.sendall(f"\0AUTH EXTERNAL {uid}\r\nNEGOTIATE_UNIX_FD\r\nBEGIN\r\n".encode())
        lines = b""
        while lines.count(b"\r\n") < 2:
            lines += self.socket.recv(4096)
        self.serial = 0
        self._buffer = b""
        self._fds: list[int] = []
        self.name = str(self.raw_call(DBUS, "/org/freedesktop/DBus", DBUS, "Hello").body[0])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.socket.close()
        while self._fds:
            os.close(self._fds.pop())

    def message(self, member: str, signature: str = "", body: bytes = b"", **more: Any) -> bytes:
        """Build the next call; `destination`, `path` and `interface` as they are unless given."""
        self.serial += 1
        to = more.pop("destination", self.destination)
        path, interface = more.pop("path", self.path), more.pop("interface", self.interface)
        return build(self.serial, to, path, interface, member, signature, body, **more)

    def send(self, raw: bytes, fds: Sequence[int] = ()) -> None:
        """Send bytes, with descriptors on the first."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        sent = self.socket.sendmsg([raw], rights)
        if sent < len(raw):
            self.socket.sendall(raw[sent:])

    def receive(self) -> Message:
        """Read the next message. Raised when the bus hangs up: EOFError; when nothing comes for 10 s: TimeoutError."""
        while True:
            message = self._cut()
            if message:
                return message
            data, ancillary, _, _ = self.socket.recvmsg(1 << 20, 4096, socket.MSG_CMSG_CLOEXEC)
            if not data:
                raise EOFError
            self._buffer += data
            for _, _, raw in ancillary:
                numbers = array.array("i")
                numbers.frombytes(raw)
                self._fds += numbers

    def _cut(self) -> Message | None:
        if len(self._buffer) < 16:
            return None
        order = "<" if self._buffer[0] == ord("l") else ">"
        body, _, fields = struct.unpack(f"{order}III", self._buffer[4:16])
        total = 16 + fields + -fields % 8 + body
        if len(self._buffer) < total:
            return None
        frame, self._buffer = self._buffer[:total], self._buffer[total:]
        return parse(frame)

    def answer(self, serial: int) -> Answer:
        """Wait for the answer to the call with that serial."""
        while True:
            message = self.receive()
            if message.reply_serial == serial:
                fds, self._fds = tuple(self._fds), []
                error = message.error_name if message.message_type is MessageType.ERROR else ""
                return Answer(error or "", message.body, fds)

    def call(self, member: str, signature: str = "", body: bytes = b"", **more: Any) -> Answer:
        """Call a method of the service; `descriptors` go with it."""
        descriptors = more.pop("descriptors", ())
        if descriptors:
            more.setdefault("fds", len(descriptors))
        self.send(self.message(member, signature, body, **more), descriptors)
        return self.answer(self.serial)

    def raw_call(self, destination: str, path: str, interface: str, member: str) -> Answer:
        """Call a method without arguments of anybody."""
        return self.call(member, destination=destination, path=path, interface=interface)

    def ping(self) -> Answer:
        """Call Ping."""
        return self.call("Ping", interface=PEER)

    def listen(self, rule: str) -> None:
        """Ask for signals."""
        where = {"destination": DBUS, "path": "/org/freedesktop/DBus", "interface": DBUS}
        answer = self.call("AddMatch", "s", text(rule), **where)
        assert not answer.error, answer

    def receive_signal(self, member: str) -> list[Any]:
        """Wait for a signal with that name and return its arguments."""
        while True:
            message = self.receive()
            if message.message_type is MessageType.SIGNAL and message.member == member:
                return list(message.body)

    def signals(self) -> list[Message]:
        """Return the signals of others than the bus that come before the answer to a Ping."""
        self.send(self.message("Ping", interface=PEER))
        found = []
        while (message := self.receive()).reply_serial != self.serial:
            if message.sender != DBUS:
                found.append(message)
        return found

    def flood(self, messages: Iterable[bytes], seconds: float = 45) -> list[Message]:
        """Send messages as fast as the bus takes them while reading what comes; one answer for each."""
        pending = list(messages)
        outgoing = memoryview(b"".join(pending))
        answers: list[Message] = []
        deadline = time.monotonic() + seconds
        self.socket.setblocking(False)
        try:
            while len(answers) < len(pending):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{len(answers)} of {len(pending)} answers in {seconds} s")
                readable, writable, _ = select.select([self.socket], [self.socket] if outgoing else [], [], 1)
                if writable:
                    outgoing = outgoing[self.socket.send(outgoing[: 1 << 18]) :]
                if readable:
                    chunk = self.socket.recv(1 << 20)
                    if not chunk:
                        raise EOFError
                    self._buffer += chunk
                    answers += self._answers()
        finally:
            self.socket.settimeout(60)
        return answers

    def _answers(self) -> list[Message]:
        """Cut all whole messages off the buffer, in one go; answers only."""
        frames = io.BytesIO(self._buffer)
        found, position = [], 0
        while len(self._buffer) - position >= 16:
            body, _, fields = struct.unpack_from("<III", self._buffer, position + 4)
            total = 16 + fields + -fields % 8 + body
            if len(self._buffer) - position < total:
                break
            frames.seek(position)
            message = parse(frames.read(total))
            if message.reply_serial:
                found.append(message)
            position += total
        self._buffer = self._buffer[position:]
        return found
