# SPDX-License-Identifier: GPL-2.0-or-later
"""Clients that work on an origin for as long as a test needs them, and fail it when one of them finds a fault.

fio writes and verifies from four connections at once, each in a region of its own; qemu-io zeroes, discards, writes
unaligned and flushes in the region behind them. They are programs of others: what they read back is their own verdict.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import threading
from collections.abc import Callable, Iterator

from tests.nbd.datapath import MIB, Origin, qemu_io, run

Work = Callable[[Callable[[], bool]], None]
"""What a client does until the function it is given says that it shall stop."""
Report = Callable[[str], None]
"""Of the fixture ``report``."""
FIO_JOBS = 4
FIO_REGION = 3 * MIB
FIO_BYTES = FIO_JOBS * FIO_REGION
"""From the start of the origin."""


def fio(origin: Origin, seed: int, *, bytes_per_second: int = 0, loops: int = 1) -> None:
    """Write each of the four regions and verify it. Raises ``AssertionError`` when a byte is not what was written."""
    run(
        "fio",
        "--name=client",
        "--ioengine=nbd",
        f"--uri={origin.uri()}",
        "--thread",
        "--rw=randwrite",
        "--bsrange=512-128k",
        "--blockalign=512",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--do_verify=1",
        "--verify_state_save=0",
        f"--numjobs={FIO_JOBS}",
        f"--size={FIO_REGION}",
        f"--offset_increment={FIO_REGION}",
        "--iodepth=8",
        "--fsync=50",
        f"--loops={loops}",
        f"--randseed={seed}",
        "--allrandrepeat=1",
        # Not --rate_iops: with --verify fio 3.33 never ends then, with any server.
        *([f"--rate={bytes_per_second}"] if bytes_per_second else []),
    )


def odds_and_ends(origin: Origin, chance: random.Random, first: int, length: int) -> None:
    """Zero, discard and write at odd places of a region, and read back what was written last."""
    commands = []
    for _ in range(8):
        size = chance.choice([1, 511, 4096, 20_000, 65_536, 200_000])
        at = first + chance.randrange(0, length - size)
        value = chance.randrange(1, 256)
        word = chance.choice(
            ["write -z", "write -z -u", "discard", f"write -f -P {value}", f"write -P {value}"]
        )
        commands.append(f"{word} {at} {size}")
        if "P" in word:
            commands.append(f"read -P {value} {at} {size}")
    qemu_io(origin.uri(), *commands, "flush")


@contextlib.contextmanager
def running(*works: Work) -> Iterator[Callable[[], bool]]:
    """Run each of ``works`` in a thread for the block; each is given a function that says when to stop.

    Gives a function that says whether all are still at it. Raises the first failure of a work, after all have ended.
    """
    stop = threading.Event()
    failures: list[BaseException] = []

    def guarded(work: Work) -> None:
        try:
            work(stop.is_set)
        except BaseException as failure:  # noqa: BLE001 - raised again below, in the thread of the test
            failures.append(failure)
            stop.set()

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    try:
        yield lambda: not stop.is_set()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]


def fio_work(origin: Origin, seed: int) -> Work:
    """Return a work that runs fio again and again, at full speed and slowly in turns."""

    def work(stopping: Callable[[], bool]) -> None:
        for number in itertools.count():
            fio(origin, seed + number, bytes_per_second=0 if number % 3 == 0 else 2 * MIB)
            if stopping():
                return

    return work


def odd_work(origin: Origin, seed: int) -> Work:
    """Return a work that does odds and ends behind fio's regions."""

    def work(stopping: Callable[[], bool]) -> None:
        chance = random.Random(seed)
        while not stopping():
            odds_and_ends(origin, chance, FIO_BYTES, origin.size - FIO_BYTES)

    return work
