# SPDX-License-Identifier: GPL-2.0-or-later
"""The interface Job: operations that take long, while they run.

An operation is shown when it has run for ``SHOW_AFTER_S``: most are over by then. Its method answers when it is done, job or
not. What can be cancelled, and when, is decided where the work is done (``work``).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from blksnap_service import errors
from blksnap_service.bus import options as bus_options, paths
from blksnap_service.bus.wire import Call, Publisher, Value
from blksnap_service.work import Work

if TYPE_CHECKING:
    from blksnap_service.bus.access import Context

SHOW_AFTER_S: Final = 0.5
MAX_JOBS_PER_UID: Final = 32


@dataclass(frozen=True, slots=True)
class Operation:
    """What is done, to which devices (their paths, for people) and objects, by whom."""

    name: str
    devices: Sequence[str]
    objects: Sequence[str]
    uid: int


class Job:
    """One job object."""

    def __init__(self, context: Context, operation: Operation, work: Work) -> None:
        """Speak for ``work``, which begins now."""
        self._context = context
        self._operation = operation
        self._work = work
        self._began = time.time_ns() // 1000
        self._reached = self._began
        self.number = 0
        """0 until it is shown."""

    def reached(self) -> None:
        """Note when it got as far as it is."""
        self._reached = time.time_ns() // 1000

    def properties(self) -> dict[str, Any]:
        """Return all properties."""
        share = self._work.share
        taken = self._reached - self._began
        return {
            "Operation": self._operation.name,
            "Progress": share or 0.0,
            "ProgressValid": share is not None,
            "Bytes": 0,
            "Rate": 0,
            "StartTime": self._began,
            "ExpectedEndTime": self._began + int(taken / share) if share else 0,
            "Objects": list(self._operation.objects),
            "StartedByUID": self._operation.uid,
            "Cancelable": self._work.stoppable,
        }

    async def Cancel(self, call: Call, options: Mapping[str, Value]) -> None:  # noqa: N802
        """Ask it to stop."""
        bus_options.take(options, {})
        operation = self._operation
        await self._context.allow(call, operation.devices, owner_uid=operation.uid, operation=operation.name)
        self._work.stop()


class Jobs:
    """All operations under way."""

    def __init__(self, publisher: Publisher) -> None:
        """Show them there."""
        self._publisher = publisher
        self._numbers = itertools.count(1)
        self._running: Counter[int] = Counter()

    @contextlib.asynccontextmanager
    async def run(self, context: Context, operation: Operation) -> AsyncIterator[Work]:
        """Show what the block does while it lasts. Raises ``errors.LimitExceeded``."""
        uid = operation.uid
        if uid and self._running[uid] >= MAX_JOBS_PER_UID:
            raise errors.LimitExceeded(
                f"uid {uid} has {MAX_JOBS_PER_UID} operations under way: wait for those first"
            )
        work = Work(lambda: self._tell(job))
        job = Job(context, operation, work)
        timer = asyncio.get_running_loop().call_later(SHOW_AFTER_S, self._show, job)
        self._running[uid] += 1
        message = "the service stopped before it was done"
        try:
            yield work
            message = ""
        except errors.BlksnapError as error:
            message = str(error)
            raise
        finally:
            self._running -= Counter({uid: 1})
            timer.cancel()
            if job.number:
                path = paths.job_path(job.number)
                self._publisher.signal(path, paths.JOB, "Completed", not message, message)
                self._publisher.unexport(path)

    def _show(self, job: Job) -> None:
        job.number = next(self._numbers)
        self._publisher.export(paths.job_path(job.number), {paths.JOB: job})

    def _tell(self, job: Job) -> None:
        job.reached()
        if job.number:
            told = ("Progress", "ProgressValid", "ExpectedEndTime", "Cancelable")
            self._publisher.changed(paths.job_path(job.number), paths.JOB, told)
