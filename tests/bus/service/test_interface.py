# SPDX-License-Identifier: GPL-2.0-or-later
"""The D-Bus interface of a running service: what it says of itself, what it refuses, what it tells."""

from __future__ import annotations

import asyncio
import os
import xml.etree.ElementTree as ET
from pathlib import Path

from blksnap_service.bus import paths, wire
from blksnap_service.bus.paths import DEVICE, IMAGE, MANAGER, MANAGER_PATH, SNAPSHOT, TRACKER
from tests.bus.daemons import MIB, REPOSITORY, Client, Signals, make_image, refused

XML = REPOSITORY / "dbus" / "interfaces" / "org.blksnap.Blksnap1.xml"


async def test_introspection_is_the_xml(user: Client, image: Path) -> None:
    """Of every kind of object there is."""
    device = await user.attach(image)
    snapshot = await user.snapshot(device)
    described = {one.get("name"): one for one in ET.parse(XML).getroot().findall("interface")}  # noqa: S314
    (picture,) = await user.get(snapshot, SNAPSHOT, "Images")
    for path, expected in (
        (MANAGER_PATH, {MANAGER}),
        (device, {DEVICE, TRACKER}),
        (snapshot, {SNAPSHOT}),
        (picture, {IMAGE}),
    ):
        (text,) = await user.connection.call(
            paths.BUS_NAME, path, "org.freedesktop.DBus.Introspectable", "Introspect"
        )
        shown = {one.get("name"): one for one in ET.fromstring(text).findall("interface")}  # noqa: S314
        assert {name for name in shown if name in described} == expected
        for name in expected:
            assert ET.canonicalize(ET.tostring(shown[name]), strip_text=True) == ET.canonicalize(
                ET.tostring(described[name]), strip_text=True
            )


ZEROS = {"s": "", "t": 0, "u": 0, "ao": [], "o": "/", "a(tt)": []}


async def test_every_method_refuses_an_unknown_option(user: Client, image: Path) -> None:
    """Before it does anything."""
    device = await user.attach(image)
    snapshot = await user.snapshot(device)
    (picture,) = await user.get(snapshot, SNAPSHOT, "Images")
    objects = {MANAGER: MANAGER_PATH, DEVICE: device, TRACKER: device, SNAPSHOT: snapshot, IMAGE: picture}
    for interface in ET.parse(XML).getroot().findall("interface"):  # noqa: S314
        for method in interface.findall("method"):
            name = str(interface.get("name"))
            if name not in objects:
                continue
            types = [str(one.get("type")) for one in method.findall("arg") if one.get("direction") == "in"][
                :-1
            ]
            arguments = [ZEROS[one] for one in types]
            with refused("OptionNotPermitted", "no option 'colour'"):
                await user.call(
                    objects[name],
                    name,
                    str(method.get("name")),
                    "".join(types),
                    *arguments,
                    colour=("s", "red"),
                )
    assert set(await user.objects()) == {MANAGER_PATH, device, snapshot, picture} | await block_devices(user)


async def block_devices(user: Client) -> set[str]:
    """The devices of this machine, which are none of the tests' business."""
    objects = await user.objects()
    return {path for path, one in objects.items() if DEVICE in one and one[DEVICE]["DeviceNumber"]}


async def test_errors_say_what_is_wrong(user: Client, image: Path, directory: Path) -> None:
    """By name and with a text for people."""
    device = await user.add(image)
    with refused("NotFound", "no such file"):
        await user.add(directory / "missing.img")
    with refused("InvalidArgument", "0 bytes"):
        await user.add(make_image(directory / "empty.img", 0))
    with refused("NotFound", "added image file"):
        await user.call(MANAGER_PATH, MANAGER, "ResolveDevice", "s", "/dev/null")
    with refused("NotTracked", "attach"):
        await user.snapshot(device)
    with refused("InvalidArgument", "at least one"):
        await user.snapshot()
    with refused("NotFound", "no device"):
        await user.snapshot("/org/blksnap/Blksnap1/Manager")
    with refused("InvalidArgument", "block size"):
        await user.call(device, DEVICE, "Attach", "", block_size=("u", 5000))
    with refused("InvalidArgument", "block size 0"):
        await user.call(device, DEVICE, "Attach", "", block_size=("u", 0))
    with refused("InvalidArgument", "must have type u"):
        await user.call(device, DEVICE, "Attach", "", block_size=("s", "big"))
    with refused("InvalidArgument", "there is: blkfilter, ublk, nbd, bpf"):
        await user.call(device, DEVICE, "Attach", "", backend=("s", "magic"))
    await user.call(device, DEVICE, "Attach", "", backend=("s", "nbd"), block_size=("u", 4096))
    with refused("AlreadyTracked"):
        await user.call(device, DEVICE, "Attach", "")
    with refused("GenerationChanged", "full copy"):
        await user.call(device, TRACKER, "GetChangedRanges", "utu", 1, 0, 10)
    with refused("GenerationChanged", "not nonsense"):
        await user.call(device, TRACKER, "GetChangedRanges", "utu", 0, 0, 10, generation_id=("s", "nonsense"))
    with refused("InvalidArgument", "no view"):
        await user.call(device, TRACKER, "OpenMap", "", view=("s", "future"))
    with refused("InvalidArgument", "no mode"):
        await user.call(device, TRACKER, "Summarize", "ttus", 0, 1, 1, "beauty")
    with refused("InvalidArgument", "nothing was marked"):
        await user.call(device, TRACKER, "MarkDirty", "a(tt)", [(0, 1), (MIB, 1)])
    snapshot = await user.snapshot(device)
    (picture,) = await user.get(snapshot, SNAPSHOT, "Images")
    with refused("NotSupported", "use Export"):
        await user.call(picture, IMAGE, "Open", "")
    with refused("Busy", "destroy that first"):
        await user.call(device, DEVICE, "Detach", "")
    with refused("InvalidState", "only once"):
        await user.call(snapshot, SNAPSHOT, "Take", "")
    with refused("InvalidArgument", "not both"), (directory / "diff").open("w+b") as file:
        fd = wire.OwnedFd(os.dup(file.fileno()))
        await user.snapshot(device, storage=("s", str(directory)), storage_fd=("h", fd))


async def test_what_happens_is_told(user: Client, signals: Signals, image: Path) -> None:
    """Objects come with all they have, change, and go, in an order a client can follow."""
    device = await user.attach(image)
    path, added = await signals.wait_for("InterfacesAdded", paths.ROOT)
    assert (path, set(added)) == (device, {DEVICE})
    snapshot = await user.snapshot(device)
    await user.call(snapshot, SNAPSHOT, "Destroy", "")
    await user.call(device, DEVICE, "Detach", "")
    story = []
    for where, member, body in signals.heard:
        if any("/jobs/" in str(one) for one in (where, body[0])):
            continue  # on a slow machine all is a job
        if member == "PropertiesChanged":
            story.append((where, sorted(body[1])))
        elif member == "InterfacesAdded":
            story.append((f"+{body[0]}", sorted(body[1])))
        elif member == "InterfacesRemoved":
            story.append((f"-{body[0]}", sorted(body[1])))
    await asyncio.sleep(0.1)
    (picture,) = [path.removeprefix("+") for path, _ in story if path.startswith("+") and "/images/" in path]
    assert story == [
        (f"+{device}", [DEVICE]),
        (f"+{device}", [TRACKER]),
        (device, ["Tracked"]),
        (device, ["ChangesNumber"]),
        (f"+{picture}", [IMAGE]),
        (f"+{snapshot}", [SNAPSHOT]),
        (device, ["Snapshots"]),
        (snapshot, ["State"]),
        (f"-{picture}", [IMAGE]),
        (f"-{snapshot}", [SNAPSHOT]),
        (device, ["Snapshots"]),
        (f"-{device}", [TRACKER]),
        (device, ["Tracked"]),
    ]
