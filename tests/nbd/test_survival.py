# SPDX-License-Identifier: GPL-2.0-or-later
"""The data path is killed with -9 and comes back by itself: origins, numbers, maps, snapshots and images are as they were."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.nbd.control import HungUp, Refused, opened
from tests.nbd.datapath import MIB, Datapath, find_binary, qemu_io, run
from tests.nbd.load import FIO_BYTES, Report, fio_work, odd_work, running
from tests.nbd.nbdwire import Client, Gone, NbdError, content_of
from tests.nbd.survival import Held, patient
from tests.nbd.test_oracle import Instant, Verdict, differing, marked, release, take

DEATHS = 50
ACTIVE = 240
"""Where the numbers begin: the window slides at 255, between deaths."""
BLOCK = 16 << 10
SIZE = FIO_BYTES + 4 * MIB + 5_000


@pytest.fixture
def mortal(directory: Path) -> Iterator[Held]:
    """A data path with a holder; whatever becomes of them is the test's business."""
    held = Held(directory)
    try:
        yield held
    finally:
        held.kill()


@pytest.fixture
def held(mortal: Held) -> Iterator[Held]:
    """A data path with a holder; both have to be there when the test is over."""
    yield mortal
    assert mortal.process.poll() is None, f"the holder died: {mortal.story()}"
    with mortal.connect() as control:
        control.call("list")


def test_fifty_deaths_under_verified_writing_lose_nothing(
    held: Held, directory: Path, report: Report
) -> None:
    """fio and qemu-io see no error, no change is missed, held images stand still and the numbers go on."""
    unmarked = bytes(-(-SIZE // BLOCK))
    origin = held.add(SIZE, block_size=BLOCK, saved=unmarked, active=ACTIVE)
    generation = origin.info().generation
    chance = random.Random(3)
    verdict = Verdict()
    kept: list[Instant] = []
    before: list[Instant] = []
    with (
        patient(held, origin) as steady,
        running(fio_work(steady, 100), odd_work(steady, 200)) as going,
    ):
        while held.deaths < DEATHS and going():
            if held.deaths % 2 == 0:
                others = [instant for instant in kept if instant not in before]
                before = [take(held, origin, chance, others + before, verdict)]
                kept += before
            time.sleep(chance.choice([0.0, chance.random() * 0.1, 0.2 + chance.random() * 0.4]))
            held.die()
            while len(kept) > chance.randrange(1, 4):
                release(origin, kept.pop(chance.randrange(len(kept))), directory / "out")
                verdict.released += 1
    for instant in kept:
        release(origin, instant, directory / "out")
        verdict.released += 1
    after = origin.maps()
    last = before[0]
    now = np.frombuffer(origin.content(), np.uint8)
    verdict.misses += len(
        differing(last.content, now, BLOCK) - marked(after.live, after.reading.base, last.number)
    )
    report(f"{held.deaths} deaths: {verdict}")
    assert verdict.misses == 0
    assert held.deaths == DEATHS
    assert verdict.takes == verdict.released == DEATHS // 2
    assert after.reading.generation == generation
    assert after.reading.changes == ACTIVE - 1 + verdict.takes
    assert after.reading.base > 0, "the window never slid"
    assert verdict.compared * 0.01 < verdict.differing


def states_of(held: Held) -> dict[str, str]:
    """Return the state of every snapshot by its name."""
    return {one["snapshot"]: one["state"] for one in held.control.call("list")["snapshots"]}


def test_a_death_amid_a_take_of_two_origins_leaves_both_images_or_none(held: Held, report: Report) -> None:
    """A snapshot that is there afterwards is whole and is never missed by the maps; else it can be taken still."""
    chance = random.Random(7)
    origins = [held.add(4 * MIB, block_size=4096) for _ in range(2)]
    kinds = {"taken": 0, "created": 0}
    for number in range(1, 25):
        contents = []
        for origin in origins:
            with Client(origin.socket) as client:
                client.write(chance.randrange(0, 4 * MIB - 8192), bytes([number]) * 8192)
            contents.append(origin.content())
        snapshot = held.create(chunk_size=4096)
        killer = threading.Timer(chance.random() * 0.004, held.slay)
        with held.connect() as control:
            killer.start()
            with contextlib.suppress(HungUp, OSError):
                snapshot.take(*origins, control=control)
            killer.join()
        held.again()
        state = states_of(held)[snapshot.name]
        kinds[state] += 1
        numbers = [origin.info().changes for origin in origins]
        if state == "created":
            with pytest.raises(Gone):
                Client(origins[0].socket, snapshot.name)
            snapshot.take(*origins)
        for origin in origins:
            with Client(origin.socket) as client:
                client.write(0, bytes([255 - number]) * MIB)
        reading = snapshot.info()
        assert [image.origin for image in reading.images] == [origin.name for origin in origins]
        for origin, image, content, before in zip(origins, reading.images, contents, numbers, strict=True):
            assert image.number == before + (state == "created")
            assert content_of(origin.socket, snapshot.name) == content
            assert set(range(256)) <= origin.maps().changed(image.number, live=True)
        snapshot.destroy()
    report(f"deaths amid a take of two: {kinds}")


def test_all_that_is_known_comes_back(held: Held) -> None:
    """Names, sizes, numbers, maps, snapshots with their limits and images with their origins are the same."""
    origins = [held.add(3 * MIB + 5, block_size=4096) for _ in range(3)]
    first, second = held.create(limit=5 * MIB, low_space=1000, step=MIB), held.create(chunk_size=8192)
    waiting = held.create()
    first.take(*origins)
    second.take(origins[1], writable=True)
    for origin in origins:
        qemu_io(origin.uri(), "write -P 7 100000 70000")
    qemu_io(origins[1].uri(second.name), "write -P 8 0 5000")

    def known() -> tuple[object, ...]:
        told = held.control.call("list")
        for origin in told["origins"]:
            origin.pop("counters")
            # Other memory, so other sequences.
            origin["live_sequence"] = origin["taken_sequence"] = 0
            origin["clients"] = 0
        maps = [(origin.maps().live, origin.maps().taken) for origin in origins]
        images = [content_of(origin.socket, first.name) for origin in origins]
        return told, maps, images, content_of(origins[1].socket, second.name)

    before, sequences = known(), [origin.info().live_sequence for origin in origins]
    for _ in range(5):
        held.die()
        assert known() == before
    assert [origin.info().live_sequence for origin in origins] == [number + 5 for number in sequences]
    assert held.control.call("hello", protocol=1)["life"] == 6
    waiting.take(origins[0])
    assert waiting.info().state == "taken"


def test_the_maps_of_images_can_be_had_again(held: Held) -> None:
    """The memory of the dead process stands still; that of its successor says what changes."""
    origin = held.add(block_size=4096)
    snapshot = held.create(chunk_size=4096)
    snapshot.take(origin, writable=True)
    held.die()
    qemu_io(origin.uri(snapshot.name), "write -P 8 8192 4096")
    ok, (taken, table) = held.control.request("snapshot.maps", snapshot=snapshot.name)
    with taken, table:
        assert ok["state"] == "taken"
        assert os.pread(taken.fileno(), 4, 0) == b"\0\0\1\0"
        assert os.pread(table.fileno(), 4, 0) == b"\0\0\3\0"


def test_a_snapshot_that_failed_stays_failed(held: Held) -> None:
    """Its image answers with an error, its origin is served, and it can be destroyed."""
    origin = held.add(content=os.urandom(16 * MIB))
    snapshot = held.create(limit=MIB)
    snapshot.take(origin)
    qemu_io(origin.uri(), "write -P 1 0 4M")
    before = snapshot.info()
    assert before.state == "failed"
    for _ in range(2):
        held.die()
        after = snapshot.info()
        assert (after.state, after.error, after.errno) == ("failed", before.error, before.errno)
        with Client(origin.socket, snapshot.name) as image, pytest.raises(NbdError):
            image.read(8 * MIB, 4096)
    qemu_io(origin.uri(), "write -P 2 4M 4M", "read -P 1 0 4M")
    snapshot.destroy()
    held.die()
    assert states_of(held) == {}
    qemu_io(origin.uri(), "read -P 2 4M 4M")


def test_what_was_written_to_an_image_is_there_afterwards(held: Held) -> None:
    """Every write to a writable image that was answered, in whatever state its chunk was."""
    chance = random.Random(5)
    origin = held.add(2 * MIB, content=os.urandom(MIB))
    snapshot = held.create(chunk_size=16 << 10)
    snapshot.take(origin, writable=True)
    expected = bytearray(origin.content())
    for number in range(12):
        with contextlib.suppress(OSError), Client(origin.socket, snapshot.name) as image:
            for _ in range(chance.randrange(1, 12)):
                at, data = chance.randrange(0, 2 * MIB - 30_000), os.urandom(chance.randrange(1, 30_000))
                image.write(at, data)
                expected[at : at + len(data)] = data
                with Client(origin.socket) as client:
                    client.write(chance.randrange(0, 2 * MIB - 30_000), bytes([number]) * 30_000)
        held.die()
        assert content_of(origin.socket, snapshot.name) == bytes(expected)


def test_bytes_written_while_nobody_served_are_found(held: Held) -> None:
    """Where it can be told: no write of ours came after the last look at the file."""
    quiet, busy, cut = held.add(), held.add(), held.add()
    for origin in (quiet, busy, cut):
        held.create().take(origin)
    qemu_io(busy.uri(), "write -P 1 0 4096")
    os.kill(held.process.pid, signal.SIGSTOP)
    held.slay()
    with quiet.path.open("r+b") as file:
        file.write(b"behind the back")
    os.truncate(cut.path, MIB)
    os.kill(held.process.pid, signal.SIGCONT)
    held.again()
    (image,) = held.create().take(busy).images
    assert image.reset == ""
    (image,) = held.create().take(quiet).images
    assert "behind" in image.reset
    assert cut.info().state == "broken"
    # And the verdict outlives further deaths.
    held.die()
    assert cut.info().state == "broken"


def test_nobody_else_gets_the_file_while_the_data_path_is_dead(held: Held) -> None:
    """The lock is that of the open file, which the holder has."""
    origin = held.add()
    os.kill(held.process.pid, signal.SIGSTOP)
    held.slay()
    try:
        out = run("qemu-io", "-f", "raw", "-c", "write 0 512", origin.path, status=1)
        assert "lock" in out
    finally:
        os.kill(held.process.pid, signal.SIGCONT)
    held.again()
    origin.remove()
    run("qemu-io", "-f", "raw", "-c", "write 0 512", origin.path)


def test_the_holder_keeps_nothing_of_what_has_gone(held: Held) -> None:
    """However origins, snapshots and processes come and go, no descriptor stays behind."""
    before = held.kept()
    for _ in range(3):
        origins = [held.add(MIB) for _ in range(2)]
        snapshots = [held.create(limit=MIB) for _ in range(3)]
        for snapshot in snapshots[:2]:
            snapshot.take(*origins)
        held.die()
        snapshots[0].destroy()
        origins[0].remove(force=True)
        held.die()
        for snapshot in snapshots[1:]:
            snapshot.destroy()
        origins[1].remove()
        assert held.kept() == before
        held.die()
        assert held.control.call("list") == {"origins": [], "snapshots": []}
        assert held.kept() == before


def test_a_refused_request_leaves_nothing_in_the_store(held: Held) -> None:
    """Origins that are in use, snapshots that exist and takes that cannot be are stored for nobody."""
    origin = held.add()
    snapshot = held.create()
    before = held.kept()
    with pytest.raises(Refused):
        held.add(path=origin.path)
    with pytest.raises(Refused):
        held.add(active=99)
    with pytest.raises(Refused), opened(held.directory, os.O_RDWR | os.O_TMPFILE) as storage:
        held.control.call("snapshot.create", [storage], snapshot=snapshot.name, limit=MIB)
    with pytest.raises(Refused):
        held.control.call("snapshot.take", snapshot=snapshot.name, devices=[])
    assert held.kept() == before


def test_one_who_subscribes_hears_which_origins_came_back(held: Held) -> None:
    """Once, by the first subscriber after the death."""
    names = [held.add(MIB).name for _ in range(2)]
    held.die()
    with held.events() as events:
        heard = events.gather(0.2)
    assert [(event["event"], event["origin"], event["life"]) for event in heard] == [
        ("origin.recovered", name, 2) for name in names
    ]
    with held.events() as events:
        assert events.gather(0.2) == []


def test_a_stop_in_order_ends_the_holder_too(mortal: Held) -> None:
    """Its status is that of the data path, and the directory is free."""
    mortal.add()
    mortal.control.call("stop", force=True)
    assert mortal.process.wait(10) == 0
    Held(mortal.directory).kill()


def test_a_holder_that_is_told_to_end_ends_the_data_path_in_order(mortal: Held) -> None:
    """SIGTERM to the holder is one to the data path."""
    origin = mortal.add()
    pid = mortal.pid()
    assert mortal.end() == 0
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    run("qemu-io", "-f", "raw", "-c", "write 0 512", origin.path)
    Held(mortal.directory).kill()


def test_a_second_holder_on_one_directory_is_turned_away(held: Held) -> None:
    """With the status and the words of a second data path; the first goes on."""
    out = run(find_binary(), "--hold", "--runtime-dir", held.directory, status=3)
    assert "another data path serves" in out
    held.add()
    held.die()


def test_a_data_path_without_its_holder_serves_on_and_says_what_that_means(mortal: Held) -> None:
    """Nobody can take it over: a new holder is turned away as long as it lives."""
    origin = mortal.add()
    pid = mortal.pid()
    mortal.process.kill()
    mortal.process.wait()
    qemu_io(origin.uri(), "write -P 5 0 4096", "read -P 5 0 4096")
    mortal.add()
    end = time.monotonic() + 5
    while mortal.control.call("hello", protocol=1)["survives"]:
        assert time.monotonic() < end
    assert "nothing that is tracked would survive" in mortal.story()
    run(find_binary(), "--hold", "--runtime-dir", mortal.directory, status=3)
    os.kill(pid, signal.SIGTERM)
    while Path(f"/proc/{pid}").exists():
        time.sleep(0.01)
    Held(mortal.directory).kill()


def test_without_a_holder_all_works_but_survival(datapath: Datapath) -> None:
    """It says so to the service."""
    assert datapath.control.call("hello", protocol=1)["survives"] is False
    snapshot = datapath.create()
    snapshot.take(datapath.add())
    snapshot.destroy()


def test_a_holder_gives_up_what_dies_again_and_again(mortal: Held) -> None:
    """Ten lives that never served are enough; its last line says what that means."""
    mortal.add()
    last = 0
    end = time.monotonic() + 30
    while mortal.process.poll() is None:
        assert time.monotonic() < end
        if mortal.pid() != last:
            with contextlib.suppress(ProcessLookupError):
                last = mortal.slay()
    assert mortal.process.wait(10) == 1
    assert "giving up" in mortal.story()
