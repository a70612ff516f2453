# SPDX-License-Identifier: GPL-2.0-or-later
"""Single requests on an origin: what they do to the bytes, the map and the counters, and which are refused."""

from __future__ import annotations

import errno
import os
import random
import struct

import pytest

from tests.nbd import nbdwire as nbd
from tests.nbd.control import opened
from tests.nbd.datapath import BLOCK, MIB, Datapath, Origin, qemu_io
from tests.nbd.load import Work, running
from tests.nbd.nbdwire import Client, NbdError


def test_qemu_io_reads_what_it_wrote(origin: Origin) -> None:
    """Writes of any size and alignment arrive, and only there."""
    expected = bytearray(16 * MIB)
    chance = random.Random(1)
    commands = []
    for number in range(60):
        offset, length = chance.randrange(0, 15 * MIB), chance.choice([1, 511, 512, 4097, 65536, 300_001])
        commands += [f"write -P {number + 1} {offset} {length}", f"read -P {number + 1} {offset} {length}"]
        expected[offset : offset + length] = bytes([number + 1]) * length
    qemu_io(origin.uri(), *commands, "flush")
    assert origin.content() == expected


def test_every_kind_of_change_marks_exactly_its_blocks(origin: Origin) -> None:
    """Writes, zeroes and discards mark the blocks they touch, before or behind an interval's end, and no others."""
    qemu_io(
        origin.uri(),
        f"write -P 1 {BLOCK - 1} 2",
        f"write -f -P 1 {10 * BLOCK} 1",
        f"write -z {20 * BLOCK} {BLOCK}",
        f"write -z -u {30 * BLOCK + 5} 5",
        f"discard {40 * BLOCK} {2 * BLOCK}",
        "read 0 16M",
        "flush",
    )
    maps = origin.maps()
    assert maps.changed(0, live=True) == {0, 1, 10, 20, 30, 40, 41}
    assert maps.changed(0) == set()
    assert set(maps.live) == {0, 1}


def test_the_counters_tell_what_was_done(origin: Origin) -> None:
    """Requests and bytes are counted by kind."""
    qemu_io(origin.uri(), "write -P 1 0 100k", "write -z 1M 64k", "discard 2M 4k", "read 0 1000")
    counters = origin.info().counters
    assert (counters["writes"], counters["written_bytes"]) == (1, 100 << 10)
    assert (counters["zeroes"], counters["zeroed_bytes"]) == (1, 64 << 10)
    assert (counters["discards"], counters["discarded_bytes"]) == (1, 4096)
    assert (counters["reads"], counters["read_bytes"]) == (1, 1000)


def room_of(origin: Origin) -> int:
    """Return the bytes a file takes on its file system, nothing of it being only planned."""
    with opened(origin.path) as fd:
        os.fsync(fd)
        return os.fstat(fd).st_blocks * 512


def test_zeroes_without_holes_keep_their_room(datapath: Datapath) -> None:
    """WRITE_ZEROES punches a hole, and with NO_HOLE leaves room behind."""
    origin = datapath.add(content=b"x" * 8 * MIB, size=8 * MIB)
    before = room_of(origin)
    qemu_io(origin.uri(), "write -z 0 2M")
    assert room_of(origin) >= before
    qemu_io(origin.uri(), "write -z -u 4M 2M")
    assert room_of(origin) == before - 2 * MIB
    assert origin.content() == bytes(2 * MIB) + b"x" * 2 * MIB + bytes(2 * MIB) + b"x" * 2 * MIB


def test_a_discard_makes_a_hole_that_reads_as_zero(datapath: Datapath) -> None:
    """TRIM gives room back and the bytes are gone."""
    origin = datapath.add(content=b"x" * 4 * MIB, size=4 * MIB)
    before = room_of(origin)
    qemu_io(origin.uri(), "discard 1M 1M", "read -P 0 1M 1M", "read -P 120 0 1M")
    assert room_of(origin) == before - MIB


@pytest.mark.parametrize("code", [nbd.WRITE, nbd.WRITE_ZEROES, nbd.TRIM])
def test_changes_with_fua(origin: Origin, code: int) -> None:
    """Every change may carry FUA."""
    with Client(origin.socket) as client:
        client.write(0, b"x" * 10_000)
        if code == nbd.WRITE:
            client.write(100, b"y" * 300_000, flags=nbd.FUA)
        else:
            client.command(code, 100, 300_000, flags=nbd.FUA)
        expected = b"x" * 100 + (b"y" if code == nbd.WRITE else b"\0") * 300_000
        assert client.read(0, 300_100) == expected


@pytest.mark.parametrize("count", [64, 65, 200, 1000])
def test_requests_far_more_than_there_are_places_for_are_each_answered_once(
    origin: Origin, count: int
) -> None:
    """A burst of reads is answered by its data, and the requests after it are not taken for others."""
    content = random.Random(2).randbytes(1000 * 512)
    # In place: a file that is cut for a moment is a broken origin.
    with origin.path.open("r+b") as file:
        file.write(content)
    with Client(origin.socket) as client:
        burst = b"".join(nbd.request(nbd.READ, n * 512, 512, cookie=n) for n in range(count))
        client.socket.sendall(burst)
        for _ in range(count):
            magic, error, cookie = struct.unpack(">IIQ", nbd.receive(client.socket, 16))
            assert (magic, error) == (nbd.SIMPLE_REPLY_MAGIC, 0)
            assert nbd.receive(client.socket, 512) == content[cookie * 512 : cookie * 512 + 512]
        for place in (7, 3, 900):
            assert client.read(place * 512, 512) == content[place * 512 : place * 512 + 512]


def test_a_burst_of_writes_lands_where_it_was_sent(origin: Origin) -> None:
    """Hundreds of writes of odd sizes in one stream, FUA among them, none misplaced."""
    chance = random.Random(3)
    expected = bytearray(16 * MIB)
    stream = bytearray()
    cookies = set()
    for cookie in range(600):
        length = chance.choice([1, 100, 512, 5000, 70_000, 200_000])
        offset = chance.randrange(cookie * 20_000, 16 * MIB - 200_000)
        data = chance.randbytes(length)
        # Which of two writes that overlap comes last is nobody's promise: none does.
        if any(expected[offset : offset + length]):
            continue
        expected[offset : offset + length] = data
        flags = chance.choice([0, 0, nbd.FUA])
        stream += nbd.request(nbd.WRITE, offset, length, cookie=cookie, flags=flags) + data
        cookies.add(cookie)
    with Client(origin.socket) as client:
        client.socket.sendall(stream)
        for _ in range(len(cookies)):
            magic, error, cookie = struct.unpack(">IIQ", nbd.receive(client.socket, 16))
            assert (magic, error) == (nbd.SIMPLE_REPLY_MAGIC, 0)
            cookies.remove(cookie)
    assert not cookies
    assert origin.content() == expected


def sender(client: Client, stream: bytes) -> Work:
    """Return a work that sends a stream, so that its answers can be read meanwhile."""
    return lambda _stopping: client.socket.sendall(stream)


def test_a_burst_of_everything(datapath: Datapath) -> None:
    """Reads, writes, zeroes and flushes in one stream without structured replies, while snapshots are taken."""
    chance = random.Random(4)
    still = chance.randbytes(8 * MIB)
    origin = datapath.add(16 * MIB, content=still)
    expected = bytearray(origin.content())
    for _ in range(10):
        stream = bytearray()
        waiting: dict[int, tuple[int, int]] = {}
        # Changes of one burst do not overlap: each has a place of its own in the second half.
        for cookie, place in enumerate(chance.sample(range(256), 256)):
            at, length = 8 * MIB + place * 32_768, chance.choice([1, 512, 4096, 32_768])
            match chance.randrange(4):
                case 0:
                    data = chance.randbytes(length)
                    stream += nbd.request(nbd.WRITE, at, length, cookie=cookie) + data
                    expected[at : at + length] = data
                    waiting[cookie] = (0, 0)
                case 1:
                    stream += nbd.request(nbd.WRITE_ZEROES, at, length, cookie=cookie)
                    expected[at : at + length] = bytes(length)
                    waiting[cookie] = (0, 0)
                case 2:
                    stream += nbd.request(nbd.FLUSH, 0, 0, cookie=cookie)
                    waiting[cookie] = (0, 0)
                case _:
                    at = chance.randrange(0, 7 * MIB)
                    length = chance.choice([1, 5000, 200_000, 900_000])
                    stream += nbd.request(nbd.READ, at, length, cookie=cookie)
                    waiting[cookie] = (at, length)
        with Client(origin.socket) as client, running(sender(client, bytes(stream))):
            snapshot = datapath.create()
            snapshot.take(origin)
            while waiting:
                magic, error, cookie = struct.unpack(">IIQ", nbd.receive(client.socket, 16))
                assert (magic, error) == (nbd.SIMPLE_REPLY_MAGIC, 0)
                at, length = waiting.pop(cookie)
                assert nbd.receive(client.socket, length) == still[at : at + length]
        snapshot.destroy()
        assert origin.content() == expected


END = 16 * MIB
REFUSALS = {
    "read past the end": (nbd.READ, END - 1, 2, 0, errno.EINVAL),
    "read far past the end": (nbd.READ, 1 << 63, 512, 0, errno.EINVAL),
    "read over the end of numbers": (nbd.READ, (1 << 64) - 1, 512, 0, errno.EINVAL),
    "read of more than ever": (nbd.READ, 0, (1 << 32) - 1, 0, errno.EINVAL),
    "write past the end": (nbd.WRITE, END - 511, 512, 0, errno.ENOSPC),
    "write over the end of numbers": (nbd.WRITE, (1 << 64) - 512, 512, 0, errno.ENOSPC),
    "trim past the end": (nbd.TRIM, END, 1, 0, errno.ENOSPC),
    "zeroes past the end": (nbd.WRITE_ZEROES, 1, END, 0, errno.ENOSPC),
    "a command nobody knows": (99, 0, 512, 0, errno.EINVAL),
    "cache, which is not offered": (nbd.CACHE, 0, 512, 0, errno.EINVAL),
    "a flag nobody knows": (nbd.READ, 0, 512, 1 << 15, errno.EINVAL),
    "no-hole on a write": (nbd.WRITE, 0, 512, nbd.NO_HOLE, errno.EINVAL),
    "block status without contexts": (nbd.BLOCK_STATUS, 0, 512, 0, errno.EINVAL),
    "flush of a range": (nbd.FLUSH, 0, 512, 0, errno.EINVAL),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_wrong_request_is_an_error_and_the_connection_goes_on(origin: Origin, name: str) -> None:
    """A request that cannot be served changes nothing, marks nothing and costs nobody the connection."""
    code, offset, length, flags, expected = REFUSALS[name]
    with Client(origin.socket) as client:
        payload = b"x" * length if code == nbd.WRITE else b""
        with pytest.raises(NbdError) as caught:
            client.answer(client.send(code, offset, length, payload, flags=flags), 0)
        assert caught.value.errno == expected
        assert client.read(END - 512, 512) == bytes(512)
    assert not any(origin.content())
    assert not any(origin.maps().live)


def test_a_write_far_over_the_limit_ends_the_connection(origin: Origin) -> None:
    """4 GiB are not read only to be thrown away."""
    with Client(origin.socket) as client:
        client.send(nbd.WRITE, 0, (1 << 32) - 512)
        with pytest.raises(nbd.Gone):
            client.answer(1)
    assert not any(origin.content())


def test_a_write_a_little_over_the_limit_is_refused_and_skipped(datapath: Datapath) -> None:
    """Over 32 MiB: EOVERFLOW, and the next request is found behind the payload."""
    origin = datapath.add(64 * MIB)
    with Client(origin.socket) as client:
        with pytest.raises(NbdError) as caught:
            client.write(0, bytes(nbd.MAX_PAYLOAD + 1))
        assert caught.value.errno == errno.EOVERFLOW
        client.write(0, b"x" * nbd.MAX_PAYLOAD)
        assert client.read(0, nbd.MAX_PAYLOAD) == b"x" * nbd.MAX_PAYLOAD


def test_a_read_only_origin_refuses_every_change(datapath: Datapath) -> None:
    """EPERM for all of them, with the bytes as they were."""
    origin = datapath.add(content=b"x" * MIB, size=MIB, read_only=True)
    with Client(origin.socket) as client:
        assert client.flags & nbd.READ_ONLY
        for code, payload in ((nbd.WRITE, b"y" * 512), (nbd.TRIM, b""), (nbd.WRITE_ZEROES, b"")):
            with pytest.raises(NbdError) as caught:
                client.answer(client.send(code, 0, 512, payload))
            assert caught.value.errno == errno.EPERM
        client.command(nbd.FLUSH, 0, 0)
    assert origin.content() == b"x" * MIB


def test_several_clients_see_each_others_writes(origin: Origin) -> None:
    """CAN_MULTI_CONN: what one connection was told is written, another reads."""
    with Client(origin.socket) as one, Client(origin.socket) as other:
        for number in range(1, 100):
            one.write(number * 700, bytes([number]) * 700)
            assert other.read(number * 700, 700) == bytes([number]) * 700


def test_what_was_flushed_is_in_the_file(origin: Origin) -> None:
    """A client that is gone without a goodbye has lost nothing it was told is written."""
    client = Client(origin.socket)
    client.write(MIB, b"kept" * 1000)
    client.command(nbd.FLUSH, 0, 0)
    client.socket.close()
    assert origin.content()[MIB : MIB + 4000] == b"kept" * 1000
    origin.wait_for_no_clients()
