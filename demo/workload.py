# SPDX-License-Identifier: GPL-2.0-or-later
"""The workload as the story sees it: a process that runs beside everything else, and how far it has come."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from demo.programs import DemoError, running
from demo.work import DONE

_ROOT = Path(__file__).resolve().parent.parent
_POLL_S = 0.05
PIECES_TIMEOUT_S = 120.0


class Workload:
    """A running `demo.work`; it says what it did in a file of one line per piece of work."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self._process = process
        self._log = log

    def done(self) -> list[str]:
        """List what it has done so far, in words."""
        return [line.removeprefix(DONE) for line in self._lines() if line.startswith(DONE)]

    def _lines(self) -> list[str]:
        return self._log.read_text(errors="replace").splitlines()

    async def more(self, count: int) -> list[str]:
        """
        Wait until it has done `count` more pieces of work, and list those.

        Raises DemoError when it ends or comes to a standstill instead.
        """
        before = len(self.done())
        try:
            async with asyncio.timeout(PIECES_TIMEOUT_S):
                while len(lines := self.done()) < before + count:
                    if self._process.returncode is not None:
                        raise DemoError(
                            f"the workload ended by itself: {(self._lines() or ['without a word'])[-1]}"
                        )
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            raise DemoError(f"the workload stands still: nothing new in {PIECES_TIMEOUT_S:.0f} s") from None
        return lines[before:]


@contextlib.asynccontextmanager
async def workload(scratch: Path, *where: str) -> AsyncIterator[Workload]:
    """Keep the workload running for as long as the block lasts; `where` are the options of `demo.work` that say so."""
    log = scratch / "workload.log"
    words = (sys.executable, "-m", "demo.work", "--scratch", str(scratch), *where)
    async with running(*words, log=log, env={"PYTHONPATH": str(_ROOT)}) as process:
        yield Workload(process, log)
