# SPDX-License-Identifier: GPL-2.0-or-later
"""Bytes that no NBD client sends: thousands of mutilated negotiations and transmissions, and clients that misbehave.

The bars are those of any service that listens: it lives, it serves others promptly meanwhile, it gives back what it took,
and no byte changes but where a well-formed request asked for it.
"""

from __future__ import annotations

import contextlib
import random
import socket
import time
from collections.abc import Iterator

import numpy as np
import pytest

from tests.nbd import nbdwire as nbd
from tests.nbd.datapath import BLOCK, MIB, Datapath, Origin, run
from tests.nbd.hostile import (
    Witness,
    baseline,
    check_given_back,
    deliver,
    flipped,
    greeted,
    lawful_ranges,
    mutilated,
    negotiation,
    reader,
    reads,
    start_transmission,
    transmission,
    writer,
)
from tests.nbd.load import Report, running
from tests.nbd.nbdwire import Client, content_of

NEGOTIATIONS = 12_000
TRANSMISSIONS = 8_000
PROMPT_S = 2.0
"""Longest that a good client may wait for an answer meanwhile, on two cores with other work on them."""


@pytest.fixture
def attacked(datapath: Datapath) -> Origin:
    """An origin of 16 MiB of random bytes."""
    return datapath.add(16 * MIB, content=random.Random(7).randbytes(16 * MIB))


@contextlib.contextmanager
def watched(datapath: Datapath, attacked: Origin, report: Report) -> Iterator[str]:
    """Let good clients work meanwhile, one on another origin and one on an image of this, and check all bars afterwards.

    Gives the name of the image.
    """
    other = datapath.add()
    before = baseline(datapath, attacked)
    snapshot = datapath.create()
    snapshot.take(attacked)
    image = content_of(attacked.socket, snapshot.name)
    seen = Witness(), Witness()
    with running(writer(other, seen[0]), reader(attacked, snapshot.name, image, seen[1])):
        yield snapshot.name
    for one in seen:
        summary = (
            f"a good client was served {one.rounds} times, after {one.longest_s * 1000:.0f} ms at the latest"
        )
        report(summary)
        assert one.rounds > 10
        assert one.longest_s < PROMPT_S
    assert content_of(attacked.socket, snapshot.name) == image
    run("nbdinfo", "--list", attacked.uri())
    snapshot.destroy()
    check_given_back(datapath, before, report)


@pytest.mark.timeout(150)
def test_mutilated_negotiations(datapath: Datapath, attacked: Origin, report: Report) -> None:
    """Thousands of them, none of which holds a write: the origin keeps its bytes and its map."""
    chance = random.Random(1234)
    before = attacked.content()
    with watched(datapath, attacked, report) as name:
        reads_before = attacked.info().counters["reads"]
        for _ in range(NEGOTIATIONS):
            script = mutilated(chance, negotiation(chance, name)) + reads(chance)
            deliver(attacked.socket, script, chance)
        served = attacked.info().counters["reads"] - reads_before
    assert attacked.content() == before
    assert not any(attacked.maps().live)
    report(f"{served} reads of the origin came through")
    # Wrong as they are, some must have come as far as being served.
    assert served > 20


@pytest.mark.timeout(150)
def test_mutilated_requests(datapath: Datapath, attacked: Origin, report: Report) -> None:
    """Thousands of streams of them: bytes and marks change only where a well-formed request of a stream asked for it.

    The first 4 MiB are asked for by none: a stream that by the accident of a flipped bit does is left out.
    """
    chance = random.Random(4321)
    before = np.frombuffer(attacked.content(), np.uint8)
    lawful = np.zeros(len(before), dtype=bool)
    with watched(datapath, attacked, report):
        for _ in range(TRANSMISSIONS):
            stream = flipped(chance, b"".join(transmission(chance)))
            ranges = lawful_ranges(stream, len(before))
            if any(start < 4 * MIB for start, _ in ranges):
                continue
            for start, end in ranges:
                lawful[start:end] = True
            deliver(attacked.socket, stream, chance, begun=True)
    after = np.frombuffer(attacked.content(), np.uint8)
    changed = before != after
    assert not (changed & ~lawful).any()
    blocks = set(np.flatnonzero(lawful.reshape(-1, BLOCK).any(axis=1)).tolist())
    assert attacked.maps().changed(0, live=True) <= blocks
    # The streams must have held enough that is right to get past the first look, and left something to spoil.
    assert changed.sum() > MIB
    assert (~lawful).sum() >= 4 * MIB


@pytest.mark.timeout(90)
def test_clients_that_never_read(datapath: Datapath, attacked: Origin, report: Report) -> None:
    """Sixteen ask for gigabytes and take none of it: each holds its own buffers and nothing more."""
    with watched(datapath, attacked, report) as name, contextlib.ExitStack() as stack:
        idle = datapath.memory()
        for number in range(16):
            sock = stack.enter_context(greeted(attacked.socket))
            start_transmission(sock, name if number % 2 else "")
            sock.settimeout(0.05)
            with contextlib.suppress(TimeoutError):
                for cookie in range(10_000):
                    sock.sendall(nbd.request(nbd.READ, 0, 16 * MIB, cookie=cookie))
        time.sleep(1)
        busy = datapath.memory()
        report(f"idle: {idle}; with sixteen that do not read: {busy}")
        assert busy.total - idle.total < 16 * 9 * MIB


def test_clients_that_stop_in_the_middle_of_a_write(
    datapath: Datapath, attacked: Origin, report: Report
) -> None:
    """Half a payload and then nothing: it holds up no take, no other client and no flush."""
    with watched(datapath, attacked, report), contextlib.ExitStack() as stack:
        for number in range(16):
            sock = stack.enter_context(greeted(attacked.socket))
            start_transmission(sock)
            half = b"x" * (number * 10_000)
            sock.sendall(nbd.request(nbd.WRITE, 8 * MIB, MIB, flags=number % 2) + half)
        with Client(attacked.socket) as client:
            client.write(0, b"y" * 512)
            client.command(nbd.FLUSH, 0, 0)
        snapshot = datapath.create()
        began = time.monotonic()
        snapshot.take(attacked)
        assert time.monotonic() - began < PROMPT_S
        snapshot.destroy()
        # The good clients go on for a while beside them.
        time.sleep(1)


@pytest.mark.timeout(90)
def test_who_does_not_negotiate_gives_up_its_place(
    datapath: Datapath, attacked: Origin, report: Report
) -> None:
    """64 that say nothing, or the same for ever, take all places of one origin for half a minute. No other notices."""
    other = datapath.add()
    before = baseline(datapath, attacked)
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(greeted(attacked.socket)) for _ in range(64)]
        dribbling = silent[::2]
        for sock in dribbling:
            sock.sendall(b"\0\0\0\3" + nbd.option(99, length=(1 << 32) - 1))
        with pytest.raises((nbd.Gone, ConnectionError)):
            Client(attacked.socket).close()
        content_of(other.socket)
        datapath.create().take(attacked)
        end = time.monotonic() + 60
        while silent:
            assert time.monotonic() < end
            time.sleep(0.5)
            silent = [sock for sock in silent if still_connected(sock, dribble=sock in dribbling)]
        content_of(attacked.socket)
    for reading in datapath.control.call("list")["snapshots"]:
        datapath.control.call("snapshot.destroy", snapshot=reading["snapshot"])
    check_given_back(datapath, before, report)


def still_connected(sock: socket.socket, *, dribble: bool) -> bool:
    """Return whether the server has not hung up, after sending one more byte of an endless option."""
    sock.setblocking(False)
    try:
        if dribble:
            sock.send(b"x")
        return sock.recv(64) != b""
    except BlockingIOError:
        return True
    except ConnectionError:
        return False
