# SPDX-License-Identifier: GPL-2.0-or-later
"""What a process, and the machine as a whole, has used: processor time and resident memory, read from outside."""

from __future__ import annotations

import os
import resource
import time
from dataclasses import dataclass
from pathlib import Path

_CPUCLOCK_SCHED = 2
_SETTLED_SHARE = 0.01
_SETTLE_STEP_S = 0.05


class Gone(Exception):
    """Raised when the process is not there any more."""


def cpu_seconds(pid: int) -> float:
    """Processor time of a process: user and system, all threads, also ended ones and the workers of its rings.

    The sum of utime and stime in /proc/PID/stat, but in nanoseconds instead of ticks: the process's own CPU clock
    (clock_getcpuclockid(3); the number is made as the C library makes it).
    """
    try:
        return time.clock_gettime_ns((~pid << 3) | _CPUCLOCK_SCHED) / 1e9
    except OSError as error:
        raise Gone(f"process {pid} has ended") from error


def children_cpu_seconds() -> float:
    """Processor time of this process and of its children that have ended and were waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime + time.process_time()


def machine_cpu_seconds() -> float:
    """Processor time of everybody, in ticks; what a hypervisor took away counts as well (proc_stat(5))."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = (
        int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    )
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def settle(pid: int) -> None:
    """Wait until a process has nothing to do: work that goes on behind the answers belongs to the requests."""
    before = cpu_seconds(pid)
    while True:
        time.sleep(_SETTLE_STEP_S)
        now = cpu_seconds(pid)
        if now - before < _SETTLE_STEP_S * _SETTLED_SHARE:
            return
        before = now


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident bytes of a process: now, and the most there ever were."""

    now: int
    peak: int
    shared: int
    """Of `now`: memory files and tmpfs."""


def memory(pid: int) -> Memory:
    """Read VmRSS, VmHWM and RssShmem (proc_pid_status(5)). The kernel may be some pages per thread behind."""
    sizes: dict[str, int] = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if value.endswith(" kB"):
            sizes[name] = int(value.split()[0]) << 10
    return Memory(sizes["VmRSS"], sizes["VmHWM"], sizes["RssShmem"])
