# SPDX-License-Identifier: GPL-2.0-or-later
"""
The client of every comparison: fio with its NBD engine, one connection, a fixed number of requests.

A fixed number and not a fixed time: both sides of a comparison then do the same work, page by page.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from typing import Any

from bench.processes import children_cpu_seconds, cpu_seconds, machine_cpu_seconds, settle
from bench.servers import Server
from demo.programs import DemoError, run


@dataclass(frozen=True, slots=True)
class Load:
    """What fio asks for."""

    name: str
    pattern: str
    """fio's `rw`."""
    request_bytes: int
    depth: int
    requests: int


@dataclass(frozen=True, slots=True)
class Slot:
    """One run of fio against one server."""

    requests_per_s: float
    cpu_us: float
    """Processor time of the server per request, until it came to rest."""
    others: float
    """Share of the machine's processor time that neither fio nor the server used: 0 alone, 1 all of it."""


def together(*slots: Slot) -> Slot:
    """Several runs of one load against one server as if they were one."""
    return Slot(
        len(slots) / sum(1 / slot.requests_per_s for slot in slots),
        sum(slot.cpu_us for slot in slots) / len(slots),
        max(slot.others for slot in slots),
    )


async def measure(server: Server, load: Load, size: int, seed: int) -> Slot:
    """
    Run a load over the first `size` bytes of a server's export.

    Raises DemoError when fio fails or did not do all of it, `processes.Gone` when the server has ended.
    """
    start, everybody, own = time.monotonic(), machine_cpu_seconds(), children_cpu_seconds()
    before = cpu_seconds(server.pid)
    job = await _fio(server.uri, load, size, seed)
    settle(server.pid)
    used = cpu_seconds(server.pid) - before
    others_s = machine_cpu_seconds() - everybody - (children_cpu_seconds() - own) - used
    others = others_s / (time.monotonic() - start) / (os.cpu_count() or 1)
    done = job["read"]["total_ios"] + job["write"]["total_ios"]
    if done != load.requests or job["error"]:
        raise DemoError(f"fio did {done} of {load.requests} requests (error {job['error']})")
    elapsed_s = max(job["read"]["runtime"], job["write"]["runtime"]) / 1e3
    return Slot(done / elapsed_s, used / done * 1e6, max(others, 0.0))


async def _fio(uri: str, load: Load, size: int, seed: int) -> dict[str, Any]:
    output = await run(
        "fio",
        "--output-format=json",
        "--name=bench",
        "--ioengine=nbd",
        f"--uri={uri}",
        f"--rw={load.pattern}",
        f"--bs={load.request_bytes}",
        f"--iodepth={load.depth}",
        f"--size={size}",
        f"--io_size={load.requests * load.request_bytes}",
        "--norandommap",
        f"--randseed={seed}",
        # The client is the narrow place here; it does no more than it must.
        "--gtod_reduce=1",
        "--scramble_buffers=0",
    )
    # Warnings come before the object, on the same stream.
    job: dict[str, Any] = json.loads(output[output.index("{") :])["jobs"][0]
    return job
