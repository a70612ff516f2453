# SPDX-License-Identifier: GPL-2.0-or-later
"""The change map against a model that remembers every write, and against copies that are kept up by increments."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from blksnap_service.cbt import (
    GenerationChanged,
    GenerationId,
    InvalidRange,
    Range,
    Reading,
    ResetReason,
    StalePlan,
    View,
)
from blksnap_service.changemap import ChangeMap, TakenMap

BLOCK = 4096


@dataclass
class Events:
    """Every change of one generation by the interval it is counted in; the model of one map."""

    changes: list[tuple[int, int, int]] = field(default_factory=list)

    def add(self, interval: int, offset: int, length: int) -> None:
        """Remember a change, but for one that no number can express: a mark for take 0."""
        if interval:
            self.changes.append((interval, offset, offset + length))

    def blocks_since(self, number: int) -> set[int]:
        """The blocks changed after the number."""
        return {
            block
            for interval, start, end in self.changes
            if interval > number
            for block in range(start // BLOCK, (end - 1) // BLOCK + 1)
        }


@dataclass
class Image:
    """A snapshot image: its bytes, and which of them no longer show the origin through."""

    taken: TakenMap
    events: Events
    data: bytearray
    own: bytearray


@dataclass
class Copy:
    """A client's copy of a moment."""

    generation: GenerationId
    number: int
    data: bytes


class Device:
    """An origin with real bytes, its change map under test, its images, and the copies its clients keep."""

    def __init__(self, size: int) -> None:
        self.ids = (GenerationId(f"generation-{count}") for count in itertools.count())
        self.fill = itertools.cycle(range(1, 252))
        self.map = ChangeMap(size, next(self.ids), BLOCK)
        self.data = bytearray(size)
        self.events = Events()
        self.images: list[Image] = []
        self.copies: list[Copy] = []

    def clip(self, offset: int, length: int) -> tuple[int, int]:
        """Some range inside the device, made of any two numbers."""
        offset %= len(self.data)
        return offset, min(length, len(self.data) - offset)

    def write(self, offset: int, length: int) -> None:
        """Write through the tracker: mark first, keep the old bytes for the images, then write."""
        self.map.record_write(offset, length)
        self.events.add(self.map.numbers.active, offset, length)
        for image in self.images:
            end = min(offset + length, len(image.own))
            image.own[offset:end] = b"\1" * max(0, end - offset)
        self.data[offset : offset + length] = bytes([next(self.fill)]) * length

    def write_behind(self, offset: int, length: int) -> None:
        """Write behind the tracker; it shows through every image that has no bytes of its own there."""
        value = next(self.fill)
        for position in range(offset, offset + length):
            self.data[position] = value
            for image in self.images:
                if position < len(image.data) and not image.own[position]:
                    image.data[position] = value

    def mark(self, ranges: list[tuple[int, int]]) -> None:
        """Mark ranges dirty, in the map and in the model."""
        count = self.map.mark_dirty(ranges)
        assert count == sum((o + n - 1) // BLOCK - o // BLOCK + 1 for o, n in ranges)
        for offset, length in ranges:
            self.events.add(self.map.numbers.active, offset, length)
            for image in self.images:
                # Whole blocks are marked: a longer device's partial last block may reach further in an image's map.
                start, end = offset // BLOCK * BLOCK, -(-(offset + length) // BLOCK) * BLOCK
                end = min(end, len(self.data), len(image.data))
                if start < end:
                    image.events.add(image.taken.number, start, end - start)

    def write_image(self, image: Image, offset: int, length: int) -> None:
        """Write into an image."""
        self.map.mark_image_write(image.taken, [(offset, length)])
        for other in self.images:
            if other.taken.generation == image.taken.generation and other.taken.number >= image.taken.number:
                other.events.add(other.taken.number, offset, length)
        if image.taken.generation == self.map.generation:
            self.events.add(self.map.numbers.active, offset, length)
        image.data[offset : offset + length] = bytes([next(self.fill)]) * length
        image.own[offset : offset + length] = b"\1" * length

    def take(self, found: ResetReason | None = None) -> Image:
        """Take a snapshot and hold its image."""
        before = self.map.generation
        plan = self.map.prepare_take(next(self.ids), len(self.data), found)
        taken = self.map.commit_take(plan)
        if taken.generation != before:
            self.events = Events()
        events = Events(list(self.events.changes))
        self.images.append(Image(taken, events, bytearray(self.data), bytearray(len(self.data))))
        return self.images[-1]

    def restart(self) -> None:
        """Forget what belongs to the ended generation."""
        self.events = Events()

    def copy_image(self, image: Image) -> None:
        """A client copies an image whole."""
        self.copies.append(Copy(image.taken.generation, image.taken.number, bytes(image.data)))

    def copy_live(self) -> None:
        """A client copies the device itself, and remembers the number that was taken before it began."""
        self.copies.append(Copy(self.map.generation, self.map.numbers.changes, bytes(self.data)))

    def check_map(self, reading: Reading, events: Events) -> None:
        """Every answer is exactly the blocks of the changes remembered; no number is refused without need."""
        numbers = reading.numbers
        assert numbers.oldest <= max(0, numbers.changes - 126)
        middle = (numbers.oldest + numbers.changes) // 2
        for since in {numbers.oldest, middle, max(numbers.oldest, numbers.changes - 1), numbers.changes}:
            assert set(reading.changed_blocks(since)) == events.blocks_since(since)
        assert (reading.data == bytes(len(reading.data))) == (not events.changes)

    def check_increment(self, copy: Copy, reading: Reading, data: bytes | bytearray) -> None:
        """A copy brought up to date with the ranges of a map is equal, byte for byte."""
        numbers = reading.numbers
        if copy.generation != reading.generation or copy.number > numbers.changes:
            return
        if copy.number < numbers.oldest:
            with pytest.raises(GenerationChanged):
                reading.changed_ranges(copy.number)
            return
        patched = bytearray(copy.data)
        for offset, length in reading.changed_ranges(copy.number)[0]:
            patched[offset : offset + length] = data[offset : offset + length]
        assert patched == data

    def check_all(self) -> None:
        """Check every map and every copy against every later moment."""
        if self.map.distrusted is None:
            live = self.map.read()
            self.check_map(live, self.events)
            for copy in self.copies:
                self.check_increment(copy, live, self.data)
        for image in self.images:
            self.check_map(image.taken.reading(), image.events)
            for copy in self.copies:
                if (copy.generation, copy.number) < (image.taken.generation, image.taken.number):
                    self.check_increment(copy, image.taken.reading(), image.data)


OFFSETS = st.integers(0, 60_000)
LENGTHS = st.integers(1, 9_000)


def some_takes(machine: ChangeMapMachine) -> bool:
    """Whether a generation is old enough to end: most would be too short to slide otherwise."""
    return machine.device.map.numbers.changes >= 3


class ChangeMapMachine(RuleBasedStateMachine):
    """Any order of everything that can happen to a change map."""

    device: Device

    @initialize(size=st.integers(1, 40_000))
    def attach(self, size: int) -> None:
        """A tracker is attached."""
        self.device = Device(size)

    @rule(offset=OFFSETS, length=LENGTHS)
    def write(self, offset: int, length: int) -> None:
        """A write through the tracker."""
        self.device.write(*self.device.clip(offset, length))

    @rule(ranges=st.lists(st.tuples(OFFSETS, st.integers(1, 3_000)), max_size=4))
    def write_behind_and_mark(self, ranges: list[tuple[int, int]]) -> None:
        """Bytes change behind the tracker, and someone who knows tells it."""
        clipped = [self.device.clip(*each) for each in ranges]
        for each in clipped:
            self.device.write_behind(*each)
        self.device.mark(clipped)

    @rule()
    def mark_all(self) -> None:
        """Everything is marked dirty."""
        self.device.mark([(0, len(self.device.data))])

    @rule(
        good=st.tuples(OFFSETS, LENGTHS),
        bad=st.sampled_from([(0, 0), (0, 1 << 40), (1 << 64, 1), (-1, 1), (5, -1), (1, (1 << 64) - 1)]),
    )
    def refuse_a_bad_list(self, good: tuple[int, int], bad: tuple[int, int]) -> None:
        """A list with one bad range marks nothing."""
        before = [self.device.map.taken.reading(), *(image.taken.reading() for image in self.device.images)]
        with pytest.raises(InvalidRange):
            self.device.map.mark_dirty([self.device.clip(*good), bad])
        after = [self.device.map.taken.reading(), *(image.taken.reading() for image in self.device.images)]
        assert before == after  # the live map is checked by the invariant

    @precondition(lambda self: self.device.images)
    @rule(which=st.integers(0, 20), offset=OFFSETS, length=LENGTHS)
    def write_image(self, which: int, offset: int, length: int) -> None:
        """A snapshot image is written."""
        image = self.device.images[which % len(self.device.images)]
        offset %= len(image.data)
        self.device.write_image(image, offset, min(length, len(image.data) - offset))

    @rule(found=st.sampled_from([None, None, None, ResetReason.BYTES_MISSED]))
    def take(self, found: ResetReason | None) -> None:
        """A take; when it finds that bytes were missed, it is the first of a new generation."""
        image = self.device.take(found)
        if found:
            assert (image.taken.number, self.device.map.last_reset) == (1, found)

    @rule(count=st.integers(1, 260), offset=OFFSETS)
    def take_many(self, count: int, offset: int) -> None:
        """Many takes between two looks, enough to slide."""
        for step in range(count):
            self.device.write(*self.device.clip(offset + step * 977, 10))
            self.device.map.release(self.device.take().taken)
            self.device.images.pop()
        self.device.copy_live()

    @rule()
    def abort_a_take(self) -> None:
        """A take is prepared and dropped."""
        before = (self.device.map.generation, self.device.map.numbers, self.device.map.taken)
        self.device.map.prepare_take(next(self.device.ids))
        assert before == (self.device.map.generation, self.device.map.numbers, self.device.map.taken)

    @rule()
    def take_by_a_stale_plan(self) -> None:
        """A plan that another take overtook is refused."""
        plan = self.device.map.prepare_take(next(self.device.ids))
        self.device.take()
        numbers = self.device.map.numbers
        with pytest.raises(StalePlan):
            self.device.map.commit_take(plan)
        assert self.device.map.numbers == numbers

    @precondition(lambda self: self.device.images)
    @rule(which=st.integers(0, 20))
    def release(self, which: int) -> None:
        """An image goes, and goes again."""
        image = self.device.images.pop(which % len(self.device.images))
        self.device.map.release(image.taken)
        self.device.map.release(image.taken)

    @rule(which=st.integers(0, 20))
    def copy(self, which: int) -> None:
        """A client copies the device and an image."""
        self.device.copy_live()
        if self.device.images:
            self.device.copy_image(self.device.images[which % len(self.device.images)])

    @precondition(some_takes)
    @rule()
    def reset(self) -> None:
        """A new generation is asked for."""
        self.device.map.reset(next(self.device.ids), ResetReason.REQUESTED)
        self.device.restart()

    @precondition(some_takes)
    @rule(size=st.integers(1, 40_000))
    def resize(self, size: int) -> None:
        """The device changes its size."""
        changed = size != len(self.device.data)
        assert self.device.map.resize(size, next(self.device.ids)) == changed
        if changed:
            self.device.data = (self.device.data + bytearray(size))[:size]
            self.device.restart()

    @precondition(some_takes)
    @rule(grown=st.integers(1, 9_000))
    def write_past_the_end(self, grown: int) -> None:
        """The device grew unnoticed: no answer from the live map, and the next take begins a generation."""
        size = len(self.device.data)
        self.device.data += bytes(grown)
        self.device.map.record_write(size - 1, 2)
        with pytest.raises(GenerationChanged):
            self.device.map.read(View.LIVE)
        image = self.device.take()
        assert (image.taken.number, self.device.map.geometry.size) == (1, size + grown)

    @rule()
    def stop_and_continue(self) -> None:
        """A clean stop and start: the live map continues, the taken one says no less than before."""
        for image in self.device.images:
            self.device.map.release(image.taken)
        self.device.images.clear()
        taken = self.device.map.taken.reading()
        self.device.map = ChangeMap.restore(self.device.map.read())
        lowered = self.device.map.read(View.TAKEN)
        assert lowered.numbers.changes == taken.numbers.changes
        assert all(new >= old for new, old in zip(lowered.data, taken.data, strict=True))

    @invariant()
    def nothing_is_missed(self) -> None:
        """Every map answers exactly, every copy can be brought up to date."""
        self.device.check_all()


TestChangeMapMachine = ChangeMapMachine.TestCase
TestChangeMapMachine.settings = settings(
    max_examples=150,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


@pytest.mark.parametrize("seed", range(3))
def test_700_takes_in_a_row_never_miss_a_byte(seed: int) -> None:
    """Increments over 1 to 255 takes are exact or refused, across four slides, and no number comes twice."""
    dice = random.Random(seed)
    device = Device(12 * BLOCK - 1000)
    numbers = []
    copies: list[Copy] = []
    for _ in range(700):
        for _ in range(dice.choice([0, 0, 1, 1, 2])):
            device.write(*device.clip(dice.randrange(1 << 16), dice.randrange(1, 6_000)))
        image = device.take()
        numbers.append(image.taken.number)
        device.copies = [copies[-back] for back in (1, 2, 60, 125, 126, 127, 254, 255) if back <= len(copies)]
        device.check_all()
        copies.append(Copy(image.taken.generation, image.taken.number, bytes(image.data)))
        if len(device.images) > 2:
            device.map.release(device.images.pop(0).taken)
    assert numbers == list(range(1, 701))
    assert device.map.numbers.base == 512
    assert device.map.last_reset is ResetReason.ATTACHED


def test_a_block_that_never_changes_again_is_never_reported_again() -> None:
    """However often the window slides, a block changed long ago stays "changed" but is in no increment."""
    device = Device(3 * BLOCK)
    device.write(0, 1)
    for _ in range(600):
        device.map.release(device.take().taken)
        device.images.clear()
    live = device.map.read()
    assert live.data == b"\1\0\0"
    assert all(live.changed_blocks(since) == [] for since in range(live.numbers.oldest, 601))


def test_pages_of_ranges_join_to_the_whole_answer() -> None:
    """Asking for a few ranges at a time, from each next offset on, gives what one call gives."""
    device = Device(50 * BLOCK + 7)
    for block in [0, 1, 4, 9, 10, 11, 30, 50]:
        device.write(block * BLOCK, 1)
    live = device.map.read()
    whole, end = live.changed_ranges(0)
    assert end == len(device.data)
    assert whole[-1] == Range(50 * BLOCK, 7)
    for page in range(1, 7):
        joined: list[Range] = []
        offset = 0
        while offset < end:
            ranges, offset = live.changed_ranges(0, offset, page)
            joined += ranges
            assert 0 < len(ranges) <= page
        assert joined == whole
