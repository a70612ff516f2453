# SPDX-License-Identifier: GPL-2.0-or-later
"""Image files that others touch: cut, grown, written, replaced. Never silently, never with invented bytes."""

from __future__ import annotations

import errno
import os
import random
import subprocess
from pathlib import Path

import pytest

from tests.nbd import nbdwire as nbd
from tests.nbd.control import Refused
from tests.nbd.datapath import BLOCK, MIB, Datapath, Origin, qemu_io, run
from tests.nbd.nbdwire import Client, NbdError, content_of

CONTENT = random.Random(1).randbytes(8 * MIB)


@pytest.fixture
def origin(datapath: Datapath) -> Origin:
    """8 MiB of random bytes."""
    return datapath.add(8 * MIB, content=CONTENT)


def write_past_the_tracker(path: Path, offset: int, data: bytes) -> None:
    """Write into the file as any program can that ignores locks."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def test_a_file_that_was_cut_breaks_its_origin(datapath: Datapath, origin: Origin, directory: Path) -> None:
    """An event, EIO for every read and write, no take, and no copy that looks like a success. Nothing hangs."""
    snapshot = datapath.create()
    snapshot.take(origin)
    with (
        datapath.events() as events,
        Client(origin.socket) as client,
        Client(origin.socket, snapshot.name) as image,
    ):
        os.truncate(origin.path, MIB)
        event = events.wait_for("origin.broken")
        assert event["origin"] == origin.name
        assert "smaller" in event["reason"]
        with pytest.raises(NbdError) as caught:
            client.read(4 * MIB, 512)
        assert caught.value.errno == errno.EIO
        with pytest.raises(NbdError) as caught:
            client.write(0, b"x" * 512)
        assert caught.value.errno == errno.EIO
        with pytest.raises(NbdError) as caught:
            image.read(4 * MIB, 512)
        assert caught.value.errno == errno.EIO
    reading = origin.info()
    assert (reading.state, reading.reason) == ("broken", event["reason"])
    for export in ("", snapshot.name):
        run("nbdcopy", origin.uri(export), directory / "out", status=1)
        run("nbdinfo", "--map", origin.uri(export), status=1)
    with pytest.raises(Refused) as refused:
        datapath.create().take(origin)
    assert refused.value.code == "invalid-state"
    origin.wait_for_no_clients()
    snapshot.destroy()
    origin.remove()


def test_a_cut_is_seen_by_the_first_who_reads_behind_it(
    datapath: Datapath, origin: Origin, directory: Path
) -> None:
    """Nobody has to wait for the second in which it would be noticed."""
    os.truncate(origin.path, 0)
    run("nbdcopy", origin.uri(), directory / "out", status=1)
    assert origin.info().state == "broken"


@pytest.mark.parametrize("code", [nbd.WRITE, nbd.WRITE_ZEROES], ids=["write", "zeroes"])
def test_a_write_behind_a_cut_does_not_heal_it(datapath: Datapath, origin: Origin, code: int) -> None:
    """A write at the old end would make the file as large as it was, with zeros for what is gone."""
    with Client(origin.socket) as client:
        os.truncate(origin.path, 0)
        with pytest.raises(NbdError) as caught:
            client.answer(client.send(code, 8 * MIB - 512, 512, b"x" * 512 if code == nbd.WRITE else b""))
        assert caught.value.errno == errno.EIO
        with pytest.raises(NbdError):
            client.read(0, 512)
    assert origin.info().state == "broken"
    assert origin.path.stat().st_size == 0


def test_a_file_that_has_grown_begins_a_new_generation(datapath: Datapath, origin: Origin) -> None:
    """Until the next take it is served at its old size; the take says why the generation is another one."""
    before = origin.info()
    datapath.create().take(origin)
    with origin.path.open("ab") as file:
        file.write(b"more" * 1000)
    with Client(origin.socket) as client:
        assert client.size == 8 * MIB
    snapshot = datapath.create()
    (image,) = snapshot.take(origin).images
    assert "size" in image.reset
    assert image.generation != before.generation
    assert (image.number, image.base, image.oldest, image.size) == (1, 0, 0, 8 * MIB + 4000)
    assert not any(snapshot.taken_maps[origin.name])
    assert content_of(origin.socket, snapshot.name) == CONTENT + b"more" * 1000
    with Client(origin.socket) as client:
        assert client.size == 8 * MIB + 4000
        client.write(8 * MIB + 3000, b"x" * 1000)
    assert origin.maps().changed(1, live=True) == {8 * MIB // BLOCK}


def test_images_from_before_the_growth_stay_what_they_were(datapath: Datapath, origin: Origin) -> None:
    """A held image keeps its size, its bytes and its map when the origin's generation changes."""
    old = datapath.create()
    old.take(origin)
    with origin.path.open("ab") as file:
        file.write(b"more" * 50_000)
    new = datapath.create()
    new.take(origin)
    qemu_io(origin.uri(), "write -P 1 0 8M", f"write -P 2 {8 * MIB} 100000")
    assert content_of(origin.socket, old.name) == CONTENT
    assert content_of(origin.socket, new.name) == CONTENT + b"more" * 50_000


def test_a_write_past_the_tracker_begins_a_new_generation(datapath: Datapath, origin: Origin) -> None:
    """The block is not in the map; so the map ends, with a reason, rather than miss it."""
    first = datapath.create().take(origin).images[0]
    write_past_the_tracker(origin.path, 3 * MIB, b"sneaky")
    snapshot = datapath.create()
    (image,) = snapshot.take(origin).images
    assert "behind" in image.reset
    assert image.generation != first.generation
    assert image.number == 1
    assert origin.info().generation == image.generation
    assert content_of(origin.socket, snapshot.name)[3 * MIB : 3 * MIB + 6] == b"sneaky"
    assert datapath.create().take(origin).images[0].reset == ""


def test_a_client_of_the_old_generation_is_told_everything_changed(
    datapath: Datapath, origin: Origin
) -> None:
    """Its number means nothing any more: the answer is "all of it", never "nothing"."""
    datapath.create().take(origin)
    # By hand: it is the connection from before the reset that matters.
    sock = nbd.connect(origin.socket)
    with sock:
        nbd.receive(sock, 18)
        sock.sendall(b"\0\0\0\3" + nbd.option(nbd.STRUCTURED_REPLY))
        nbd.receive(sock, 20)
        sock.sendall(nbd.option(nbd.SET_META_CONTEXT, nbd.meta_body("", "blksnap:since:1")))
        nbd.receive(sock, 20 + 4 + len("blksnap:since:1") + 20)
        sock.sendall(nbd.option(nbd.EXPORT_NAME))
        nbd.receive(sock, 10)

        def dirty() -> list[int]:
            sock.sendall(nbd.request(nbd.BLOCK_STATUS, 0, 8 * MIB))
            head = nbd.receive(sock, 20)
            body = nbd.receive(sock, int.from_bytes(head[16:20], "big"))
            return [int.from_bytes(body[at : at + 4], "big") for at in range(4, len(body), 4)]

        assert dirty() == [8 * MIB, 0]
        write_past_the_tracker(origin.path, 0, b"sneaky")
        assert datapath.create().take(origin).images[0].reset
        assert dirty() == [8 * MIB, 1]


def test_suspicion_outlives_a_take_that_failed(datapath: Datapath, origin: Origin) -> None:
    """A take over two origins fails because one is broken; the other's bypassed write is still known at its next."""
    other = datapath.add()
    write_past_the_tracker(origin.path, 5 * MIB, b"sneaky")
    os.truncate(other.path, 4096)
    with pytest.raises(Refused) as caught:
        datapath.create().take(origin, other)
    assert caught.value.code == "invalid-state"
    assert origin.info().changes == 0
    assert "behind" in datapath.create().take(origin).images[0].reset


def test_a_reset_ends_the_suspicion(datapath: Datapath, origin: Origin) -> None:
    """After a new generation was asked for, the take finds nothing to complain about."""
    write_past_the_tracker(origin.path, 5 * MIB, b"sneaky")
    generation = "00000000-0000-4000-8000-000000000001"
    datapath.control.call("origin.reset", origin=origin.name, generation=generation, reason="test")
    image = datapath.create().take(origin).images[0]
    assert (image.reset, image.generation, image.number) == ("", generation, 1)


def test_our_own_writes_raise_no_suspicion(datapath: Datapath, origin: Origin) -> None:
    """Writes, zeroes, discards and flushes through the tracker change the file's time, too; they are known."""
    for command in (
        "write -P 1 0 1M",
        "write -f -P 2 1M 64k",
        "write -z 2M 64k",
        "write -z -u 3M 64k",
        "flush",
    ):
        qemu_io(origin.uri(), command)
        snapshot = datapath.create()
        assert snapshot.take(origin).images[0].reset == ""
        snapshot.destroy()
        qemu_io(origin.uri(), "discard 4M 1M")
        snapshot = datapath.create()
        assert snapshot.take(origin).images[0].reset == ""
        qemu_io(origin.uri(), "read 0 8M")
        snapshot.destroy()


def test_an_unlinked_file_is_served_to_its_end(datapath: Datapath, origin: Origin) -> None:
    """The name is gone, the bytes are not."""
    origin.path.unlink()
    snapshot = datapath.create()
    assert snapshot.take(origin).images[0].reset == ""
    qemu_io(origin.uri(), "write -P 1 0 1M", "read -P 1 0 1M")
    assert content_of(origin.socket, snapshot.name) == CONTENT


def test_a_tracked_file_is_locked_for_those_who_ask(datapath: Datapath, origin: Origin) -> None:
    """qemu-io refuses to write a file that is tracked: it would bypass the tracker."""
    answer = run("qemu-io", "-f", "raw", "-c", "write 0 512", origin.path, status=1)
    assert "lock" in answer
    assert origin.content() == CONTENT


def test_a_file_that_another_holds_locked_is_not_tracked(datapath: Datapath) -> None:
    """A running virtual machine's image, for example: busy, with a reason."""
    path = datapath.image_file(MIB)
    holder = subprocess.Popen(
        ["qemu-io", "-f", "raw", path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        # Its answer says that the file is open, and so locked.
        print("write 0 512", file=holder.stdin, flush=True)
        assert "wrote" in holder.stdout.readline()
        with pytest.raises(Refused) as caught:
            datapath.add(path=path)
        holder.communicate("quit\n")
    assert caught.value.code == "busy"
    assert "lock" in caught.value.message
    datapath.add(path=path)
