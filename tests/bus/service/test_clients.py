# SPDX-License-Identifier: GPL-2.0-or-later
"""The service as other people's programs see it: busctl, gdbus, GLib's object manager; and that no change is kept from them."""

from __future__ import annotations

import asyncio
import json
import xml.etree.ElementTree as ET
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from blksnap_service.bus import paths, wire
from blksnap_service.bus.paths import DEVICE, IMAGE, MANAGER_PATH, SNAPSHOT, TRACKER
from tests.bus.daemons import START_S, Bus, Client, Daemon, Signals, make_image, program, standing_still

XML = Path(__file__).parents[3] / "dbus" / "interfaces" / "org.blksnap.Blksnap1.xml"

# The system's Python has GLib's bindings; they cannot be had from PyPI without a compiler.
GIO = """
import json, sys
from gi.repository import Gio, GLib

def tell(what, path, *more):
    print(json.dumps([what, path, *more]), flush=True)

bus = Gio.DBusConnection.new_for_address_sync(
    sys.argv[1],
    Gio.DBusConnectionFlags.AUTHENTICATION_CLIENT | Gio.DBusConnectionFlags.MESSAGE_BUS_CONNECTION, None, None)
manager = Gio.DBusObjectManagerClient.new_sync(
    bus, Gio.DBusObjectManagerClientFlags.DO_NOT_AUTO_START, sys.argv[2], sys.argv[3], None, None, None)
def paths_of(one):
    return sorted(interface.get_interface_name() for interface in one.get_interfaces())
manager.connect("object-added", lambda _, one: tell("added", one.get_object_path(), paths_of(one)))
manager.connect("object-removed", lambda _, one: tell("removed", one.get_object_path()))
manager.connect("interface-added", lambda _, one, face: tell("interface", one.get_object_path(), face.get_interface_name()))
manager.connect("interface-removed", lambda _, one, face: tell("no interface", one.get_object_path(), face.get_interface_name()))
manager.connect("interface-proxy-properties-changed",
    lambda _, one, face, changed, gone: tell("changed", one.get_object_path(), changed.unpack()))
manager.connect("notify::name-owner", lambda *_: tell("owner", manager.get_name_owner() or ""))
tell("ready", "", sorted(one.get_object_path() for one in manager.get_objects()))
GLib.MainLoop().run()
"""


@asynccontextmanager
async def watching(*words: str | Path) -> AsyncIterator[Callable[..., Awaitable[str]]]:
    """Run a program that tells what happens; yields how to wait for a line that has some words in it."""
    process = await asyncio.create_subprocess_exec(
        *words,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        limit=1 << 22,
    )
    heard: list[str] = []

    async def wait_for(*these: str) -> str:
        assert process.stdout is not None
        async with asyncio.timeout(START_S):
            while not (found := [line for line in heard if all(one in line for one in these)]):
                line = await process.stdout.readline()
                assert line, f"{words[0]} ended: {heard}"
                heard.append(line.decode().rstrip())
        heard.remove(found[0])
        return found[0]

    try:
        yield wait_for
    finally:
        process.kill()
        await process.wait()


async def test_glibs_object_manager_follows(user: Client, daemon: Daemon, bus: Bus, image: Path) -> None:
    """Objects and interfaces that come and go, properties that change, a service that ends and starts."""
    words = ("/usr/bin/python3", "-c", GIO, bus.address, paths.BUS_NAME, paths.ROOT)
    async with watching(*words) as wait_for:
        ready = json.loads(await wait_for('"ready"'))
        assert MANAGER_PATH in ready[2]
        device = await user.add(image)
        assert json.loads(await wait_for('"added"', device)) == ["added", device, [DEVICE]]
        await user.call(device, DEVICE, "Attach", "")
        await wait_for('"interface"', device, TRACKER)
        assert json.loads(await wait_for('"changed"', device, "Tracked"))[2]["Tracked"] is True
        snapshot = await user.snapshot(device)
        assert json.loads(await wait_for('"added"', snapshot))[2] == [SNAPSHOT]
        (picture,) = await user.get(snapshot, SNAPSHOT, "Images")
        assert json.loads(await wait_for('"added"', picture))[2] == [IMAGE]
        assert json.loads(await wait_for('"changed"', device, "ChangesNumber"))[2] == {"ChangesNumber": 1}
        await user.call(snapshot, SNAPSHOT, "Destroy", "")
        await wait_for('"removed"', snapshot)
        await wait_for('"removed"', picture)
        await user.call(device, DEVICE, "Detach", "")
        await wait_for('"no interface"', device, TRACKER)
        assert await daemon.end() == 0
        await wait_for('"removed"', device)
        assert json.loads(await wait_for('"owner"')) == ["owner", ""]
        await daemon.start()
        await wait_for('"added"', device)


async def test_busctl_sees_all_of_it(user: Client, bus: Bus, image: Path) -> None:
    """tree, introspect, monitor, get-property."""
    busctl = ("busctl", f"--address={bus.address}")
    async with watching(*busctl, "--json=short", "monitor", paths.BUS_NAME) as wait_for:
        await wait_for("Monitoring bus")
        device = await user.attach(image)
        snapshot = await user.snapshot(device)
        await wait_for("InterfacesAdded", device)
        await wait_for("InterfacesAdded", snapshot)
        await wait_for("PropertiesChanged", "ChangesNumber")
    tree = await program(*busctl, "--list", "tree", paths.BUS_NAME)
    assert {paths.ROOT, MANAGER_PATH, device, snapshot} <= set(tree.split())
    shown = await program(*busctl, "introspect", paths.BUS_NAME, device)
    described = ET.parse(XML).getroot()  # noqa: S314 - our own file
    for interface in described.findall("interface"):
        if interface.get("name") in {DEVICE, TRACKER}:
            names = [f".{one.get('name')} " for one in interface if one.tag != "annotation"]
            assert [name for name in names if name not in shown] == []
    assert (
        await program(*busctl, "get-property", paths.BUS_NAME, snapshot, SNAPSHOT, "State") == 's "taken"\n'
    )


async def test_gdbus_sees_all_of_it(user: Client, bus: Bus, image: Path) -> None:
    """introspect with the values of properties, monitor, call."""
    gdbus = ("gdbus", "{}", f"--address={bus.address}")

    def words(command: str, *more: str) -> tuple[str, ...]:
        return (gdbus[0], command, gdbus[2], "--dest", paths.BUS_NAME, *more)

    device = await user.attach(image)
    shown = await program(*words("introspect", "--object-path", device))
    assert f"readonly s Path = '{image}';" in shown
    assert "readonly s State = 'tracking';" in shown
    assert "org.freedesktop.DBus.Property.EmitsChangedSignal" in shown
    async with watching(*words("monitor")) as wait_for:
        await wait_for("is owned by")
        snapshot = await user.snapshot(device)
        await wait_for("InterfacesAdded", snapshot)
        await wait_for("PropertiesChanged", "ChangesNumber")
    info = await program(
        *words("call", "--object-path", device, "--method", f"{TRACKER}.GetInfo", "--", "{}")
    )
    assert "'changes-number': <uint32 1>" in info


def _plain(value: Any) -> Any:
    if isinstance(value, wire.Value) or hasattr(value, "signature"):
        return _plain(value.value)
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value


class Mirror:
    """What a client knows that asks once and then only listens."""

    def __init__(self, objects: dict[str, Any]) -> None:
        self.objects: dict[str, Any] = _plain(objects)

    def follow(self, path: str, member: str, body: list[Any]) -> None:
        """Do what a signal says."""
        body = _plain(body)
        if member == "InterfacesAdded":
            self.objects.setdefault(body[0], {}).update(body[1])
        elif member == "InterfacesRemoved":
            for name in body[1]:
                del self.objects[body[0]][name]
            if not self.objects[body[0]]:
                del self.objects[body[0]]
        elif member == "PropertiesChanged":
            self.objects[path][body[0]].update(body[1])


async def test_no_change_is_kept_from_who_listens(
    user: Client, daemon: Daemon, signals: Signals, directory: Path
) -> None:
    """Whoever only listens knows, after all that can happen, what whoever asks is told."""
    mirror, start = Mirror(await user.objects()), len(signals.heard)
    images = [make_image(directory / f"{number}.img") for number in range(3)]
    devices = [await user.attach(image) for image in images[:2]]
    third = await user.add(images[2])
    small = await user.snapshot(*devices, limit=("t", 1 << 20), description=("s", "small"))
    later = await user.snapshot(devices[0], take=("b", False), hold=("b", True))
    await user.call(later, SNAPSHOT, "AddDevice", "o", devices[1])
    await user.call(later, SNAPSHOT, "Take", "")
    await user.call(later, SNAPSHOT, "Release", "")
    await user.call(devices[0], TRACKER, "MarkAllDirty", "")
    with standing_still(daemon):
        slow = asyncio.create_task(user.snapshot(third, attach=("b", True)))
        async with asyncio.timeout(START_S):
            while not any("/jobs/" in path for path in await user.objects()):  # noqa: ASYNC110 - another process
                await asyncio.sleep(0.02)
    await slow
    await user.call(small, SNAPSHOT, "Destroy", "")
    await user.call(devices[1], DEVICE, "Detach", "", force=("b", True))
    daemon.lose_datapath()
    async with asyncio.timeout(2 * START_S):
        while (await user.objects())[devices[0]].get(TRACKER, {}).get("State") != "tracking":  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        while True:
            known = _plain(await user.objects())
            for path, member, body in signals.heard[start:]:
                mirror.follow(path, member, body)
            start = len(signals.heard)
            if mirror.objects == known:
                break
            await asyncio.sleep(0.2)
            if _plain(await user.objects()) == known and len(signals.heard) == start:
                assert mirror.objects == known
