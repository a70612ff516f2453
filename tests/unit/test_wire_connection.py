# SPDX-License-Identifier: GPL-2.0-or-later
"""A connection without a bus: how it ends under calls, and what holds calls back."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from blksnap_service.bus._connection import Connection
from blksnap_service.bus._frame import Header, Message, build
from blksnap_service.errors import NotAvailable

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    """Our end, which does not block, and theirs."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours, theirs:
        yield ours, theirs


async def test_a_call_on_a_connection_that_breaks_under_it_fails(pair: Pair) -> None:
    """Sending it is what finds out; nobody would ever answer."""
    connection = Connection(pair[0], "unix:path=/bus")
    pair[1].close()
    with pytest.raises(NotAvailable, match="the bus 'unix:path=/bus' is gone: cannot send: Broken pipe"):
        await asyncio.wait_for(connection.call("a.b", "/", "a.b", "C"), 5)
    with pytest.raises(NotAvailable, match="is gone"):
        await connection.wait_disconnected()


async def test_a_call_under_way_fails_when_the_bus_hangs_up(pair: Pair) -> None:
    """Whatever its time limit."""
    connection = Connection(pair[0], "unix:path=/bus")
    waiting = asyncio.create_task(connection.call("a.b", "/", "a.b", "C", timeout=None))
    await asyncio.sleep(0)
    pair[1].close()
    with pytest.raises(NotAvailable, match="the bus 'unix:path=/bus' is gone: "):
        await asyncio.wait_for(waiting, 5)


async def test_calls_are_not_read_while_answers_pile_up(pair: Pair) -> None:
    """Back-pressure: a caller that floods is stopped by the size of its answers."""
    connection = Connection(pair[0], "unix:path=/bus")
    handled: list[Any] = []

    def handle(message: Message) -> None:
        handled.append(message)
        connection.reply_error(message.header, "a.b.C", "x" * 1_000_000)

    connection.set_call_handler(handle)
    call = build(Header(1, 0, 7, "/a", member="m", sender=":1.1"), b"")
    pair[1].sendall(call * 20)
    pair[1].setblocking(False)
    for _ in range(20):
        await asyncio.sleep(0)
    assert 4 <= len(handled) < 8
    while len(handled) < 20:
        with suppress(BlockingIOError):
            pair[1].recv(1 << 20)
        await asyncio.sleep(0)
    connection.close()
