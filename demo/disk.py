# SPDX-License-Identifier: GPL-2.0-or-later
"""
A mounted ext4 on top of an NBD export: nbdfuse shows the export as a file, a loop device makes a disk of the file.

This stands in for a kernel front end: real programs write a real file system, every byte of which passes through the
data path. It needs root, FUSE and loop devices; `why_not` says what is missing on machines (containers, mostly)
that have not got them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from demo.programs import DemoError, has, run, running

_APPEAR_TIMEOUT_S = 10.0
_POLL_S = 0.05
_PROGRAMS = ("nbdfuse", "losetup", "mkfs.ext4", "mount", "umount", "fstrim", "fsfreeze")


@dataclass(frozen=True, slots=True)
class Disk:
    """The loop device and where its file system is mounted."""

    device: str
    mount: Path

    @contextlib.asynccontextmanager
    async def frozen(self) -> AsyncIterator[None]:
        """Keep the file system frozen (clean on disk, writers waiting) for as long as the block lasts."""
        await run("fsfreeze", "--freeze", self.mount)
        try:
            yield
        finally:
            await run("fsfreeze", "--unfreeze", self.mount)


async def why_not(scratch: Path) -> str:
    """
    Say why this machine cannot mount a file system through FUSE and a loop device; "" if it can.

    Tried on a plain file and a tmpfs, without blksnap: what fails afterwards is our fault and no reason to fall back.
    """
    if os.geteuid() != 0:
        return "not root"
    if missing := [program for program in _PROGRAMS if not has(program)]:
        return f"{missing[0]} is not installed"
    for node in ("/dev/fuse", "/dev/loop-control"):
        if not os.access(node, os.R_OK | os.W_OK):
            return f"{node} is not there or not ours"
    probe = scratch / "probe"
    probe.mkdir()
    file = probe / "file"
    with file.open("wb") as plain:
        plain.truncate(1 << 20)
    try:
        await run("mount", "-t", "tmpfs", "none", probe)
        await run("umount", probe)
        loop = (await run("losetup", "--find", "--show", file)).strip()
        await run("losetup", "--detach", loop)
    except DemoError as error:
        return str(error)
    return ""


async def _unmount(mount: Path) -> None:
    """Unmount; a program that still looks at it (an indexer, udev) is given a moment, then it is done lazily."""
    for _ in range(20):
        try:
            await run("umount", mount)
        except DemoError:
            await asyncio.sleep(0.25)
        else:
            return
    await run("umount", "--lazy", mount)


async def _leave_fuse(file: Path) -> None:
    """Unmount the FUSE file, unless nbdfuse has gone and taken it along."""
    if os.path.ismount(file):
        program = "fusermount3" if has("fusermount3") else "fusermount"
        await run(program, "-u", "-z", file)


@contextlib.asynccontextmanager
async def _as_file(uri: str, scratch: Path) -> AsyncIterator[Path]:
    """Show an NBD export as a file."""
    file = scratch / "export"
    file.touch()
    async with running("nbdfuse", file, uri, log=scratch / "nbdfuse.log") as nbdfuse:
        try:
            async with asyncio.timeout(_APPEAR_TIMEOUT_S):
                while not (os.path.ismount(file) and file.stat().st_size):
                    if nbdfuse.returncode is not None:
                        raise DemoError(f"nbdfuse could not show {uri} as a file: see {scratch}/nbdfuse.log")
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            raise DemoError(
                f"nbdfuse did not show {uri} as a file within {_APPEAR_TIMEOUT_S:.0f} s"
            ) from None
        try:
            yield file
        finally:
            await _leave_fuse(file)


@contextlib.asynccontextmanager
async def ext4_on(uri: str, scratch: Path) -> AsyncIterator[Disk]:
    """Make an ext4 on an NBD export and keep it mounted for as long as the block lasts."""
    async with contextlib.AsyncExitStack() as stack:
        file = await stack.enter_async_context(_as_file(uri, scratch))
        loop = (await run("losetup", "--find", "--show", file)).strip()
        stack.push_async_callback(run, "losetup", "--detach", loop)
        # The image is a hole from end to end: discarding it again would only mark every block as written.
        await run("mkfs.ext4", "-q", "-F", "-E", "nodiscard", "-L", "blksnap-demo", loop)
        mount = scratch / "mount"
        mount.mkdir()
        await run("mount", "-t", "ext4", loop, mount)
        stack.push_async_callback(_unmount, mount)
        yield Disk(loop, mount)
