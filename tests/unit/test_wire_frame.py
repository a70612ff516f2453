# SPDX-License-Identifier: GPL-2.0-or-later
"""Message headers: read what dbus-fast writes, write what it reads, and refuse the rest."""

from __future__ import annotations

import io
import struct
from contextlib import suppress
from typing import Any

import pytest
from dbus_fast import Message, MessageFlag, MessageType
from dbus_fast._private import unmarshaller
from hypothesis import given, settings, strategies as st

from blksnap_service.bus._frame import (
    FIXED_BYTES,
    FrameError,
    Header,
    build,
    read_header,
    read_lengths,
)

NAMES = st.lists(st.text("abcXYZ_", min_size=1, max_size=5), min_size=2, max_size=4).map(".".join)
MEMBERS = st.text("abcXYZ_", min_size=1, max_size=10)
PATHS = st.lists(MEMBERS, max_size=4).map(lambda parts: "/" + "/".join(parts))


def read(frame: bytes) -> Header:
    """Read a whole header."""
    return read_header(read_lengths(frame, 0), frame)


@given(
    path=PATHS,
    interface=NAMES,
    member=MEMBERS,
    destination=NAMES,
    serial=st.integers(1, 2**32 - 1),
    text=st.text("ab"),
)
def test_a_call_of_dbus_fast_is_read(
    path: str, interface: str, member: str, destination: str, serial: int, text: str
) -> None:
    """All fields a call has."""
    message = Message(
        destination=destination, path=path, interface=interface, member=member, signature="s", body=[text],
        serial=serial, flags=MessageFlag.ALLOW_INTERACTIVE_AUTHORIZATION,
    )  # fmt: skip
    frame = bytes(message._marshall(False))
    lengths = read_lengths(frame, 0)
    assert lengths.total == len(frame)
    assert read(frame) == Header(
        kind=1, flags=4, serial=serial, path=path, interface=interface, member=member, destination=destination,
        signature="s",
    )  # fmt: skip


@given(error=NAMES, destination=NAMES, reply=st.integers(1, 2**32 - 1), fds=st.integers(0, 16))
def test_what_is_built_is_read_by_dbus_fast(error: str, destination: str, reply: int, fds: int) -> None:
    """An error with every field an error has."""
    header = Header(
        3, 1, 99, error_name=error, reply_serial=reply, destination=destination, signature="s", fd_count=fds
    )
    frame = build(header, struct.pack("<I", 2) + b"hi\0")
    reader: Any = unmarshaller.Unmarshaller
    message = reader(io.BytesIO(frame)).unmarshall()
    assert (message.message_type, message.error_name, message.reply_serial) == (
        MessageType.ERROR,
        error,
        reply,
    )
    assert (message.destination, message.body, message.serial) == (destination, ["hi"], 99)
    assert read(frame) == header


@given(data=st.binary(min_size=FIXED_BYTES, max_size=200))
@settings(max_examples=1000)
def test_chance_bytes_are_read_or_refused(data: bytes) -> None:
    """FrameError is all that comes of them."""
    with suppress(FrameError):
        lengths = read_lengths(data, 0)
        read_header(lengths, data[: lengths.body_start])


@given(data=st.data())
@settings(max_examples=500)
def test_a_damaged_header_is_read_or_refused(data: st.DataObject) -> None:
    """One byte of a good message changed."""
    frame = bytearray(build(Header(1, 0, 7, "/a/b", "c.d", "E", destination="f.g", signature="a{sv}"), b""))
    frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    with suppress(FrameError):
        read(bytes(frame))


@pytest.mark.parametrize(
    "damage", [b"x" + bytes(15), b"l\1\0\2" + bytes(12), b"l\1\0\1\xff\xff\xff\xff" + bytes(8)]
)
def test_what_is_no_message_is_refused(damage: bytes) -> None:
    """A wrong byte order, a wrong version, a length above the limit of the specification."""
    with pytest.raises(FrameError):
        read_lengths(damage, 0)


def test_a_field_of_a_wrong_type_is_refused() -> None:
    """A path that is a string."""
    frame = bytearray(build(Header(1, 0, 7, "/a", member="E"), b""))
    frame[FIXED_BYTES + 2] = ord("s")
    with pytest.raises(FrameError, match="header field path has type 's'"):
        read(bytes(frame))
