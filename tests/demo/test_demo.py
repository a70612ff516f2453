# SPDX-License-Identifier: GPL-2.0-or-later
"""The demonstration as a user runs it: every program in it is the real one."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from demo import copies, story
from demo.__main__ import left_behind, parse, perform, scratch_directory
from demo.disk import why_not
from demo.programs import run
from demo.report import Report

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("--size", "256", "--increments", "2")

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def place() -> Iterator[Path]:
    """Give a directory with a short name: sockets in it may have 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="blksnap-test-", dir="/var/tmp") as path:
        yield Path(path)


async def begin(*options: str, env: dict[str, str] | None = None) -> asyncio.subprocess.Process:
    """Start the demo as `make demo` does, without a terminal."""
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "demo",
        *options,
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )


async def outcome(process: asyncio.subprocess.Process) -> tuple[int | None, str]:
    """Wait for the demo to end; gives its status and what it printed."""
    output, _ = await process.communicate()
    return process.returncode, output.decode()


def verdicts(output: str) -> list[str]:
    """Give the last column of the summary."""
    return re.findall(r"^ *(?:\d+|all) .* (yes|NO)$", output, re.MULTILINE)


async def test_every_increment_on_a_bare_socket_is_proved(place: Path) -> None:
    """Without root, FUSE and loop devices qemu-io and fio write to the socket; the copies hold, the kill is survived."""
    status, output = await outcome(await begin("--bare-socket", *SMALL, "--directory", str(place)))

    assert status == 0, output
    assert verdicts(output) == ["yes", "yes", "yes"], output
    assert "no file system on top (asked for): qemu-io and fio write to the socket" in output
    assert "same generation, same number" in output
    assert "nothing is left behind" in output
    assert not list(place.iterdir())


async def test_every_increment_of_a_mounted_file_system_is_proved(place: Path) -> None:
    """With them programs work on a real ext4; where they are missing the reason is printed."""
    scratch = place / "scratch"
    scratch.mkdir()
    reason = await why_not(scratch)
    status, output = await outcome(await begin(*SMALL, "--directory", str(place)))

    assert status == 0, output
    assert verdicts(output) == ["yes", "yes", "yes"], output
    if reason:
        assert f"no file system on top ({reason})" in output
    else:
        assert "e2fsck calls the copy clean" in output
        assert "trimmed the free space" in output
    assert [path.name for path in place.iterdir()] == ["scratch"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
async def test_an_interrupted_demo_leaves_nothing(place: Path, number: signal.Signals) -> None:
    """Ctrl-C, kill and a closed terminal unmount, detach and end everything before the demo ends."""
    process = await begin("--size", "256", "--directory", str(place))
    assert process.stdout is not None
    printed = b""
    while b"full copy" not in printed:
        line = await process.stdout.readline()
        assert line, printed.decode()
        printed += line
    (scratch,) = place.iterdir()

    process.send_signal(number)
    status, output = await outcome(process)

    assert (status, "demo: interrupted" in output, "left behind:" in output) == (130, True, False), output
    assert await left_behind(scratch) == []


async def test_a_directory_too_deep_for_sockets_is_named(place: Path) -> None:
    """What the service says when it ends at once is what the user reads, at once."""
    deep = place / ("deep" * 25)
    deep.mkdir()
    status, output = await outcome(await begin(*SMALL, "--directory", str(deep)))

    assert status == 1, output
    assert re.search(r"demo: failed: .*(long|shorter|socket)", output), output
    assert not list(deep.iterdir())


async def test_a_service_that_cannot_work_is_an_error_in_words(place: Path) -> None:
    """No traceback: the reason, the ends of the logs, status 1, nothing left."""
    env = {"BLKSNAP_DATAPATH": str(place / "missing")}
    status, output = await outcome(await begin(*SMALL, "--directory", str(place), env=env))

    assert status == 1, output
    assert "demo: failed: " in output
    assert "Traceback" not in output
    assert not list(place.iterdir())


async def test_a_missed_range_is_found_out(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The proof is one: an increment that leaves out a single range makes the demo fail."""

    async def all_but_the_last(uri: str, ranges: Sequence[tuple[int, int]], copy: Path) -> int:
        return await copies.apply_increment(uri, ranges[:-1], copy)

    monkeypatch.setattr(story, "apply_increment", all_but_the_last)
    arguments = parse(["--plain", "--bare-socket", *SMALL, "--directory", str(place)])

    status = await perform(arguments, Report(), None)

    output = capsys.readouterr().out
    assert status == 1, output
    assert "NO" in verdicts(output), output
    assert "these increments differ from their images" in output


async def test_on_a_terminal_the_terminal_program_is_shown(place: Path) -> None:
    """In a terminal of 120 by 40 the devices and the heat map appear above the steps; afterwards the report is printed."""
    tmux = ("tmux", "-S", str(place / "outer"), "-f", "/dev/null")
    work = place / "work"
    work.mkdir()
    words = (
        sys.executable,
        "-m",
        "demo",
        "--close-when-done",
        "--bare-socket",
        *SMALL,
        "--directory",
        str(work),
    )
    status = place / "status"
    command = f"cd {ROOT}; {shlex.join(words)}; echo $? >{status}; sleep 600"
    await run(*tmux, "new-session", "-d", "-x", "120", "-y", "40", command)
    try:
        seen = ""
        while not status.exists():
            screen = await run(*tmux, "capture-pane", "-p")
            seen = screen if "age of the last change" in screen and "full copy" in screen else seen
            await asyncio.sleep(0.2)
        printed = await run(*tmux, "capture-pane", "-p", "-S", "-")
    finally:
        await run(*tmux, "kill-server")

    assert status.read_text().strip() == "0", printed
    assert "disk.img" in seen, printed
    assert "difference storage" in seen, seen
    assert verdicts(printed) == ["yes", "yes", "yes"], printed
    assert not list(work.iterdir())


async def test_the_scratch_directory_goes_whatever_happens(place: Path) -> None:
    """Also when the story in it fails."""

    async def fail() -> None:
        async with scratch_directory(place) as path:
            (path / "file").touch()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        await fail()

    assert not list(place.iterdir())
