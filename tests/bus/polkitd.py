# SPDX-License-Identifier: GPL-2.0-or-later
"""A bus as a system bus is configured, the real polkitd on it with our policy, an agent that answers, callers without rights.

polkitd reads its actions and rules where it was built to: the directories are put there in a mount namespace of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from blksnap_service.bus import polkit, wire
from blksnap_service.errors import BlksnapError
from tests.bus.daemons import REPOSITORY, START_S, Bus

BUS_CONFIG = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>system</type>
  <listen>unix:path={path}</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow user="*"/>
    <deny own="*"/>
    <deny send_type="method_call"/>
    <allow send_type="signal"/>
    <allow send_requested_reply="true" send_type="method_return"/>
    <allow send_requested_reply="true" send_type="error"/>
    <allow receive_type="method_call"/>
    <allow receive_type="method_return"/>
    <allow receive_type="error"/>
    <allow receive_type="signal"/>
    <allow send_destination="org.freedesktop.DBus"/>
  </policy>
  <includedir>{ours}</includedir>
  <include>/usr/share/dbus-1/system.d/org.freedesktop.PolicyKit1.conf</include>
</busconfig>
"""
RULES = """
polkit.addRule(function (action, subject) {{
    if (action.id.indexOf("org.blksnap.") != 0) return polkit.Result.NOT_HANDLED;
    var said = polkit.spawn(["/bin/cat", "{verdict}"]).trim();
    if (said == "yes") return polkit.Result.YES;
    if (said == "no") return polkit.Result.NO;
    if (said && said == action.lookup("devices")) return polkit.Result.YES;
    return polkit.Result.NOT_HANDLED;
}});
"""
AGENT_XML = """<node><interface name="org.freedesktop.PolicyKit1.AuthenticationAgent">
  <method name="BeginAuthentication">
    <arg type="s" name="action_id"/><arg type="s" name="message"/><arg type="s" name="icon_name"/>
    <arg type="a{ss}" name="details"/><arg type="s" name="cookie"/><arg type="a(sa{sv})" name="identities"/>
  </method>
  <method name="CancelAuthentication"><arg type="s" name="cookie"/></method>
</interface></node>"""
AGENT = "org.freedesktop.PolicyKit1.AuthenticationAgent"
AGENT_PATH = "/org/blksnap/TestAgent"
NOBODY = 65_534


class SystemBus(Bus):
    """A private bus with the limits and rules of a system bus, and ours."""

    config = BUS_CONFIG.replace("{ours}", str(REPOSITORY / "dbus" / "system.d"))


class Polkit:
    """The real polkitd. ``verdict``: what our one rule says to all, or a device for which it says yes; empty leaves it open."""

    def __init__(self, directory: Path, bus: Bus, *, with_rule: bool = True) -> None:
        """Start it; ``wait`` waits until it is on the bus. The rule starts a process for each check."""
        self._verdict = directory / "verdict"
        self.rule("")
        actions, rules = directory / "actions", directory / "rules.d"
        for made in (actions, rules):
            made.mkdir()
            made.chmod(0o755)
        for policy in (
            REPOSITORY / "dbus/polkit/org.blksnap.blksnap1.policy",
            Path("/usr/share/polkit-1/actions/org.freedesktop.policykit.policy"),
        ):
            _readable(actions / policy.name, policy.read_text())
        if with_rule:
            _readable(rules / "10-test.rules", RULES.format(verdict=self._verdict))
        script = (
            "mount --make-rprivate / && mount --bind $0 /usr/share/polkit-1/actions && "
            "mount --bind $1 /etc/polkit-1/rules.d && exec /usr/lib/polkit-1/polkitd"
        )
        self.log = directory / "polkitd.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                ["unshare", "-m", "sh", "-c", script, actions, rules],
                env={**os.environ, "DBUS_SYSTEM_BUS_ADDRESS": bus.address},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    async def wait(self, connection: wire.Connection) -> None:
        """Wait until it answers."""
        end = time.monotonic() + START_S
        while True:
            with contextlib.suppress(BlksnapError):
                await connection.call(polkit.NAME, polkit.PATH, "org.freedesktop.DBus.Peer", "Ping")
                return
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, "polkitd does not come up"
            await asyncio.sleep(0.02)

    def rule(self, verdict: str) -> None:
        """Have the rule say ``yes``, ``no``, ``yes`` for that device only, or nothing."""
        new = self._verdict.with_suffix(".new")
        _readable(new, verdict)
        new.replace(self._verdict)

    def hang(self) -> None:
        """Stop it from answering."""
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Let it answer again."""
        self.process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()


def _readable(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o644)


class _DeclinedError(BlksnapError):
    dbus_name: ClassVar[str] = "org.freedesktop.PolicyKit1.Error.Cancelled"


class Agent:
    """Asks nobody: answers ``yes`` or ``no`` for a process, when ``gate`` is open. Remembers what a person would have read."""

    def __init__(self, connection: wire.Connection) -> None:
        """Answer on the connection of root."""
        self._connection = connection
        self.answer = "yes"
        self.messages: list[str] = []
        self.details: list[Mapping[str, str]] = []
        self.cancelled = asyncio.Event()
        self.begun = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()
        publisher = wire.Publisher(connection, "/org/blksnap", wire.parse_interfaces(AGENT_XML))
        publisher.export(AGENT_PATH, {AGENT: self})

    def properties(self) -> dict[str, Any]:
        """It has none."""
        return {}

    async def register(self, pid: int, uid: int) -> None:
        """Answer for that process."""
        start = int(Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[19])
        what = {
            "pid": wire.variant("u", pid),
            "start-time": wire.variant("t", start),
            "uid": wire.variant("i", uid),
        }
        await self._connection.call(
            polkit.NAME,
            polkit.PATH,
            polkit.INTERFACE,
            "RegisterAuthenticationAgent",
            "(sa{sv})ss",
            [("unix-process", what), "C.UTF-8", AGENT_PATH],
        )

    async def BeginAuthentication(  # noqa: N802 - as polkit calls it
        self,
        call: wire.Call,
        action: str,
        message: str,
        icon: str,
        details: Mapping[str, str],
        cookie: str,
        identities: list[tuple[str, Mapping[str, wire.Value]]],
    ) -> None:
        """Answer."""
        self.messages.append(message)
        self.details.append(details)
        self.begun.set()
        await self.gate.wait()
        if self.answer != "yes":
            raise _DeclinedError("declined")
        kind, values = identities[0]
        for uid in (NOBODY, 0):
            # polkit 122 wants the uid of who answers, later ones that of the subject.
            with contextlib.suppress(BlksnapError):
                await self._connection.call(
                    polkit.NAME,
                    polkit.PATH,
                    polkit.INTERFACE,
                    "AuthenticationAgentResponse2",
                    "us(sa{sv})",
                    [uid, cookie, (kind, values)],
                )
                return

    async def CancelAuthentication(self, call: wire.Call, cookie: str) -> None:  # noqa: N802
        """Take the question back."""
        self.cancelled.set()
        self.gate.set()


class Unprivileged:
    """A process of another user with a connection of its own, which calls what it is told to (``tests.bus.nobody``)."""

    def __init__(self, bus: Bus, uid: int = NOBODY) -> None:
        """Start it."""
        self.uid = uid
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.bus.nobody", bus.address, str(uid)],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.name = self._line().strip()
        assert self.name.startswith(":"), self.name

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def begin(
        self,
        path: str,
        interface: str,
        member: str,
        signature: str = "",
        *arguments: Any,
        interactive: bool = True,
        quiet: bool = False,
        **options: tuple[str, Any],
    ) -> None:
        """Call a method of ours; ``_`` in options' names stands for ``-``. An h is the name of a file it is to open.

        ``quiet`` gives the option auth.no_user_interaction. Any number of calls may be under way.
        """
        request = {
            "path": path,
            "interface": interface,
            "member": member,
            "signature": signature,
            "arguments": arguments,
            "interactive": interactive,
            "options": {name.replace("_", "-"): pair for name, pair in options.items()}
            | ({"auth.no_user_interaction": ("b", True)} if quiet else {}),
        }
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()

    async def end(self) -> tuple[str, Any]:
        """Return the last name of the error, or nothing, and what came back or its text, of the next call that ends."""
        error, result = json.loads(await asyncio.to_thread(self._line))
        return str(error).rpartition(".")[2], result

    async def call(self, *words: Any, **more: Any) -> tuple[str, Any]:
        """Call a method as ``begin`` does and wait as ``end`` does."""
        self.begin(*words, **more)
        return await self.end()

    def leave(self) -> None:
        """Leave the bus at once."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
