# SPDX-License-Identifier: GPL-2.0-or-later
"""D-Bus messages as bytes: the fixed header, the header fields, where a message ends.

What it is: the message format of the D-Bus specification ("Message Format"), without bodies (`_values`, `_reading`). What
it is not: I/O. Sizes are bytes.

Headers are read here and not by the library, so that a call is refused by its header (unknown member, wrong
signature, too large a body) before any of its body is looked at.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Final

from blksnap_service.bus._reading import Reader

METHOD_CALL: Final = 1
METHOD_RETURN: Final = 2
ERROR: Final = 3
SIGNAL: Final = 4

NO_REPLY_EXPECTED: Final = 0x1
ALLOW_INTERACTIVE_AUTHORIZATION: Final = 0x4

FIXED_BYTES: Final = 16
MAX_MESSAGE_BYTES: Final = 128 * 2**20  # the specification's limit

_FIELDS: Final = {
    1: ("path", "o"),
    2: ("interface", "s"),
    3: ("member", "s"),
    4: ("error_name", "s"),
    5: ("reply_serial", "u"),
    6: ("destination", "s"),
    7: ("sender", "s"),
    8: ("signature", "g"),
    9: ("fd_count", "u"),
}


class FrameError(ValueError):
    """Raised when bytes are not a D-Bus message."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """What the first 16 bytes tell of a message: byte order (``<`` or ``>``), kind, flags, serial and lengths."""

    order: str
    kind: int
    flags: int
    serial: int
    fields: int
    body: int

    @property
    def body_start(self) -> int:
        """Offset of the body: the header ends on a multiple of 8."""
        return FIXED_BYTES + self.fields + -self.fields % 8

    @property
    def total(self) -> int:
        """Length of the whole message."""
        return self.body_start + self.body


@dataclass(frozen=True, slots=True)
class Header:
    """Everything of a message but its body. An absent field is empty or 0."""

    kind: int
    flags: int = 0
    serial: int = 0
    path: str = ""
    interface: str = ""
    member: str = ""
    error_name: str = ""
    reply_serial: int = 0
    destination: str = ""
    sender: str = ""
    signature: str = ""
    fd_count: int = 0
    order: str = "<"


@dataclass(slots=True)
class Message:
    """A received message. Who gets it owns `fds`.

    `body` is None if it was larger than is accepted. `fds_lost`: fewer file descriptors arrived than were sent, since
    this process has no free ones; `fds` is empty then.
    """

    header: Header
    body: bytes | None
    fds: list[int] = field(default_factory=list)
    fds_lost: bool = False


def read_lengths(buffer: bytes | bytearray, start: int) -> Lengths:
    """Read the fixed header at `start`. Raised when it is not one: FrameError, and no later byte can be trusted."""
    order = {ord("l"): "<", ord("B"): ">"}.get(buffer[start])
    if order is None or buffer[start + 3] != 1:
        raise FrameError("no D-Bus message where one should begin")
    body, serial, fields = struct.unpack_from(f"{order}III", buffer, start + 4)
    lengths = Lengths(order, buffer[start + 1], buffer[start + 2], serial, fields, body)
    if lengths.total > MAX_MESSAGE_BYTES:
        raise FrameError(f"a message of {lengths.total} bytes")
    return lengths


def read_header(lengths: Lengths, buffer: bytes) -> Header:
    """Read the header fields of a message; `buffer` holds it from its first byte at least to `body_start`.

    Unknown fields are skipped, as the specification wants. Raised when the fields are malformed: FrameError; the
    message as a whole can still be skipped.
    """
    values: dict[str, str | int] = {}
    reader = Reader(lengths.order, buffer[: FIXED_BYTES + lengths.fields], FIXED_BYTES)
    try:
        while reader.position < FIXED_BYTES + lengths.fields:
            reader.align(8)
            code = reader.byte()
            field_value = reader.variant()
            if code in _FIELDS:
                name, expected = _FIELDS[code]
                if field_value.signature != expected:
                    raise FrameError(f"header field {name} has type {field_value.signature!r}")
                values[name] = field_value.value
    except FrameError:
        raise
    except ValueError as error:
        raise FrameError(f"malformed header fields: {error}") from error
    return Header(
        kind=lengths.kind,
        flags=lengths.flags,
        serial=lengths.serial,
        order=lengths.order,
        **values,  # type: ignore[arg-type]  # _FIELDS has the types of Header
    )


def build(header: Header, body: bytes) -> bytes:
    """Return the message, little-endian, ready to be sent."""
    fields = bytearray()
    for code, (name, kind) in _FIELDS.items():
        value = getattr(header, name)
        if not value:
            continue
        fields += bytes(-len(fields) % 8)
        fields += bytes([code, 1, ord(kind), 0])
        if kind == "u":
            fields += struct.pack("<I", value)
            continue
        text = value.encode("utf-8")
        fields += (bytes([len(text)]) if kind == "g" else struct.pack("<I", len(text))) + text + b"\0"
    fixed = struct.pack(
        "<BBBBIII", ord("l"), header.kind, header.flags, 1, len(body), header.serial, len(fields)
    )
    return b"".join((fixed, fields, bytes(-len(fields) % 8), body))
