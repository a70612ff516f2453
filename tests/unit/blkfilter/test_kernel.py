# SPDX-License-Identifier: GPL-2.0-or-later
"""Calls to the kernel this runs on, as far as any kernel can answer them."""

from __future__ import annotations

import errno
import os
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator

import pytest

from blksnap_service.backends.blkfilter.kernel import BLKGETSIZE64, RealSystem
from blksnap_service.fds import OwnedFd

MIB = 1 << 20
BLKZEROOUT = 0x127F


@pytest.fixture
def disk() -> Iterator[OwnedFd]:
    """A loop device over 128 MiB of memory."""
    if os.geteuid() != 0:
        pytest.skip("not root: a loop device cannot be made")
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
        file.truncate(128 * MIB)
        made = subprocess.run(
            ["losetup", "--find", "--show", file.name], check=False, capture_output=True, text=True
        )
        if made.returncode:
            pytest.skip(f"not root enough: no loop device can be made here ({made.stderr.strip()})")
        path = made.stdout.strip()
        try:
            with RealSystem().open(path, os.O_RDWR) as fd:
                yield fd
        finally:
            subprocess.run(["losetup", "--detach", path], check=True)


def test_answers_and_errors_are_the_kernels(disk: OwnedFd) -> None:
    """The argument is changed in place; an errno is an OSError."""
    argument = bytearray(8)
    RealSystem().ioctl(disk.fileno(), BLKGETSIZE64, argument)
    assert int.from_bytes(argument, "little") == 128 * MIB
    with pytest.raises(OSError, match="Invalid argument") as caught:
        RealSystem().ioctl(disk.fileno(), 0xC02012FE, bytearray(32))
    assert caught.value.errno == errno.EINVAL


def test_a_call_with_a_large_argument_lets_others_run(disk: OwnedFd) -> None:
    """The thread that waits for events would stop the whole service otherwise."""
    argument = bytearray(4096)
    struct.pack_into("QQ", argument, 0, 0, 128 * MIB)
    times: list[float] = []

    def work() -> None:
        times.append(time.monotonic())
        RealSystem().ioctl(disk.fileno(), BLKZEROOUT, argument)
        times.append(time.monotonic())

    thread = threading.Thread(target=work)
    ran: list[float] = []
    thread.start()
    while thread.is_alive():
        thread.join(0.001)
        ran.append(time.monotonic())
    started, ended = times
    assert any(started < moment < ended for moment in ran)
