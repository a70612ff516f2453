# SPDX-License-Identifier: GPL-2.0-or-later
"""How the demo runs other people's programs."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

from demo.programs import DemoError, alive_with, end_pid, pipe, run, running


async def test_output_comes_back() -> None:
    """What a program prints is what `run` returns."""
    assert await run("printf", "a\\nb") == "a\nb"


async def test_a_failure_is_told_in_the_programs_own_words() -> None:
    """The last line of its errors is the reason."""
    with pytest.raises(DemoError, match=r"status 3: out of luck"):
        await run("sh", "-c", "echo noise >&2; echo out of luck >&2; exit 3")


async def test_an_answer_is_no_failure() -> None:
    """A status that is an answer (cmp's 1) does not raise."""
    assert await run("sh", "-c", "exit 1", answers=(0, 1)) == ""


async def test_a_missing_program_is_named_with_what_to_do() -> None:
    """Nobody is shown a FileNotFoundError."""
    with pytest.raises(DemoError, match="no-such-program is not installed: run `make setup`"):
        await run("no-such-program")


async def test_a_cancelled_program_is_gone() -> None:
    """Ctrl-C does not wait for a program that takes long, nor leave it."""
    mark = f"sleep 61{os.getpid()}"
    task = asyncio.create_task(run(*mark.split()))
    while not alive_with(mark):  # noqa: ASYNC110 - another process has no Event
        await asyncio.sleep(0.02)

    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert not alive_with(mark)


async def test_a_running_program_ends_with_its_block_even_if_it_does_not_want_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM first; SIGKILL for one that ignores it."""
    monkeypatch.setattr("demo.programs.STOP_TIMEOUT_S", 0.3)
    stubborn = (
        "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    )
    log = tmp_path / "log"

    async with running(sys.executable, "-c", stubborn, log=log) as process:
        while "up" not in log.read_text():  # noqa: ASYNC110 - another process has no Event
            await asyncio.sleep(0.02)

    assert process.returncode == -9


async def test_a_program_that_is_not_our_child_can_be_ended() -> None:
    """The data path is nobody's child once its service was killed."""
    mark = f"62{os.getpid()}"
    pid = int(await run("sh", "-c", f"sleep {mark} </dev/null >/dev/null 2>&1 & echo $!"))
    assert alive_with(mark)

    await end_pid(pid)

    assert not alive_with(mark)


async def test_ending_what_is_gone_is_fine() -> None:
    """No error for a process that ended first."""
    process = await asyncio.create_subprocess_exec("true")
    await process.wait()

    await end_pid(process.pid)


async def test_a_pipe_hands_bytes_on() -> None:
    """The right program reads what the left one prints, all of it."""
    assert await pipe(("printf", "a\\nb\\n"), ("sh", "-c", "test $(wc -l) = 2")) == 0


async def test_the_right_end_may_have_enough() -> None:
    """Somebody who stops reading early (cmp, at the first difference) is no failure of the left one."""
    assert await pipe(("yes",), ("sh", "-c", "read line; exit 1"), enough=1) == 1


@pytest.mark.parametrize(
    "left,right", [("echo why >&2; exit 4", "cat"), ("echo", "cat; echo why >&2; exit 4")]
)
async def test_a_failure_at_either_end_of_a_pipe_is_told(left: str, right: str) -> None:
    """Half a copy is no copy: a left program that fails is not taken for the end of the data."""
    with pytest.raises(DemoError, match="status 4: why"):
        await pipe(("sh", "-c", left), ("sh", "-c", right))
