# SPDX-License-Identifier: GPL-2.0-or-later
"""`python -m demo`: options, signals, the scratch directory, and the proof that nothing is left behind."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

from blksnap_tui.client import Client
from demo import screen
from demo.programs import DemoError, alive_with, has, run
from demo.report import Report, fail, table
from demo.service import private_bus, private_service
from demo.story import Plan, Story, tell, until

MIB = 1 << 20
SMALLEST_MIB = 256
LOG_LINES = 12
# Where large temporary files belong (file-hierarchy(7)); /tmp is memory on many systems.
LARGE_FILES = Path("/var/tmp")  # noqa: S108 - mkdtemp makes a private directory in it
EXIT_FAILED, EXIT_INTERRUPTED = 1, 130


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="make demo",
        description="Track a disk image, let programs write to it, copy what changed, prove every copy.",
    )
    parser.add_argument(
        "--plain", action="store_true", help="print the steps; do not open the terminal program"
    )
    parser.add_argument(
        "--close-when-done", action="store_true", help="do not wait for the terminal program to be left"
    )
    parser.add_argument(
        "--bare-socket", action="store_true", help="write to the NBD socket, not to a file system"
    )
    parser.add_argument("--increments", type=int, default=6, metavar="N", help="how many (default 6)")
    parser.add_argument("--size", type=int, default=1024, metavar="MIB", help="of the image (default 1024)")
    parser.add_argument(
        "--seed", type=int, default=1, metavar="N", help="what the workload writes comes from it"
    )
    parser.add_argument(
        "--directory", type=Path, default=LARGE_FILES, help="where its files go (default /var/tmp)"
    )
    parser.add_argument("--screen", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    if arguments.increments < 1 or arguments.size < SMALLEST_MIB:
        parser.error(f"at least 1 increment and {SMALLEST_MIB} MiB, please")
    return arguments


@contextlib.asynccontextmanager
async def scratch_directory(parent: Path) -> AsyncIterator[Path]:
    """Make a directory, and remove it afterwards unless something is still mounted in it."""
    path = Path(tempfile.mkdtemp(prefix="blksnap-demo-", dir=parent))
    try:
        yield path
    finally:
        if not _mounts_in(path):
            shutil.rmtree(path)


def _mounts_in(path: Path) -> list[str]:
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return [mount for mount in mounts if mount.startswith(f"{path}/")]


async def left_behind(path: Path) -> list[str]:
    """List what the demo has started or made and not taken away again."""
    found = [f"mounted: {mount}" for mount in _mounts_in(path)]
    found += [f"running: {process}" for process in alive_with(str(path))]
    if has("losetup"):
        loops = await run("losetup", "--list", "--noheadings", "--output", "NAME,BACK-FILE")
        found += [f"loop device: {line}" for line in loops.splitlines() if str(path) in line]
    if path.exists():
        found.append(f"directory: {path}")
    return found


def last_words(path: Path) -> str:
    """Give the ends of the logs in the scratch directory, which will be gone in a moment."""
    ends = []
    for log in sorted((*path.glob("*.log"), *path.glob("run/*.log"))):
        lines = log.read_text(errors="replace").splitlines()[-LOG_LINES:]
        ends += [f"--- the end of {log.name}", *lines] if lines else []
    return "\n".join(ends)


async def show(
    arguments: argparse.Namespace, report: Report, path: Path, window: screen.Screen | None
) -> None:
    """Start everything, tell the story, end everything."""
    plan = Plan(path, arguments.size * MIB, arguments.increments, arguments.seed, arguments.bare_socket)
    async with contextlib.AsyncExitStack() as stack:
        bus = await stack.enter_async_context(private_bus(path))
        service = await stack.enter_async_context(private_service(bus, path))
        client = await stack.enter_async_context(Client(bus, wait_for_service=True))
        await until(client, lambda: client.available, "blksnapd did not come to the bus", service=service)
        manager = client.state.manager
        report.step(f"blksnapd {manager.version if manager else ''} on a private bus; see it with")
        report.detail(f"busctl --address={shlex.quote(bus)} tree org.blksnap.Blksnap1")
        story = Story(plan, report, service, client)
        if window is not None:
            await window.open(bus)
            stack.push_async_callback(window.close)
        try:
            await tell(story, report)
        except DemoError:
            report.plain(last_words(path))
            raise
        finally:
            if story.increments:
                report.plain("\n" + table(story.increments) + "\n")
        if window is not None and not arguments.close_when_done:
            report.step("done, everything held; leave the terminal program (q) to end the demo")
            await window.closed()
        await story.give_back()


async def perform(arguments: argparse.Namespace, report: Report, window: screen.Screen | None) -> int:
    """Show it, clean up, look whether that worked; returns the exit status. Ctrl-C and its like end it early."""
    task = asyncio.current_task()
    loop = asyncio.get_running_loop()
    stopping = False

    def stop() -> None:
        nonlocal stopping
        if stopping or task is None:
            return report.step("still cleaning up")
        stopping = True
        task.cancel()
        return None

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop)
    status, path = 0, Path()
    try:
        async with scratch_directory(arguments.directory) as path:
            await show(arguments, report, path, window)
    except DemoError as error:
        status = EXIT_FAILED
        report.plain(f"demo: failed: {error}")
    except asyncio.CancelledError:
        status = EXIT_INTERRUPTED
        report.plain("demo: interrupted")
    stopping = True
    if found := await left_behind(path):
        status = status or EXIT_FAILED
        report.plain("demo: left behind:\n" + "\n".join(f"  {line}" for line in found))
    elif not status:
        report.step("every copy was proved; nothing is left behind")
    return status


def main() -> int:
    """Show the demo beside the terminal program where there is a terminal, else plainly."""
    arguments = parse()
    if arguments.screen is None and not arguments.plain:
        if not (reason := screen.suits()):
            return screen.in_tmux(sys.argv[1:])
        print(f"without the terminal program: {reason}", flush=True)
    window = screen.Screen(arguments.screen) if arguments.screen else None
    try:
        status = asyncio.run(perform(arguments, Report(window.report if window else None), window))
    except OSError as error:
        fail(str(error))
        status = EXIT_FAILED
    if window is not None:
        window.finish(status)
    return status


if __name__ == "__main__":
    sys.exit(main())
