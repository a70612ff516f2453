# SPDX-License-Identifier: GPL-2.0-or-later
"""What the data path holds in memory: at most 16 MiB and 2 bytes per block, and the buffers of those it serves."""

from __future__ import annotations

import random
import time

import pytest

from tests.nbd import nbdwire as nbd
from tests.nbd.datapath import MIB, Datapath, Memory, Origin, qemu_io, run
from tests.nbd.load import Report
from tests.nbd.nbdwire import Client, content_of

TIB = 1 << 40
BASE = 16 * MIB
CONNECTION = 8 * MIB + 256 * 1024
"""64 pieces of 128 KiB and the receive buffer."""
STAGING = 4 * MIB
"""Of a held image, with chunks up to 1 MiB."""


def bar(blocks: int) -> int:
    """Return the bytes allowed beside buffers."""
    return BASE + 2 * blocks


def check(report: Report, what: str, memory: Memory, allowed: int) -> None:
    """Print and keep a figure, then compare it. Nothing is left out: shared maps and the program itself count, too."""
    text = f"{what}: {memory}, allowed {allowed / MIB:.1f}"
    report(text)
    assert memory.total <= allowed, text


@pytest.fixture
def huge(datapath: Datapath) -> Origin:
    """A sparse image file of one TiB: 2 Mi blocks."""
    return datapath.add(TIB)


def test_an_idle_process(datapath: Datapath, report: Report) -> None:
    """Without any origin."""
    check(report, "idle, no origin", datapath.memory(), BASE)


def test_an_idle_tebibyte(datapath: Datapath, huge: Origin, report: Report) -> None:
    """Tracked and untouched, and then with every block marked."""
    blocks = huge.info().block_count
    assert blocks == 2 << 20
    check(report, "1 TiB, idle", datapath.memory(), bar(blocks))
    datapath.control.call("origin.mark-all", origin=huge.name)
    check(report, "1 TiB, all marked", datapath.memory(), bar(blocks))


@pytest.mark.timeout(120)
def test_a_tebibyte_after_load(datapath: Datapath, huge: Origin, report: Report) -> None:
    """Clients and snapshots come and go: what they needed is given back."""
    blocks = huge.info().block_count
    for number in range(4):
        snapshot = datapath.create()
        snapshot.take(huge)
        run(
            "fio", "--name=load", "--ioengine=nbd", f"--uri={huge.uri()}", "--thread", "--rw=randrw", "--bs=64k",
            "--numjobs=4", "--iodepth=32", "--size=1g", f"--io_size={8 * MIB}", f"--offset={number * 200}g",
            "--offset_increment=1g", "--norandommap",
        )  # fmt: skip
        qemu_io(huge.uri(snapshot.name), f"read -P 0 {number * 200}G 32M", options=["-r"])
        held = datapath.memory()
        # An image has 9 bytes per chunk in its table and 2 for its readers, and the chunks on their way to the storage.
        chunk = snapshot.info().images[0].chunk_size
        table = 11 * (TIB // chunk) + max(STAGING, 4 * chunk)
        check(report, f"1 TiB, snapshot {number + 1} held", held, bar(blocks) + blocks + table)
        snapshot.destroy()
    huge.wait_for_no_clients()
    after = datapath.memory()
    check(report, "1 TiB, after load", after, bar(blocks))


def test_buffers_are_those_of_the_clients_that_are_there(datapath: Datapath, report: Report) -> None:
    """Eight clients with as much in flight as there can be; each holds its own buffers, and none when it has gone."""
    origin = datapath.add(64 * MIB, content=random.Random(1).randbytes(64 * MIB))
    clients = [Client(origin.socket) for _ in range(8)]
    try:
        for client in clients:
            for _ in range(4):
                client.send(nbd.READ, 0, 32 * MIB)
        time.sleep(0.5)
        busy = datapath.memory()
        check(report, "8 busy clients", busy, bar(1024) + 8 * CONNECTION)
        assert busy.total > 8 * 4 * MIB, "they were not busy"
    finally:
        for client in clients:
            client.socket.close()
    origin.wait_for_no_clients()
    check(report, "after 8 busy clients", datapath.memory(), bar(1024))


def test_many_takes_leave_nothing_behind(datapath: Datapath, report: Report) -> None:
    """300 takes, each held for a moment: memory and descriptors are what they were after the first."""
    origin = datapath.add(64 * MIB, content=random.Random(2).randbytes(64 * MIB), block_size=4096)
    figures: list[tuple[Memory, int]] = []
    with Client(origin.socket) as client:
        for number in range(300):
            snapshot = datapath.create(limit=16 * MIB)
            snapshot.take(origin)
            client.write(number * 100_000, b"x" * 100_000)
            if number % 50 == 0:
                content_of(origin.socket, snapshot.name)
            snapshot.destroy()
            figures.append((datapath.memory(), datapath.descriptors()))
    first, last = figures[20], figures[-1]
    text = f"after 20 takes {first[0]}, {first[1]} descriptors; after 300 {last[0]}, {last[1]} descriptors"
    report(text)
    assert last[1] == first[1]
    assert last[0].total < first[0].total + 2 * MIB
    assert last[0].total < bar(16_384) + CONNECTION + STAGING
