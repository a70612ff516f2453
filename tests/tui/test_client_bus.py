# SPDX-License-Identifier: GPL-2.0-or-later
"""The client on a real message bus, against a service that can be told to answer badly."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from blksnap_tui import events, model
from blksnap_tui.client import Client
from blksnap_tui.errors import (
    BusUnavailableError,
    CallTimeoutError,
    ProtocolError,
    ServiceUnavailableError,
)
from blksnap_tui.wire import CALLS_IN_FLIGHT
from tests.tui.bus import DISK, Message, ScriptedService, Variant, private_bus

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
async def bus() -> AsyncIterator[str]:
    """The address of a bus of our own."""
    with tempfile.TemporaryDirectory(prefix="blksnap-tui-") as directory:
        async with private_bus(Path(directory)) as address:
            yield address


@pytest.fixture
async def service(bus: str) -> AsyncIterator[ScriptedService]:
    """A service on it."""
    async with ScriptedService(bus) as made:
        yield made


def returns(signature: str = "", *body: Any, fds: tuple[int, ...] = ()) -> Callable[[Any], Any]:
    """Make a handler that always gives the same answer."""
    return lambda call: Message.new_method_return(call, signature, list(body), list(fds))


def open_fds() -> int:
    """Count our descriptors."""
    return len(list(Path("/proc/self/fd").iterdir()))


async def until(true: Callable[[], bool]) -> None:
    """Wait for something to hold."""
    async with asyncio.timeout(10):
        while not true():  # noqa: ASYNC110 - what is waited for has no event of its own
            await asyncio.sleep(0.01)


async def test_the_state_follows_the_signals(service: ScriptedService) -> None:
    """Added, changed, removed: as the bus brings them."""
    async with Client(service.address) as client:
        assert [device.tracked for device in client.state.devices] == [False]
        service.change(DISK, model.DEVICE, Tracked=Variant("b", True))
        await until(lambda: client.state.devices[0].tracked)
        object_manager = "org.freedesktop.DBus.ObjectManager"
        service.emit(model.ROOT_PATH, object_manager, "InterfacesRemoved", "oas", [DISK, [model.DEVICE]])
        await until(lambda: not client.state.devices)


async def test_invalidated_properties_are_read_again(service: ScriptedService) -> None:
    """A signal may name properties without their values."""
    async with Client(service.address) as client:
        service.objects[DISK][model.DEVICE]["Size"] = Variant("t", 4096)
        properties = "org.freedesktop.DBus.Properties"
        service.emit(DISK, properties, "PropertiesChanged", "sa{sv}as", [model.DEVICE, {}, ["Size"]])
        await until(lambda: client.state.devices[0].size == 4096)


async def test_interactive_authorization_is_allowed(service: ScriptedService) -> None:
    """Else polkit could never ask for a password."""
    service.handlers["Attach"] = returns()
    async with Client(service.address) as client:
        await client.attach(DISK, block_size=1 << 20)
    call = service.calls[-1]
    assert (call.member, call.signature, int(call.flags) & 4) == ("Attach", "a{sv}", 4)
    assert call.body[0]["block-size"].signature == "u"


async def test_thousands_of_calls_at_once_are_answered(service: ScriptedService) -> None:
    """Each waits for its turn; sent all at once they would end the connection."""
    waiting = 0
    most = 0

    def answer(call: Any) -> Any:
        nonlocal waiting, most
        waiting += 1
        most = max(most, waiting)
        return Message.new_method_return(call, "ayt", [bytes(call.body[2]), 1])

    service.handlers["Summarize"] = answer
    async with Client(service.address) as client:

        async def one() -> None:
            nonlocal waiting
            levels, _ = await client.summarize(DISK, 0, 10, 5000)
            waiting -= 1
            assert len(levels) == 5000

        await asyncio.gather(*(one() for _ in range(3000)))
    assert most <= CALLS_IN_FLIGHT


async def test_calls_larger_than_the_socket_are_sent(service: ScriptedService) -> None:
    """A full socket is waited for."""
    service.handlers["MarkDirty"] = returns()
    ranges = [(offset * 4096, 4096) for offset in range(30_000)]
    async with Client(service.address) as client:
        await asyncio.gather(*(client.mark_dirty(DISK, ranges) for _ in range(4)))
    assert [len(call.body[0]) for call in service.calls[-4:]] == [30_000] * 4


async def test_descriptors_are_owned_by_who_asked(service: ScriptedService) -> None:
    """Those nobody asked for are closed: in signals, calls, errors, and answers that have too many."""
    fd = os.memfd_create("map")
    os.write(fd, b"abc")
    service.handlers["OpenMap"] = returns("ha{sv}", 0, {"base": Variant("u", 3)}, fds=(fd,))
    service.handlers["Open"] = returns("hh", 0, 1, fds=(fd, fd))
    async with Client(service.address) as client:
        before = open_fds()
        with await client.open_map(DISK) as shown:
            assert (os.pread(shown.fd, 9, 0), shown.info) == (b"abc", {"base": 3})
        with pytest.raises(ProtocolError, match="2 descriptors"):
            await client.open_image(DISK)
        for _ in range(5):
            signal = Message.new_signal(DISK, model.TRACKER, "New", "h", [0])
            signal.unix_fds = [fd]
            service._bus.send(signal)
        service.change(DISK, model.DEVICE, Tracked=Variant("b", True))
        await until(lambda: client.state.devices[0].tracked)
        assert open_fds() - before <= 5  # the scripted service closes its copies as they are sent
        await until(lambda: open_fds() == before)
    os.close(fd)


async def test_a_descriptor_is_sent(service: ScriptedService, tmp_path: Path) -> None:
    """Storage that the caller opened; it stays the caller's."""
    seen: list[int] = []

    def answer(call: Any) -> Any:
        seen.append(os.fstat(call.unix_fds[call.body[1]["storage-fd"].value]).st_ino)
        for fd in call.unix_fds:
            os.close(fd)
        return Message.new_method_return(call, "o", ["/x"])

    service.handlers["CreateSnapshot"] = answer
    with (tmp_path / "store").open("wb") as file:
        async with Client(service.address) as client:
            assert await client.create_snapshot([DISK], storage_fd=file.fileno()) == "/x"
        assert seen == [os.fstat(file.fileno()).st_ino]


@pytest.mark.parametrize(
    "body",
    [(), ("ay", b"abc"), ("ayt", b"abcd", 1), ("s", "no")],
    ids=["nothing", "half", "short", "other"],
)
async def test_an_answer_of_another_shape_is_an_error(
    service: ScriptedService, body: tuple[Any, ...]
) -> None:
    """It names what was asked, and takes nothing down."""
    service.handlers["Summarize"] = returns(*body)
    async with Client(service.address) as client:
        with pytest.raises(ProtocolError):
            await client.summarize(DISK, 0, 10, 3)
        assert client.state.devices


async def test_objects_of_another_shape_are_an_error(service: ScriptedService) -> None:
    """Signals of a wrong shape are dropped, wrong objects are named."""
    async with Client(service.address) as client:
        service.emit(DISK, "org.freedesktop.DBus.Properties", "PropertiesChanged", "s", [model.DEVICE])
        service.emit(model.ROOT_PATH, "org.freedesktop.DBus.ObjectManager", "InterfacesAdded", "u", [7])
        service.change(DISK, model.DEVICE, Tracked=Variant("b", True))
        await until(lambda: client.state.devices[0].tracked)
        service.change(DISK, model.DEVICE, Size=Variant("s", "big"))
        with pytest.raises(ProtocolError, match=f"{DISK}: property Size"):
            await until(lambda: not client.state.devices)


async def test_a_call_without_an_answer_ends(
    service: ScriptedService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After its time, with an error that says which it was; what comes late is nothing, and closed."""
    monkeypatch.setattr("blksnap_tui.calls.ACT_TIMEOUT_S", 0.2)
    held: list[Any] = []
    service.handlers["GetInfo"] = held.append
    fd = os.memfd_create("late")
    async with Client(service.address) as client:
        before = open_fds()
        with pytest.raises(CallTimeoutError, match="GetInfo"):
            await client.get_info(DISK)
        service._bus.send(Message.new_method_return(held[0], "h", [0], [fd]))
        service.change(DISK, model.DEVICE, Tracked=Variant("b", True))
        await until(lambda: client.state.devices[0].tracked)
        assert open_fds() == before
    os.close(fd)


async def test_a_service_that_leaves_during_a_call_is_an_error(service: ScriptedService) -> None:
    """The bus answers in its place, and the state is empty."""
    told: list[events.Event] = []

    def leave(call: Any) -> Any:
        service._bus._sock.shutdown(2)
        return Message.new_error(call, "org.example.TooLate", "")

    service.handlers["Attach"] = leave
    async with Client(service.address) as client:
        client.subscribe(told.append)
        with pytest.raises(ServiceUnavailableError):
            await client.attach(DISK)
        await until(lambda: not client.available)
    assert events.ServiceLost() in told


async def test_a_bus_that_ends_is_told(tmp_path: Path) -> None:
    """Calls under way fail, and later ones."""
    with tempfile.TemporaryDirectory(prefix="blksnap-tui-") as directory:
        told: list[events.Event] = []
        async with private_bus(Path(directory)) as address:
            client = Client(address, wait_for_service=True)
            await client.__aenter__()
            client.subscribe(told.append)
        await until(lambda: bool(told))
        assert isinstance(told[0], events.BusLost)
        with pytest.raises(BusUnavailableError):
            await client.collect()
        await client.__aexit__(None, None, None)
    with pytest.raises(BusUnavailableError):
        async with Client(f"unix:path={tmp_path}/no"):
            pass


async def test_a_bus_that_closes_while_authenticating_is_an_error(tmp_path: Path) -> None:
    """It must not spin."""
    server = await asyncio.start_unix_server(lambda _reader, writer: writer.close(), tmp_path / "bus")
    async with server, asyncio.timeout(10):
        with pytest.raises(BusUnavailableError):
            async with Client(f"unix:path={tmp_path / 'bus'}"):
                pass


@pytest.mark.parametrize("address", ["nonsense", "unix:", "carrier-pigeon:loft=7", ""])
async def test_a_wrong_address_is_an_error(address: str) -> None:
    """As one line, not as what the library makes of it."""
    with pytest.raises(BusUnavailableError):
        async with Client(address):
            pass


async def test_no_descriptors_are_left_behind(service: ScriptedService) -> None:
    """However often one connects."""
    async with Client(service.address):
        pass
    before = open_fds()
    for _ in range(20):
        async with Client(service.address):
            pass
    assert open_fds() == before


@pytest.mark.parametrize("library", ["next", "fast"] if sys.version_info < (3, 15) else ["fast"])
def test_both_libraries_do(library: str) -> None:
    """The same client, and the program's --once with it, in a process of its own for each."""
    with tempfile.TemporaryDirectory(prefix="blksnap-tui-") as directory:
        code = f"""
import asyncio, sys
from pathlib import Path
from blksnap_tui.wire import _library
from tests.tui.bus import ScriptedService, private_bus
async def main():
    async with private_bus(Path({directory!r})) as address, ScriptedService(address):
        done = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "blksnap_tui", "--bus", address, "--once", "--json", stdout=-1)
        print(_library.__name__, (await done.communicate())[0].decode(), sep="\\n")
asyncio.run(main())
"""
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            cwd=REPOSITORY,
            env={**os.environ, "BLKSNAP_DBUS_LIBRARY": library},
        )
    name, _, shown = done.stdout.partition("\n")
    assert name == f"dbus_{library}"
    assert [device["path"] for device in json.loads(shown)["devices"]] == ["/srv/disk.img"]
