# SPDX-License-Identifier: GPL-2.0-or-later
"""The client of the data path: requests, replies, descriptors, events, and everything that may go wrong with them."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from blksnap_service import errors
from blksnap_service.datapath.client import DatapathClient
from blksnap_service.datapath.connection import Connection, Disconnected
from blksnap_service.datapath.framing import MAX_LINE_BYTES, LineSocket
from blksnap_service.datapath.model import Event, OriginReading
from blksnap_service.fds import OwnedFd
from tests.unit.fakes.datapath import FakeDatapath, Refusal, running

GENERATION = "11111111-2222-3333-4444-555555555555"


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeDatapath]:
    """A fake data path."""
    with running(tmp_path / "run") as one:
        yield one


class Heard:
    """What the client's callbacks were called with."""

    def __init__(self) -> None:
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.lost: list[str] = []


@pytest.fixture
def heard() -> Heard:
    """What the callbacks were called with."""
    return Heard()


@pytest.fixture
async def client(fake: FakeDatapath, heard: Heard) -> AsyncIterator[DatapathClient]:
    """A connected client."""
    one = DatapathClient(heard.events.put_nowait, heard.lost.append)
    await one.open(fake.runtime_dir / "datapath.sock")
    yield one
    one.close()


def image(directory: Path, size: int = 1 << 20) -> OwnedFd:
    """An open image file."""
    path = directory / "disk.img"
    with path.open("wb") as file:
        file.truncate(size)
    return OwnedFd(os.open(path, os.O_RDWR | os.O_CLOEXEC))


def open_descriptors() -> int:
    """How many descriptors this process has."""
    return len(list(Path("/proc/self/fd").iterdir()))


async def descriptors_are(count: int) -> None:
    """Wait until there are so many: the fake at the other end, in this process too, closes what it sent a moment later."""
    async with asyncio.timeout(5):
        while open_descriptors() != count:  # noqa: ASYNC110 - a descriptor tells nobody that it is closed
            await asyncio.sleep(0.01)


async def all_told() -> None:
    """Let the loop hear of every descriptor that is readable now, and of what follows from that."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_adding_an_origin_hands_over_the_file_and_returns_its_maps(
    client: DatapathClient, fake: FakeDatapath, tmp_path: Path
) -> None:
    """The descriptor given is consumed; those received are read with the reading they belong to."""
    fd = image(tmp_path)
    maps = await client.origin_add("a", fd, generation=GENERATION, label="disk")
    assert fd.closed
    with maps:
        assert os.pread(maps.live.fileno(), 100, 0) == bytes(16)
        assert maps.reading == OriginReading.parse(fake._reading("a"))
    assert os.fstat(fake.origins["a"].fd).st_size == 1 << 20


async def test_received_descriptors_are_closed_in_programs_started_later(
    client: DatapathClient, tmp_path: Path
) -> None:
    """A child must not keep an origin's maps alive."""
    maps = await client.origin_add("a", image(tmp_path), generation=GENERATION)
    with maps:
        assert not os.get_inheritable(maps.live.fileno())
        assert not os.get_inheritable(maps.taken.fileno())


@pytest.mark.parametrize(
    "code, expected",
    [
        ("not-found", errors.NotFound),
        ("exists", errors.AlreadyTracked),
        ("busy", errors.Busy),
        ("invalid", errors.InvalidArgument),
        ("invalid-state", errors.InvalidState),
        ("no-space", errors.NoSpace),
        ("timed-out", errors.TimedOut),
        ("limit", errors.LimitExceeded),
        ("bad-request", errors.Failed),
        ("something-new", errors.Failed),
    ],
)
async def test_every_error_code_becomes_its_error(
    client: DatapathClient, fake: FakeDatapath, code: str, expected: type[errors.BlksnapError]
) -> None:
    """The text is the data path's."""
    fake.refuse["origin.info"] = Refusal(code, "because of the moon")
    with pytest.raises(expected, match="because of the moon") as caught:
        await client.origin_info("a")
    assert type(caught.value) is expected


async def test_an_input_output_error_says_which(client: DatapathClient, fake: FakeDatapath) -> None:
    """The errno of an `io` error is put into words."""
    fake.refuse["origin.info"] = Refusal("io", "the storage cannot be grown", errno=errno.EIO)
    with pytest.raises(errors.Failed, match=r"the storage cannot be grown: input/output error"):
        await client.origin_info("a")


async def test_a_slow_operation_does_not_delay_readings(client: DatapathClient, fake: FakeDatapath) -> None:
    """They travel on connections of their own."""
    fake.hold["origin.mark-all"] = threading.Event()
    slow = asyncio.create_task(client.origin_mark_all("a"))
    await fake.asked("origin.mark-all")
    assert await client.list() == ([], [])
    assert not slow.done()
    fake.hold["origin.mark-all"].set()
    with pytest.raises(errors.NotFound):
        await slow


async def test_a_cancelled_request_leaves_no_descriptors_open(
    client: DatapathClient, fake: FakeDatapath, tmp_path: Path
) -> None:
    """The reply comes when nobody waits for it any more; what it carries is closed, and the next reply is the next one's."""
    (await client.origin_add("a", image(tmp_path), generation=GENERATION)).close()
    # The fake is done with what it sent when it answers the next request.
    await client.origin_info("a")
    await client.origin_info("a")
    before = open_descriptors()
    fake.hold["origin.maps"] = threading.Event()
    waiting = asyncio.create_task(client.origin_maps("a"))
    await fake.asked("origin.maps")
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    fake.hold.pop("origin.maps").set()
    assert (await client.origin_info("a")).origin == "a"
    await descriptors_are(before)


async def test_a_reply_in_the_step_of_the_cancellation_leaves_no_descriptors_open(
    client: DatapathClient, tmp_path: Path
) -> None:
    """The future has its result and the task its cancellation at the same time."""
    (await client.origin_add("a", image(tmp_path), generation=GENERATION)).close()
    # The fake is done with what it sent when it answers the next request.
    await client.origin_info("a")
    await client.origin_info("a")
    before = open_descriptors()
    waiting = asyncio.create_task(client.origin_maps("a"))
    await asyncio.sleep(0)
    lines = client._readings._socket
    assert lines is not None
    deliver = lines._on_line

    def deliver_and_cancel(message: dict[str, object], fds: list[OwnedFd]) -> None:
        deliver(message, fds)
        waiting.cancel()

    lines._on_line = deliver_and_cancel
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await descriptors_are(before)


async def test_events_arrive_with_what_they_say(
    client: DatapathClient, fake: FakeDatapath, heard: Heard
) -> None:
    """In the order they were told."""
    fake.tell(event="snapshot.low-space", snapshot="s", used=90, limit=100)
    fake.tell(event="origin.broken", origin="a", reason="shrunk")
    first, second = await heard.events.get(), await heard.events.get()
    assert (first.name, first.fields.number("used")) == ("snapshot.low-space", 90)
    assert (second.name, second.fields.text("reason")) == ("origin.broken", "shrunk")


async def test_losing_the_data_path_fails_what_waits_and_is_told_once(
    client: DatapathClient, fake: FakeDatapath, heard: Heard
) -> None:
    """All three connections end; one message is enough."""
    fake.hold["origin.mark-all"] = threading.Event()
    waiting = asyncio.create_task(client.origin_mark_all("a"))
    await fake.asked("origin.mark-all")
    fake.hold["origin.mark-all"].set()
    fake.close()
    with pytest.raises(errors.BlksnapError):
        await waiting
    async with asyncio.timeout(60):
        while not heard.lost:  # noqa: ASYNC110 - the callback is a list's
            await asyncio.sleep(0.01)
    await all_told()
    assert heard.lost == ["the data path closed the connection"]
    with pytest.raises(Disconnected):
        await client.origin_info("a")


async def test_closing_the_client_is_not_losing_the_data_path(client: DatapathClient, heard: Heard) -> None:
    """Who closes knows."""
    client.close()
    await all_told()
    assert heard.lost == []


async def test_another_protocol_version_is_refused(fake: FakeDatapath, heard: Heard) -> None:
    """The service says so instead of guessing."""
    fake.refuse["hello"] = Refusal("protocol", "version 1 is not spoken here")
    client = DatapathClient(heard.events.put_nowait, heard.lost.append)
    with pytest.raises(errors.NotAvailable, match="version 1"):
        await client.open(fake.runtime_dir / "datapath.sock")


async def test_many_ranges_are_sent_in_parts(
    client: DatapathClient, fake: FakeDatapath, tmp_path: Path
) -> None:
    """65 536 ranges do not fit into one line of 1 MiB."""
    (await client.origin_add("a", image(tmp_path, 1 << 30), block_size=4096, generation=GENERATION)).close()
    ranges = [(number * 8192, 4096) for number in range(65_536)]
    assert await client.origin_mark("a", ranges) == 65_536
    parts = [one for one in fake.requests if one["op"] == "origin.mark"]
    assert [offset for part in parts for offset, _ in part["ranges"]] == [offset for offset, _ in ranges]


async def test_a_reading_of_the_wrong_shape_is_an_error(
    client: DatapathClient, fake: FakeDatapath, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing number is never taken for 0."""
    monkeypatch.setattr(fake, "_origin_info", lambda _fds, origin: ({"origin": origin, "label": ""}, []))
    with pytest.raises(errors.Failed, match="'kind'"):
        await client.origin_info("a")


class Peer:
    """The other end of a socket, spoken to byte by byte."""

    def __init__(self) -> None:
        mine, self.socket = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        mine.setblocking(False)
        self.lines: asyncio.Queue[tuple[dict[str, object], list[OwnedFd]]] = asyncio.Queue()
        self.closed: asyncio.Queue[str] = asyncio.Queue()
        self.line_socket = LineSocket(
            mine, lambda message, fds: self.lines.put_nowait((message, fds)), self.closed.put_nowait
        )


@pytest.fixture
async def peer() -> AsyncIterator[Peer]:
    """Both ends of a connection."""
    one = Peer()
    yield one
    one.line_socket.close()
    one.socket.close()


async def test_lines_arrive_whole_however_they_are_cut(peer: Peer) -> None:
    """A stream has no messages."""
    for byte in b'{"id": 1, "ok": "h\xc3\xa4lt"}\n{"id": 2}\n':
        peer.socket.send(bytes([byte]))
        await asyncio.sleep(0)
    assert [(await peer.lines.get())[0], (await peer.lines.get())[0]] == [{"id": 1, "ok": "hält"}, {"id": 2}]


async def test_descriptors_belong_to_the_line_they_came_with(peer: Peer) -> None:
    """Two lines with one each, sent back to back."""
    with OwnedFd(os.memfd_create("one")) as one, OwnedFd(os.memfd_create("two")) as two:
        for number, fd in enumerate((one, two)):
            line = json.dumps({"id": number, "fds": 1}).encode() + b"\n"
            socket.send_fds(peer.socket, [line], [fd.fileno()])
        for fd in (one, two):
            _, received = await peer.lines.get()
            with received[0] as got:
                assert os.fstat(got.fileno()).st_ino == os.fstat(fd.fileno()).st_ino


@pytest.mark.parametrize(
    "line",
    [b"nonsense\n", b"[1]\n", b'{"fds": 1}\n', b'{"fds": -1}\n', b'{"fds": "1"}\n', b"\xff\n"],
)
async def test_what_is_not_the_protocol_ends_the_connection(peer: Peer, line: bytes) -> None:
    """After it nothing could be trusted to be where it belongs."""
    peer.socket.send(line)
    assert "data path" in await peer.closed.get()
    assert peer.line_socket.closed


async def test_an_endless_line_ends_the_connection(peer: Peer) -> None:
    """Memory is not filled with what never becomes a message."""
    peer.socket.setblocking(False)
    sent = 0
    while sent <= MAX_LINE_BYTES and not peer.line_socket.closed:
        try:
            sent += peer.socket.send(b"x" * 65_536)
        except BlockingIOError:
            await asyncio.sleep(0.001)
    assert "1 MiB" in await peer.closed.get()


async def test_what_does_not_fit_the_socket_is_sent_when_it_does(peer: Peer) -> None:
    """A full socket is not the end of it; the descriptor goes with the first byte."""
    with OwnedFd(os.memfd_create("one")) as fd:
        for number in range(8):
            peer.line_socket.send({"id": number, "pad": "x" * 200_000}, [fd.dup()])
    data, fds = b"", list[int]()
    peer.socket.setblocking(False)
    while data.count(b"\n") < 8:
        try:
            part, new, _, _ = socket.recv_fds(peer.socket, 1 << 20, 8)
            data, fds = data + part, fds + new
        except BlockingIOError:
            await asyncio.sleep(0.001)
    assert [json.loads(line)["id"] for line in data.splitlines()] == list(range(8))
    assert len(fds) == 8
    for number in fds:
        os.close(number)


async def test_a_line_over_the_limit_is_refused_and_its_descriptors_closed(peer: Peer) -> None:
    """The data path would end the connection."""
    fd = OwnedFd(os.memfd_create("one"))
    with pytest.raises(ValueError, match="over the limit"):
        peer.line_socket.send({"pad": "x" * MAX_LINE_BYTES}, [fd])
    assert fd.closed


async def test_an_error_for_a_line_that_could_not_be_read_reaches_who_sent_it(tmp_path: Path) -> None:
    """Such a reply has no id: it is the one of the oldest request."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "s"))
    listener.listen()

    def serve() -> None:
        accepted, _ = listener.accept()
        with accepted, accepted.makefile("rb") as lines:
            number = json.loads(lines.readline())["id"]
            accepted.sendall(b'{"id": %d, "ok": {"version": "0", "pid": 1}}\n' % number)
            lines.readline()
            accepted.sendall(b'{"id": null, "error": {"code": "bad-request", "message": "unreadable"}}\n')
            lines.readline()

    thread = threading.Thread(target=serve)
    thread.start()
    lost: list[str] = []
    connection = Connection(lambda _: None, lost.append)
    await connection.open(tmp_path / "s")
    with pytest.raises(errors.Failed, match="unreadable"):
        await connection.request("list")
    connection.close()
    await asyncio.to_thread(thread.join)
    listener.close()
