# SPDX-License-Identifier: GPL-2.0-or-later
"""
The ublk backend against the kernel's own devices, in instructions per request on a stock kernel.

Boots a guest with one emulated processor whose clock counts instructions, and has `bench.ublk_guest` measure in it: what else
the host does changes nothing. A ratio is throughput against throughput where the processor is all there is to wait for,
that is instructions of the other by instructions of ours: above 1 ours is the cheaper one.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import ublk_guest as guest
from bench.report import Bar, Figure, Sense, Spread, ratios
from demo.programs import DemoError
from tests.vm.errors import VmError
from tests.vm.machine import Guest, Machine

_OUTPUT = "readings.json"
_TIME_LIMIT_S = 3600
_MIB = 1 << 20
_FIXED_MIB = 24

_ON_TO_OFF = Bar(Sense.AT_LEAST, 0.98)
_TO_LOOP = Bar(Sense.AT_LEAST, 1.0)
_TO_RAW = Bar(Sense.AT_LEAST, 0.85)
_FIRST_TOUCH = Bar(Sense.AT_MOST, 0.5)
_REWRITE = Bar(Sense.AT_MOST, 1.25)

_Readings = Mapping[tuple[str, str, str], Sequence[float]]


async def ublk(binary: Path, kernels: Sequence[str], rounds: int) -> list[Figure]:
    """Measure `rounds` times in one guest of each kernel. Raises DemoError when a guest or a load in it failed."""
    return [figure for kernel in kernels for figure in await _on(binary, kernel, rounds)]


async def _on(binary: Path, kernel: str, rounds: int) -> list[Figure]:
    machine = Machine(
        series=kernel,
        memory_mib=3072,
        cpus=1,
        disks=(),
        time_limit_s=_TIME_LIMIT_S,
        # The clock that counts instructions, trusted from the start.
        append="tsc=reliable",
        # Time that is waited for the host passes as it does there: skipped (sleep=off), it would end waits with a limit.
        qemu=("-icount", "shift=0"),
    )
    command = f"exec {sys.executable} -m bench.ublk_guest /run/vm/{_OUTPUT} {rounds}"
    try:
        with Guest(machine, command, {"BLKSNAP_DATAPATH": str(binary)}) as running:
            try:
                status, words = await asyncio.to_thread(_run, running)
            except asyncio.CancelledError:
                running.cut_power()
                raise
            if status:
                raise DemoError(f"measuring on Linux {kernel} ended with {status}: {words}")
            found = json.loads((running.directory / _OUTPUT).read_text())
            release = running.kernel.release
    except VmError as error:
        raise DemoError(str(error)) from error
    readings: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for reading in found["readings"]:
        readings[reading["disk"], reading["stack"], reading["load"]].append(reading["value"])
    zero_copy = found["zero_copy"]
    return [
        *_through(readings, release, zero_copy=zero_copy),
        *_kept(readings, release),
        *_memory(found["memory"], release),
    ]


def _run(running: Guest) -> tuple[int, str]:
    """How the guest ended, and its last words; it says each reading as it has it."""
    line = ""
    for line in running.output:
        print(f"bench: {line}", file=sys.stderr)
    return running.wait(), line


def _through(readings: _Readings, release: str, *, zero_copy: bool) -> Iterator[Figure]:
    """Requests on their way through: every stack, and ours against those the bars name."""
    for disk, loads in ((guest.BRD, (*guest.RANDOM, *guest.SEQUENTIAL)), (guest.NULL_BLK, guest.SEQUENTIAL)):
        for load in loads:
            part = f"{release}, {disk}: {load.name}"
            found = {
                stack: values
                for (on, stack, name), values in readings.items()
                if (on, name) == (disk, load.name)
            }
            yield from _instructions(part, found)
            ours = found[guest.ON]
            if guest.OFF in found:
                yield ratios(part, "tracking on ÷ off", found[guest.OFF], ours, _ON_TO_OFF)
            deep = load.depth > 1 and load in guest.RANDOM
            yield ratios(part, "ours ÷ loop", found[guest.LOOP], ours, _TO_LOOP if deep else None)
            large = load in guest.SEQUENTIAL
            yield ratios(part, "ours ÷ raw", found[guest.RAW], ours, _TO_RAW if large and zero_copy else None)


def _kept(readings: _Readings, release: str) -> Iterator[Figure]:
    """Writes under a held snapshot. Instructions against instructions here: the less the better."""
    for pair in guest.TOUCHES:
        for load, bar in zip(pair, (_FIRST_TOUCH, _REWRITE), strict=True):
            part = f"{release}, {guest.BRD}: {load.name}"
            found = {stack: values for (_, stack, name), values in readings.items() if name == load.name}
            yield from _instructions(part, found)
            yield ratios(
                part,
                "instructions, ours ÷ dm-snapshot N",
                found[guest.ON],
                found[guest.DM_SNAPSHOT],
                bar,
            )


def _instructions(part: str, found: Mapping[str, Sequence[float]]) -> Iterator[Figure]:
    for stack, values in found.items():
        yield Figure(part, f"instructions, {stack}", "k", Spread.of([value / 1e3 for value in values]))


def _memory(found: Sequence[Mapping[str, Any]], release: str) -> Iterator[Figure]:
    """Resident memory after use: the bar is for each device, its maps and the buffers of its requests apart."""
    for sizes in found:
        count, own = sizes["devices"], sizes["maps"] + sizes["buffers"]
        yield Figure(
            f"{release}: resident memory of the data path",
            f"per device, {count} of them",
            "MiB",
            Spread.of([sizes["resident"] / count / _MIB]),
            Bar(Sense.AT_MOST, _FIXED_MIB + own / count / _MIB),
            f"of which maps and buffers: {own / count / _MIB:.1f} MiB",
        )
