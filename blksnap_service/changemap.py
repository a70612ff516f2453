# SPDX-License-Identifier: GPL-2.0-or-later
"""The change map of one origin in motion: writes, marks, takes, loss of trust, resets.

The state that the rules of `cbt` are about: a live map, the maps of the takes whose images are held, and the
generation they belong to. Every backend must behave like it; it is the oracle of the tests and as slow as plain
Python. Pure, and chance comes from outside: the caller brings every generation id.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from blksnap_service.cbt import (
    MAX_NUMBER,
    GenerationChanged,
    GenerationId,
    Geometry,
    InvalidMap,
    Number,
    Numbers,
    Range,
    Reading,
    ResetReason,
    StalePlan,
    View,
    slide,
)


def _raise(data: bytearray, blocks: Iterable[int], byte: int) -> None:
    for block in blocks:
        data[block] = max(data[block], byte)


@dataclass(eq=False, slots=True)
class TakenMap:
    """The map of one take: a copy that only marks touch. Two takes are never equal."""

    generation: GenerationId
    geometry: Geometry
    numbers: Numbers
    """The numbers just after the take: `numbers.changes` is the number of this one."""
    _data: bytearray = field(repr=False)

    @property
    def number(self) -> Number:
        """The number of this take; 0 for the empty map that stands in before the first."""
        return self.numbers.changes

    def reading(self) -> Reading:
        """What the map says now."""
        return Reading(self.generation, self.geometry, self.numbers, bytes(self._data))

    def mark(self, blocks: Iterable[int]) -> None:
        """Make blocks part of the increment up to this take. Only `ChangeMap` knows what else to mark."""
        _raise(self._data, blocks, self.numbers.byte_for_changes)


@dataclass(frozen=True, slots=True)
class TakePlan:
    """A prepared take. It has consumed nothing; dropping it is how a take is aborted (defect 34)."""

    before: tuple[GenerationId, Numbers]
    generation: GenerationId
    geometry: Geometry
    numbers: Numbers
    slides: bool
    reset: ResetReason | None
    """Why the old generation ends with this take, if it does."""


class ChangeMap:
    """The live map of one origin, the maps of its takes, and the generation they belong to."""

    _geometry: Geometry
    _generation: GenerationId
    _numbers: Numbers
    _live: bytearray
    _taken: TakenMap
    _last_reset: ResetReason
    _distrusted: ResetReason | None

    def __init__(self, size: int, generation: GenerationId, block_size: int = 0) -> None:
        """Start a generation for `size` bytes. `block_size` 0: by the rule. Raises `InvalidSize`."""
        self._requested = block_size
        self._held: list[TakenMap] = []
        self._start(Geometry.of(size, block_size), generation, ResetReason.ATTACHED)

    @classmethod
    def restore(cls, saved: Reading) -> ChangeMap:
        """Continue a saved live map. Raises `InvalidMap` when its bytes cannot be of its numbers.

        Raises `InvalidSize` too. The map of the last take was not saved. In its place stands the live map with its
        newest bytes lowered to that take's number: it says at least what that map said.
        """
        geometry = Geometry.of(saved.geometry.size, saved.geometry.block_size)
        numbers, data = saved.numbers, saved.data
        if len(data) != geometry.block_count:
            raise InvalidMap(f"the saved map has {len(data)} bytes, not {geometry.block_count}")
        if max(data) > numbers.byte_for_active:
            raise InvalidMap("the saved map holds bytes that are newer than the map itself")
        by_rule = geometry == Geometry.of(geometry.size)
        restored = cls(geometry.size, saved.generation, 0 if by_rule else geometry.block_size)
        restored._numbers = numbers
        restored._live = bytearray(data)
        lowered = bytearray(min(byte, numbers.byte_for_changes) for byte in data)
        restored._taken = TakenMap(saved.generation, geometry, numbers, lowered)
        return restored

    @property
    def generation(self) -> GenerationId:
        """The generation being written."""
        return self._generation

    @property
    def geometry(self) -> Geometry:
        """How the origin is cut into blocks in this generation."""
        return self._geometry

    @property
    def numbers(self) -> Numbers:
        """The numbers of this generation."""
        return self._numbers

    @property
    def taken(self) -> TakenMap:
        """The map of the last take of this generation; before the first, an empty one with number 0."""
        return self._taken

    @property
    def last_reset(self) -> ResetReason:
        """Why this generation started."""
        return self._last_reset

    @property
    def distrusted(self) -> ResetReason | None:
        """Why the live map answers no more questions, if so; the next take or reset ends its generation."""
        return self._distrusted

    def record_write(self, offset: int, length: int) -> None:
        """Note a write, write-zeroes or passed-down discard, before it is submitted.

        Never raises: tracking must not come between a write and its copy (defect 8). What lies past the end of the
        map (a device that grew unnoticed) cannot be noted: the live map is not trusted any more.
        """
        _raise(self._live, self._geometry.blocks(offset, length), self._numbers.byte_for_active)
        if length > 0 and offset + length > self._geometry.size:
            self.distrust(ResetReason.GROWN)

    def mark_dirty(self, ranges: Sequence[Range | tuple[int, int]]) -> int:
        """Make ranges part of the next increment and of the one being copied now.

        Returns how many blocks that were, counted once per range.
        The whole list is checked before anything is marked (defects 2, 10, 11, 12). Marks the live map with the
        active number, the map of the last take with its own, and so those of older takes whose images are held:
        what changed behind the tracker shows through them too. Raises `InvalidRange`.
        """
        runs = self._geometry.validate(ranges)
        for run in runs:
            _raise(self._live, run, self._numbers.byte_for_active)
            for taken in self._takes():
                taken.mark(taken.geometry.blocks(*self._geometry.bytes(run)))
        return sum(map(len, runs))

    def mark_all_dirty(self) -> int:
        """Mark the whole device dirty: how many blocks. Works on a distrusted map too (defect 33)."""
        return self.mark_dirty([Range(0, self._geometry.size)])

    def mark_image_write(self, written: TakenMap, ranges: Sequence[Range | tuple[int, int]]) -> None:
        """Note that the image of a take is about to be written: it will differ from its instant (defect 29).

        A copy made of that image holds the new bytes: they belong to the increment that ends at the take, and the
        next one must bring the origin's bytes back. Marks the map of the take, those of later takes of its
        generation, and the live map if it is still of that generation. Raises `InvalidRange`.
        """
        for run in written.geometry.validate(ranges):
            for taken in {*self._takes(), written}:
                if taken.generation == written.generation and taken.number >= written.number:
                    taken.mark(run)
            if written.generation == self._generation:
                _raise(self._live, run, self._numbers.byte_for_active)

    def prepare_take(
        self, next_generation: GenerationId, size: int | None = None, found: ResetReason | None = None
    ) -> TakePlan:
        """What a take would do now; changes nothing, consumes no number.

        `next_generation` begins with the take if the live map is not trusted or has no number left, if the device
        was found to have another `size`, or for any other reason `found` (defect 25).
        Raises `InvalidSize`, and `InvalidMap` when `next_generation` would begin but is the present one.
        """
        numbers = self._numbers
        before = (self._generation, numbers)
        reset = self._distrusted or found or self._resized(size)
        if reset is None and numbers.active == MAX_NUMBER:
            reset = ResetReason.NUMBERS_EXHAUSTED
        if reset is None:
            after = numbers.after_take()
            return TakePlan(before, self._generation, self._geometry, after, numbers.slides_next, reset)
        self._refuse_reuse(next_generation)
        geometry = Geometry.of(self._geometry.size if size is None else size, self._requested)
        return TakePlan(before, next_generation, geometry, Numbers().after_take(), slides=False, reset=reset)

    def commit_take(self, plan: TakePlan) -> TakenMap:
        """Do a prepared take. Writes and marks since `prepare_take` belong to the interval that ends here.

        After a slide both maps count from the new base. Raises `StalePlan` when a take, a reset or the loss of
        trust came between; then nothing has happened and no number is consumed.
        """
        lost_trust = self._distrusted is not None and plan.reset is None
        if plan.before != (self._generation, self._numbers) or lost_trust:
            raise StalePlan("the map is not the one this take was prepared for")
        if plan.reset:
            self._start(plan.geometry, plan.generation, plan.reset)
        elif plan.slides:
            self._live = slide(self._live)
        self._numbers = plan.numbers
        self._taken = TakenMap(self._generation, self._geometry, plan.numbers, bytearray(self._live))
        self._held.append(self._taken)
        return self._taken

    def take(self, next_generation: GenerationId) -> TakenMap:
        """Prepare and commit in one step."""
        return self.commit_take(self.prepare_take(next_generation))

    def release(self, taken: TakenMap) -> None:
        """The image of a take is gone: marks need not reach its map. Twice is no error (defect 22)."""
        self._held = [held for held in self._held if held is not taken]

    def distrust(self, reason: ResetReason) -> None:
        """Bytes were missed: the live map answers nothing until the generation ends.

        Taken maps stay valid (defect 9). The first reason is kept.
        """
        self._distrusted = self._distrusted or reason

    def reset(self, generation: GenerationId, reason: ResetReason, size: int | None = None) -> None:
        """Start a new generation, of another size if given: both maps new and empty, base 0, active 1.

        Everything new is made before anything old is let go (defect 4). Maps of held takes keep their own
        generation. Raises `InvalidSize`, and `InvalidMap` when `generation` is the present one.
        """
        self._refuse_reuse(generation)
        geometry = Geometry.of(self._geometry.size if size is None else size, self._requested)
        self._start(geometry, generation, reason)

    def resize(self, size: int, generation: GenerationId) -> bool:
        """Follow the size of the device: whether a generation started. Raises as `reset`."""
        reason = self._resized(size)
        if reason is not None:
            self.reset(generation, reason, size)
        return reason is not None

    def read(self, view: View = View.LIVE) -> Reading:
        """One consistent reading. Raises `GenerationChanged` for the live view of a distrusted map."""
        if view is View.TAKEN:
            return self._taken.reading()
        if self._distrusted:
            raise GenerationChanged(f"the map cannot be trusted ({self._distrusted}): a full copy is needed")
        return Reading(self._generation, self._geometry, self._numbers, bytes(self._live))

    def changed_ranges(
        self,
        generation: GenerationId,
        since: int,
        view: View = View.LIVE,
        offset: int = 0,
        max_ranges: int | None = None,
    ) -> tuple[list[Range], int]:
        """What changed since a number of a generation, as `Reading.changed_ranges`. Raises `GenerationChanged`."""
        if generation != self._generation:
            raise GenerationChanged(
                f"the generation is {self._generation}, not {generation}: a full copy is needed"
            )
        return self.read(view).changed_ranges(since, offset, max_ranges)

    def _takes(self) -> list[TakenMap]:
        return [taken for taken in self._held if taken is not self._taken] + [self._taken]

    def _resized(self, size: int | None) -> ResetReason | None:
        if size is None or size == self._geometry.size:
            return None
        return ResetReason.GROWN if size > self._geometry.size else ResetReason.SHRUNK

    def _refuse_reuse(self, generation: GenerationId) -> None:
        if generation == self._generation:
            raise InvalidMap(f"generation {generation} is in use: its numbers would be handed out twice")

    def _start(self, geometry: Geometry, generation: GenerationId, reason: ResetReason) -> None:
        live, copy = bytearray(geometry.block_count), bytearray(geometry.block_count)
        self._geometry, self._generation, self._numbers = geometry, generation, Numbers()
        self._live, self._taken = live, TakenMap(generation, geometry, Numbers(), copy)
        self._last_reset, self._distrusted = reason, None
