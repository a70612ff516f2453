# SPDX-License-Identifier: GPL-2.0-or-later
"""The connection itself: reaching a bus, names, calls to others, who leaves, and the end."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from blksnap_service.bus import _handshake, wire
from blksnap_service.errors import Busy, NotAuthorized, NotAvailable, NotFound, RemoteError, TimedOut
from tests.bus import publisher
from tests.bus.conftest import NAME, REPOSITORY, Bus, Service, StartService
from tests.bus.hostile import DBUS, NO_REPLY, options, text

PATH = "/org/freedesktop/DBus"


@contextmanager
def false_bus(directory: Path, *lines: bytes, linger: bool = False) -> Iterator[str]:
    """Listen as a bus would, answer each line of one caller with the next of `lines`, hang up; gives the address.

    `linger`: hang up only when the caller does.
    """
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(directory / "false"))
    listener.listen()

    def serve() -> None:
        with listener.accept()[0] as one, suppress(ConnectionError):
            one.settimeout(10)
            for line in lines:
                one.recv(4096)
                one.sendall(line)
            while one.recv(4096) and linger:
                pass

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"unix:path={directory / 'false'}"
    finally:
        listener.close()
        thread.join(10)


async def test_a_bus_that_hangs_up_during_authentication_is_an_error(directory: Path) -> None:
    """At once, and not a loop without end."""
    with (
        false_bus(directory) as address,
        pytest.raises(NotAvailable, match="closed the connection during authentication"),
    ):
        await asyncio.wait_for(wire.connect(address), 5)


async def test_a_bus_that_hangs_up_after_authentication_is_an_error(directory: Path) -> None:
    """Before it says who we are."""
    with (
        false_bus(directory, b"OK 0123\r\n", b"AGREE_UNIX_FD\r\n") as address,
        pytest.raises(NotAvailable, match="is gone: "),
    ):
        await asyncio.wait_for(wire.connect(address), 5)


async def test_a_bus_that_refuses_is_an_error(directory: Path) -> None:
    """REJECTED names the mechanisms it would take."""
    with (
        false_bus(directory, b"REJECTED DBUS_COOKIE_SHA1\r\n") as address,
        pytest.raises(NotAuthorized, match="REJECTED DBUS_COOKIE_SHA1"),
    ):
        await wire.connect(address)


async def test_a_bus_that_passes_no_descriptors_is_an_error(directory: Path) -> None:
    """Maps and images are handed over by descriptor."""
    with (
        false_bus(directory, b"OK 0123\r\n", b"ERROR\r\n") as address,
        pytest.raises(NotAvailable, match="does not pass file descriptors"),
    ):
        await wire.connect(address)


async def test_a_bus_that_says_nothing_is_an_error(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a while."""
    monkeypatch.setattr(_handshake, "TIMEOUT_SECONDS", 0.2)
    with false_bus(directory, linger=True) as address, pytest.raises(NotAvailable, match="did not answer"):
        await wire.connect(address)


async def test_a_bus_that_talks_without_end_is_an_error(directory: Path) -> None:
    """A line has at most 16 KiB."""
    with (
        false_bus(directory, b"x" * 100_000, linger=True) as address,
        pytest.raises(NotAvailable, match="overlong line"),
    ):
        await wire.connect(address)


@pytest.mark.parametrize(
    "address, reason",
    [
        ("unix:path=/nowhere/bus", "No such file or directory"),
        ("tcp:host=localhost,port=1", "only unix:path= and unix:abstract= are known"),
        ("nonsense", "only unix:path= and unix:abstract= are known"),
    ],
)
async def test_an_address_without_a_bus_is_an_error(address: str, reason: str) -> None:
    """With the address and the reason in the text."""
    with pytest.raises(NotAvailable, match=reason) as raised:
        await wire.connect(address)
    assert address in str(raised.value)


async def test_the_next_address_of_a_list_is_tried(bus: Bus) -> None:
    """The first that answers is taken; escaped characters mean themselves."""
    escaped = bus.address.replace("blksnap", "%62lksnap")
    connection = await wire.connect(f"tcp:host=x;unix:path=/nowhere;{escaped}")
    assert connection.unique_name.startswith(":")
    connection.close()


def test_system_and_session_are_found_in_the_environment(
    monkeypatch: pytest.MonkeyPatch, directory: Path
) -> None:
    """By the variables of the specification; without any there is a system bus but no session bus."""
    for name in ("DBUS_SYSTEM_BUS_ADDRESS", "DBUS_SESSION_BUS_ADDRESS", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)
    assert _handshake.resolve("system") == "unix:path=/run/dbus/system_bus_socket"
    with pytest.raises(NotAvailable, match="DBUS_SESSION_BUS_ADDRESS"):
        _handshake.resolve("session")
    (directory / "bus").touch()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(directory))
    assert _handshake.resolve("session") == f"unix:path={directory}/bus"
    monkeypatch.setenv("DBUS_SESSION_BUS_ADDRESS", "unix:abstract=s")
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", "unix:path=/x")
    assert (_handshake.resolve("session"), _handshake.resolve("system")) == (
        "unix:abstract=s",
        "unix:path=/x",
    )
    assert _handshake.resolve("unix:path=/y") == "unix:path=/y"
    assert _handshake.socket_names("unix:abstract=s,guid=1") == ["\0s"]


async def test_a_name_has_one_owner(bus: Bus) -> None:
    """The second who asks is told, and not put into a queue."""
    first, second = await wire.connect(bus.address), await wire.connect(bus.address)
    await first.request_name("org.example.Other")
    await first.request_name("org.example.Other")
    with pytest.raises(Busy, match=r"org\.example\.Other is taken"):
        await second.request_name("org.example.Other")
    first.close()
    second.close()


async def test_a_call_returns_plain_values_or_raises(service: Service) -> None:
    """Results, errors by name, and calls nobody answers."""
    connection = await wire.connect(service.bus.address)
    where = (NAME, publisher.THING, publisher.INTERFACE)
    assert await connection.call(*where, "Echo", "sa{sv}", ["hi", {}]) == ["hi"]
    file, info = await connection.call(*where, "OpenFile", "ua{sv}", [5, {}])
    with file:
        assert os.fstat(file.fileno()).st_size == 5
    assert info == {"size": wire.Value("t", 5), "names": wire.Value("as", ["a", "b"])}
    with pytest.raises(RemoteError, match="Busy happened") as raised:
        await connection.call(*where, "Fail", "sa{sv}", ["Busy", {}])
    assert raised.value.remote_name == "org.blksnap.Blksnap1.Error.Busy"
    with pytest.raises(TimedOut, match="did not answer Hang in 0"):
        await connection.call(*where, "Hang", "a{sv}", [{}], timeout=0.2)
    assert (await connection.call(*where, "WhoAmI", "a{sv}", [{}], interactive=True))[2] is True
    with pytest.raises(RemoteError):
        await connection.call("org.example.Other", "/", "a.b", "C")
    connection.close()
    with pytest.raises(NotAvailable):
        await connection.call(*where, "Echo", "sa{sv}", ["hi", {}])
    await connection.wait_disconnected()


async def test_a_thousand_calls_of_ours_at_once_are_answered(service: Service) -> None:
    """A full socket is waited for in this direction as well."""
    connection = await wire.connect(service.bus.address)
    where = (NAME, publisher.THING, "org.freedesktop.DBus.Introspectable")
    answers = await asyncio.gather(*(connection.call(*where, "Introspect") for _ in range(1000)))
    assert len({answer[0] for answer in answers}) == 1
    connection.close()


async def test_a_caller_s_uid_is_asked_once_and_forgotten_when_it_leaves(bus: Bus) -> None:
    """Unique names are not used again, but a cache of them would grow."""
    connection = await wire.connect(bus.address)
    other = await wire.connect(bus.address)
    uids = await asyncio.gather(*(connection.caller_uid(other.unique_name) for _ in range(10)))
    assert set(uids) == {os.getuid()}
    assert list(connection._uids) == [other.unique_name]
    left = asyncio.Event()
    connection.watch_name(other.unique_name, lambda _name: left.set())
    other.close()
    await asyncio.wait_for(left.wait(), 5)
    assert connection._uids == {}
    with pytest.raises(NotFound, match="has left the bus"):
        await connection.caller_uid(other.unique_name)
    assert connection._uids == {}
    connection.close()


def test_who_leaves_is_noticed_once(service: Service) -> None:
    """Also one that had left before it was watched; a cancelled watch is silent."""
    with service.caller() as listener, service.caller() as actor:
        listener.listen(f"type='signal',sender='{NAME}',member='Left'")
        with service.caller() as leaving:
            actor.call("Watch", "sa{sv}", options(text(leaving.name)))
            assert not leaving.ping().error
        assert listener.receive_signal("Left") == [leaving.name]
        actor.call("Watch", "sa{sv}", options(text(leaving.name)))
        assert listener.receive_signal("Left") == [leaving.name]
        assert not listener.ping().error


def test_nobody_else_can_say_who_left(service: Service) -> None:
    """A NameOwnerChanged that is not the bus's is not believed."""
    with service.caller() as listener, service.caller() as liar, service.caller() as victim:
        listener.listen(f"type='signal',sender='{NAME}',member='Left'")
        liar.call("Watch", "sa{sv}", options(text(victim.name)))
        body = text(victim.name)
        body += bytes(-len(body) % 4) + text(victim.name)
        body += bytes(-len(body) % 4) + text("")
        owner = liar.call("GetNameOwner", "s", text(NAME), destination=DBUS, path=PATH, interface=DBUS).body[
            0
        ]
        lie = liar.message(
            "NameOwnerChanged",
            "sss",
            body,
            destination=owner,
            path=PATH,
            interface=DBUS,
            kind=4,
            flags=NO_REPLY,
        )
        liar.send(lie)
        assert not liar.ping().error
        assert listener.signals() == []
        victim.socket.close()
        assert listener.receive_signal("Left") == [victim.name]
        assert not listener.ping().error
    service.assert_alive()


def test_a_service_whose_bus_ends_ends(service: Service) -> None:
    """With the reason on its standard error and a status that makes systemd start it again."""
    service.bus.process.terminate()
    assert service.process.wait(10) == 1
    assert "NotAvailable: the bus 'unix:path=" in service.log.read_text(encoding="utf-8")
    assert "is gone: the bus closed the connection" in service.log.read_text(encoding="utf-8")


def test_a_second_service_of_the_name_ends(service: Service, start_service: StartService) -> None:
    """With a text that says what is wrong."""
    with pytest.raises(AssertionError, match=f"Busy: the name {NAME} is taken on this bus"):
        start_service()
    service.assert_alive()


async def test_stopping_answers_what_runs_and_refuses_what_comes(bus: Bus) -> None:
    """Callers learn that the service stopped, with a name they can act on."""
    connection = await wire.connect(bus.address)
    other = await wire.connect(bus.address)
    served = wire.Publisher(connection, publisher.ROOT, wire.parse_interfaces(publisher.XML))
    thing = publisher.Thing(connection, served)
    served.export(publisher.THING, {publisher.INTERFACE: thing})
    await connection.request_name(NAME)
    where = (NAME, publisher.THING, publisher.INTERFACE)
    running = asyncio.create_task(other.call(*where, "Hang", "a{sv}", [{}]))
    await other.call(*where, "Echo", "sa{sv}", ["x", {}])
    await served.stop()
    for call in (running, other.call(*where, "Echo", "sa{sv}", ["x", {}])):
        with pytest.raises(RemoteError) as raised:
            await call
        assert raised.value.remote_name == "org.blksnap.Blksnap1.Error.Cancelled"
    connection.close()
    other.close()


def test_the_library_can_be_chosen_and_a_wrong_choice_is_told(library: str) -> None:
    """BLKSNAP_DBUS_LIBRARY, for tests."""
    script = "from blksnap_service.bus import wire; print(wire.LIBRARY_NAME)"
    for wanted, expected in ((library, library), ("other", "it can be next or fast")):
        done = subprocess.run(
            [sys.executable, "-c", script],
            env=os.environ | {"BLKSNAP_DBUS_LIBRARY": wanted},
            cwd=REPOSITORY, capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
        assert expected in done.stdout + done.stderr
