# SPDX-License-Identifier: GPL-2.0-or-later
"""File systems that are worked on while snapshots come and go: no change is missed, no image moves, nothing is lost."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.nbd.control import Refused
from tests.nbd.datapath import Datapath, Snapshot
from tests.nbd.load import running
from tests.vm.guest import devices, filework, kinds, nodes, ublk
from tests.vm.guest.filework import Content, RandomProgram
from tests.vm.guest.kinds import FILE_SYSTEMS, KINDS, Placed
from tests.vm.guest.ublk import MIB

SIZE = 32 * MIB
"""A smaller xfs has one allocation group, which xfs_repair refuses to judge."""
BLOCK = 16 << 10
MOST_HELD = 3
FROZEN_EVERY = 4
CHECKED_EVERY = 5
PATIENCE = 5
"""How often a take may be given up because the emulated disk is not written out in time."""


@pytest.fixture
def datapath() -> Iterator[Datapath]:
    """A running data path, with device-mapper loaded."""
    devices.modprobe("dm-mod")
    with ublk.datapath() as running_:
        yield running_


@dataclass(frozen=True, slots=True)
class Instant:
    """A held snapshot and what its image held right after the take."""

    snapshot: Snapshot
    image: Path
    number: int
    content: bytes


@dataclass(slots=True)
class Verdict:
    """What was compared, in blocks."""

    takes: int = 0
    differing: int = 0
    marked: int = 0
    misses: int = 0
    copies_compared: int = 0
    given_up: int = 0

    def judge(self, before: bytes, after: bytes, marked: set[int]) -> None:
        """Count what differs and is not marked."""
        differ = ublk.differing(before, after, BLOCK)
        self.differing += len(differ)
        self.marked += len(marked)
        self.misses += len(differ - marked)

    def __str__(self) -> str:
        """Say it in one line."""
        return (
            f"{self.takes} takes ({self.given_up} given up and repeated), {self.copies_compared} compared with a frozen copy;"
            f" {self.differing} blocks differ from the take before, {self.marked} are marked, {self.misses} missed"
        )


@dataclass(slots=True)
class Observer:
    """Takes, looks at what was taken and ends it again, while others work on the file system."""

    placed: Placed
    file_system: str
    live: Path
    past: Path
    archive: Path
    chance: random.Random
    held: list[Instant] = field(default_factory=list)
    last: Instant | None = None
    verdict: Verdict = field(default_factory=Verdict)

    def observe(self, program: RandomProgram) -> None:
        """Take once, compare with what is known of the moment, and end some of the held ones."""
        frozen = self.verdict.takes % FROZEN_EVERY == 0
        (self.live / "number").write_text(str(self.verdict.takes))
        with ExitStack() as stack:
            known = None
            if frozen:
                known = stack.enter_context(program.paused())
                stack.enter_context(filework.frozen(self.live))
                copy = ublk.read(self.placed.below)
            instant = self._take(freeze=not frozen)
        if frozen:
            assert instant.content == copy
            self.verdict.copies_compared += 1
        self._look_inside(instant, known)
        if self.last is not None:
            maps = self.placed.tracked.maps()
            self.verdict.judge(self.last.content, instant.content, maps.changed(self.last.number))
        self.last = instant
        self.held.append(instant)
        self.verdict.takes += 1
        while len(self.held) > self.chance.randrange(MOST_HELD + 1):
            self.release(self.held.pop(self.chance.randrange(len(self.held))))

    def release(self, instant: Instant) -> None:
        """End a snapshot whose image is what it was."""
        assert ublk.read(instant.image) == instant.content
        assert instant.snapshot.info().state == "taken", instant.snapshot.info().error
        instant.snapshot.destroy()
        assert not instant.image.exists()

    def _take(self, *, freeze: bool) -> Instant:
        tracked = self.placed.tracked
        with ExitStack() as stack:
            mounts = stack.enter_context(kinds.to_be_frozen(tracked, self.live)) if freeze else ()
            while True:
                try:
                    snapshot = tracked.datapath.create(limit=2 * SIZE)
                    taken = nodes.take_all([tracked], snapshot=snapshot, mounts=mounts, freeze=freeze)
                except Refused as refused:
                    snapshot.destroy()
                    self.verdict.given_up += 1
                    if refused.code != "timed-out" or self.verdict.given_up > PATIENCE:
                        raise
                else:
                    break
        (image,) = taken["images"]
        assert image["reset"] == ""
        node = Path(image["path"])
        return Instant(taken["snapshot"], node, image["number"], ublk.read(node))

    def _look_inside(self, instant: Instant, known: Content | None) -> None:
        """The files of the image are those of the moment."""
        if self.verdict.takes % CHECKED_EVERY == 0:
            assert nodes.is_clean(instant.image, self.file_system)
        options = kinds.IMAGE_OPTIONS[self.file_system]
        with nodes.mounted(instant.image, self.past, "-o", options) as directory:
            assert (directory / "number").read_text() == str(self.verdict.takes)
            if known is not None:
                assert filework.is_unpacked(self.archive, directory / "kept")
                file = (directory / "random").read_bytes()
                assert Content(len(file), hashlib.sha256(file).hexdigest()) == known
        self.past.rmdir()


def endure(datapath: Datapath, directory: Path, kind: str, file_system: str, takes: int) -> None:
    """Work on a file system of a kind through so many takes."""
    live = directory / "live"
    archive = directory / "archive"
    filework.pack(archive)
    with kinds.disk(kind, SIZE, directory) as disk:
        if kind == "lvm":
            # It is got under as it is found: in use.
            nodes.make_file_system(disk, file_system)
            placed = None
        else:
            placed = kinds.place(datapath, kind, disk, block_size=BLOCK)
            nodes.make_file_system(placed.tracked.node, file_system)
        node = placed.tracked.node if placed else disk
        with nodes.mounted(node, live):
            placed = placed or kinds.place(datapath, kind, disk, block_size=BLOCK)
            filework.unpack(archive, live / "kept")
            observer = Observer(placed, file_system, live, directory / "past", archive, random.Random(7))
            with (
                RandomProgram(live / "random", 7, MIB // 2) as program,
                running(filework.unpacking(archive, live)) as going,
                nodes.load(live / "verified", 4 * MIB),
            ):
                while observer.verdict.takes < takes and going():
                    observer.observe(program)
            for instant in observer.held:
                observer.release(instant)
        last = observer.last
        assert last is not None
        assert nodes.is_clean(node, file_system)
        content = ublk.read(node)
        observer.verdict.judge(last.content, content, placed.tracked.maps().changed(last.number, live=True))
        assert ublk.read(placed.below) == content
        print(f"{kind}, {file_system}, {program.operations} random operations: {observer.verdict}")
        assert observer.verdict.takes == takes
        assert observer.verdict.misses == 0
        assert observer.verdict.differing
        placed.tracked.remove()
        assert ublk.read(disk) == content


@pytest.mark.parametrize(
    "kind, file_system",
    [
        ("brd", "ext4"),
        ("scsi_debug", "ext4"),
        ("lvm", "ext4"),
        ("null_blk", "xfs"),
        ("loop", "xfs"),
        ("lvm", "xfs"),
    ],
)
@pytest.mark.timeout(1500)
def test_a_file_system_that_is_worked_on_loses_nothing(
    datapath: Datapath, tmp_path: Path, kind: str, file_system: str
) -> None:
    """Unpacked trees, verified writes and a random program, while snapshots are taken, mounted, compared and destroyed.

    Each image reads the same at its take and at its end, every fourth one equals a copy made below the tracker while
    the file system stood still, what differs between one and the next is marked, and what is mounted is whole.
    """
    endure(datapath, tmp_path, kind, file_system, 34)


@pytest.mark.long
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("file_system", FILE_SYSTEMS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_hundred_snapshots_of_each_kind(
    datapath: Datapath, tmp_path: Path, kind: str, file_system: str
) -> None:
    """The same, a hundred times on every kind of disk with either file system."""
    endure(datapath, tmp_path, kind, file_system, 100)
