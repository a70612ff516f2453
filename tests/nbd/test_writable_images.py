# SPDX-License-Identifier: GPL-2.0-or-later
"""Images that clients write into: their bytes go to the difference storage, and the maps say so."""

from __future__ import annotations

import errno
import random

import pytest

from tests.nbd import nbdwire as nbd
from tests.nbd.datapath import BLOCK, MIB, Datapath, Origin, qemu_io
from tests.nbd.nbdwire import Client, NbdError, content_of
from tests.nbd.tools import dirty_blocks, nbdinfo

CONTENT = random.Random(1).randbytes(4 * MIB)


@pytest.fixture
def origin(datapath: Datapath) -> Origin:
    """8 MiB, the first half random, the second zero."""
    return datapath.add(8 * MIB, content=CONTENT)


def test_writes_are_seen_in_the_image_only(datapath: Datapath, origin: Origin) -> None:
    """What qemu-io writes into an image is read back there; the origin and other images keep their bytes."""
    before = origin.content()
    writable, untouched = datapath.create(), datapath.create()
    writable.take(origin, writable=True)
    untouched.take(origin)
    commands = ("write -P 7 100 5000", "write -P 8 6M 1M", "write -P 9 200000 300000")
    qemu_io(
        origin.uri(writable.name), *commands, *(word.replace("write", "read") for word in commands), "flush"
    )
    expected = bytearray(before)
    for value, offset, length in ((7, 100, 5000), (8, 6 * MIB, MIB), (9, 200_000, 300_000)):
        expected[offset : offset + length] = bytes([value]) * length
    assert content_of(origin.socket, writable.name) == expected
    assert content_of(origin.socket, untouched.name) == before
    assert origin.content() == before


def test_an_image_keeps_its_writes_when_the_origin_is_written_too(datapath: Datapath, origin: Origin) -> None:
    """Writes to both at the same places, before and after each other, end up where they were sent."""
    snapshot = datapath.create(chunk_size=BLOCK)
    snapshot.take(origin, writable=True)
    image, now = bytearray(origin.content()), bytearray(origin.content())
    chance = random.Random(2)
    with Client(origin.socket) as one, Client(origin.socket, snapshot.name) as other:
        for _ in range(300):
            client, model = chance.choice([(one, now), (other, image)])
            length = chance.choice([1, 512, 5000, 70_000])
            offset = chance.randrange(0, 8 * MIB - length)
            data = chance.randbytes(length)
            client.write(offset, data)
            model[offset : offset + length] = data
        assert other.read_all() == image
    assert origin.content() == now


def test_a_write_into_an_image_marks_its_own_map_and_the_live_one(datapath: Datapath, origin: Origin) -> None:
    """A block that was written into an image differs from every copy of that instant: both maps must name it."""
    first, second = datapath.create(), datapath.create()
    first.take(origin)
    second.take(origin, writable=True)
    qemu_io(origin.uri(second.name), f"write -P 1 {3 * BLOCK} 1", f"write -P 1 {80 * BLOCK} {BLOCK}")
    assert dirty_blocks(origin.uri(second.name), 1) == {3, 80}
    assert dirty_blocks(origin.uri(), 2) == {3, 80}
    assert dirty_blocks(origin.uri(first.name), 0) == set()


def test_a_write_into_an_older_image_marks_every_later_map(datapath: Datapath, origin: Origin) -> None:
    """Who copied the written image and goes on with a later one must copy the block again."""
    snapshots = [datapath.create() for _ in range(4)]
    for snapshot in snapshots:
        snapshot.take(origin, writable=True)
    qemu_io(origin.uri(snapshots[1].name), f"write -P 1 {5 * BLOCK} 1")
    assert dirty_blocks(origin.uri(snapshots[0].name), 0) == set()
    assert dirty_blocks(origin.uri(snapshots[1].name), 1) == {5}
    for later in snapshots[2:]:
        assert dirty_blocks(origin.uri(later.name), 2) == {5}
    assert dirty_blocks(origin.uri(), 4) == {5}


def test_a_read_only_image_refuses_to_be_written(datapath: Datapath, origin: Origin) -> None:
    """Every change is refused, by flag for those who look and by error for those who do not."""
    snapshot = datapath.create()
    snapshot.take(origin)
    assert nbdinfo(origin.uri(snapshot.name))["is_read_only"]
    before = content_of(origin.socket, snapshot.name)
    with Client(origin.socket, snapshot.name) as client:
        for code, payload in ((nbd.WRITE, b"y" * 512), (nbd.TRIM, b""), (nbd.WRITE_ZEROES, b"")):
            with pytest.raises(NbdError) as caught:
                client.answer(client.send(code, 0, 512, payload))
            assert caught.value.errno == errno.EPERM
    assert content_of(origin.socket, snapshot.name) == before
    assert not any(origin.maps().live)


def test_a_writable_image_offers_only_what_it_can_do(datapath: Datapath, origin: Origin) -> None:
    """It is writable and flushes; trims and zeroes are not offered and refused."""
    snapshot = datapath.create()
    snapshot.take(origin, writable=True)
    export = nbdinfo(origin.uri(snapshot.name))
    assert not export["is_read_only"]
    assert export["can_flush"]
    assert not any(export[ability] for ability in ("can_trim", "can_zero", "can_fua"))
    with Client(origin.socket, snapshot.name) as client:
        for code in (nbd.TRIM, nbd.WRITE_ZEROES):
            with pytest.raises(NbdError) as caught:
                client.command(code, 0, 512)
            assert caught.value.errno == errno.EINVAL
        client.command(nbd.FLUSH, 0, 0)


def test_a_full_storage_fails_the_image_that_is_written(datapath: Datapath, origin: Origin) -> None:
    """Writing into an image takes room; without any the image fails and the origin does not notice."""
    snapshot = datapath.create(limit=MIB, chunk_size=BLOCK)
    snapshot.take(origin, writable=True)
    with Client(origin.socket, snapshot.name) as client:
        client.write(0, b"x" * MIB)
        with pytest.raises(NbdError) as caught:
            client.write(2 * MIB, b"x" * 512)
        assert caught.value.errno == errno.EIO
        with pytest.raises(NbdError):
            client.read(0, 512)
    assert snapshot.info().state == "failed"
    qemu_io(origin.uri(), "write -P 5 0 4M", "read -P 5 0 4M")
