# SPDX-License-Identifier: GPL-2.0-or-later
"""
The demo on a terminal: a tmux of its own with blksnap-tui above and the steps of the story below.

`in_tmux` runs in the user's terminal and starts the demo a second time inside; that one opens the upper pane once the bus
is there. tmux runs on a socket of its own with no configuration, so a tmux the user has is neither used nor changed.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from demo.programs import DemoError, environment, has, run

# Below this many lines the terminal program gets all of the window and the steps go to the status bar.
SMALL_LINES = 36
_END_TIMEOUT_S = 90.0
_CLOSED = "tui-closed"

_CONFIG = """\
set -g mouse on
set -g escape-time 10
set -g focus-events on
set -g default-terminal tmux-256color
set -ga terminal-overrides ",*:Tc"
set -g status-style "bg=default,fg=default,reverse"
set -g status-interval 1
set -g status-left " #(tail -n 1 {place}/report) "
set -g status-left-length 200
set -g status-right ""
set -g window-status-current-format ""
"""


def suits() -> str:
    """Say why the demo cannot show the terminal program here; "" if it can."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return "this is no terminal"
    if os.environ.get("TERM", "dumb") in ("", "dumb"):
        return "this terminal cannot move its cursor"
    if not has("tmux"):
        return "tmux is not installed"
    return ""


def in_tmux(options: Sequence[str]) -> int:
    """Run the demo with `options` inside a tmux, then print what it reported; returns its exit status."""
    with tempfile.TemporaryDirectory(prefix="blksnap-demo-screen-") as directory:
        place = Path(directory)
        (place / "conf").write_text(_CONFIG.format(place=place))
        inner = [sys.executable, "-m", "demo", f"--screen={place}", *options]
        tmux = ["tmux", "-S", str(place / "tmux"), "-f", str(place / "conf")]
        root = str(Path(__file__).resolve().parent.parent)
        env = environment({"PYTHONPATH": root, "TMUX": ""})
        # A terminal that is closed must not take us along before the demo below has cleaned up. Handled, not ignored: what
        # is ignored stays so in the programs we start.
        signal.signal(signal.SIGHUP, lambda _number, _frame: None)
        subprocess.run([*tmux, "new-session", shlex.join(inner)], check=False, env=env)
        # Whoever detached from tmux wants to leave: the demo below is told so (SIGHUP) and cleans up.
        subprocess.run([*tmux, "kill-server"], check=False, env=env, stderr=subprocess.DEVNULL)
        _await_end(place / "pid")
        # OSError: no report, or no terminal any more.
        with contextlib.suppress(OSError):
            print((place / "report").read_text(), end="", flush=True)
        try:
            return int((place / "status").read_text())
        except (FileNotFoundError, ValueError):
            print("demo: it ended without a result", file=sys.stderr)
            return 1


def _await_end(pid_file: Path) -> None:
    """Wait until the inner demo has cleaned up and gone."""
    deadline = time.monotonic() + _END_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            os.kill(int(pid_file.read_text()), 0)
        except (FileNotFoundError, ValueError, ProcessLookupError):
            return
        time.sleep(0.1)


class Screen:
    """The tmux around us, seen from inside. Its files are in `place`: tmux (socket), report, pid, status, tui-status."""

    def __init__(self, place: Path) -> None:
        self.report = place / "report"
        self._place = place
        self._socket = place / "tmux"
        self._pane = ""
        (place / "pid").write_text(str(os.getpid()))

    async def open(self, bus: str) -> None:
        """Open the terminal program in the upper pane; in a small terminal it gets all of it."""
        command = shlex.join([sys.executable, "-m", "blksnap_tui", f"--bus={bus}"])
        status, socket = shlex.quote(str(self._place / "tui-status")), shlex.quote(str(self._socket))
        shell = f"{command}; echo $? >{status}; tmux -S {socket} wait-for -S {_CLOSED}"
        small = os.get_terminal_size().lines < SMALL_LINES
        pane = await self._tmux("split-window", "-b", "-v", "-l", "72%", "-P", "-F", "#{pane_id}", shell)
        self._pane = pane.strip()
        await self._tmux(*(("resize-pane", "-Z") if small else ("set", "-g", "status", "off")))

    async def closed(self) -> None:
        """Wait until the user has left the terminal program. Raises DemoError when that had failed."""
        await self._tmux("wait-for", _CLOSED)
        status = (self._place / "tui-status").read_text().strip()
        if status != "0":
            raise DemoError(f"blksnap-tui ended with status {status}")

    async def close(self) -> None:
        """Close the terminal program, unless the user has."""
        with contextlib.suppress(DemoError):
            await self._tmux("kill-pane", "-t", self._pane)

    def finish(self, status: int) -> None:
        """Leave the exit status for `in_tmux`."""
        (self._place / "status").write_text(str(status))

    async def _tmux(self, *words: str) -> str:
        return await run("tmux", "-S", self._socket, *words)
