# SPDX-License-Identifier: GPL-2.0-or-later
"""nbdinfo, nbdcopy and qemu-img on origins and images: what third-party clients see and copy."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.nbd.datapath import BLOCK, MIB, Datapath, Origin, qemu_io, run
from tests.nbd.load import running
from tests.nbd.nbdwire import Client, content_of
from tests.nbd.tools import dirty_blocks, map_of, nbdinfo

ODD_SIZE = 10 * MIB + 12_345
"""No multiple of a sector, a block or a chunk."""


def data_extents(path: Path) -> list[tuple[int, int, int]]:
    """Return what lseek(2) says about a file, as ``map_of`` would."""
    extents: list[tuple[int, int, int]] = []
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        at = 0
        while at < size:
            try:
                data = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:
                data = size
            if data > at:
                extents.append((at, data - at, 3))
            if data < size:
                at = os.lseek(file.fileno(), data, os.SEEK_HOLE)
                extents.append((data, at - data, 0))
            else:
                at = size
    return extents


@pytest.fixture
def odd(datapath: Datapath) -> Origin:
    """An origin of an odd size, full of random bytes."""
    return datapath.add(content=random.Random(1).randbytes(ODD_SIZE), size=ODD_SIZE)


def test_nbdinfo_shows_what_an_origin_can_do(origin: Origin) -> None:
    """The origin offers everything that clients use to be fast and safe."""
    export = nbdinfo(origin.uri())
    assert export["export-size"] == 16 * MIB
    assert export["description"] == str(origin.path)
    assert not export["is_read_only"]
    for ability in ("flush", "fua", "multi_conn", "trim", "zero", "fast_zero"):
        assert export[f"can_{ability}"], ability
    assert export["contexts"] == ["base:allocation"]


def test_nbdinfo_shows_a_read_only_origin_as_such(datapath: Datapath) -> None:
    """A read-only origin offers no command that changes it."""
    export = nbdinfo(datapath.add(read_only=True).uri())
    assert export["is_read_only"]
    assert not any(export[ability] for ability in ("can_trim", "can_zero", "can_fua"))
    assert export["can_multi_conn"]


def test_nbdinfo_lists_the_origin_and_each_image(datapath: Datapath, origin: Origin) -> None:
    """The exports are the origin and the images that are held, no others."""
    snapshots = [datapath.create() for _ in range(3)]
    for snapshot in snapshots:
        snapshot.take(origin)
    snapshots.pop(1).destroy()
    exports = json.loads(run("nbdinfo", "--list", "--json", origin.uri()))["exports"]
    assert [export["export-name"] for export in exports] == ["", *(one.name for one in snapshots)]
    assert [export["is_read_only"] for export in exports] == [False, True, True]
    images = [nbdinfo(origin.uri(snapshot.name)) for snapshot in snapshots]
    assert [image["description"] for image in images] == [
        f"{origin.path} as of snapshot {number}" for number in (1, 3)
    ]


def test_an_unknown_export_is_refused(origin: Origin) -> None:
    """A name that is no snapshot ends in an error of the client, not in the origin."""
    answer = run("nbdinfo", origin.uri("no-such-snapshot"), status=1)
    assert "No such file or directory" in answer


def test_allocation_of_an_origin_is_that_of_its_file(datapath: Datapath) -> None:
    """base:allocation says about the export exactly what lseek says about the file."""
    origin = datapath.add(ODD_SIZE)
    qemu_io(origin.uri(), "write -P 1 256k 64k", "write -P 2 1M 1M", f"write -P 3 {ODD_SIZE - 1} 1")
    assert map_of(origin.uri()) == data_extents(origin.path)
    holes = sum(length for _, length, flags in map_of(origin.uri()) if flags == 3)
    assert holes >= 8 * MIB


def test_allocation_of_an_image_stays_that_of_the_take(datapath: Datapath) -> None:
    """Writes to the origin after the take change nothing of what an image says about holes and data."""
    origin = datapath.add(8 * MIB)
    qemu_io(origin.uri(), "write -P 1 1M 1M", "write -P 2 4M 64k")
    snapshot = datapath.create()
    snapshot.take(origin)
    before = map_of(origin.uri(snapshot.name))
    assert before == map_of(origin.uri()) == data_extents(origin.path)
    qemu_io(origin.uri(), "write -P 9 0 3M", "write -z -u 4M 64k", "discard 1M 1M")
    assert map_of(origin.uri(snapshot.name)) == before


def test_changes_since_a_number_are_exact(datapath: Datapath) -> None:
    """blksnap:since:N of an image names the blocks written between the takes, those and no others."""
    origin = datapath.add(ODD_SIZE)
    chance = random.Random(2)
    blocks = (ODD_SIZE + BLOCK - 1) // BLOCK
    written: list[set[int]] = []
    names: list[str] = []
    for _ in range(5):
        chosen = set(chance.sample(range(blocks - 1), chance.randrange(1, 20)))
        qemu_io(origin.uri(), *(f"write -P 5 {block * BLOCK + 7} 99" for block in sorted(chosen)))
        snapshot = datapath.create()
        snapshot.take(origin)
        written.append(chosen)
        names.append(snapshot.name)
    qemu_io(origin.uri(), f"write -P 6 {ODD_SIZE - 1} 1")
    for last, name in enumerate(names, start=1):
        for since in range(last + 1):
            expected = set().union(*written[since:last])
            assert dirty_blocks(origin.uri(name), since) == expected, (last, since)
    for since in range(6):
        expected = set().union(*written[since:]) | {blocks - 1}
        assert dirty_blocks(origin.uri(), since) == expected


def test_a_number_that_cannot_be_answered_is_not_a_context(datapath: Datapath, origin: Origin) -> None:
    """Asking since a number of the future gets no map rather than an empty one."""
    snapshot = datapath.create()
    snapshot.take(origin)
    for uri in (origin.uri(), origin.uri(snapshot.name)):
        assert "does not support" in run("nbdinfo", "--map=blksnap:since:2", uri, status=1)


def test_an_origin_copies_out_whole(odd: Origin, directory: Path) -> None:
    """nbdcopy with its many requests in flight makes the same file, also at an odd size."""
    out = directory / "out"
    run("nbdcopy", odd.uri(), out)
    run("cmp", out, odd.path)


def test_a_file_copies_in_whole(datapath: Datapath, directory: Path) -> None:
    """nbdcopy into the origin makes the same file, and every block that has data in it is marked."""
    origin = datapath.add(ODD_SIZE)
    source = directory / "source"
    chance = random.Random(3)
    places = [chance.randrange(0, ODD_SIZE - 70_000) for _ in range(12)]
    with source.open("wb") as file:
        file.truncate(ODD_SIZE)
        for place in places:
            file.seek(place)
            file.write(chance.randbytes(chance.randrange(1, 70_000)))
    run("nbdcopy", source, origin.uri())
    run("cmp", source, origin.path)
    content = source.read_bytes()
    holding = {at // BLOCK for at in range(0, ODD_SIZE, BLOCK) if any(content[at : at + BLOCK])}
    assert holding <= origin.maps().changed(0, live=True)


def test_copies_with_more_requests_than_the_server_has_places_for(
    datapath: Datapath, directory: Path
) -> None:
    """Four connections with 128 requests each, both ways: every byte arrives where it belongs."""
    size = 64 * MIB
    source = directory / "source"
    source.write_bytes(random.Random(4).randbytes(size))
    origin = datapath.add(size)
    deep = ("--connections=4", "--requests=128", "--request-size=65536")
    run("nbdcopy", *deep, source, origin.uri())
    run("cmp", source, origin.path)
    out = directory / "out"
    run("nbdcopy", *deep, origin.uri(), out)
    run("cmp", source, out)


def test_an_image_copies_out_as_it_was(datapath: Datapath, odd: Origin, directory: Path) -> None:
    """A copy of an image is the origin of the instant of the take, whatever was written since."""
    before = odd.content()
    snapshot = datapath.create()
    snapshot.take(odd)
    qemu_io(odd.uri(), "write -P 1 100k 2M", "write -z 4M 1M", f"write -P 2 {ODD_SIZE - 5000} 5000")
    out = directory / "out"
    run("nbdcopy", odd.uri(snapshot.name), out)
    assert out.read_bytes() == before
    assert odd.content() != before


def test_qemu_img_converts_out_and_compares(datapath: Datapath, directory: Path) -> None:
    """An image becomes a qcow2 file that qemu-img finds identical with the image, and not with the origin of later."""
    origin = datapath.add(8 * MIB)
    qemu_io(origin.uri(), "write -P 1 1M 1M", "write -P 2 3M 512")
    snapshot = datapath.create()
    snapshot.take(origin)
    qemu_io(origin.uri(), "write -P 3 1M 4k")
    out = directory / "out.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", origin.uri(snapshot.name), out)
    compare = ("qemu-img", "compare", "-f", "raw", "-F", "qcow2")
    assert "identical" in run(*compare, origin.uri(snapshot.name), out)
    assert "mismatch at offset 1048576" in run(*compare, origin.uri(), out, status=1)


def test_qemu_img_converts_in(datapath: Datapath, directory: Path) -> None:
    """qemu-img writes a file into the origin, holes as zeroes."""
    origin = datapath.add(content=random.Random(5).randbytes(4 * MIB), size=8 * MIB)
    source = directory / "source"
    with source.open("wb") as file:
        file.truncate(8 * MIB)
        file.seek(2 * MIB)
        file.write(random.Random(6).randbytes(3 * MIB))
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", "-m", "16", "-W", source, origin.uri())
    run("cmp", source, origin.path)


def qemu_map(origin: Origin, export: str, context: str) -> list[dict[str, Any]]:
    """Return ``qemu-img map`` of an export with a meta context in the place of base:allocation."""
    options = (
        f"driver=nbd,server.type=unix,server.path={origin.socket},export={export},x-dirty-bitmap={context}"
    )
    extents = json.loads(run("qemu-img", "map", "--output=json", "--image-opts", options))
    assert isinstance(extents, list)
    return extents


def test_qemu_img_reads_the_changes(datapath: Datapath) -> None:
    """qemu-img map with x-dirty-bitmap shows the changed blocks; it shows dirty as "no data"."""
    origin = datapath.add(8 * MIB)
    datapath.create().take(origin)
    qemu_io(origin.uri(), "write -P 1 1M 100k", "discard 4M 64k")
    snapshot = datapath.create()
    snapshot.take(origin)
    qemu_io(origin.uri(), "write -P 1 6M 1")
    for export, blocks in ((snapshot.name, [16, 17]), ("", [16, 17, 96])):
        extents = qemu_map(origin, export, "blksnap:since:1")
        dirty = [
            block
            for extent in extents
            if not extent["data"]
            for block in range(extent["start"] // BLOCK, (extent["start"] + extent["length"]) // BLOCK)
        ]
        assert dirty == blocks
        assert sum(extent["length"] for extent in extents) == 8 * MIB


def test_the_window_slides_under_a_client_that_asked_before(datapath: Datapath) -> None:
    """After 300 takes the latest changes are still told apart, and too old a number is refused, not answered wrongly."""
    origin = datapath.add(MIB, block_size=4096)
    snapshot = datapath.create()
    snapshot.take(origin)
    for number in range(2, 301):
        if number == 299:
            qemu_io(origin.uri(), "write -P 1 8k 1")
        snapshot.destroy()
        snapshot = datapath.create(limit=MIB)
        assert snapshot.take(origin).images[0].number == number
    reading = origin.info()
    assert (reading.base, reading.oldest, reading.changes) == (128, 129, 300)
    for since, expected in ((297, {2}), (298, {2}), (299, set()), (129, {2})):
        assert dirty_blocks(origin.uri(snapshot.name), since, 4096) == expected, since
    run("nbdinfo", "--map=blksnap:since:128", origin.uri(), status=1)
    assert content_of(origin.socket, snapshot.name) == origin.content()


def test_a_map_of_an_image_keeps_nobody_waiting(datapath: Datapath) -> None:
    """Block status of millions of small chunks, while another client of the origin wants its answers."""
    origin = datapath.add(8 << 30)
    qemu_io(origin.uri(), "write -P 1 1G 64k", "write -P 1 3G 64k")
    snapshot = datapath.create(chunk_size=4096)
    snapshot.take(origin)
    longest_s = 0.0

    def work(stopping: Callable[[], bool]) -> None:
        nonlocal longest_s
        with Client(origin.socket) as client:
            while not stopping():
                began = time.monotonic()
                client.read(0, 512)
                longest_s = max(longest_s, time.monotonic() - began)

    with running(work):
        extents = map_of(origin.uri(snapshot.name))
    assert extents == map_of(origin.uri())
    assert longest_s < 0.5
