# SPDX-License-Identifier: GPL-2.0-or-later
"""Finds out which generation of the kernel filter there is, without doing anything to any device that matters.

A number that starts tracking in one generation controls it in another, and the one that creates a snapshot removes a
tracker in the oldest: so nothing is sent that any of them could carry out. The family is told by the nodes it makes; then
a filter of a name that does not exist is detached from a loop device made for that, which only a generation that has this
number answers with "there is none" (ENOENT). The version the module tells is the same for all.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from blksnap_service import sysblock
from blksnap_service.backends.blkfilter import control, uapi
from blksnap_service.backends.blkfilter.kernel import RealSystem, System
from blksnap_service.backends.blkfilter.uapi import V6, V7, V615, Generation
from blksnap_service.fds import OwnedFd

_BOGUS: Final = b"blksnap-probe"
_NOWHERE: Final = (1 << 64) - 1
_LOOP_CTL_GET_FREE: Final = 0x4C82
_LOOP_CONFIGURE: Final = 0x4C0A
_LOOP_CONFIG: Final = struct.Struct("=II232s64x")
"""loop_config: descriptor, block size, loop_info64 (flags at 52), reserved (include/uapi/linux/loop.h)."""
_LOOP_FLAGS_AT: Final = 52
_READ_ONLY_AUTOCLEAR: Final = 1 | 4
_ATTEMPTS: Final = 16


@dataclass(frozen=True, slots=True)
class Found:
    """The generation that is spoken here, or why there is none."""

    generation: Generation | None
    reason: str
    passing: bool = False
    """Whether what was in the way may be gone the next time, although there is nothing else to see then."""


@dataclass(frozen=True, slots=True)
class Sign:
    """What there is to see without asking the kernel anything. Another one: ask again."""

    nodes: tuple[tuple[str, int], ...]
    """Nodes of the family, with the number of the device each is."""
    classes: frozenset[str]
    """Classes in sysfs that the oldest ones make."""


class ScratchDevice(Protocol):
    """Makes block devices nobody uses."""

    def __call__(self) -> contextlib.AbstractContextManager[OwnedFd]:
        """A device for as long as the block lasts. Raises ``OSError``."""


_NODES: Final = ("blksnap-control", "bdevfilter", "veeamblksnap", "blksnap")


def look(dev: Path = Path("/dev")) -> Sign:
    """What modules of the family are loaded, by the nodes they make."""
    nodes = []
    for name in _NODES:
        with contextlib.suppress(OSError):
            status = (dev / name).stat()
            # /dev/blksnap may be a directory of links of our own (60-blksnap.rules).
            if stat.S_ISCHR(status.st_mode):
                nodes.append((name, status.st_rdev))
    return Sign(tuple(nodes), frozenset(name for name in _NODES if sysblock.has_class(name)))


def detect(
    sign: Sign,
    scratch: ScratchDevice,
    system: System | None = None,
    parameters: Path = Path("/sys/module/blksnap/parameters"),
) -> Found:
    """Which generation it is. Blocks shortly."""
    system = system or RealSystem()
    names = {name for name, _ in sign.nodes}
    if "blksnap-control" in names:
        if struct.calcsize("P") != 8:
            return Found(None, "its control node has no interface for 32-bit programs")
        return _upstream(system, scratch, parameters)
    if "bdevfilter" in names:
        return Found(
            None,
            "the module loaded is that of Veeam Agent 7 (VAL-7, /dev/bdevfilter): it is left to the agent",
        )
    if "veeamblksnap" in names or "veeamblksnap" in sign.classes:
        return Found(
            None, "the module loaded is that of Veeam Agent 6 (VAL-6, veeamblksnap): it is left to the agent"
        )
    if "blksnap" in names or "blksnap" in sign.classes:
        return Found(None, "the module loaded is blksnap 1.0 (stable-v1.0), which has another interface")
    return Found(None, "the kernel module blksnap is not loaded, or this kernel has none")


def _upstream(system: System, scratch: ScratchDevice, parameters: Path) -> Found:
    try:
        with scratch() as fd:
            new, old = (_answers(system, fd, number) for number in (V615.detach, V6.detach))
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        what = f"its generation cannot be told without a loop device, and there is none: {reason}"
        return Found(None, what, passing=True)
    if new == old:
        return Found(None, "the module blksnap is of a generation this version of blksnap does not know")
    pooled = (parameters / "free_diff_buffer_pool_size").exists()
    if new:
        if pooled:
            return Found(None, "the module blksnap shows signs of two generations; it is left alone")
        return Found(V615, "")
    return _old(system)


def _answers(system: System, fd: OwnedFd, number: int) -> bool:
    """Whether the kernel knows this number as DETACH.

    A loop device answers EINVAL to numbers nobody knows (lo_simple_ioctl), which is what a filter of another name would be
    too: but on a device just made there is none.
    """
    argument = bytearray(uapi.NAME.pack(_BOGUS))
    try:
        system.ioctl(fd.fileno(), number, argument)
    except OSError as error:
        return error.errno == errno.ENOENT
    return False


def _old(system: System) -> Found:
    """Tell v6, which is given difference storage by descriptor, from those that are given a name.

    By a request neither can carry out: as a descriptor it is one that cannot be (EINVAL), as a pointer one that leads
    nowhere (EFAULT). That the number is CREATE's is known by now.
    """
    argument = bytearray(uapi.CREATE_BY_NAME.pack(0, _NOWHERE, bytes(16)))
    try:
        with system.open(control.NODE, os.O_RDWR) as fd:
            system.ioctl(fd.fileno(), uapi.IOCTL_CREATE, argument)
    except OSError as error:
        match error.errno:
            case errno.EFAULT:
                return Found(V7, "")
            case errno.EINVAL | errno.EBADF:
                return Found(V6, "")
            case _:
                reason = (error.strerror or str(error)).lower()
                return Found(None, f"{control.NODE} cannot be used: {reason}", passing=True)
    return Found(None, "the module blksnap accepts difference storage that cannot be; it is left alone")


@contextlib.contextmanager
def loop_device() -> Iterator[OwnedFd]:
    """A read-only loop device over a little memory, which goes away by itself. Raises ``OSError``."""
    with contextlib.ExitStack() as stack:
        memory = stack.enter_context(OwnedFd(os.memfd_create("blksnap-probe", os.MFD_CLOEXEC)))
        os.ftruncate(memory.fileno(), 1 << 20)
        info = bytearray(232)
        struct.pack_into("=I", info, _LOOP_FLAGS_AT, _READ_ONLY_AUTOCLEAR)
        config = _LOOP_CONFIG.pack(memory.fileno(), 0, bytes(info))
        loops = stack.enter_context(OwnedFd(os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)))
        for attempt in range(_ATTEMPTS):
            number = fcntl.ioctl(loops.fileno(), _LOOP_CTL_GET_FREE)
            with contextlib.ExitStack() as this:
                fd = this.enter_context(OwnedFd(os.open(f"/dev/loop{number}", os.O_RDONLY | os.O_CLOEXEC)))
                try:
                    fcntl.ioctl(fd.fileno(), _LOOP_CONFIGURE, config)
                except OSError as error:
                    # Somebody else was faster.
                    if error.errno != errno.EBUSY or attempt + 1 == _ATTEMPTS:
                        raise
                    continue
                yield fd
                return
