# SPDX-License-Identifier: GPL-2.0-or-later
"""
The NBD servers that are compared, each a process of its own that lives as long as a block.

No service is involved: the data path is asked for its origin directly (docs/datapath-protocol.md), which is also the
only way to have tracking off.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from blksnap_service.datapath.client import DatapathClient
from blksnap_service.datapath.connection import Connection
from blksnap_service.datapath.process import SOCKET
from blksnap_service.fds import OwnedFd, close_all
from demo.programs import DemoError, running

ORIGIN = "o"
_START_TIMEOUT_S = 20.0
_POLL_S = 0.005


@dataclass(frozen=True, slots=True)
class Server:
    """A server of one file."""

    pid: int
    uri: str


@dataclass(frozen=True, slots=True)
class Datapath:
    """A data path of its own, with one origin at a time."""

    pid: int
    client: DatapathClient
    _runtime_dir: Path

    @contextlib.asynccontextmanager
    async def serving(self, image: Path, *, tracking: bool = True) -> AsyncIterator[Server]:
        """Serve `image`, with or without tracking, and detach it again."""
        await _add(self._runtime_dir / SOCKET, image, tracking=tracking)
        yield Server(self.pid, f"nbd+unix:///?socket={self._runtime_dir / 'nbd' / ORIGIN}.sock")
        # The client has ended, but the data path may not have noticed yet.
        maps = await self.client.origin_remove(ORIGIN, force=True)
        maps.close()


@contextlib.asynccontextmanager
async def datapath(binary: Path, runtime_dir: Path) -> AsyncIterator[Datapath]:
    """Run a data path without origins."""
    runtime_dir.mkdir(mode=0o700, exist_ok=True)
    log = runtime_dir.with_suffix(".log")
    async with (
        running(binary, "--runtime-dir", runtime_dir, log=log) as process,
        _connected(process, runtime_dir / SOCKET, log) as client,
    ):
        yield Datapath(process.pid, client, runtime_dir)


@contextlib.asynccontextmanager
async def _connected(
    process: asyncio.subprocess.Process, socket: Path, log: Path
) -> AsyncIterator[DatapathClient]:
    client = DatapathClient(lambda _event: None, lambda _reason: None)
    async with asyncio.timeout(_START_TIMEOUT_S):
        while True:
            try:
                await client.open(socket)
                break
            except (FileNotFoundError, ConnectionRefusedError):
                if process.returncode is not None:
                    raise DemoError(f"the data path could not start; see {log}") from None
                await asyncio.sleep(_POLL_S)
    try:
        yield client
    finally:
        client.close()


async def _add(socket: Path, image: Path, *, tracking: bool) -> None:
    """Make `image` an origin. The service's client cannot ask for one without tracking."""
    connection = Connection(lambda _event: None, lambda _reason: None)
    await connection.open(socket)
    try:
        reply = await connection.request(
            "origin.add",
            (OwnedFd(os.open(image, os.O_RDWR | os.O_CLOEXEC)),),
            origin=ORIGIN,
            generation=str(uuid.uuid4()),
            tracking=tracking,
            label=str(image),
        )
        close_all(reply.fds)
    finally:
        connection.close()


@contextlib.asynccontextmanager
async def nbdkit(runtime_dir: Path, image: Path) -> AsyncIterator[Server]:
    """Serve `image` by nbdkit's file plugin as it comes: 16 threads, page cache, FLUSH = fdatasync."""
    runtime_dir.mkdir(mode=0o700, exist_ok=True)
    socket, log = runtime_dir / "nbdkit.sock", runtime_dir / "nbdkit.log"
    socket.unlink(missing_ok=True)
    async with running("nbdkit", "-f", "-U", socket, "file", image, log=log) as process:
        async with asyncio.timeout(_START_TIMEOUT_S):
            # nbdkit listens before it does anything else that can fail, and a client then waits for it.
            while not socket.exists():
                if process.returncode is not None:
                    raise DemoError(f"nbdkit could not start; see {log}")
                await asyncio.sleep(_POLL_S)
        yield Server(process.pid, f"nbd+unix:///?socket={socket}")
