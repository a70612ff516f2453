# SPDX-License-Identifier: GPL-2.0-or-later
"""The client against a service inside the process: state, events, calls."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blksnap_service.mapreader import MAX_RANGES
from blksnap_tui import events, model
from blksnap_tui.calls import RANGES_PER_CALL
from blksnap_tui.client import Client
from blksnap_tui.errors import (
    BusUnavailableError,
    GenerationChangedError,
    NotAuthorizedError,
    ProtocolError,
    ServiceError,
    ServiceUnavailableError,
    from_dbus,
)
from blksnap_tui.fakelink import Refusal
from blksnap_tui.fakemap import FakeMap
from blksnap_tui.model import ObjectPath
from blksnap_tui.testing import FakeService


@pytest.fixture
def service() -> FakeService:
    """A service with one untracked device."""
    made = FakeService()
    made.add_device("/srv/disk.img", 1 << 30)
    return made


def client_of(service: FakeService, *, wait: bool = False) -> Client:
    """Make a client that leads to the fake."""
    return Client("test", wait_for_service=wait, transport=service.connect)


def only_device(client: Client) -> model.Device:
    """Give the one device."""
    (device,) = client.state.devices
    return device


async def test_the_state_is_there_after_entering(service: FakeService) -> None:
    """Devices and manager are read before the first line of the caller runs."""
    async with client_of(service) as client:
        assert client.available
        assert only_device(client).path == "/srv/disk.img"
        assert client.state.manager is not None
        assert [backend.name for backend in client.state.manager.backends] == ["blkfilter", "nbd"]


async def test_attaching_shows_a_tracker_when_the_call_returns(service: FakeService) -> None:
    """The next line of a program sees what the one before did."""
    async with client_of(service) as client:
        path = only_device(client).object_path
        await client.attach(path)
        tracker = only_device(client).tracker
        assert tracker is not None
        assert (tracker.state, tracker.active_number) == ("tracking", 1)
        await client.detach(path)
        assert only_device(client).tracker is None


async def test_a_snapshot_comes_with_its_images_and_goes_with_them(service: FakeService) -> None:
    """State follows interfaces that are added and removed."""
    async with client_of(service) as client:
        path = only_device(client).object_path
        await client.attach(path)
        made = await client.create_snapshot([path], limit=1 << 20, description="x")
        shot = client.state.snapshot(made)
        assert shot is not None
        assert (shot.storage_limit, shot.description) == (1 << 20, "x")
        assert [image.changes_number for image in client.state.images_of(shot)] == [1]
        await client.destroy_snapshot(shot.object_path)
        assert not client.state.snapshots
        assert not client.state.images


async def test_options_left_at_their_default_are_not_sent(service: FakeService) -> None:
    """The service chooses; an unknown option would be an error there."""
    async with client_of(service) as client:
        await client.attach(only_device(client).object_path)
        await client.create_snapshot([only_device(client).object_path], take=False)
    assert ("Attach", ({},)) in service.calls
    assert service.calls[-1][1][1] == {"take": False}


async def test_a_file_is_named_by_its_absolute_path(service: FakeService) -> None:
    """The service has another working directory."""
    async with client_of(service) as client:
        await client.add_image_file("here.img")
    assert service.calls[-1] == ("AddImageFile", (str(Path.cwd() / "here.img"), {}))


async def test_ranges_of_several_answers_are_joined(
    service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neighbouring ranges become one, also over the border of two calls."""
    monkeypatch.setattr("blksnap_tui.calls.RANGES_PER_CALL", 2)
    device = service.add_device("/srv/b.img", 64 * 65_536)
    shown = FakeMap(bytearray(64))
    for block in (1, 2, 3, 7, 63):
        shown.write(block, 1)
    shown.take()
    service.track(device, shown)
    async with client_of(service) as client:
        found = [pair async for pair in client.changed_ranges(device, 0)]
    assert found == [(65_536, 3 * 65_536), (7 * 65_536, 65_536), (63 * 65_536, 65_536)]
    assert sum(name == "GetChangedRanges" for name, _ in service.calls) == 3


def test_a_page_that_is_not_full_is_the_last() -> None:
    """The client stops there: the service must never cut one shorter than the client asks for."""
    assert RANGES_PER_CALL <= MAX_RANGES


async def test_a_map_file_is_closed_by_who_entered_it(service: FakeService) -> None:
    """One owner, and closing twice is nothing."""
    device = only_device_path(service)
    service.track(device, FakeMap(bytearray(b"\1\0\1"), active=2, taken=b"\1\0\0"))
    async with client_of(service) as client:
        with await client.open_map(device, view="taken") as shown:
            assert os.pread(shown.fd, 10, 0) == b"\1\0\0"
            assert (shown.size, shown.info["active"]) == (3, 2)
            fd = shown.fd
        shown.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def only_device_path(service: FakeService) -> ObjectPath:
    """Give the path of the fake's first device."""
    return ObjectPath(next(path for path, shown in service.objects.items() if model.DEVICE in shown))


async def test_refusals_carry_the_words_of_the_service(service: FakeService) -> None:
    """Name, kind and text arrive as they were sent."""
    service.refuse["Attach"] = Refusal("Busy", "/srv/disk.img is in use")
    async with client_of(service) as client:
        with pytest.raises(ServiceError) as caught:
            await client.attach(only_device(client).object_path)
    assert (caught.value.kind, caught.value.text) == ("Busy", "/srv/disk.img is in use")
    assert caught.value.name == "org.blksnap.Blksnap1.Error.Busy"


@pytest.mark.parametrize(
    "name, kind",
    [
        ("org.blksnap.Blksnap1.Error.NotAuthorizedDismissed", NotAuthorizedError),
        ("org.blksnap.Blksnap1.Error.GenerationChanged", GenerationChangedError),
        ("org.blksnap.Blksnap1.Error.Busy", ServiceError),
        ("org.freedesktop.DBus.Error.UnknownMethod", ServiceError),
        ("org.freedesktop.DBus.Error.ServiceUnknown", ServiceUnavailableError),
        ("org.freedesktop.DBus.Error.NoReply", ServiceUnavailableError),
        ("org.freedesktop.DBus.Error.Spawn.ExecFailed", ServiceUnavailableError),
        ("org.example.GenerationChanged", ServiceError),
    ],
)
def test_each_error_name_has_its_class(name: str, kind: type[Exception]) -> None:
    """Callers tell by class what they can do about it."""
    assert type(from_dbus(name, "text")) is kind


async def test_an_absent_service_is_an_error_for_who_does_not_wait(service: FakeService) -> None:
    """A command must not hang."""
    service.service_up = False
    with pytest.raises(ServiceUnavailableError):
        async with client_of(service):
            pass
    assert service.links == []


async def test_an_absent_bus_is_an_error(service: FakeService) -> None:
    """For those who wait for the service, too: only a new client can find another bus."""
    service.bus_up = False
    with pytest.raises(BusUnavailableError):
        async with client_of(service, wait=True):
            pass


async def until(true: Callable[[], bool]) -> None:
    """Let the loop run until something holds."""
    async with asyncio.timeout(5):
        while not true():  # noqa: ASYNC110 - what is waited for has no event of its own
            await asyncio.sleep(0)


async def test_a_service_that_comes_and_goes_is_followed(service: FakeService) -> None:
    """Lost empties the state, found reads it anew, and both are told once."""
    service.service_up = False
    told: list[events.Event] = []
    async with client_of(service, wait=True) as client:
        client.subscribe(told.append)
        assert not client.available
        assert client.state == model.State()
        service.start()
        await until(lambda: client.available)
        assert told == [events.ServiceFound()]
        service.stop()
        assert (client.available, client.state.devices) == (False, ())
        service.add_device("/dev/sdb", 1 << 20)
        service.start()
        await until(lambda: client.available)
        assert len(client.state.devices) == 2
    assert told == [events.ServiceFound(), events.ServiceLost(), events.ServiceFound()]


async def test_what_changes_while_the_state_is_read_is_not_lost(service: FakeService) -> None:
    """Signals that overtake the answer are kept and applied to it."""
    answer = service.answer

    def late(path: str, member: str, body: Any) -> Any:
        reply = answer(path, member, body)
        if member == "GetManagedObjects":
            service.add_device("/dev/late", 4096)
        return reply

    service.answer = late  # type: ignore[method-assign]
    async with client_of(service) as client:
        assert [device.name for device in client.state.devices] == ["late", "disk.img"]


async def test_a_lost_bus_is_told(service: FakeService) -> None:
    """With the reason; calls fail from then on."""
    told: list[events.Event] = []
    async with client_of(service) as client:
        client.subscribe(told.append)
        service.cut()
        assert told == [events.BusLost("the message bus closed the connection")]
        with pytest.raises(BusUnavailableError):
            await client.collect()


async def test_signals_of_the_service_become_events(service: FakeService) -> None:
    """Known ones with readable bodies; others are nothing."""
    told: list[events.Event] = []
    async with client_of(service) as client:
        client.subscribe(told.append)
        service._emit(":1.7", "/s", model.SNAPSHOT, "LowSpace", 90, 100)
        service._emit(":1.7", "/s", model.SNAPSHOT, "LowSpace", "90", 100)
        service._emit(":1.7", "/s", model.SNAPSHOT, "Unheard", 1)
        service._emit(":1.99", "/s", model.SNAPSHOT, "LowSpace", 1, 2)
    assert told == [events.LowSpace(ObjectPath("/s"), 90, 100)]


async def test_who_unsubscribed_hears_nothing(service: FakeService) -> None:
    """A callback ends when it is told to."""
    told: list[events.Event] = []
    async with client_of(service) as client:
        client.subscribe(told.append)()
        service.add_device("/dev/sdb", 1 << 20)
    assert told == []


@pytest.mark.parametrize("change", [{"Size": None}, {"Size": "1"}, {"Size": True}, {"MountPoints": [1]}])
async def test_a_property_that_is_not_as_promised_is_an_error(
    service: FakeService, change: dict[str, Any]
) -> None:
    """Missing or of another type: never a false value. The message names object and property."""
    (name,) = change
    shown = service.objects[only_device_path(service)][model.DEVICE]
    if change[name] is None:
        del shown[name]
    else:
        shown.update(change)
    async with client_of(service) as client:
        with pytest.raises(ProtocolError, match=name):
            _ = client.state


async def test_unknown_properties_and_interfaces_are_no_trouble(service: FakeService) -> None:
    """A newer service may show more."""
    shown = service.objects[only_device_path(service)]
    shown[model.DEVICE]["Colour"] = "blue"
    shown["org.blksnap.Blksnap1.New"] = {"X": 1}
    async with client_of(service) as client:
        assert only_device(client).size == 1 << 30


def test_the_client_needs_no_textual() -> None:
    """Scripts and the command line start without it."""
    code = "import sys, blksnap_tui.client, blksnap_tui.once, blksnapctl.__main__; print('textual' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
