# SPDX-License-Identifier: GPL-2.0-or-later
"""The life of the process and of its origins: start, second start, stop, kill, add, remove, continue."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.nbd.control import HungUp, Refused
from tests.nbd.datapath import BLOCK, MIB, Datapath, Origin, find_binary, new_id, qemu_io, run
from tests.nbd.nbdwire import Client, Gone, NbdError, content_of

Start = Callable[[], Datapath]


def test_a_second_process_on_one_directory_ends_with_status_3(datapath: Datapath, origin: Origin) -> None:
    """One line says why, and the first goes on undisturbed."""
    with Client(origin.socket) as client:
        second = subprocess.run(
            [find_binary(), "--runtime-dir", datapath.directory], capture_output=True, timeout=20, check=False
        )
        assert second.returncode == 3
        assert second.stdout == b""
        assert second.stderr.count(b"\n") == 1
        assert b"another data path" in second.stderr
        client.write(0, b"x" * 512)
        assert client.read(0, 512) == b"x" * 512
    assert (datapath.directory / "datapath.pid").read_text() == f"{datapath.process.pid}\n"


def test_its_sockets_are_its_owners_alone(datapath: Datapath, origin: Origin) -> None:
    """Nobody else may connect, whatever the umask of who started it."""
    for path in (datapath.control_socket, origin.socket, datapath.directory / "datapath.pid"):
        assert path.stat().st_mode & 0o077 == 0, path


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_order(start: Start, number: signal.Signals) -> None:
    """With clients and a snapshot: all are disconnected, the bytes are in the file, the status is 0, a new one starts."""
    datapath = start()
    origin = datapath.add()
    snapshot = datapath.create()
    snapshot.take(origin)
    with Client(origin.socket) as client, Client(origin.socket, snapshot.name) as reader:
        client.write(MIB, b"kept" * 1000)
        assert datapath.end(number) == 0
        for one in (client, reader):
            with pytest.raises((Gone, OSError)):
                one.read(0, 512)
    assert not origin.socket.exists()
    assert not datapath.control_socket.exists()
    assert origin.content()[MIB : MIB + 4000] == b"kept" * 1000
    again = start()
    assert again.control.call("list") == {"origins": [], "snapshots": []}
    assert content_of(again.add(path=origin.path).socket) == origin.content()


def test_stop_is_refused_while_it_serves(start: Start) -> None:
    """Busy without force; with it the process ends after its answer."""
    datapath = start()
    origin = datapath.add()
    with pytest.raises(Refused) as caught:
        datapath.control.call("stop")
    assert caught.value.code == "busy"
    qemu_io(origin.uri(), "write -P 1 0 512")
    assert datapath.control.call("stop", force=True) == {}
    assert datapath.process.wait(10) == 0


def test_a_killed_one_leaves_nothing_in_the_way(start: Start) -> None:
    """kill -9: sockets and pid file of the dead do not keep a new one from starting."""
    first = start()
    origin = first.add()
    qemu_io(origin.uri(), "write -P 1 0 1M")
    first.end(signal.SIGKILL)
    assert origin.socket.exists()
    second = start()
    again = second.add(path=origin.path, origin=origin.name)
    qemu_io(again.uri(), "read -P 1 0 1M")


def test_io_goes_on_when_every_control_connection_is_gone(datapath: Datapath, origin: Origin) -> None:
    """The service may come and go; clients do not notice."""
    snapshot = datapath.create()
    snapshot.take(origin)
    with Client(origin.socket) as client:
        datapath.control.close()
        client.write(0, b"x" * 512)
        qemu_io(origin.uri(snapshot.name), "read -P 0 0 512", options=["-r"])
        with datapath.connect() as control:
            listed = control.call("list")
    assert [reading["origin"] for reading in listed["origins"]] == [origin.name]
    assert [reading["snapshot"] for reading in listed["snapshots"]] == [snapshot.name]


@pytest.mark.parametrize("kind", ["same name", "same file", "hard link"])
def test_nothing_is_tracked_twice(datapath: Datapath, origin: Origin, kind: str) -> None:
    """Two origins over one file would each miss the other's writes."""
    path = origin.path
    options: dict[str, Any] = {}
    if kind == "hard link":
        path = origin.path.with_name("link")
        os.link(origin.path, path)
    if kind == "same name":
        path, options = datapath.image_file(MIB), {"origin": origin.name}
    with pytest.raises(Refused) as caught:
        datapath.add(path=path, **options)
    assert caught.value.code == "exists"
    qemu_io(origin.uri(), "write -P 1 0 512", "read -P 1 0 512")


@pytest.mark.parametrize(
    "options",
    [
        {"origin": "a/b"},
        {"origin": ".."},
        {"origin": "x" * 65},
        {"block_size": 2048},
        {"block_size": 5000},
        {"block_size": 128 * MIB},
        {"generation": "not-a-uuid"},
        {"generation": "0B1F5C3E-9A0D-4C52-8F4E-8D8D2A6C1E55"},
        {"active": 5},
        {"base": 1, "active": 2, "saved": bytes(256)},
        {"active": 0, "saved": bytes(256)},
        {"active": 256, "saved": bytes(256)},
        {"active": 5, "saved": bytes(255)},
        {"active": 5, "saved": bytes(257)},
        {"active": 5, "saved": bytes(255) + b"\6"},
    ],
    ids=lambda options: ",".join(str(item)[:24] for pair in options.items() for item in pair),
)
def test_an_origin_that_cannot_be_is_refused(datapath: Datapath, options: dict[str, Any]) -> None:
    """Names, block sizes, generations, numbers and saved maps that are none: ``invalid``, with nothing left behind."""
    path = datapath.image_file(16 * MIB)
    before = datapath.descriptors()
    with pytest.raises(Refused) as caught:
        datapath.add(path=path, **options)
    assert caught.value.code == "invalid"
    assert datapath.descriptors() == before
    assert list((datapath.directory / "nbd").iterdir()) == []
    datapath.add(path=path)


def test_an_empty_file_is_refused(datapath: Datapath) -> None:
    """There is nothing in it to track."""
    with pytest.raises(Refused) as caught:
        datapath.add(0)
    assert caught.value.code == "invalid"


@pytest.mark.parametrize("kind", ["pipe", "directory", "device"])
def test_what_is_no_image_is_refused(datapath: Datapath, kind: str, directory: Path) -> None:
    """Neither a pipe nor a directory nor a character device."""
    os.mkfifo(directory / "pipe")
    path, flags = {
        "pipe": (directory / "pipe", os.O_RDWR),
        "directory": (directory, os.O_RDONLY),
        "device": (Path("/dev/null"), os.O_RDWR),
    }[kind]
    with pytest.raises(Refused) as caught:
        datapath.add(path=path, flags=flags)
    assert caught.value.code == "invalid"


def test_an_origin_in_use_is_removed_by_force_only(datapath: Datapath, origin: Origin) -> None:
    """A client, a snapshot: busy. With force the client is disconnected and the image fails, and says why."""
    with Client(origin.socket) as client:
        with pytest.raises(Refused) as caught:
            origin.remove()
        assert caught.value.code == "busy"
        client.write(0, b"x" * 512)
    origin.wait_for_no_clients()
    snapshot = datapath.create()
    snapshot.take(origin)
    with pytest.raises(Refused) as caught:
        origin.remove()
    assert caught.value.code == "busy"
    with Client(origin.socket) as client, Client(origin.socket, snapshot.name) as reader:
        client.write(BLOCK, b"x" * 512)
        final = origin.remove(force=True)
        for one in (client, reader):
            with pytest.raises((Gone, NbdError, OSError)):
                one.read(0, 512)
    assert final.changed(0, live=True) == {0, 1}
    assert final.changed(1, live=True) == {1}
    assert snapshot.info().state == "failed"
    assert "detached" in snapshot.info().error
    assert not origin.socket.exists()
    snapshot.destroy()
    again = datapath.add(path=origin.path, origin=origin.name)
    assert content_of(again.socket) == origin.content()


def test_destroying_a_snapshot_disconnects_its_readers_only(datapath: Datapath, origin: Origin) -> None:
    """The image's clients are gone, the origin's and the other image's stay; its name is no export any more."""
    first, second = datapath.create(), datapath.create()
    first.take(origin)
    second.take(origin)
    with (
        Client(origin.socket) as client,
        Client(origin.socket, first.name) as gone,
        Client(origin.socket, second.name) as stays,
    ):
        first.destroy()
        with pytest.raises((Gone, OSError)):
            gone.read(0, 512)
        client.write(0, b"x" * 512)
        assert stays.read(0, 512) == bytes(512)
    run("nbdinfo", origin.uri(first.name), status=1)
    with pytest.raises(Refused) as caught:
        first.info()
    assert caught.value.code == "not-found"


def test_a_snapshot_is_taken_once(datapath: Datapath, origin: Origin) -> None:
    """And over origins that exist, each named once, with names for generations that are uuids."""
    snapshot = datapath.create()
    for devices, code in (
        ([], "invalid"),
        ([(origin.name, new_id()), (origin.name, new_id())], "invalid"),
        ([("nobody", new_id())], "not-found"),
        ([(origin.name, "x")], "invalid"),
    ):
        listed = [{"origin": name, "next_generation": generation} for name, generation in devices]
        with pytest.raises(Refused) as caught:
            datapath.control.call("snapshot.take", snapshot=snapshot.name, devices=listed)
        assert caught.value.code == code
    assert origin.info().changes == 0
    assert snapshot.take(origin).images[0].number == 1
    with pytest.raises(Refused) as caught:
        snapshot.take(origin)
    assert caught.value.code == "invalid-state"
    assert origin.info().changes == 1


def test_sixteen_snapshots_of_an_origin_are_held_and_no_more(datapath: Datapath, origin: Origin) -> None:
    """The seventeenth is refused without a trace; after one has gone there is room again."""
    contents, snapshots = [], []
    for number in range(16):
        qemu_io(origin.uri(), f"write -P {number + 1} {number * 100_000} 150000")
        contents.append(origin.content())
        snapshots.append(datapath.create())
        snapshots[-1].take(origin)
    extra = datapath.create()
    with pytest.raises(Refused) as caught:
        extra.take(origin)
    assert caught.value.code == "limit"
    assert origin.info().changes == 16
    qemu_io(origin.uri(), "write -P 99 0 4M")
    for snapshot, content in zip(snapshots, contents, strict=True):
        assert content_of(origin.socket, snapshot.name) == content
    snapshots[7].destroy()
    assert extra.take(origin).images[0].number == 17


def test_an_origin_without_tracking_is_served_and_not_taken(datapath: Datapath) -> None:
    """For measurements: no marks, so no snapshots."""
    origin = datapath.add(tracking=False)
    qemu_io(origin.uri(), "write -P 1 0 1M", "read -P 1 0 1M")
    assert not any(origin.maps().live)
    with pytest.raises(Refused) as caught:
        datapath.create().take(origin)
    assert caught.value.code == "invalid-state"


def test_a_saved_map_continues_its_generation(start: Start) -> None:
    """Stop, start, add with the final map: the numbers go on, and every change of before is still known."""
    first = start()
    origin = first.add()
    chance = random.Random(1)
    written: list[set[int]] = []
    for _ in range(5):
        chosen = set(chance.sample(range(256), 9))
        qemu_io(origin.uri(), *(f"write -P 1 {block * BLOCK} 1" for block in chosen))
        written.append(chosen)
        first.create().take(origin)
    qemu_io(origin.uri(), f"write -P 1 {77 * BLOCK} 1")
    written.append({77})
    final = origin.remove(force=True)
    first.control.call("stop")
    assert first.process.wait(10) == 0
    reading = final.reading
    assert (reading.active, reading.changes, reading.state) == (6, 5, "tracking")

    second = start()
    again = second.add(
        path=origin.path,
        saved=final.live,
        base=reading.base,
        active=reading.active,
        generation=reading.generation,
    )
    assert again.maps().live == final.live
    for since in range(6):
        # Nobody knows the map of the last take any more; what stands in for it may say more, never less.
        assert again.maps().changed(since) >= set().union(*written[since:5])
    qemu_io(again.uri(), f"write -P 1 {78 * BLOCK} 1")
    snapshot = second.create()
    (image,) = snapshot.take(again).images
    assert (image.number, image.generation, image.reset) == (6, reading.generation, "")
    for since in range(6):
        assert again.maps().changed(since) == set().union({78}, *written[since:])


def test_a_map_is_not_continued_over_bytes_nobody_saw(datapath: Datapath, origin: Origin) -> None:
    """A write past the tracker before the removal: the final reading says that its map must not be used."""
    datapath.create().take(origin)
    with origin.path.open("r+b") as file:
        file.write(b"sneaky")
    final = origin.remove(force=True)
    assert final.reading.state == "broken"
    assert "behind" in final.reading.reason


def test_more_origins_than_an_answer_can_carry_are_refused(datapath: Datapath, origin: Origin) -> None:
    """The answer has three descriptors for each, and a message at most 253: 85 are too many, before anything happens."""
    snapshot = datapath.create()
    names = [origin.name, *(f"more-{number}" for number in range(84))]
    devices = [{"origin": name, "next_generation": new_id()} for name in names]
    with pytest.raises(Refused) as caught:
        datapath.control.call("snapshot.take", snapshot=snapshot.name, devices=devices)
    assert caught.value.code == "limit"
    assert origin.info().changes == 0
    assert snapshot.take(origin).images[0].number == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="not root: 84 rings are more than RLIMIT_MEMLOCK allows a user")
def test_as_many_origins_as_an_answer_can_carry_are_taken_at_once(datapath: Datapath) -> None:
    """84 of them, at one instant."""
    origins = [datapath.add(BLOCK) for _ in range(84)]
    taken = datapath.create().take(*origins)
    assert [image.origin for image in taken.images] == [origin.name for origin in origins]
    assert {image.number for image in taken.images} == {1}


def test_a_marked_range_is_in_both_maps(datapath: Datapath, origin: Origin) -> None:
    """Validated whole before anything is marked; widened to blocks; in the live map and in that of the last take."""
    snapshot = datapath.create()
    snapshot.take(origin)
    for wrong in ([[0, 0]], [[0, 1], [16 * MIB, 1]], [[0, 1], [1, 16 * MIB]], [[(1 << 64) - 1, 2]]):
        with pytest.raises(Refused) as caught:
            datapath.control.call("origin.mark", origin=origin.name, ranges=wrong)
        assert caught.value.code == "invalid"
    assert not any(origin.maps().live)
    marked = datapath.control.call(
        "origin.mark", origin=origin.name, ranges=[[BLOCK - 1, 2], [5 * BLOCK, 1], [5 * BLOCK, BLOCK]]
    )
    assert marked == {"blocks": 4}
    maps = origin.maps()
    assert maps.changed(1, live=True) == maps.changed(0) == {0, 1, 5}
    assert maps.changed(1) == set()
    assert datapath.control.call("origin.mark-all", origin=origin.name) == {"blocks": 256}
    assert len(origin.maps().changed(0)) == 256


def test_a_stranger_cannot_stop_it_by_hanging_up(datapath: Datapath) -> None:
    """A connection that ends in the middle of a line is nobody's business but its own."""
    with datapath.connect() as control:
        control.send(b'{"id": 1, "op": "sto')
    with datapath.connect() as control:
        control.socket.shutdown(socket.SHUT_WR)
        with pytest.raises(HungUp):
            control.line()
    assert datapath.control.call("hello", protocol=1)["pid"] == datapath.process.pid
