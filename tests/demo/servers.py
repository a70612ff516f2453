# SPDX-License-Identifier: GPL-2.0-or-later
"""An NBD server that is not ours, for the pieces of the demo that only need one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from demo.programs import running


@contextlib.asynccontextmanager
async def nbdkit(directory: Path, *words: str | Path) -> AsyncIterator[str]:
    """Keep nbdkit serving with these arguments; gives the URI."""
    socket = directory / "nbdkit.sock"
    async with running(
        "nbdkit", "--foreground", "--unix", socket, *words, log=directory / "nbdkit.log"
    ) as server:
        async with asyncio.timeout(20):
            while not socket.exists():
                assert server.returncode is None, (directory / "nbdkit.log").read_text()
                await asyncio.sleep(0.02)
        yield f"nbd+unix:///?socket={socket}"
