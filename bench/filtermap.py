# SPDX-License-Identifier: GPL-2.0-or-later
"""
The kernel filter's map, from ioctl to a client's eyes: what the service adds to the time the kernel takes.

The kernel is none: its place is taken by a copy of the same bytes into the same buffer, called in the same way. So the time
of the calls themselves is not in it, and the difference is what is measured: checks, memory file, seals, comparison.
"""

from __future__ import annotations

import asyncio
import ctypes
import mmap
import os
import struct
import time
import uuid
from pathlib import Path

import numpy as np

from bench.report import Bar, Figure, Sense, Spread
from blksnap_service.backends.blkfilter import uapi
from blksnap_service.backends.blkfilter.kernel import BLKGETDISKSEQ, BLKGETSIZE64, FilteredDevice, Target
from blksnap_service.backends.blkfilter.tracker import FilterTracker, look, reading_of
from blksnap_service.cbt import View
from blksnap_service.fds import OwnedFd
from blksnap_service.storage import Identity

BLOCKS = 2 << 20
_BLOCK_SHIFT = 16
_BAR = Bar(Sense.AT_MOST, 20.0)


class CopyingKernel:
    """Answers about one map; a ``kernel.System``."""

    def __init__(self) -> None:
        self._map = np.random.default_rng(1).integers(0, 20, BLOCKS, np.uint8)
        self._info = uapi.CBTINFO.pack(
            BLOCKS << _BLOCK_SHIFT, 1 << _BLOCK_SHIFT, BLOCKS, uuid.uuid4().bytes, 19
        )

    def open(self, path: str, flags: int) -> OwnedFd:
        """Open a file in place of a device."""
        return OwnedFd(os.open(path, flags | os.O_CLOEXEC))

    def ioctl(self, fd: int, request: int, argument: bytearray) -> None:
        """Copy what is asked for."""
        del fd
        if request == BLKGETSIZE64:
            argument[:] = (BLOCKS << _BLOCK_SHIFT).to_bytes(8, "little")
        elif request != BLKGETDISKSEQ:
            _, command, _, address = uapi.CTL.unpack(argument)
            if command == uapi.CTL_CBTINFO:
                ctypes.memmove(address, self._info, len(self._info))
            else:
                offset, length, buffer = struct.unpack("=IIQ", ctypes.string_at(address, uapi.CBTMAP.size))
                self.copy(offset, length, buffer)

    def copy(self, offset: int, length: int, address: int) -> None:
        """What the ioctl itself would take, at least."""
        ctypes.memmove(address, self._map.ctypes.data + offset, length)


async def filter_map(directory: Path, rounds: int) -> list[Figure]:
    """Measure `rounds` times, in processor time of this process."""
    kernel = CopyingKernel()
    path = directory / "filtered"
    path.touch()
    device = FilteredDevice(kernel, uapi.V615, Target(str(path), Identity(0, 0)))
    raw: list[float] = []
    whole: list[float] = []
    again: list[float] = []
    buffer = np.ones(BLOCKS, np.uint8)
    for number in range(-1, rounds):
        info, reason = await asyncio.to_thread(look, device)
        tracker = FilterTracker(device, "filtered", reading_of(info, reason))
        start = time.process_time_ns()
        kernel.copy(0, BLOCKS, buffer.ctypes.data)
        times = [time.process_time_ns() - start]
        for _ in range(2):
            start = time.process_time_ns()
            await _to_the_client(tracker)
            times.append(time.process_time_ns() - start)
        tracker.close()
        if number >= 0:
            for kept, took in zip((raw, whole, again), times, strict=True):
                kept.append(took / 1e6)
    part = f"kernel filter's map of {BLOCKS >> 20} Mi blocks to a client's hands"
    over = [took - least for took, least in zip(whole, raw, strict=True)]
    return [
        Figure(part, "the copy alone", "ms", Spread.of(raw)),
        Figure(part, "over that, first time", "ms", Spread.of(over), _BAR),
        Figure(part, "in all, when it says the same again", "ms", Spread.of(again)),
    ]


async def _to_the_client(tracker: FilterTracker) -> int:
    opened = await tracker.open_map(View.TAKEN)
    with opened.fd, mmap.mmap(opened.fd.fileno(), BLOCKS, prot=mmap.PROT_READ) as window:
        blocks = np.frombuffer(window, np.uint8)
        changed = int(np.count_nonzero(blocks))
        del blocks
        return changed
