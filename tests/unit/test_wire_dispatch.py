# SPDX-License-Identifier: GPL-2.0-or-later
"""Dispatch without a bus: what a bus would hide, seen on the socket itself."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from blksnap_service.bus import wire
from blksnap_service.bus._connection import Connection
from blksnap_service.bus._dispatch import MAX_CALLS_PER_UID
from blksnap_service.bus._frame import NO_REPLY_EXPECTED, Header, Message, build, read_header, read_lengths
from blksnap_service.errors import NotFound

XML = """<node><interface name="a.B1">
  <method name="Open"><arg name="fd" type="h" direction="out"/></method>
  <method name="Keep"><arg name="fd" type="h" direction="in"/></method>
  <method name="Wait"/>
  <method name="Refuse"/>
  <method name="Crash"/>
</interface></node>"""
SENDER = ":1.9"
UID = 1000


class Thing:
    """One method for each way to end."""

    def __init__(self) -> None:
        self.begun: list[str] = []

    def properties(self) -> dict[str, Any]:
        """None."""
        return {}

    async def Open(self, call: wire.Call) -> int:  # noqa: N802 - as on the bus
        """Return a descriptor."""
        self.begun.append("Open")
        return os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)

    async def Keep(self, call: wire.Call, fd: wire.OwnedFd) -> None:  # noqa: N802 - as on the bus
        """Leave a descriptor where it is."""
        await self.Wait(call)

    async def Wait(self, call: wire.Call) -> None:  # noqa: N802 - as on the bus
        """Never return."""
        self.begun.append("Wait")
        await asyncio.Event().wait()

    async def Refuse(self, call: wire.Call) -> None:  # noqa: N802 - as on the bus
        """Raise an error of ours."""
        raise NotFound("nothing here")

    async def Crash(self, call: wire.Call) -> None:  # noqa: N802 - as on the bus
        """Raise an error that is a defect."""
        raise ZeroDivisionError


@dataclass
class Wire:
    """A publisher and the other end of its socket."""

    connection: Connection
    publisher: wire.Publisher
    thing: Thing
    theirs: socket.socket

    def call(self, member: str, flags: int = 0, sender: str = SENDER) -> None:
        """Send a call without arguments, as the bus would."""
        self.theirs.send(build(Header(1, flags, 7, "/r/x", "a.B1", member, sender=sender), b""))

    def know(self, sender: str, uid: int) -> None:
        """Have the connection know whose a name is; there is no bus to ask."""
        known: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        known.set_result(uid)
        self.connection._uids[sender] = known

    def begin_keep(self) -> None:
        """Hand in a call of Keep with a descriptor. Its task is made and has not begun."""
        header = Header(1, 0, 7, "/r/x", "a.B1", "Keep", sender=":1.9", signature="h", fd_count=1)
        fd = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        self.publisher._dispatcher(Message(header, bytes(4), [fd]))
        assert len(self.publisher._dispatcher._tasks) == 1
        assert self.thing.begun == []

    async def settle(self) -> list[Header]:
        """Let everything happen; return what was sent."""
        for _ in range(20):
            await asyncio.sleep(0)
        sent = []
        data = b""
        with suppress(BlockingIOError):
            data = self.theirs.recv(1 << 20)
        while data:
            lengths = read_lengths(data, 0)
            sent.append(read_header(lengths, data[: lengths.total]))
            data = data[lengths.total :]
        return sent


def open_fds() -> int:
    """Return how many file descriptors this process has."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.fixture
async def service() -> AsyncIterator[Wire]:
    """A publisher with one object; what its export sent is read."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    connection = Connection(ours, "unix:path=/bus")
    publisher = wire.Publisher(connection, "/r", wire.parse_interfaces(XML))
    thing = Thing()
    publisher.export("/r/x", {"a.B1": thing})
    one = Wire(connection, publisher, thing, theirs)
    one.know(SENDER, UID)
    await one.settle()
    yield one
    await publisher.stop()
    connection.close()
    theirs.close()


@pytest.mark.parametrize("member", ["Open", "Refuse", "Crash", "Nothing"])
async def test_a_call_that_wants_no_answer_is_not_answered(service: Wire, member: str) -> None:
    """The bus would drop the answer, but another sees it: nothing is sent, and a descriptor in it is closed."""
    before = open_fds()
    service.call(member, flags=NO_REPLY_EXPECTED)
    assert await service.settle() == []
    assert open_fds() == before
    service.call(member)
    assert [header.reply_serial for header in await service.settle()] == [7]


async def test_a_call_that_was_just_read_is_answered_by_a_stop(service: Wire) -> None:
    """Its task has not begun; its descriptor is closed."""
    before = open_fds()
    service.begin_keep()
    await service.publisher.stop()
    assert [header.error_name for header in await service.settle()] == [
        "org.blksnap.Blksnap1.Error.Cancelled"
    ]
    assert open_fds() == before


async def test_the_descriptors_of_a_cancelled_task_are_closed(service: Wire) -> None:
    """Whoever cancels it, and before its first step."""
    before = open_fds()
    service.begin_keep()
    for task in service.publisher._dispatcher._tasks:
        task.cancel()
    await service.settle()
    assert service.thing.begun == []
    assert open_fds() == before


async def test_calls_of_the_past_are_not_counted(service: Wire) -> None:
    """The table of callers is empty when nothing runs."""
    for _ in range(5):
        service.call("Open")
    await service.settle()
    assert service.publisher._dispatcher._calls == {}
    service.call("Wait")
    await service.settle()
    assert service.publisher._dispatcher._calls == {":1.9": 1}


async def test_one_user_cannot_take_up_all_calls(service: Wire) -> None:
    """With many connections either; root can still call, and so can the user when calls have ended."""
    for number in range(MAX_CALLS_PER_UID // 64):
        service.know(f":2.{number}", UID)
        for _ in range(64):
            service.call("Wait", sender=f":2.{number}")
        assert await service.settle() == []
    service.call("Open")
    refused = await service.settle()
    assert [header.error_name for header in refused] == ["org.blksnap.Blksnap1.Error.LimitExceeded"]
    service.know(":3.1", 0)
    service.call("Open", sender=":3.1")
    assert [header.error_name for header in await service.settle()] == [""]
    for task in service.publisher._dispatcher._tasks:
        task.cancel()
    while await service.settle():
        pass
    service.call("Open")
    assert [header.error_name for header in await service.settle()] == [""]
    assert not service.publisher._dispatcher._calls_of_uids
