# SPDX-License-Identifier: GPL-2.0-or-later
"""blksnapd as a process, with a real bus, the real data path and programs that are not ours."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from blksnap_service.bus import paths, wire
from blksnap_service.bus.paths import DEVICE, IMAGE, MANAGER, MANAGER_PATH, SNAPSHOT, TRACKER
from blksnap_service.errors import ERROR_PREFIX, RemoteError
from tests.bus.daemons import (
    MIB,
    REPOSITORY,
    Bus,
    Client,
    Daemon,
    Signals,
    client,
    content,
    program,
    run_daemon,
    scratch,
    write,
)

BLOCK = 65_536
XML = REPOSITORY / "dbus" / "interfaces" / "org.blksnap.Blksnap1.xml"
RESIDENT_BYTES_MAX = 60 * MIB


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory of the test's own."""
    with scratch() as one:
        yield one


@pytest.fixture
def bus(directory: Path) -> Iterator[Bus]:
    """A private bus."""
    one = Bus(directory)
    yield one
    one.stop()


@pytest.fixture
async def daemon(directory: Path, bus: Bus) -> AsyncIterator[Daemon]:
    """A running service; in the end it has never printed a traceback."""
    one = Daemon(directory, bus)
    try:
        await one.start()
        yield one
        assert "Traceback" not in one.log.read_text()
        assert "Warning" not in one.log.read_text()
    finally:
        one.clean_up()


@pytest.fixture
async def user(daemon: Daemon, bus: Bus) -> AsyncIterator[Client]:
    """A client of the running service."""
    async with client(bus) as one:
        yield one


@pytest.fixture
def signals(daemon: Daemon, bus: Bus) -> Iterator[Signals]:
    """What the service tells."""
    one = Signals(bus)
    yield one
    one.close()


@pytest.fixture
def image(directory: Path) -> Path:
    """An image file of 16 blocks."""
    return make_image(directory / "disk.img")


def make_image(path: Path, size: int = MIB) -> Path:
    """Make a sparse image file."""
    path.write_bytes(b"")
    os.truncate(path, size)
    return path


@contextlib.contextmanager
def refused(name: str, text: str | None = None) -> Iterator[None]:
    """Expect an error of ours by its last name."""
    with pytest.raises(RemoteError, match=text) as caught:
        yield
    assert caught.value.remote_name == ERROR_PREFIX + name
    assert "Traceback" not in str(caught.value)
    assert "/blksnap_service/" not in str(caught.value)


async def test_an_increment_is_what_changed(user: Client, image: Path) -> None:
    """Track, write, take, write, take: the ranges since the first take cover every difference, and the image stands still."""
    device = await user.attach(image)
    uri = await user.get(device, TRACKER, "Node")
    await write(uri, (1, 0, BLOCK), (2, 5 * BLOCK + 512, 512))
    first = await user.snapshot(device, description=("s", "first"))
    (picture,) = await user.get(first, SNAPSHOT, "Images")
    before = await content(await user.call(picture, IMAGE, "Export", ""))
    await write(uri, (3, 9 * BLOCK, 2 * BLOCK))
    second = await user.snapshot(device)
    (newer,) = await user.get(second, SNAPSHOT, "Images")
    number = await user.get(picture, IMAGE, "ChangesNumber")
    ranges, following = await user.call(device, TRACKER, "GetChangedRanges", "utu", number, 0, 100)
    assert [tuple(one) for one in ranges] == [(9 * BLOCK, 2 * BLOCK)]
    assert following == MIB
    copy = bytearray(before)
    now = await content(await user.get(newer, IMAGE, "NbdUri"))
    for offset, length in ranges:
        copy[offset : offset + length] = now[offset : offset + length]
    assert bytes(copy) == now == image.read_bytes()
    assert await content(await user.get(picture, IMAGE, "NbdUri")) == before


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
    with refused("InvalidArgument", "there is: nbd"):
        await user.call(device, DEVICE, "Attach", "", backend=("s", "bpf"))
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
    with refused("Busy", "destroy them first"):
        await user.call(device, DEVICE, "Detach", "")
    with refused("InvalidState", "only once"):
        await user.call(snapshot, SNAPSHOT, "Take", "")
    with refused("InvalidArgument", "not both"), (directory / "diff").open("w+b") as file:
        fd = wire.OwnedFd(os.dup(file.fileno()))
        await user.snapshot(device, storage=("s", str(directory)), storage_fd=("h", fd))


async def test_maps_are_handed_over_and_cannot_be_harmed(user: Client, image: Path) -> None:
    """The live map shows a write at once; nobody but the data path can write it."""
    device = await user.attach(image)
    fd, info = await user.call(device, TRACKER, "OpenMap", "")
    with fd:
        assert {name: value.value for name, value in info.items()} | {"sequence": 0} == {
            "generation-id": await user.get(device, TRACKER, "GenerationId"),
            "base": 0,
            "active": 1,
            "changes-number": 0,
            "oldest-number": 0,
            "block-size": BLOCK,
            "block-count": 16,
            "sequence": 0,
            "view": "live",
        }
        with mmap.mmap(fd.fileno(), 16, prot=mmap.PROT_READ) as shown:
            await write(await user.get(device, TRACKER, "Node"), (1, 3 * BLOCK, 512))
            assert shown[:] == bytes([0, 0, 0, 1]) + bytes(12)
        seals = fcntl.fcntl(fd.fileno(), fcntl.F_GET_SEALS)
        assert seals & (fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        # Root may open it again for writing; the seal holds all the same.
        with wire.OwnedFd(os.open(f"/proc/self/fd/{fd.fileno()}", os.O_RDWR)) as again:
            with pytest.raises(PermissionError):
                os.pwrite(again.fileno(), b"x", 0)
            with pytest.raises(PermissionError):
                mmap.mmap(again.fileno(), 16)
    assert await user.call(device, TRACKER, "ReadMap", "tu", 2, 3) == b"\0\1\0"
    fd, info = await user.call(device, TRACKER, "OpenMap", "", view=("s", "taken"))
    with fd:
        assert os.pread(fd.fileno(), 100, 0) == bytes(16)


async def test_a_reading_counts(user: Client, image: Path) -> None:
    """Requests, bytes, and blocks since each number."""
    device = await user.attach(image)
    await write(await user.get(device, TRACKER, "Node"), (1, 0, 2 * BLOCK))
    await user.snapshot(device)
    await user.call(device, TRACKER, "MarkDirty", "a(tt)", [(15 * BLOCK, 1)])
    info = {name: value.value for name, value in (await user.call(device, TRACKER, "GetInfo", "")).items()}
    assert info["writes"] >= 1
    assert info["written-bytes"] == 2 * BLOCK
    assert info["changed-blocks"] == {0: 3, 1: 1}
    assert (info["state"], info["changes-number"], info["capacity"]) == ("tracking", 1, MIB)
    await user.call(device, TRACKER, "MarkAllDirty", "")
    info = await user.call(device, TRACKER, "GetInfo", "")
    assert info["changed-blocks"].value == {0: 16, 1: 16}


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


async def gone(user: Client, path: str) -> None:
    """Wait until an object is not there any more."""
    while path in await user.objects():  # noqa: ASYNC110 - asks another process
        await asyncio.sleep(0.02)


async def test_a_held_snapshot_ends_with_its_caller(user: Client, bus: Bus, image: Path) -> None:
    """Unless it was released."""
    device = await user.attach(image)
    async with client(bus) as other:
        held = await other.snapshot(device, hold=("b", True))
        released = await other.snapshot(device, hold=("b", True))
        assert await user.get(held, SNAPSHOT, "Held")
        await other.call(released, SNAPSHOT, "Release", "")
    await gone(user, held)
    assert not await user.get(released, SNAPSHOT, "Held")


async def test_a_hold_outlives_the_service_but_not_its_caller(
    user: Client, daemon: Daemon, bus: Bus, image: Path
) -> None:
    """After a restart the caller is still watched; one that left meanwhile is missed."""
    device = await user.attach(image)
    staying = await user.snapshot(device, hold=("b", True))
    async with client(bus) as other:
        leaving = await other.snapshot(device, hold=("b", True))
        await daemon.end(signal.SIGKILL)
    await daemon.start()
    await gone(user, leaving)
    assert await user.get(staying, SNAPSHOT, "Held")


async def load(uri: str, seconds: int, *, patience: bool = True) -> dict[str, Any]:
    """Write and verify with fio for a while; returns its report. Fails when any request failed, if there is patience."""
    with tempfile.TemporaryDirectory() as place:
        report = Path(place) / "report"
        process = await asyncio.create_subprocess_exec(
            "fio", "--name=load", "--ioengine=nbd", f"--uri={uri}", "--rw=randwrite", "--bs=4k", "--iodepth=8",
            "--size=16M", "--time_based", f"--runtime={seconds}", "--verify=crc32c", "--verify_backlog=512",
            "--verify_state_save=0", "--thinktime=200", "--output-format=json", f"--output={report}",
            cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            status = await process.wait()
            if not patience:
                return {}
            assert status == 0
        finally:
            # Without its server fio goes on for ever.
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        job: dict[str, Any] = json.loads(report.read_text())["jobs"][0]
        assert job["error"] == 0
        return job


async def test_killing_the_service_stops_no_io_and_forgets_nothing(
    user: Client, daemon: Daemon, directory: Path
) -> None:
    """While fio writes and verifies: kill -9, start, take, stop, start. All it had is there again."""
    device = await user.attach(make_image(directory / "disk.img", 16 * MIB))
    uri = await user.get(device, TRACKER, "Node")
    await write(uri, (7, 0, MIB))
    snapshot = await user.snapshot(device, description=("s", "held over the kill"))
    (picture,) = await user.get(snapshot, SNAPSHOT, "Images")
    export = await user.get(picture, IMAGE, "NbdUri")
    frozen = await content(export)
    before = (await user.objects())[device]
    async with asyncio.TaskGroup() as group:
        loading = group.create_task(load(uri, 6))
        await asyncio.sleep(1)
        await daemon.end(signal.SIGKILL)
        await asyncio.sleep(0.5)
        assert not loading.done()
        await daemon.start()
        after = await user.objects()
        assert after[device][TRACKER] == before[TRACKER]
        assert after[snapshot][SNAPSHOT]["Description"] == "held over the kill"
        second = await user.snapshot(device)
        assert await user.get(device, TRACKER, "ChangesNumber") == 2
        assert await daemon.end(signal.SIGTERM) == 0
        assert not loading.done()
        await daemon.start()
        assert {snapshot, second} < set(await user.objects())
        assert await content(export) == frozen
    assert loading.result()["write"]["total_ios"] > 100
    assert await user.get(snapshot, SNAPSHOT, "State") == "taken"
    assert await content(export) == frozen


@pytest.mark.parametrize("gibibytes", [64, 256])
async def test_memory_stays_small(user: Client, daemon: Daemon, directory: Path, gibibytes: int) -> None:
    """At its peak, with a map of 16 Mi blocks that is taken, handed over, read, counted, searched and drawn; 64 Mi too."""
    device = await user.attach(make_image(directory / "disk.img", gibibytes << 30), block_size=("u", 4096))
    uri = await user.get(device, TRACKER, "Node")
    await write(uri, (1, 0, MIB), (2, gibibytes - 1 << 30, MIB))
    for _ in range(3):
        await user.snapshot(device, limit=("t", 64 * MIB))
        fd, _ = await user.call(device, TRACKER, "OpenMap", "")
        fd.close()
        await user.call(device, TRACKER, "GetInfo", "")
        ranges, _ = await user.call(device, TRACKER, "GetChangedRanges", "utu", 0, 0, 65_536)
        assert len(ranges) == 2
        for mode in ("age", "density", "frequency"):
            await user.call(device, TRACKER, "Summarize", "ttus", 0, gibibytes << 18, 4096, mode)
        await user.call(device, TRACKER, "ReadMap", "tu", 0, 1 << 20)
    assert daemon.peak_bytes <= RESIDENT_BYTES_MAX


async def test_storage_that_overflows_fails_only_the_snapshot(
    user: Client, signals: Signals, directory: Path
) -> None:
    """Writes go on; the state, the error and the signals say what happened."""
    device = await user.attach(make_image(directory / "disk.img", 16 * MIB))
    uri = await user.get(device, TRACKER, "Node")
    await write(uri, (1, 0, 16 * MIB))
    snapshot = await user.snapshot(device, limit=("t", 4 * MIB), low_space=("t", 2 * MIB))
    for part in range(16):
        await write(uri, (2, part * MIB, MIB))
    assert (await signals.wait_for("LowSpace", snapshot))[1] == 4 * MIB
    await signals.wait_for("NoSpace", snapshot)
    about, _, _ = await signals.wait_for("Corrupted", snapshot)
    assert about == device
    assert await user.get(snapshot, SNAPSHOT, "State") == "failed"
    assert await user.get(snapshot, SNAPSHOT, "Error")
    (picture,) = await user.get(snapshot, SNAPSHOT, "Images")
    with refused("Corrupted", "take a new snapshot"):
        await user.call(picture, IMAGE, "Export", "")
    assert await content(uri) == b"\2" * 16 * MIB
    await user.call(snapshot, SNAPSHOT, "Destroy", "")
    await user.snapshot(device)


async def test_two_devices_are_taken_at_one_instant(user: Client, directory: Path) -> None:
    """One snapshot, an image of each, the same moment."""
    devices = [await user.attach(make_image(directory / f"{name}.img")) for name in ("one", "two")]
    snapshot = await user.snapshot(*devices, storage=("s", str(directory / "diff")))
    assert await user.get(snapshot, SNAPSHOT, "Devices") == devices
    pictures = await user.get(snapshot, SNAPSHOT, "Images")
    assert [await user.get(one, IMAGE, "Device") for one in pictures] == devices
    assert await user.call(MANAGER_PATH, MANAGER, "Collect", "") == [snapshot]
    await user.call(snapshot, SNAPSHOT, "Destroy", "")
    assert not (directory / "diff").exists()


async def tracked_again(user: Client, *devices: str) -> None:
    """Wait until trackers are there again."""
    async with asyncio.timeout(20):
        while True:
            objects = await user.objects()
            if all(TRACKER in objects[device] for device in devices):
                return
            await asyncio.sleep(0.05)


async def test_a_killed_data_path_loses_no_change(
    user: Client, daemon: Daemon, signals: Signals, directory: Path
) -> None:
    """Killed while fio writes: trackers come back by themselves, their maps hold every difference, and writes go on.

    Snapshots are gone, which is said on the bus and in the log.
    """
    busy = make_image(directory / "a.img", 16 * MIB)
    quiet = make_image(directory / "b.img")
    devices = [await user.attach(busy), await user.attach(quiet, persistent=("b", True))]
    nodes = [await user.get(device, TRACKER, "Node") for device in devices]
    await write(nodes[0], (1, 0, 16 * MIB))
    snapshot = await user.snapshot(*devices)
    await write(nodes[1], (2, 3 * BLOCK, 512))
    before = (await user.objects()), busy.read_bytes()
    async with asyncio.TaskGroup() as group:
        loading = group.create_task(load(nodes[0], 30, patience=False))
        await asyncio.sleep(1)
        daemon.kill_datapath()
        await signals.wait_for("InterfacesRemoved", paths.ROOT)
        await tracked_again(user, *devices)
        loading.cancel()
    after = await user.objects()
    for device in devices:
        assert after[device][TRACKER] == before[0][device][TRACKER]
        assert after[device][TRACKER]["ChangesNumber"] == 1
        assert (after[device][DEVICE]["Tracked"], after[device][DEVICE]["Snapshots"]) == (True, [])
    now = busy.read_bytes()
    different = {offset for offset in range(0, len(now), BLOCK)
                 if now[offset : offset + BLOCK] != before[1][offset : offset + BLOCK]}  # fmt: skip
    assert different
    assert different <= set(await blocks_since(user, devices[0], 1))
    assert await blocks_since(user, devices[1], 1) == [3 * BLOCK]
    await write(nodes[1], (3, 9 * BLOCK, 512))
    assert await blocks_since(user, devices[1], 1) == [3 * BLOCK, 9 * BLOCK]
    await user.snapshot(*devices)
    assert await user.get(devices[1], TRACKER, "ChangesNumber") == 2
    assert snapshot not in after
    snapshots = [body[1]["Snapshots"].value for path, member, body in signals.heard
                 if member == "PropertiesChanged" and path == devices[0] and "Snapshots" in body[1]]  # fmt: skip
    assert [len(one) for one in snapshots] == [1, 0, 1]
    snapshot_id = snapshot.rpartition("/")[2].replace("_", "-")
    assert f"snapshot {snapshot_id} of a_2eimg, b_2eimg did not survive" in daemon.said()


async def blocks_since(user: Client, device: str, number: int) -> list[int]:
    """Return the offsets of the blocks changed since a number."""
    ranges, following = await user.call(
        device, TRACKER, "GetChangedRanges", "utu", number, 0, 65_536, view=("s", "live")
    )
    assert following == await user.get(device, TRACKER, "Capacity")
    return [block for offset, length in ranges for block in range(offset, offset + length, BLOCK)]


async def test_a_file_that_grew_under_a_killed_data_path_begins_anew(
    user: Client, daemon: Daemon, signals: Signals, image: Path
) -> None:
    """The map is of another size: a new generation, with its reason as property and signal."""
    device = await user.attach(image)
    generation = await user.get(device, TRACKER, "GenerationId")
    daemon.kill_datapath()
    os.truncate(image, 2 * MIB)
    await signals.wait_for("InterfacesRemoved", paths.ROOT)
    await tracked_again(user, device)
    now, reason = await signals.wait_for("GenerationStarted", device)
    assert now == await user.get(device, TRACKER, "GenerationId") != generation
    assert reason == await user.get(device, TRACKER, "LastReset")
    assert reason.startswith("the data path ended unexpectedly: its size changed")


async def test_a_data_path_that_ended_with_the_service_is_not_continued(
    user: Client, daemon: Daemon, directory: Path
) -> None:
    """Nobody held the maps: what is to be tracked always is, as a new generation; the rest is forgotten, and said."""
    always = await user.attach(make_image(directory / "a.img"), persistent=("b", True))
    once = await user.attach(make_image(directory / "b.img"))
    generation = await user.get(always, TRACKER, "GenerationId")
    await daemon.end(signal.SIGKILL)
    daemon.kill_datapath()
    await daemon.start()
    objects = await user.objects()
    assert not objects[once][DEVICE]["Tracked"]
    assert objects[always][TRACKER]["GenerationId"] != generation
    assert "without a clean detach" in objects[always][TRACKER]["LastReset"]
    assert "b.img is not tracked any more" in daemon.said()


async def test_history_goes_on_over_a_detach(user: Client, image: Path) -> None:
    """Numbers and map, with a real file's fingerprint."""
    device = await user.attach(image)
    await write(await user.get(device, TRACKER, "Node"), (1, 2 * BLOCK, 512))
    snapshot = await user.snapshot(device)
    await user.call(snapshot, SNAPSHOT, "Destroy", "")
    before = (await user.objects())[device][TRACKER]
    await user.call(device, DEVICE, "Detach", "")
    await user.call(device, DEVICE, "Attach", "")
    after = (await user.objects())[device][TRACKER]
    assert {**after, "AttachedAt": 0} == {**before, "AttachedAt": 0}
    ranges, _ = await user.call(device, TRACKER, "GetChangedRanges", "utu", 0, 0, 10, view=("s", "live"))
    assert [tuple(one) for one in ranges] == [(2 * BLOCK, BLOCK)]


async def test_a_file_another_program_has_locked_is_busy(user: Client, image: Path) -> None:
    """As QEMU locks its images."""
    with image.open("r+b") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        with refused("Busy"):
            await user.attach(image)


async def test_only_the_owner_may_do_anything(user: Client, bus: Bus, image: Path) -> None:
    """Another user may look, not touch."""
    if os.geteuid() != 0:
        pytest.skip("not root")
    device = await user.attach(image)
    caller = (
        "setpriv",
        "--reuid=65534",
        "--regid=65534",
        "--clear-groups",
        "busctl",
        f"--address={bus.address}",
    )
    shown = await program(*caller, "get-property", paths.BUS_NAME, device, TRACKER, "State")
    assert shown.strip() == 's "tracking"'
    process = await asyncio.create_subprocess_exec(
        *caller, "call", paths.BUS_NAME, device, DEVICE, "Detach", "a{sv}", "0",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    output, _ = await process.communicate()
    assert process.returncode != 0
    assert f"uid 65534 may not do this ({image})" in output.decode()


async def test_a_second_service_on_one_state_directory_is_refused(
    user: Client, daemon: Daemon, bus: Bus, directory: Path
) -> None:
    """The first does not notice."""
    words = [f"--bus={bus.address}", "--authority=owner", f"--state-dir={daemon.state}"]
    done = await asyncio.to_thread(run_daemon, [*words, f"--runtime-dir={directory / 'run2'}"])
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"blksnapd: CRITICAL: another blksnapd runs on the state directory {daemon.state}: use that one\n"
    )
    await user.objects()


async def test_a_second_service_on_one_bus_is_refused(daemon: Daemon, bus: Bus, directory: Path) -> None:
    """And the data path it started for nothing is gone again."""
    run = directory / "run2"
    words = [f"--bus={bus.address}", "--authority=owner", f"--state-dir={directory / 'state2'}"]
    done = await asyncio.to_thread(run_daemon, [*words, f"--runtime-dir={run}"])
    assert done.returncode == 1
    assert "another service is running" in done.stderr
    other = Daemon(directory, bus)
    other.run = run
    async with asyncio.timeout(10):
        while other.datapath_pid() is not None:  # noqa: ASYNC110 - asks another process
            await asyncio.sleep(0.02)


async def test_two_services_on_one_runtime_directory_share_the_data_path(
    user: Client, daemon: Daemon, directory: Path, image: Path
) -> None:
    """It is adopted, not started twice: what it serves is found."""
    device = await user.attach(image)
    pid = daemon.datapath_pid()
    with scratch() as place:
        other_bus = Bus(place)
        other = Daemon(place, other_bus, f"--runtime-dir={daemon.run}")
        try:
            await other.start()
            assert daemon.datapath_pid() == pid
            async with client(other_bus) as second:
                assert (await second.objects())[device][DEVICE]["Tracked"]
            assert await other.end() == 0
        finally:
            other.clean_up()
            other_bus.stop()


async def test_losing_the_bus_ends_the_service_with_one_line(daemon: Daemon, bus: Bus) -> None:
    """Whoever started it starts it again; the data path goes on."""
    pid = daemon.datapath_pid()
    bus.stop()
    assert await daemon.ended() == 1
    lines = [line for line in daemon.log.read_text().splitlines() if "CRITICAL" in line]
    assert lines == [f"blksnapd: CRITICAL: the bus '{bus.address}' is gone: the bus closed the connection"]
    assert daemon.datapath_pid() == pid


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_stop_is_clean(daemon: Daemon, number: signal.Signals) -> None:
    """Status 0, the data path goes on."""
    assert await daemon.end(number) == 0
    assert daemon.datapath_pid() is not None


BAD_STARTS = {
    "no bus": (["--bus=unix:path={dir}/nope"], 1, "cannot connect to the bus"),
    "bad bus": (["--bus=garbage"], 1, "garbage"),
    "state is a file": (["--state-dir={dir}/file"], 1, "state directory {dir}/file cannot be used"),
    "runtime is a file": (["--runtime-dir={dir}/file"], 1, "runtime directory {dir}/file cannot be used"),
    "no permission": (["--state-dir=/proc/x"], 1, "state directory /proc/x cannot be used"),
    "open to all": (["--runtime-dir={dir}/open"], 1, "others may write to it"),
    "long name": (["--runtime-dir={dir}/" + "x" * 90], 1, "choose a shorter one with --runtime-dir"),
    "no data path": (["--datapath={dir}/nope"], 1, "{dir}/nope is missing or not executable"),
    "not a data path": (
        ["--datapath={dir}/fails"],
        1,
        "ended with status 7 instead of getting ready: out of luck",
    ),
    "unknown option": (["--colour=red"], 2, "unrecognized arguments: --colour=red"),
    "unknown authority": (["--authority=king"], 2, "invalid choice: 'king'"),
}


@pytest.mark.parametrize("case", BAD_STARTS)
def test_a_start_that_cannot_work_says_why(directory: Path, bus: Bus, case: str) -> None:
    """In one line, with a status, and without a traceback."""
    (directory / "file").write_text("")
    (directory / "open").mkdir()
    (directory / "open").chmod(0o777)
    (directory / "fails").write_text("#!/bin/sh\necho out of luck >&2\nexit 7\n")
    (directory / "fails").chmod(0o700)
    extra, status, text = BAD_STARTS[case]
    words = [
        f"--bus={bus.address}",
        "--authority=owner",
        f"--state-dir={directory}/s",
        f"--runtime-dir={directory}/r",
    ]
    done = run_daemon([*words, *(one.format(dir=directory) for one in extra)])
    assert done.returncode == status
    assert text.format(dir=directory) in done.stderr
    assert "Traceback" not in done.stderr
    assert sum("CRITICAL" in line for line in done.stderr.splitlines()) == (1 if status == 1 else 0)
    assert not (directory / "r" / "datapath.sock").exists()


def test_the_program_says_its_version() -> None:
    """Without a bus."""
    done = subprocess.run(
        [sys.executable, "-m", "blksnap_service", "--version"],
        capture_output=True,
        text=True,
        check=True,
        cwd=REPOSITORY,
    )
    assert done.stdout.startswith("blksnapd ")
