# SPDX-License-Identifier: GPL-2.0-or-later
"""Every method, asked for by a user without rights and by root: what polkit says is what happens."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from blksnap_service.authority import ACTIONS
from blksnap_service.bus import paths
from blksnap_service.bus.paths import DEVICE, IMAGE, MANAGER, MANAGER_PATH, SNAPSHOT, TRACKER
from blksnap_service.errors import RemoteError
from tests.bus.daemons import EMULATED, Client, Daemon, make_image
from tests.bus.polkitd import NOBODY, Agent, Polkit, Unprivileged

Words = tuple[Any, ...]


class Stage:
    """Makes what a method is called on, as nobody's where that matters."""

    def __init__(self, directory: Path, root: Client, nobody: Unprivileged, polkit: Polkit) -> None:
        self._directory, self._root, self._nobody, self._polkit = directory, root, nobody, polkit
        self._number = 0

    def image(self) -> Path:
        """Make another image file."""
        self._number += 1
        path = make_image(self._directory / f"disk{self._number}.img")
        os.chown(path, NOBODY, NOBODY)
        return path

    async def device(self) -> str:
        """Add another image file."""
        return await self._root.add(self.image())

    async def tracked(self) -> str:
        """Attach a tracker to another one."""
        return await self._root.attach(self.image())

    async def snapshot(self, device: str, **options: Any) -> str:
        """Have nobody make a snapshot, as polkit allows for once."""
        self._polkit.rule("yes")
        error, result = await self._nobody.call(
            MANAGER_PATH, MANAGER, "CreateSnapshot", "ao", [device], **options
        )
        self._polkit.rule("")
        assert not error, result
        return str(result[0])

    async def call(  # noqa: C901 - one case per method
        self, interface: str, member: str
    ) -> tuple[Words, dict[str, Any]]:
        """Prepare a call that works for whoever may."""
        match interface, member:
            case "Manager", "ResolveDevice":
                image = self.image()
                await self._root.add(image)
                return (MANAGER_PATH, MANAGER, member, "s", str(image)), {}
            case "Manager", "AddImageFile":
                image = self.image()
                return (MANAGER_PATH, MANAGER, member, "s", str(image)), {"path_fd": ("h", str(image))}
            case "Manager", "CreateSnapshot":
                return (MANAGER_PATH, MANAGER, member, "ao", [await self.tracked()]), {}
            case "Manager", _:
                return (MANAGER_PATH, MANAGER, member), {}
            case "Device", "Attach":
                return (await self.device(), DEVICE, member), {}
            case "Device", _:
                return (await self.tracked(), DEVICE, member), {}
            case "Tracker", _:
                arguments: dict[str, Words] = {
                    "ReadMap": ("tu", 0, 16),
                    "GetChangedRanges": ("utu", 0, 0, 10),
                    "Summarize": ("ttus", 0, 16, 4, "age"),
                    "MarkDirty": ("a(tt)", [(0, 4096)]),
                }
                return (await self.tracked(), TRACKER, member, *arguments.get(member, ())), {}
            case "Snapshot", "AddDevice":
                snapshot = await self.snapshot(await self.tracked(), take=("b", False))
                return (snapshot, SNAPSHOT, member, "o", await self.tracked()), {}
            case "Snapshot", _:
                options = {"Take": {"take": ("b", False)}, "Release": {"hold": ("b", True)}}
                made = await self.snapshot(await self.tracked(), **options.get(member, {}))
                return (made, SNAPSHOT, member), {}
            case "Image", _:
                (image,) = await self._root.get(await self.snapshot(await self.tracked()), SNAPSHOT, "Images")
                return (image, IMAGE, member), {}
        raise AssertionError(f"{interface}.{member} is not tested")


async def _as_root(root: Client, words: Words, options: dict[str, Any]) -> str:
    path, interface, member, *rest = words
    signature, arguments = (rest[0], rest[1:]) if rest else ("", [])
    options = {name: pair for name, pair in options.items() if pair[0] != "h"}
    try:
        result = await root.call(path, interface, member, signature, *arguments, **options)
    except RemoteError as error:
        return error.remote_name.rpartition(".")[2]
    for one in result if isinstance(result, tuple) else (result,):
        if hasattr(one, "close"):
            one.close()
    return "ok"


COLUMNS = ("no rule", "not asked", "rule: no", "agent: no", "agent: yes", "rule: yes", "root")
EXPECTED = (
    "NotAuthorizedCanObtain",
    "NotAuthorizedCanObtain",
    "NotAuthorized",
    "NotAuthorizedDismissed",
    "ok",
    "ok",
    "ok",
)
# An image file has no device node: who may open it learns that.
OPEN_OF_A_FILE = "NotSupported"


@pytest.mark.timeout(600 if EMULATED else 180)
async def test_every_method_asks_polkit(
    daemon: Daemon,
    polkit: Polkit,
    root: Client,
    nobody: Unprivileged,
    agent: Agent,
    directory: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And does what it is told: without a rule, with one, with an agent that says no or yes, and for root."""
    stage = Stage(directory, root, nobody, polkit)
    methods = [method for method in ACTIONS if method[0] != "Job"]
    found: dict[tuple[str, str], list[str]] = {method: [] for method in methods}

    ready: dict[tuple[str, str], tuple[Words, dict[str, Any]]] = {}

    async def row(verdict: str, *, interactive: bool = True) -> None:
        for method in methods:
            # What is refused leaves everything as it was: it is there for the next.
            if method not in ready:
                ready[method] = await stage.call(*method)
            words, options = ready[method]
            polkit.rule(verdict)
            asked = len(agent.messages)
            error, text = await nobody.call(*words, interactive=interactive, **options)
            polkit.rule("")
            found[method].append(error or "ok")
            if not error:
                del ready[method]
            assert "Traceback" not in str(text)
            if len(agent.messages) > asked:
                assert "$(" not in agent.messages[-1]
                assert agent.details[-1]["polkit.caller-pid"] == str(daemon.process and daemon.process.pid)

    await row("")
    await row("", interactive=False)
    await row("no")
    await agent.register(nobody.process.pid, NOBODY)
    agent.answer = "no"
    await row("")
    agent.answer = "yes"
    await row("")
    await row("yes")
    for method in methods:
        found[method].append(await _as_root(root, *await stage.call(*method)))
    with capsys.disabled():
        print("\n" + "".join(f"{column:25}" for column in ("method", *COLUMNS)))
        for method, cells in found.items():
            print("".join(f"{cell:25}" for cell in (".".join(method), *cells)))
    for method, cells in found.items():
        if ACTIONS[method] is None:
            assert cells == ["ok"] * len(COLUMNS), method
            continue
        allowed = OPEN_OF_A_FILE if method == ("Image", "Open") else "ok"
        assert cells == [allowed if one == "ok" else one for one in EXPECTED], method
    assert paths.MANAGER_PATH in await root.objects()
