# SPDX-License-Identifier: GPL-2.0-or-later
"""A model of the kernel's change map: two byte tables and their numbers, as the patch set v6 has them, defects included.

The defects are numbered as in tests/unit/test_cbt_defects.py. What would be a fault or a leak in the kernel raises ``Oops``.
"""

from __future__ import annotations

import errno
import uuid

SECTOR_SHIFT = 9
_U64 = (1 << 64) - 1


class Oops(AssertionError):
    """Raised when the kernel would have come to harm."""


class KernelError(Exception):
    """Raised to answer with an errno."""

    def __init__(self, number: int) -> None:
        super().__init__(errno.errorcode[number])
        self.errno = number


class ModelMap:
    """The map of one device; ``capacity`` in sectors."""

    def __init__(
        self,
        capacity: int,
        *,
        minimum_shift: int = 16,
        maximum_count: int = 2_097_152,
        maximum_shift: int = 26,
    ) -> None:
        if capacity <= 0:
            raise KernelError(errno.ENOMEM)  # defect 26
        self.capacity = capacity
        self.shift = minimum_shift
        while self._count() > maximum_count and self.shift < maximum_shift:
            self.shift += 1
        self.count = self._count()
        self.read_map = bytearray(self.count)
        self.write_map = bytearray(self.count)
        self.previous, self.active = 0, 1
        self.generation = uuid.uuid4()
        self.corrupted = False

    def _count(self) -> int:
        return -(-self.capacity >> (self.shift - SECTOR_SHIFT))

    def switch(self) -> None:
        """A take. Defect 6: at the wrap the old number stands beside the new id. Defect 7: the map read is not refreshed."""
        self.previous = self.active
        self.active += 1
        if self.active == 256:
            self.active = 1
            self.write_map[:] = bytes(self.count)
            self.generation = uuid.uuid4()
        else:
            self.read_map[:] = self.write_map

    def _set(self, start: int, count: int, number: int, table: bytearray) -> bool:
        # In sector_t: defects 10 (a count of 0) and 11 (overflow). What is before the end is marked first: 12.
        shift = self.shift - SECTOR_SHIFT
        first, last = start >> shift, ((start + count - 1) & _U64) >> shift
        for block in range(first, min(last, self.count) + 1):
            if block >= self.count:
                return False
            table[block] = max(table[block], number & 255)
        return first <= self.count

    def record(self, start: int, count: int) -> bool:
        """A write of sectors; False when it is not in the map, which is not trusted any more then (defect 8)."""
        if self.corrupted:
            return False
        if not self._set(start, count, self.active, self.write_map):
            self.corrupted = True
            return False
        return True

    def mark(self, start: int, count: int) -> None:
        """A mark, or a write to the image. Defect 33: not in a map that is not trusted."""
        if (
            self.corrupted
            or not self._set(start, count, self.active, self.write_map)
            or not self._set(start, count, self.previous, self.read_map)
        ):
            raise KernelError(errno.EINVAL)

    def part(self, offset: int, length: int) -> bytes:
        """What CBTMAP copies out. Defect 9: nothing of it when the other table is not trusted. Defect 5: the check underflows."""
        if self.corrupted:
            raise KernelError(errno.EFAULT)
        if length > (self.count - offset) & _U64:
            raise KernelError(errno.ENODATA)
        if offset > self.count:
            raise Oops(f"{length} bytes of kernel memory behind the map went out")
        return bytes(self.read_map[offset : offset + length])
