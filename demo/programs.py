# SPDX-License-Identifier: GPL-2.0-or-later
"""
Other people's programs: run to their end, or kept running for as long as a block lasts.

Every program gets a session of its own, so that Ctrl-C in the terminal reaches the demo alone and it ends them in
the right order (a file system must be unmounted before the server below it goes).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

# mkfs.ext4, losetup and fsfreeze are there for users too, only not on their PATH.
SEARCH_PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"))

STOP_TIMEOUT_S = 10.0
# What execvp(3) says about a program it did not find; the second when PATH has a directory that is closed to us.
_NOT_THERE = (FileNotFoundError, PermissionError)


class DemoError(Exception):
    """Raised when the demo cannot go on, or when something it promises did not hold; the text is for the user."""


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Give the environment of every program: ours, with the administrator's directories, in plain English."""
    return {**os.environ, "PATH": SEARCH_PATH, "LC_ALL": "C.UTF-8", **(extra or {})}


def has(program: str) -> bool:
    """Say whether a program is installed."""
    return shutil.which(program, path=SEARCH_PATH) is not None


def _last_words(errors: str) -> str:
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    return lines[-1] if lines else "it did not say why"


async def _begin(words: Sequence[str], reads: int, writes: int) -> asyncio.subprocess.Process:
    """Start a program between two descriptors (or asyncio's PIPE); what it complains about can be read."""
    try:
        return await asyncio.create_subprocess_exec(
            *words,
            stdin=reads,
            stdout=writes,
            stderr=asyncio.subprocess.PIPE,
            env=environment(),
            start_new_session=True,
        )
    except _NOT_THERE:
        raise DemoError(f"{words[0]} is not installed: run `make setup`") from None


async def _end(process: asyncio.subprocess.Process) -> tuple[str, str]:
    """Wait for a program to end, or kill it when cancelled; gives what it printed and what it complained about."""
    try:
        output, errors = await process.communicate()
    except asyncio.CancelledError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        raise
    return (output or b"").decode(errors="replace"), errors.decode(errors="replace")


def _check(words: Sequence[str], status: int | None, answers: tuple[int, ...], complaints: str) -> None:
    if status not in answers:
        raise DemoError(f"`{' '.join(words)}` ended with status {status}: {_last_words(complaints)}")


async def run(*argv: str | Path, answers: tuple[int, ...] = (0,)) -> str:
    """
    Run a program to its end and return what it printed; cancelled, it is killed.

    Raises DemoError when it is not installed or ends with a status that is not among `answers`.
    """
    words = [os.fspath(word) for word in argv]
    process = await _begin(words, asyncio.subprocess.DEVNULL, asyncio.subprocess.PIPE)
    output, errors = await _end(process)
    _check(words, process.returncode, answers, errors or output)
    return output


async def pipe(left: Sequence[str], right: Sequence[str], *, enough: int = 0) -> int:
    """
    Run `left | right`; gives the status of `right`: 0 or `enough`.

    `enough` is the status with which `right` may end without having read everything. Raises DemoError when either is
    not installed or fails otherwise.
    """
    read_end, write_end = os.pipe()
    try:
        source = await _begin(left, asyncio.subprocess.DEVNULL, write_end)
    except BaseException:
        os.close(read_end)
        raise
    finally:
        os.close(write_end)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(stop, source)
        try:
            sink = await _begin(right, read_end, asyncio.subprocess.PIPE)
        finally:
            os.close(read_end)
        stack.push_async_callback(stop, sink)
        (_, source_errors), (output, errors) = await asyncio.gather(_end(source), _end(sink))
    _check(right, sink.returncode, (0, enough), errors or output)
    if sink.returncode == 0:
        _check(left, source.returncode, (0,), source_errors)
    return sink.returncode or 0


async def stop(process: asyncio.subprocess.Process) -> None:
    """End a program: asked first, killed when it does not listen."""
    if process.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


@contextlib.asynccontextmanager
async def running(
    *argv: str | Path, log: Path, env: Mapping[str, str] | None = None
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Keep a program running for as long as the block lasts; what it says goes to the end of `log`."""
    words = [os.fspath(word) for word in argv]
    with log.open("ab") as output:
        try:
            process = await asyncio.create_subprocess_exec(
                *words,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment(env),
                start_new_session=True,
            )
        except _NOT_THERE:
            raise DemoError(f"{words[0]} is not installed: run `make setup`") from None
    try:
        yield process
    finally:
        await stop(process)


async def end_pid(pid: int) -> None:
    """End a process that is not our child, as `stop` does; one that is gone already is fine."""
    for number, patience_s in ((signal.SIGTERM, STOP_TIMEOUT_S), (signal.SIGKILL, STOP_TIMEOUT_S)):
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            return
        try:
            signal.pidfd_send_signal(pidfd, number)
            if await _ends(pidfd, patience_s):
                return
        except ProcessLookupError:
            return
        finally:
            os.close(pidfd)


async def _ends(pidfd: int, patience_s: float) -> bool:
    """Wait for a process to end; whether it did. A pidfd is readable from then on."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(pidfd, ended.set)
    try:
        await asyncio.wait_for(ended.wait(), patience_s)
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(pidfd)
    return True


def alive_with(text: str) -> list[str]:
    """List the processes whose command line holds `text`, but for this one: what was left behind."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) in (os.getpid(), os.getppid()):
            continue
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            if text in words:
                found.append(f"{entry.name} {words}")
    return found
