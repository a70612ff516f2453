# SPDX-License-Identifier: GPL-2.0-or-later
"""A random program over one file that knows what the file must hold: `python -m tests.vm.guest.fsx FILE SEED BYTES`.

In the manner of fsx: it writes, maps, truncates, punches, clones, syncs and drops caches at random, and compares every
byte it reads with a model in memory. It knows nothing of trackers or snapshots. One seed is one sequence.

It obeys lines on its standard input, between two operations: `pause` is answered with `paused OPERATIONS LENGTH SHA256` of the
model and followed by a wait for `go`; `stop` (or the end of the input) reads the whole file once more and is answered with
`done OPERATIONS`. The first wrong byte is told as `wrong …`, and the exit status is 1.
"""

import ctypes
import hashlib
import mmap
import os
import random
import select
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

PAGE = mmap.PAGESIZE
LONGEST = 64 << 10
# linux/falloc.h
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 16

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class WrongBytes(Exception):
    """Raised when the file holds something else than the model."""


@dataclass(slots=True)
class Program:
    """The file, its model, and the operations; each method does one of them at a random place."""

    path: Path
    chance: random.Random
    most: int
    """Of the file, in bytes; whole pages."""
    model: bytearray = field(default_factory=bytearray)
    count: int = 0
    fd: int = -1

    def step(self) -> None:
        """Do one operation. Raises ``WrongBytes``."""
        self.count += 1
        (operation,) = self.chance.choices(list(OPERATIONS), list(OPERATIONS.values()))
        operation(self)

    def open(self) -> None:
        """Open the file, or close it and open it again."""
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def compare(self, start: int, data: bytes, how: str) -> None:
        """Compare bytes that were read with the model. Raises ``WrongBytes``."""
        expected = self.model[start : start + len(data)]
        if data != expected:
            at = next(
                number for number, pair in enumerate(zip(data, expected, strict=True)) if len({*pair}) > 1
            )
            raise WrongBytes(
                f"operation {self.count}, {how}: byte {start + at} is {data[at]} and not {expected[at]}"
                f" (read {start}+{len(data)} of {len(self.model)})"
            )

    def compare_all(self) -> None:
        """Compare the whole file, its length too. Raises ``WrongBytes``."""
        if (size := os.fstat(self.fd).st_size) != len(self.model):
            raise WrongBytes(f"operation {self.count}: it is {size} bytes long and not {len(self.model)}")
        self.compare(0, os.pread(self.fd, size, 0), "all")

    def write(self) -> None:
        """Write, also past the end."""
        start, length = self._somewhere(self.most)
        self._put(start, data := self.chance.randbytes(length))
        assert os.pwrite(self.fd, data, start) == length

    def read(self) -> None:
        """Read."""
        start, length = self._somewhere(len(self.model))
        data = os.pread(self.fd, length, start)
        assert len(data) == length
        self.compare(start, data, "read")

    def write_direct(self) -> None:
        """Write whole pages past the page cache."""
        start, length = self._whole_pages(self.most)
        if length:
            with mmap.mmap(-1, length) as memory:
                memory.write(data := self.chance.randbytes(length))
                self._put(start, data)
                self._direct(lambda fd: os.pwritev(fd, [memory], start), length)

    def read_direct(self) -> None:
        """Read whole pages past the page cache."""
        start, length = self._whole_pages(len(self.model))
        if length:
            with mmap.mmap(-1, length) as memory:
                self._direct(lambda fd: os.preadv(fd, [memory], start), length)
                self.compare(start, memory[:], "read past the cache")

    def write_mapped(self) -> None:
        """Write through a mapping of the file."""
        start, length = self._somewhere(len(self.model))
        if length:
            with mmap.mmap(self.fd, len(self.model)) as memory:
                memory[start : start + length] = data = self.chance.randbytes(length)
                self._put(start, data)
                if self.chance.random() < 0.2:
                    memory.flush()

    def read_mapped(self) -> None:
        """Read through a mapping of the file."""
        start, length = self._somewhere(len(self.model))
        if length:
            with mmap.mmap(self.fd, len(self.model), prot=mmap.PROT_READ) as memory:
                self.compare(start, memory[start : start + length], "read by mapping")

    def truncate(self) -> None:
        """Make it shorter or longer, most often a little."""
        change = self.chance.randrange(-LONGEST, LONGEST)
        length = self.chance.randrange(self.most) if self.chance.random() < 0.1 else len(self.model) + change
        length = max(0, min(self.most, length))
        os.ftruncate(self.fd, length)
        self.model[length:] = bytes(max(0, length - len(self.model)))

    def punch(self) -> None:
        """Make a hole."""
        self._zero(PUNCH_HOLE | KEEP_SIZE)

    def zero(self) -> None:
        """Have the file system write zeros."""
        self._zero(ZERO_RANGE | KEEP_SIZE)

    def allocate(self) -> None:
        """Have room allocated, in holes too; no byte changes."""
        start, length = self._somewhere(self.most)
        if length:
            self._fallocate(KEEP_SIZE, start, length)

    def copy(self) -> None:
        """Have the kernel copy (or share, on xfs) a range."""
        source, length = self._somewhere(len(self.model))
        target = self.chance.randrange(0, self.most - length + 1)
        if not length or abs(source - target) < length:
            return
        done = 0
        while done < length:
            copied = os.copy_file_range(self.fd, self.fd, length - done, source + done, target + done)
            if not copied:
                raise WrongBytes(f"operation {self.count}, copy: it ends before {source + length}")
            done += copied
        self._put(target, bytes(self.model[source : source + length]))

    def sync(self) -> None:
        """Have it written to the disk, by the one call or the other."""
        self.chance.choice([os.fsync, os.fdatasync])(self.fd)

    def forget(self) -> None:
        """Have it written and read from the disk the next time."""
        os.fsync(self.fd)
        os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def _somewhere(self, end: int) -> tuple[int, int]:
        start = self.chance.randrange(end) if end else 0
        # Short and long ones alike.
        longest = self.chance.choice([16, 600, PAGE, LONGEST])
        return start, min(self.chance.randrange(1, longest + 1), end - start)

    def _whole_pages(self, end: int) -> tuple[int, int]:
        pages = end // PAGE
        start = self.chance.randrange(pages) if pages else 0
        return start * PAGE, min(self.chance.randrange(1, LONGEST // PAGE + 1), pages - start) * PAGE

    def _put(self, start: int, data: bytes) -> None:
        self.model.extend(bytes(max(0, start - len(self.model))))
        self.model[start : start + len(data)] = data

    def _direct(self, do: Callable[[int], int], length: int) -> None:
        fd = os.open(self.path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
        try:
            assert do(fd) == length
        finally:
            os.close(fd)

    def _zero(self, mode: int) -> None:
        start, length = self._somewhere(len(self.model))
        if length:
            self._fallocate(mode, start, length)
            self.model[start : start + length] = bytes(length)

    def _fallocate(self, mode: int, start: int, length: int) -> None:
        if _libc.fallocate(self.fd, mode, start, length):
            number = ctypes.get_errno()
            raise OSError(number, f"fallocate {mode} {start}+{length}: {os.strerror(number)}")


OPERATIONS: dict[Callable[[Program], None], int] = {
    Program.write: 20,
    Program.read: 15,
    Program.write_mapped: 12,
    Program.read_mapped: 8,
    Program.write_direct: 5,
    Program.read_direct: 5,
    Program.truncate: 6,
    Program.punch: 6,
    Program.zero: 4,
    Program.allocate: 3,
    Program.copy: 4,
    Program.sync: 3,
    Program.forget: 2,
    Program.open: 2,
}
"""How often each comes, in proportion."""


def main(path: str, seed: str, most: str) -> int:
    """Run until told to stop."""
    program = Program(Path(path), random.Random(int(seed)), int(most))
    program.open()
    try:
        while True:
            if select.select([sys.stdin], [], [], 0)[0]:
                order = sys.stdin.readline()
                if order == "pause\n":
                    digest = hashlib.sha256(program.model).hexdigest()
                    print("paused", program.count, len(program.model), digest, flush=True)
                    order = sys.stdin.readline()
                if order != "go\n":
                    program.compare_all()
                    print("done", program.count, flush=True)
                    return 0
            program.step()
    except (WrongBytes, OSError) as error:
        print("wrong:", error, flush=True)
        return 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
