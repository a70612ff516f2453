# SPDX-License-Identifier: GPL-2.0-or-later
"""
The workload: a process of its own that writes to the tracked disk as users do, until it is told to stop.

`python -m demo.work --mount DIRECTORY` works on a mounted file system, `--uri NBD_URI` on the bare socket. One line on
standard output, beginning with `+ `, per finished piece of work; SIGTERM ends it after the present piece. What it writes comes from `--seed`.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

Piece = Callable[[], str]

# What a line about a finished piece begins with; errors of the programs used come on the same stream.
DONE = "+ "

MIB = 1 << 20
PAGE = 4096

TREE_BYTES = 6 * MIB
TREES_KEPT = 3
ROWS = 2000
FILE_BYTES = 48 * MIB
PAGES_REWRITTEN = 60


class FileSystemWork:
    """Trees unpacked and removed, a database, a big file rewritten in place, trims and syncs."""

    def __init__(self, mount: Path, tar: Path, rng: random.Random) -> None:
        self._mount = mount
        self._tar = tar
        self._rng = rng
        self._trees: list[Path] = []
        self._numbers = itertools.count(1)
        self._file_count = self._pack()

    def pieces(self) -> Iterator[Piece]:
        """Give pieces of work for ever; each returns what it did, in words."""
        rotation = (
            self._unpack,
            self._insert,
            self._rewrite,
            self._delete_rows,
            self._sync,
            self._unpack,
            self._update,
            self._remove_tree,
            self._trim,
            self._insert,
            self._rewrite,
        )
        return itertools.cycle(rotation)

    def _pack(self) -> int:
        """Make the archive that is unpacked again and again: part of the Python library, which is always there."""
        library = Path(sysconfig.get_path("stdlib"))
        names, total = [], 0
        for path in sorted(library.rglob("*.py")):
            if "site-packages" in path.parts or not path.is_file():
                continue
            names.append(str(path.relative_to(library)))
            total += path.stat().st_size
            if total >= TREE_BYTES:
                break
        listing = "\n".join(names).encode()
        subprocess.run(["tar", "-C", library, "-chf", self._tar, "-T", "-"], input=listing, check=True)
        return len(names)

    def _unpack(self) -> str:
        tree = self._mount / f"tree-{next(self._numbers)}"
        tree.mkdir()
        subprocess.run(["tar", "-C", tree, "--no-same-owner", "-xf", self._tar], check=True)
        self._trees.append(tree)
        return f"unpacked {self._file_count} files into {tree.name}"

    def _remove_tree(self) -> str:
        if len(self._trees) < TREES_KEPT:
            return self._unpack()
        tree = self._trees.pop(0)
        shutil.rmtree(tree)
        return f"removed {tree.name}"

    def _database(self) -> sqlite3.Connection:
        database = sqlite3.connect(self._mount / "database.sqlite")
        database.execute("CREATE TABLE IF NOT EXISTS entry (id INTEGER PRIMARY KEY, content BLOB)")
        return database

    def _change(self, statement: str, rows: list[tuple[object, ...]]) -> int:
        """Change the database in one transaction, which SQLite ends with an fsync."""
        database = self._database()
        try:
            with database:
                return database.executemany(statement, rows).rowcount
        finally:
            database.close()

    def _insert(self) -> str:
        rows: list[tuple[object, ...]] = [
            (self._rng.randbytes(self._rng.randint(50, 900)),) for _ in range(ROWS)
        ]
        count = self._change("INSERT INTO entry (content) VALUES (?)", rows)
        return f"inserted {count} rows into SQLite"

    def _update(self) -> str:
        rows: list[tuple[object, ...]] = [(self._rng.randbytes(300), self._rng.randrange(7))]
        count = self._change("UPDATE entry SET content = ? WHERE id % 7 = ?", rows)
        return f"updated {count} rows in SQLite"

    def _delete_rows(self) -> str:
        count = self._change("DELETE FROM entry WHERE id % 5 = ?", [(self._rng.randrange(5),)])
        return f"deleted {count} rows from SQLite"

    def _rewrite(self) -> str:
        path = self._mount / "big-file"
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if os.fstat(fd).st_size < FILE_BYTES:
                os.posix_fallocate(fd, 0, FILE_BYTES)
            for _ in range(PAGES_REWRITTEN):
                os.pwrite(fd, self._rng.randbytes(PAGE), self._rng.randrange(FILE_BYTES // PAGE) * PAGE)
            os.fsync(fd)
        finally:
            os.close(fd)
        return f"rewrote {PAGES_REWRITTEN} pages of a {FILE_BYTES // MIB} MiB file"

    def _trim(self) -> str:
        subprocess.run(["fstrim", self._mount], check=True)
        return "trimmed the free space"

    def _sync(self) -> str:
        subprocess.run(["sync", "--file-system", self._mount], check=True)
        return "synced"


class SocketWork:
    """Writes, zeroes and discards of qemu-io and fio on the NBD socket, where no file system can be mounted."""

    def __init__(self, uri: str, size: int, rng: random.Random) -> None:
        self._uri = uri
        self._size = size
        self._rng = rng

    def pieces(self) -> Iterator[Piece]:
        """Give pieces of work for ever; each returns what it did, in words."""
        return itertools.cycle((self._write, self._random_writes, self._zero, self._write, self._discard))

    def _range(self, most: int) -> tuple[int, int]:
        length = self._rng.randint(1, most // PAGE) * PAGE
        return self._rng.randrange((self._size - length) // PAGE) * PAGE, length

    def _qemu_io(self, *commands: str) -> None:
        words = [word for command in (*commands, "flush") for word in ("-c", command)]
        subprocess.run(["qemu-io", "-f", "raw", *words, self._uri], check=True, stdout=subprocess.DEVNULL)

    def _write(self) -> str:
        ranges = [self._range(2 * MIB) for _ in range(4)]
        self._qemu_io(*(f"write -P {self._rng.randint(1, 255)} {start} {length}" for start, length in ranges))
        return f"qemu-io wrote {sum(length for _, length in ranges) // 1024} KiB"

    def _zero(self) -> str:
        start, length = self._range(4 * MIB)
        self._qemu_io(f"write -z -u {start} {length}")
        return f"qemu-io zeroed {length // 1024} KiB"

    def _discard(self) -> str:
        start, length = self._range(4 * MIB)
        self._qemu_io(f"discard {start} {length}")
        return f"qemu-io discarded {length // 1024} KiB"

    def _random_writes(self) -> str:
        start, _ = self._range(32 * MIB)
        start = min(start, self._size - 64 * MIB)
        subprocess.run(
            [
                "fio", "--name=demo", "--ioengine=nbd", f"--uri={self._uri}", "--rw=randwrite", "--bs=4k", "--iodepth=8",
                f"--offset={max(0, start)}", "--size=64m", "--io_size=1m", f"--randseed={self._rng.getrandbits(31)}",
                "--end_fsync=1", "--output=/dev/null",
            ],
            check=True,
        )  # fmt: skip
        return "fio wrote 1024 KiB in random pages"


def main() -> int:
    """Work until told to stop."""
    parser = argparse.ArgumentParser(
        prog="demo.work", description="write to the tracked disk until told to stop"
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--mount", type=Path, help="work on the file system mounted there")
    where.add_argument("--uri", help="work on this NBD export")
    parser.add_argument(
        "--scratch", type=Path, required=True, help="a directory for the archive that is unpacked"
    )
    parser.add_argument("--size", type=int, default=0, help="bytes of the NBD export")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--pause", type=float, default=0.15, help="seconds between two pieces")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    enough = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: enough.set())
    work: FileSystemWork | SocketWork
    if arguments.mount:
        work = FileSystemWork(arguments.mount, arguments.scratch / "tree.tar", rng)
    else:
        work = SocketWork(arguments.uri, arguments.size, rng)
    try:
        for piece in work.pieces():
            print(f"{DONE}{piece()}", flush=True)
            if enough.wait(arguments.pause):
                return 0
    except (OSError, sqlite3.Error, subprocess.CalledProcessError) as error:
        print(f"failed: {error}", flush=True)
    return 1


if __name__ == "__main__":
    sys.exit(main())
