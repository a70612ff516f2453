# SPDX-License-Identifier: GPL-2.0-or-later
"""What is done to a file system while snapshots of it come and go: programs that find out for themselves what they lost."""

import contextlib
import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tests.nbd.load import Work
from tests.vm.guest import devices
from tests.vm.machine import TREE

POLITELY = ("nice", "--adjustment=19")
"""Work never ends by itself: it takes the processors that whoever looks at it leaves."""


@dataclass(frozen=True, slots=True)
class Content:
    """What a file has to hold."""

    length: int
    sha256: str


class RandomProgram:
    """A running `fsx.py` over one file; a context manager, which checks the whole file at the end."""

    def __init__(self, file: Path, seed: int, most: int) -> None:
        """Start it. `most` is of the file, in bytes."""
        self.operations = 0
        words = (*POLITELY, sys.executable, "-m", "tests.vm.guest.fsx", str(file), str(seed), str(most))
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._process:
            if kind is None:
                self._ask("stop", "done")
                assert self._process.wait(60) == 0
            else:
                self._process.kill()

    @contextlib.contextmanager
    def paused(self) -> Iterator[Content]:
        """What the file holds for as long as the block lasts."""
        length, sha256 = self._ask("pause", "paused")
        try:
            yield Content(int(length), sha256)
        finally:
            self._say("go")

    def _ask(self, order: str, answer: str) -> list[str]:
        self._say(order)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        first, *words = line.split() or ["nothing"]
        assert first == answer, line
        self.operations = int(words[0])
        return words[1:]

    def _say(self, order: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{order}\n")
        self._process.stdin.flush()


def pack(archive: Path) -> None:
    """Make an archive of some hundred small files."""
    devices.run("tar", "--create", f"--file={archive}", f"--directory={TREE}", "datapath/src", "docs")


def unpack(archive: Path, directory: Path) -> None:
    """Unpack it into a new directory."""
    directory.mkdir()
    devices.run(*POLITELY, "tar", "--extract", f"--file={archive}", f"--directory={directory}")


def is_unpacked(archive: Path, directory: Path, *manner: str) -> bool:
    """Whether all of it is there, every byte. `manner` is a program that starts the one that looks."""
    words = (*manner, "tar", "--compare", f"--file={archive}", f"--directory={directory}")
    return subprocess.run(words, check=False, capture_output=True).returncode == 0


def unpacking(archive: Path, directory: Path) -> Work:
    """Return a work that unpacks, compares and removes again and again."""

    def work(stopping: Callable[[], bool]) -> None:
        for number in itertools.count():
            if stopping():
                return
            target = directory / f"tree-{number}"
            unpack(archive, target)
            assert is_unpacked(archive, target, *POLITELY)
            devices.run("rm", "--recursive", "--", str(target))

    return work


@contextlib.contextmanager
def frozen(directory: Path) -> Iterator[None]:
    """Freeze a file system, by the program of others, for as long as the block lasts."""
    devices.run("fsfreeze", "--freeze", str(directory))
    try:
        yield
    finally:
        devices.run("fsfreeze", "--unfreeze", str(directory))
