# SPDX-License-Identifier: GPL-2.0-or-later
"""Bytes that no NBD client sends, and how they are delivered; with what good clients see meanwhile.

``lawful_ranges`` is a second reading of proto.md: it says which bytes of an origin a stream of requests may change.
"""

from __future__ import annotations

import contextlib
import random
import select
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.nbd import nbdwire as nbd
from tests.nbd.datapath import MIB, Datapath, Memory, Origin, run
from tests.nbd.load import Report, Work
from tests.nbd.nbdwire import Client, content_of

EXTREMES = [
    0,
    1,
    27,
    28,
    255,
    4095,
    16_383,
    16_384,
    16_385,
    65_536,
    1 << 20,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
]
FAR_OFFSETS = [16 * MIB - 1, 16 * MIB, (1 << 32), (1 << 63) - 1, 1 << 63, (1 << 64) - 1]
OFFSETS = [0, 511, *FAR_OFFSETS]


@dataclass
class Baseline:
    """What the data path held before it was attacked."""

    descriptors: int
    threads: int
    memory: Memory


@dataclass
class Witness:
    """A good client: how often it was served, and how long it waited at most."""

    rounds: int = 0
    longest_s: float = 0.0

    def served(self, began: float) -> None:
        """Count a round that began at a time of ``time.monotonic``."""
        self.rounds += 1
        self.longest_s = max(self.longest_s, time.monotonic() - began)


def baseline(datapath: Datapath, origin: Origin) -> Baseline:
    """Measure after everything has been used once."""
    for _ in range(3):
        content_of(origin.socket)
        run("nbdinfo", "--map", origin.uri())
    settle(datapath)
    return Baseline(datapath.descriptors(), datapath.threads(), datapath.memory())


def settle(datapath: Datapath) -> None:
    """Wait until the ends of all NBD clients have been seen."""
    end = time.monotonic() + 20
    while True:
        clients = sum(reading["clients"] for reading in datapath.control.call("list")["origins"])
        if not clients:
            return
        assert time.monotonic() < end, f"{clients} clients are still counted"
        time.sleep(0.02)


def check_given_back(datapath: Datapath, before: Baseline, report: Report) -> None:
    """Fail unless all that was taken for bad clients has been given back."""
    settle(datapath)
    now = Baseline(datapath.descriptors(), datapath.threads(), datapath.memory())
    report(
        f"before: {before.memory}, {before.descriptors} descriptors; after: {now.memory}, {now.descriptors}"
    )
    assert now.descriptors == before.descriptors
    # io_uring keeps a few workers for some seconds.
    assert now.threads <= before.threads + 8
    assert now.memory.total < before.memory.total + 4 * MIB


def writer(origin: Origin, seen: Witness) -> Work:
    """Return a work that writes and reads back its own first MiB over one connection."""

    def work(stopping: Callable[[], bool]) -> None:
        chance = random.Random(99)
        with Client(origin.socket) as client:
            while not stopping():
                began = time.monotonic()
                offset, data = chance.randrange(0, MIB - 9000), chance.randbytes(chance.randrange(1, 9000))
                client.write(offset, data)
                assert client.read(offset, len(data)) == data
                seen.served(began)
                time.sleep(0.002)

    return work


def reader(origin: Origin, image: str, content: bytes, seen: Witness) -> Work:
    """Return a work that reads an image, which must not change, over one connection."""

    def work(stopping: Callable[[], bool]) -> None:
        chance = random.Random(98)
        with Client(origin.socket, image) as client:
            while not stopping():
                began = time.monotonic()
                offset, length = chance.randrange(0, len(content) - 70_000), chance.randrange(1, 70_000)
                assert client.read(offset, length) == content[offset : offset + length]
                seen.served(began)
                time.sleep(0.002)

    return work


def greeted(path: Path) -> socket.socket:
    """Connect until there is a place and return the greeted socket."""
    for _ in range(500):
        sock = nbd.connect(path)
        try:
            nbd.receive(sock, 18)
        except (nbd.Gone, ConnectionError):
            # All 64 places are taken by those of before, whose end has not been seen yet.
            sock.close()
            time.sleep(0.01)
        else:
            return sock
    raise AssertionError("no place became free")


def deliver(path: Path, script: bytes, chance: random.Random, *, begun: bool = False) -> None:
    """Send a script in one of many ways, look at the answers or do not, and leave in one of many ways.

    ``begun``: after choosing the origin, as requests.
    """
    with greeted(path) as sock, contextlib.suppress(ConnectionError, TimeoutError):
        if begun:
            start_transmission(sock)
        sock.settimeout(1)
        if chance.random() < 0.2:
            cut = chance.randrange(0, len(script) + 1)
            sock.sendall(script[:cut])
            sock.sendall(script[cut:])
        else:
            sock.sendall(script)
        leave = chance.random()
        if leave < 0.3:
            # Half closed: no more is coming, answers would still be read.
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(1 << 16):
                pass
        elif leave < 0.6:
            if select.select([sock], [], [], 0.02)[0]:
                sock.recv(1 << 16)
        elif leave < 0.7:
            sock.shutdown(socket.SHUT_RD)


def negotiation(chance: random.Random, export: str) -> list[bytes]:
    """Return the messages of a lawful negotiation that ends in reads."""
    name = chance.choice(["", "", export, export, "nobody", "x" * 4097, "\0\0"])
    options = {
        "list": lambda: nbd.option(nbd.LIST),
        "info": lambda: nbd.option(nbd.INFO, nbd.info_body(name, 1, 2, 3)),
        "structured": lambda: nbd.option(nbd.STRUCTURED_REPLY),
        "list-meta": lambda: nbd.option(nbd.LIST_META_CONTEXT, nbd.meta_body(name, "base:")),
        "set-meta": lambda: nbd.option(
            nbd.SET_META_CONTEXT, nbd.meta_body(name, "base:allocation", "blksnap:since:0", "blksnap:since:x")
        ),
        "unknown": lambda: nbd.option(
            chance.randrange(0, 1 << 32), chance.randbytes(chance.randrange(0, 64))
        ),
    }
    messages = [struct.pack(">I", chance.choice([3] * 8 + [1, 0, 2, 7, 1 << 31]))]
    messages += [options[chance.choice(list(options))]() for _ in range(chance.randrange(0, 6))]
    last = chance.choice([nbd.GO, nbd.GO, nbd.EXPORT_NAME, nbd.ABORT])
    body = {nbd.GO: nbd.info_body(name), nbd.EXPORT_NAME: name.encode(), nbd.ABORT: b""}[last]
    messages.append(nbd.option(last, body))
    return messages


def reads(chance: random.Random) -> bytes:
    """Return requests that change nothing."""
    commands = [nbd.READ, nbd.BLOCK_STATUS, nbd.FLUSH, 99]
    return b"".join(nbd.request(chance.choice(commands), 512 * n, 512, cookie=n) for n in range(3))


def mutilated(chance: random.Random, messages: list[bytes]) -> bytes:
    """Return the messages as one stream with one to three things wrong."""
    for _ in range(chance.choice([1, 1, 2, 3])):
        place = chance.randrange(len(messages))
        message = bytearray(messages[place])
        match chance.randrange(8):
            case 0:
                message = message[: chance.randrange(0, len(message) + 1)]
            case 1 if message:
                message[chance.randrange(len(message))] ^= 1 << chance.randrange(8)
            case 2 if len(message) >= 16:
                message[12:16] = struct.pack(">I", chance.choice(EXTREMES))
            case 3 if len(message) >= 20:
                message[16:20] = struct.pack(">I", chance.choice(EXTREMES))
            case 4:
                message += chance.randbytes(chance.randrange(1, 200))
            case 5:
                message = bytearray(chance.randbytes(chance.randrange(1, 200)))
            case 6:
                messages.insert(place, bytes(message))
            case _:
                messages.insert(chance.randrange(len(messages)), bytes(chance.choice([1, 28, 5000])))
        messages[place] = bytes(message)
    return b"".join(messages)


LAWFUL_FROM = 8 * MIB
"""Well-formed changes go behind this; a bit that flips may bring one before it."""


def transmission(chance: random.Random) -> list[bytes]:
    """Return requests, many of them wrong in a field, with payloads, some of a wrong length."""
    messages = []
    for cookie in range(chance.randrange(1, 12)):
        command = chance.choice([*range(9), nbd.WRITE, nbd.WRITE, chance.randrange(1 << 16)])
        changes = command in {nbd.WRITE, nbd.TRIM, nbd.WRITE_ZEROES}
        length = chance.choice([1, 512, 4096, chance.randrange(1, 60_000)])
        offset = LAWFUL_FROM + chance.randrange(0, 8 * MIB - length)
        flags = chance.choice(
            [0, 0, 0, nbd.FUA, nbd.NO_HOLE, nbd.FAST_ZERO, nbd.REQ_ONE, chance.randrange(1 << 16)]
        )
        payload = chance.randbytes(length) if command == nbd.WRITE else b""
        match chance.randrange(6):
            case 0:
                offset = chance.choice(FAR_OFFSETS if changes else OFFSETS)
            case 1 if not changes:
                length = chance.choice(EXTREMES)
            case 2 if command == nbd.WRITE:
                length = chance.choice([(1 << 25) + 1, (1 << 26) + 1, (1 << 32) - 1])
            case 3:
                payload = payload[: chance.randrange(0, len(payload) + 1)]
            case _:
                pass
        messages.append(nbd.request(command, offset, length, cookie=cookie, flags=flags) + payload)
    return messages


def flipped(chance: random.Random, stream: bytes) -> bytes:
    """Return a stream that lost its end, or a few bits, or got bytes in between; some are left as they are."""
    data = bytearray(stream)
    match chance.randrange(5):
        case 0:
            del data[chance.randrange(len(data)) :]
        case 1:
            for _ in range(chance.randrange(1, 4)):
                data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        case 2:
            at = chance.randrange(len(data))
            data[at:at] = chance.randbytes(chance.randrange(1, 60))
        case 3:
            at = chance.randrange(0, max(1, len(data) - 28))
            data[at : at + 28] = chance.randbytes(28)
        case _:
            pass
    return bytes(data)


def lawful_ranges(stream: bytes, size: int) -> list[tuple[int, int]]:
    """Return the (start, end) that well-formed requests at their places in a stream may change, whole or in part."""
    ranges = []
    at = 0
    while at + 28 <= len(stream):
        magic, flags, command, _, offset, length = struct.unpack_from(">IHHQQI", stream, at)
        at += 28
        if magic != nbd.REQUEST_MAGIC or command == nbd.DISCONNECT:
            break
        allowed = {
            nbd.WRITE: nbd.FUA,
            nbd.TRIM: nbd.FUA,
            nbd.WRITE_ZEROES: nbd.FUA | nbd.NO_HOLE | nbd.FAST_ZERO,
        }
        if command in allowed:
            well = not flags & ~allowed[command] and length > 0 and offset + length <= size
            if well and (command != nbd.WRITE or length <= nbd.MAX_PAYLOAD):
                ranges.append((offset, offset + length))
        if command == nbd.WRITE:
            at += length
    return ranges


def start_transmission(sock: socket.socket, export: str = "") -> None:
    """Choose an export on a greeted socket."""
    sock.sendall(struct.pack(">I", 3) + nbd.option(nbd.EXPORT_NAME, export.encode()))
    nbd.receive(sock, 10)
