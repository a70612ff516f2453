# SPDX-License-Identifier: GPL-2.0-or-later
"""
What an I/O costs in instructions, in a guest whose clock is its instruction counter (`qemu -icount shift=0`).

There one nanosecond is one instruction, and the time that the one processor was not idle is all that was executed:
client, kernel, workers and server alike. Runs in the guest only; knows no device and no bar.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

_SCHEDSTAT = "/proc/schedstat"
_FEW = 64


class MeasureError(Exception):
    """Raised when a load did not do what it was asked for."""


@dataclass(frozen=True, slots=True)
class Load:
    """What fio asks a block device for."""

    name: str
    pattern: str
    """fio's `rw`."""
    request_bytes: int
    depth: int
    requests: int

    @property
    def stride(self) -> int:
        """From one request of a sequential load to the next: fio's `write:60k` leaves out so much after each."""
        hole = self.pattern.partition(":")[2]
        return self.request_bytes + (int(hole.removesuffix("k")) << 10 if hole else 0)

    @property
    def area_bytes(self) -> int:
        """Bytes of a device that `per_request` touches."""
        return (self.requests + 2 * _FEW) * self.stride


def per_request(node: Path, load: Load) -> float:
    """
    Instructions per request: what many cost more than a few, so that what comes with every run is not in it, nor is
    what goes on behind the last answers.

    The few go to the first bytes of the device, the many to those behind: a sequential load touches no byte twice.
    """
    few = _run(node, load, 0, _FEW)
    many = _run(node, load, _FEW * load.stride, _FEW + load.requests)
    return (many - few) / load.requests


def _run(node: Path, load: Load, offset: int, requests: int) -> int:
    """
    What was executed from just before the first request to just after the last answer.

    Nothing waits meanwhile: while a guest does, its clock runs ahead, and whatever is due from time to time is due often.
    """
    words = [
        "fio",
        "--output-format=json",
        "--name=bench",
        "--ioengine=io_uring",
        "--direct=1",
        f"--filename={node}",
        f"--rw={load.pattern}",
        f"--bs={load.request_bytes}",
        f"--iodepth={load.depth}",
        f"--offset={offset}",
        f"--size={requests * load.stride}",
        f"--io_size={requests * load.request_bytes}",
        "--norandommap",
        "--randseed=1",
        # The client is the same for all: it does no more than it must.
        "--gtod_reduce=1",
        "--scramble_buffers=0",
        # fio adds the redirection, to bench.prerun.txt and bench.postrun.txt.
        f"--exec_prerun=cat {_SCHEDSTAT}",
        f"--exec_postrun=cat {_SCHEDSTAT}",
    ]
    with tempfile.TemporaryDirectory() as name:
        done = subprocess.run(words, capture_output=True, check=False, text=True, cwd=name)
        if done.returncode:
            raise MeasureError(
                f"fio ended with {done.returncode}: {done.stderr.strip() or done.stdout.strip()}"
            )
        before, after = (executed(Path(name, f"bench.{moment}.txt")) for moment in ("prerun", "postrun"))
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    count = job["read"]["total_ios"] + job["write"]["total_ios"]
    if job["error"] or count != requests:
        raise MeasureError(f"fio did {count} of {requests} requests (error {job['error']})")
    return after - before


def executed(reading: Path) -> int:
    """Instructions on processor 0 but those of its idle loop: nanoseconds that tasks ran (sched-stats.rst)."""
    for line in reading.read_text().splitlines():
        if line.startswith("cpu0 "):
            return int(line.split()[7])
    raise MeasureError(f"{reading} does not tell of a processor")
