# SPDX-License-Identifier: GPL-2.0-or-later
"""Reading and writing a bus socket: any cut of the stream, full sockets, descriptors, limits, the end."""

from __future__ import annotations

import array
import asyncio
import errno
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from blksnap_service.bus import _reader, _writer
from blksnap_service.bus._frame import Header, Message, build
from blksnap_service.bus._reader import BUDGET, MAX_BODY_BYTES, Reader
from blksnap_service.bus._writer import HIGH_BYTES, LOW_BYTES, Writer, close_all


def open_fds() -> int:
    """Return how many file descriptors this process has."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@dataclass
class Ends:
    """Both ends of a socket; `ours` does not block."""

    ours: socket.socket
    theirs: socket.socket

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send to us, with descriptors."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        assert self.theirs.sendmsg([data], rights) == len(data)

    def receive_all(self) -> bytes:
        """Read what was sent by us."""
        self.theirs.setblocking(False)
        data = b""
        try:
            while chunk := self.theirs.recv(1 << 20):
                data += chunk
        except BlockingIOError:
            pass
        finally:
            self.theirs.setblocking(True)
        return data


@pytest.fixture
def ends() -> Iterator[Ends]:
    """A connected pair of sockets."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours, theirs:
        yield Ends(ours, theirs)


@dataclass
class Inbox:
    """What a reader delivered; closes descriptors that were left in messages."""

    messages: list[Message] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def take(self, message: Message) -> None:
        """Keep a message."""
        self.messages.append(message)
        self.changed.set()

    def lose(self, reason: str) -> None:
        """Keep why there are no more."""
        self.lost.append(reason)
        self.changed.set()

    def members(self) -> list[str]:
        """Return the members of the messages."""
        return [message.header.member for message in self.messages]

    async def wait(self, count: int) -> None:
        """Wait for as many messages, or the end."""
        async with asyncio.timeout(10):
            while len(self.messages) < count and not self.lost:
                self.changed.clear()
                await self.changed.wait()


@pytest.fixture
def inbox() -> Iterator[Inbox]:
    """A place for messages."""
    one = Inbox()
    yield one
    for message in one.messages:
        close_all(message.fds)


def reader_of(ends: Ends, inbox: Inbox) -> Reader:
    """Return a reader that reads."""
    reader = Reader(ends.ours, inbox.take, inbox.lose)
    reader.resume()
    return reader


def call(member: str, body: bytes = b"", fds: int = 0) -> bytes:
    """Return a call with a body of bytes."""
    header = Header(1, 0, 7, "/a", member=member, sender=":1.1", fd_count=fds)
    return build(header, body)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 16, 17, 100, 5000])
async def test_messages_are_the_same_however_the_stream_is_cut(ends: Ends, inbox: Inbox, size: int) -> None:
    """In pieces of any size, headers and bodies across their borders."""
    reader = reader_of(ends, inbox)
    sent = [call(f"m{number}", bytes([number]) * (number * 13 % 40)) for number in range(30)]
    stream = b"".join(sent)
    for start in range(0, len(stream), size):
        ends.send(stream[start : start + size])
        await asyncio.sleep(0)
    await inbox.wait(30)
    assert inbox.members() == [f"m{number}" for number in range(30)]
    assert [message.body for message in inbox.messages] == [
        bytes([number]) * (number * 13 % 40) for number in range(30)
    ]
    reader.close()


async def test_descriptors_go_to_the_message_they_came_with(ends: Ends, inbox: Inbox) -> None:
    """Between messages without any, all read together."""
    read, write = os.pipe()
    reader = Reader(ends.ours, inbox.take, inbox.lose)
    ends.send(call("a") + call("b"))
    ends.send(call("c", fds=2), [read, write])
    ends.send(call("d"))
    ends.send(call("e", b"x" * 100, fds=1), [read])
    ends.send(call("f", fds=16), [write] * 16)
    reader.resume()
    await inbox.wait(6)
    assert [len(message.fds) for message in inbox.messages] == [0, 0, 2, 0, 1, 16]
    assert not any(message.fds_lost for message in inbox.messages)
    assert not any(os.get_inheritable(fd) for message in inbox.messages for fd in message.fds)
    os.close(read)
    os.close(write)
    reader.close()


async def test_descriptors_that_do_not_match_are_closed(ends: Ends, inbox: Inbox) -> None:
    """More or fewer than the header says: none are kept, and the next message has its own."""
    read, write = os.pipe()
    before = open_fds()
    reader = reader_of(ends, inbox)
    ends.send(call("a", fds=2), [read])
    ends.send(call("b"), [read])
    ends.send(call("c", fds=1), [read])
    await inbox.wait(3)
    assert [(message.fds_lost, len(message.fds)) for message in inbox.messages] == [
        (True, 0),
        (True, 0),
        (False, 1),
    ]
    close_all(inbox.messages[2].fds)
    assert open_fds() == before
    os.close(read)
    os.close(write)
    reader.close()


async def test_descriptors_nobody_got_are_closed_at_the_end(ends: Ends, inbox: Inbox) -> None:
    """They came with the first half of a message."""
    read, write = os.pipe()
    reader = reader_of(ends, inbox)
    before = open_fds()
    ends.send(call("a", fds=1)[:10], [write])
    for _ in range(5):
        await asyncio.sleep(0)
    assert open_fds() == before + 1
    reader.close()
    assert open_fds() == before
    os.close(read)
    os.close(write)


async def test_a_body_too_large_is_skipped_and_its_header_delivered(ends: Ends, inbox: Inbox) -> None:
    """The next message is found, and descriptors of both are right."""
    read, write = os.pipe()
    reader = reader_of(ends, inbox)
    large = call("large", bytes(MAX_BODY_BYTES + 1), fds=1)
    fitting = call("fitting", bytes(MAX_BODY_BYTES))
    ends.send(large[:1000], [read])

    def send_the_rest() -> None:
        ends.theirs.sendall(large[1000:] + fitting + call("next"))

    await asyncio.gather(asyncio.to_thread(send_the_rest), inbox.wait(3))
    assert inbox.members() == ["large", "fitting", "next"]
    assert [message.body is None for message in inbox.messages] == [True, False, False]
    assert [len(message.fds) for message in inbox.messages] == [1, 0, 0]
    assert len(reader._buffer) == 0
    os.close(read)
    os.close(write)
    reader.close()


async def test_a_message_with_a_bad_header_is_skipped(ends: Ends, inbox: Inbox) -> None:
    """Its length is known; what it means is not. Its descriptors are closed."""
    read, write = os.pipe()
    reader = reader_of(ends, inbox)
    before = open_fds()
    bad = bytearray(call("bad", b"body", fds=1))
    bad[18] = ord("s")
    ends.send(bytes(bad), [read])
    ends.send(call("good"))
    await inbox.wait(1)
    assert inbox.members() == ["good"]
    assert open_fds() == before
    os.close(read)
    os.close(write)
    reader.close()


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"GET / HTTP/1.1\r\n\r\n", "no D-Bus message"),
        (b"l\1\0\1" + b"\xff" * 12, "a message of"),
        (b"", "closed"),
    ],
)
async def test_a_stream_that_is_none_ends(ends: Ends, inbox: Inbox, data: bytes, reason: str) -> None:
    """Once, with the reason."""
    reader_of(ends, inbox)
    if data:
        ends.send(data)
    else:
        ends.theirs.close()
    await inbox.wait(1)
    assert [reason in one for one in inbox.lost] == [True]


async def test_a_turn_of_the_loop_delivers_a_limited_number(ends: Ends, inbox: Inbox) -> None:
    """Other work gets its turn between, and nothing waits for new data to come."""
    reader = reader_of(ends, inbox)
    ends.send(b"".join(call(f"m{number}") for number in range(3 * BUDGET)))
    seen = set()
    while len(inbox.messages) < 3 * BUDGET:
        await asyncio.sleep(0)
        seen.add(len(inbox.messages))
    assert seen == {0, BUDGET, 2 * BUDGET, 3 * BUDGET}
    reader.close()


async def test_nothing_is_delivered_while_paused(ends: Ends, inbox: Inbox) -> None:
    """Not even what is in the buffer; resuming delivers it without new data."""

    def deliver(message: Message) -> None:
        inbox.take(message)
        reader.pause()

    reader = Reader(ends.ours, deliver, inbox.lose)
    reader.resume()
    ends.send(call("a") + call("b") + call("c"))
    await inbox.wait(1)
    for _ in range(10):
        await asyncio.sleep(0)
    assert inbox.members() == ["a"]
    reader.resume()
    await inbox.wait(2)
    assert inbox.members() == ["a", "b"]
    reader.close()
    reader.resume()
    for _ in range(10):
        await asyncio.sleep(0)
    assert inbox.members() == ["a", "b"]


async def test_a_full_socket_is_waited_for(ends: Ends) -> None:
    """Everything arrives, in order, as the other side reads."""
    lost: list[str] = []
    writer = Writer(ends.ours, lambda _: None, lost.append)
    messages = [struct.pack("<I", number) * 1000 for number in range(500)]
    for message in messages:
        writer.send(message, [])
    assert writer.queued > 0
    received = b""
    while len(received) < 2_000_000:
        received += ends.receive_all()
        await asyncio.sleep(0)
    assert received == b"".join(messages)
    assert (writer.queued, lost) == (0, [])
    await writer.drained()
    writer.close()


async def test_pressure_is_told_once_each_way(ends: Ends) -> None:
    """Above HIGH_BYTES queued, and again below LOW_BYTES."""
    told: list[tuple[bool, int]] = []
    writer = Writer(ends.ours, lambda pressed: told.append((pressed, writer.queued)), lambda _: None)
    while not told:
        writer.send(bytes(100_000), [])
    writer.send(bytes(100_000), [])
    assert [pressed for pressed, _ in told] == [True]
    while writer.queued:
        ends.receive_all()
        await asyncio.sleep(0)
    assert [pressed for pressed, _ in told] == [True, False]
    assert told[0][1] > HIGH_BYTES
    assert told[1][1] < LOW_BYTES
    writer.close()


async def test_descriptors_are_sent_once_and_closed(ends: Ends) -> None:
    """Also with a message that is sent in pieces; those of a writer that closes are closed."""
    before = open_fds()
    writer = Writer(ends.ours, lambda _: None, lambda _: None)
    writer.send(bytes(3_000_000), list(os.pipe()))
    writer.send(b"x", list(os.pipe()))
    assert open_fds() == before + 2
    _, ancillary, _, _ = ends.theirs.recvmsg(1 << 20, 4096)
    numbers = array.array("i")
    numbers.frombytes(ancillary[0][2])
    assert len(numbers) == 2
    close_all(numbers.tolist())
    writer.close()
    writer.send(b"x", list(os.pipe()))
    assert open_fds() == before


async def test_a_broken_socket_ends_the_writer_once(ends: Ends) -> None:
    """Descriptors still queued are closed."""
    lost: list[str] = []
    before = open_fds()
    writer = Writer(ends.ours, lambda _: None, lost.append)
    ends.theirs.shutdown(socket.SHUT_RDWR)
    writer.send(b"x", list(os.pipe()))
    writer.send(b"x", list(os.pipe()))
    assert lost == ["cannot send: Broken pipe"]
    assert open_fds() == before
    await writer.drained()


async def test_a_message_the_kernel_refuses_for_its_descriptors_is_dropped(
    ends: Ends, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """ETOOMANYREFS: too many in flight for a user without CAP_SYS_RESOURCE, which a test as root cannot bring about."""
    lost: list[str] = []
    writer = Writer(ends.ours, lambda _: None, lost.append)
    send_one = writer._send_one

    def refuse(view: memoryview, fds: list[int]) -> int:
        if fds:
            raise OSError(errno.ETOOMANYREFS, os.strerror(errno.ETOOMANYREFS))
        return send_one(view, fds)

    monkeypatch.setattr(writer, "_send_one", refuse)
    before = open_fds()
    writer.send(b"with", list(os.pipe()))
    writer.send(b"without", [])
    assert ends.receive_all() == b"without"
    assert (lost, open_fds()) == ([], before)
    assert "a message with file descriptors was dropped" in caplog.text
    writer.close()


def test_the_limits_fit_each_other() -> None:
    """The largest call (65 536 ranges) fits; a chunk holds no more than a few turns' messages."""
    assert MAX_BODY_BYTES > 65536 * 16 + 4096
    assert _reader.CHUNK_BYTES <= _reader.MAX_FIELDS_BYTES
    assert _writer.LOW_BYTES < _writer.HIGH_BYTES
