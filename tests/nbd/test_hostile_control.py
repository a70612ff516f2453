# SPDX-License-Identifier: GPL-2.0-or-later
"""Bytes that no service sends to the control socket. Only its own user can connect, but a bug of his must not cost I/O."""

from __future__ import annotations

import array
import contextlib
import json
import random
import select
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.nbd.control import Control, HungUp, Refused, opened
from tests.nbd.datapath import MIB, Datapath, Origin, new_id
from tests.nbd.hostile import Witness, baseline, check_given_back, writer
from tests.nbd.load import Report, running

LINES = 12_000
PROMPT_S = 2.0
LINE_LIMIT = 1 << 20

WRONG_ENVELOPES: list[bytes] = [
    b"",
    b" ",
    b"null",
    b"1",
    b'"hello"',
    b"[]",
    b"{}",
    b"{",
    b"\xff\xfe",
    b"\0",
    b'{"id": 1}',
    b'{"op": "list"}',
    b'{"id": "1", "op": "list"}',
    b'{"id": -1, "op": "list"}',
    b'{"id": 1.5, "op": "list"}',
    b'{"id": 18446744073709551616, "op": "list"}',
    b'{"id": 1, "op": 7}',
    b'{"id": 1, "op": "list", "fds": -1}',
    b'{"id": 1, "op": "list", "fds": "0"}',
    b'{"id": 1, "op": "list", "fds": 254}',
    b'{"id": 1, "op": "list"} {"id": 2, "op": "list"}',
    b"[" * 100_000,
    b'{"id": 1, "op": "list", "a": ' + b"[" * 1000 + b"]" * 1000 + b"}",
]

WRONG_REQUESTS: list[tuple[str, dict[str, Any]]] = [
    ("", {}),
    ("nothing", {}),
    ("HELLO", {"protocol": 1}),
    ("hello", {}),
    ("hello", {"protocol": "1"}),
    ("hello", {"protocol": 1, "more": 1}),
    ("list", {"origin": "a"}),
    ("subscribe", {"all": True}),
    ("origin.info", {}),
    ("origin.info", {"origin": 7}),
    ("origin.info", {"origin": None}),
    ("origin.info", {"origin": ["a"]}),
    ("origin.mark", {"origin": "a", "ranges": [[0]]}),
    ("origin.mark", {"origin": "a", "ranges": [[0, 1, 2]]}),
    ("origin.mark", {"origin": "a", "ranges": [[-1, 2]]}),
    ("origin.mark", {"origin": "a", "ranges": [[0, 1.5]]}),
    ("origin.mark", {"origin": "a", "ranges": {}}),
    ("origin.remove", {"origin": "a", "force": "yes"}),
    ("origin.add", {"origin": "a", "block_size": -1, "generation": "x"}),
    ("snapshot.create", {"snapshot": 1}),
    ("snapshot.create", {"limit": 1 << 20}),
    ("snapshot.take", {"snapshot": "a", "devices": "b"}),
    ("snapshot.take", {"snapshot": "a", "devices": [{"origin": "b"}]}),
    ("snapshot.take", {"snapshot": "a", "devices": [], "timeout_ms": -5}),
    ("stop", {"force": 1}),
]


def check_answers(control: Control) -> None:
    """Fail unless the connection still serves a good request."""
    assert control.call("hello", protocol=1)["protocol"] == 1


@pytest.fixture
def control(datapath: Datapath) -> Iterator[Control]:
    """A connection of its own, so that what happens to it happens to nobody else."""
    with datapath.connect() as control:
        # An answer says that its descriptors are counted among those of the data path from now on.
        check_answers(control)
        yield control


@pytest.mark.parametrize("line", WRONG_ENVELOPES, ids=lambda line: repr(line[:40]))
def test_a_line_that_is_no_request_is_answered_as_such(control: Control, line: bytes) -> None:
    """``bad-request`` to nobody, and the connection goes on."""
    control.send(line + b"\n")
    with pytest.raises(Refused) as caught:
        control.reply()
    assert (caught.value.code, caught.value.identity) == ("bad-request", None)
    check_answers(control)


@pytest.mark.parametrize("op,arguments", WRONG_REQUESTS, ids=lambda item: str(item)[:50])
def test_a_wrong_request_is_refused_whole(control: Control, op: str, arguments: dict[str, Any]) -> None:
    """Unknown operations, unknown keys, missing ones and wrong types: ``bad-request``, nothing is silently ignored."""
    with pytest.raises(Refused) as caught:
        control.call(op, **arguments)
    assert caught.value.code == "bad-request"
    assert caught.value.identity is not None
    check_answers(control)


@pytest.mark.parametrize("protocol", [0, 2, 1 << 40])
def test_another_protocol_is_refused(control: Control, protocol: int) -> None:
    """With a code of its own, so that the service can say what to do."""
    with pytest.raises(Refused) as caught:
        control.call("hello", protocol=protocol)
    assert caught.value.code == "protocol"


def test_numbers_up_to_the_largest_come_back(control: Control) -> None:
    """``id`` is any unsigned integer of 64 bits."""
    for number in (0, 1 << 53, (1 << 64) - 1):
        control.send(json.dumps({"id": number, "op": "hello", "protocol": 1}).encode() + b"\n")
        assert control.line()["id"] == number


def test_a_line_of_a_mebibyte_is_served_and_a_longer_one_ends_the_connection(datapath: Datapath) -> None:
    """The limit holds with its newline."""
    request = b'{"id": 1, "op": "hello", "protocol": 1}'
    with datapath.connect() as control:
        control.send(request.rjust(LINE_LIMIT - 1) + b"\n")
        assert control.line()["id"] == 1
        check_answers(control)
    with datapath.connect() as control:
        # It may hang up before all has been sent.
        with contextlib.suppress(ConnectionError):
            control.send(request.rjust(LINE_LIMIT) + b"\n")
        with pytest.raises((Refused, HungUp, ConnectionError)):
            control.reply()
        with pytest.raises((HungUp, ConnectionError)):
            control.line()


def test_a_line_without_end_is_not_gathered(datapath: Datapath) -> None:
    """Gigabytes without a newline: the connection ends at the limit."""
    before = datapath.memory()
    with datapath.connect() as control, pytest.raises(ConnectionError):
        control.socket.sendall(b"x" * 64 * MIB)
    assert datapath.memory().total < before.total + 4 * MIB
    check_answers(datapath.control)


@pytest.mark.parametrize(
    "announced,sent", [(0, 1), (1, 0), (1, 2), (2, 1), (2, 0), (253, 1), (0, 200)], ids=str
)
def test_a_wrong_number_of_descriptors_is_refused_and_they_are_closed(
    datapath: Datapath, control: Control, announced: int, sent: int
) -> None:
    """Told one number and given another: ``bad-request``, and no descriptor stays open."""
    before = datapath.descriptors()
    request = {"id": 1, "op": "list"} | ({"fds": announced} if announced else {})
    with opened("/dev/null") as fd:
        control.send(json.dumps(request).encode() + b"\n", [fd] * sent)
        with pytest.raises(Refused) as caught:
            control.reply()
    assert caught.value.code == "bad-request"
    check_answers(control)
    assert datapath.descriptors() == before


@pytest.mark.parametrize("count", [0, 3, 100])
def test_operations_take_their_own_number_of_descriptors(
    datapath: Datapath, control: Control, count: int
) -> None:
    """A file too few or too many for ``origin.add`` and ``snapshot.create``: refused, all of them closed."""
    before = datapath.descriptors()
    path = datapath.image_file(MIB)
    requests: list[tuple[str, dict[str, Any]]] = [
        ("origin.add", {"origin": "a", "generation": new_id()}),
        ("snapshot.create", {"snapshot": new_id(), "limit": MIB}),
        ("list", {}),
    ]
    for op, arguments in requests[: 2 if count == 0 else 3]:
        with opened(path) as fd, pytest.raises(Refused) as caught:
            control.call(op, [fd] * count, **arguments)
        assert caught.value.code == "bad-request"
    assert datapath.descriptors() == before


def test_descriptors_that_no_line_claims_end_the_connection(datapath: Datapath) -> None:
    """Thousands of them on a line without end would leave none for clients."""
    before = datapath.descriptors()
    with datapath.connect() as control, opened("/dev/null") as fd:
        most = 0
        with contextlib.suppress(ConnectionError):
            for _ in range(40):
                control.send(b"x", [fd] * 250)
                time.sleep(0.01)
                most = max(most, datapath.descriptors() - before)
    assert most < 600
    end = time.monotonic() + 5
    while datapath.descriptors() > before:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_descriptors_sent_with_later_bytes_of_a_line_harm_nobody(
    datapath: Datapath, control: Control
) -> None:
    """They belong to a line's first byte; elsewhere they end in an error or are taken with the line, never leak."""
    before = datapath.descriptors()
    with opened("/dev/null") as fd:
        control.send(b'{"id": 1, "op": ')
        time.sleep(0.05)
        control.send(b'"list"}\n', [fd] * 3)
        with pytest.raises(Refused) as caught:
            control.reply()
    assert caught.value.code == "bad-request"
    check_answers(control)
    assert datapath.descriptors() == before


def test_a_burst_of_requests_is_answered_in_order(control: Control) -> None:
    """A thousand lines in one piece, good and bad mixed."""
    lines = bytearray()
    expected: list[int | None] = []
    for number in range(1000):
        if number % 7 == 3:
            lines += b"garbage\n"
            expected.append(None)
        else:
            lines += json.dumps({"id": number, "op": "hello", "protocol": 1}).encode() + b"\n"
            expected.append(number)
    control.send(bytes(lines))
    assert [control.line()["id"] for _ in expected] == expected


def test_sixty_three_idle_connections_keep_nobody_out(datapath: Datapath, origin: Origin) -> None:
    """64 is the limit; one more is hung up on, and when one leaves there is room."""
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(datapath.connect()) for _ in range(62)]
        with datapath.connect() as last:
            check_answers(last)
            with datapath.connect() as extra, pytest.raises((HungUp, ConnectionError)):
                extra.call("list")
            check_answers(datapath.control)
        idle.pop().close()
        end = time.monotonic() + 5
        while True:
            try:
                with datapath.connect() as again:
                    check_answers(again)
                break
            except (HungUp, ConnectionError):
                assert time.monotonic() < end
                time.sleep(0.02)


def test_a_subscriber_that_does_not_listen_is_hung_up_on(datapath: Datapath) -> None:
    """Events that nobody takes do not pile up, and others get theirs."""
    with datapath.connect() as deaf, datapath.events() as good:
        deaf.call("subscribe")
        # Answers that it does not take either fill its socket.
        deaf.socket.setblocking(False)
        with contextlib.suppress(BlockingIOError, ConnectionError):
            for _ in range(100_000):
                deaf.socket.send(b'{"id": 1, "op": "list"}\n')
        for _ in range(3):
            snapshot, origin = datapath.create(), datapath.add()
            snapshot.take(origin)
            origin.remove(force=True)
            good.wait_for("snapshot.failed", 15)
            good.seen.clear()
        with contextlib.suppress(ConnectionError):
            # What was sent to it is still there; then comes the end, and not "nothing yet" (BlockingIOError).
            while deaf.socket.recv(1 << 20):
                pass


@pytest.mark.timeout(120)
def test_mutilated_lines(datapath: Datapath, origin: Origin, report: Report) -> None:
    """Thousands of broken requests, with and without descriptors: it lives, serves a client, and leaks nothing."""
    chance = random.Random(77)
    other = datapath.add()
    before = baseline(datapath, origin)
    state = datapath.control.call("list")
    seen = Witness()
    with running(writer(other, seen)), opened("/dev/null") as fd:
        sent = 0
        while sent < LINES:
            with datapath.connect() as control, contextlib.suppress(ConnectionError, TimeoutError):
                control.socket.settimeout(5)
                for _ in range(chance.randrange(1, 60)):
                    line = mutilated_line(chance, origin.name)
                    fds = [fd] * chance.choice([0, 0, 0, 1, 2, 30])
                    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
                    control.socket.sendmsg([line], ancillary)
                    sent += 1
                    # Answers are taken now and then, so that neither side waits for the other.
                    if select.select([control.socket], [], [], 0)[0]:
                        control.socket.recv(1 << 20)
    summary = f"{sent} lines; a good client was served {seen.rounds} times, after {seen.longest_s * 1000:.0f} ms at the latest"
    report(summary)
    assert seen.longest_s < PROMPT_S
    for reading in state["origins"]:
        now = datapath.control.call("origin.info", origin=reading["origin"])
        assert (now["state"], now["generation"]) == ("tracking", reading["generation"])
    assert datapath.control.call("list")["snapshots"] == []
    end = time.monotonic() + 10
    while datapath.descriptors() > before.descriptors:
        assert time.monotonic() < end
        time.sleep(0.05)
    check_given_back(datapath, before, report)


def mutilated_line(chance: random.Random, origin: str) -> bytes:
    """Return a request with something wrong in it; none of them would end or change what is there."""
    value: Any = chance.choice(
        [
            None,
            True,
            0,
            -1,
            1 << 64,
            1.5,
            "",
            "x" * 1000,
            origin,
            new_id(),
            [],
            {},
            [[0, 1]],
            [[1, 0]],
            {"a": []},
        ]
    )
    op = chance.choice(
        ["hello", "list", "subscribe", "origin.add", "origin.info", "origin.maps", "origin.mark", "snapshot.create",
         "snapshot.take", "snapshot.info", "snapshot.destroy", "origin.remov", "stopp", ""]
    )  # fmt: skip
    key = chance.choice(
        ["origin", "snapshot", "generation", "ranges", "limit", "devices", "protocol", "fds", "id", "op"]
    )
    request = {"id": chance.randrange(100), "op": op, key: value}
    line = bytearray(json.dumps(request).encode())
    for _ in range(chance.randrange(3)):
        match chance.randrange(4):
            case 0:
                line[chance.randrange(len(line))] = chance.randrange(256)
            case 1:
                del line[chance.randrange(len(line)) :]
                line += b" "
            case 2:
                line[chance.randrange(len(line)) : 0] = chance.randbytes(5)
            case _:
                line *= 2
    return bytes(line) + (b"\n" if chance.random() < 0.95 else b"")
