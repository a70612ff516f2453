# SPDX-License-Identifier: GPL-2.0-or-later
"""
What a person may do to the service: ask when it matters, call, say how it went.

Each act is a coroutine run as a worker of the app. Refusals are shown in the service's own words. Drawing is not done here.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from textual.app import App

from blksnap_tui.client import Client
from blksnap_tui.errors import BlksnapError
from blksnap_tui.model import Device, Snapshot, State
from blksnap_tui.screens.dialogs import AskFile, AskSnapshot, Confirm, Notice

Result = TypeVar("Result")


class Acts:
    """The acts of one program; `client` gives the present connection, or None."""

    def __init__(self, app: App[Any], client: Callable[[], Client | None]) -> None:
        self._app = app
        self._client = client

    async def _do(self, what: str, call: Callable[[Client], Awaitable[Result]]) -> tuple[bool, Result | None]:
        """Call the service; a failure becomes a notice. Gives whether it went well, and the result."""
        client = self._client()
        if client is None:
            await self._app.push_screen_wait(
                Notice(f"could not {what}", "there is no connection to the service")
            )
            return False, None
        try:
            return True, await call(client)
        except BlksnapError as error:
            await self._app.push_screen_wait(Notice(f"could not {what}", str(error)))
            return False, None

    async def add_file(self) -> str | None:
        """Ask for an image file and add it; gives the new device's object path."""
        path = await self._app.push_screen_wait(AskFile())
        if not path:
            return None
        _, device = await self._do(f"add {path}", lambda client: client.add_image_file(path))
        return device

    async def track(self, device: Device) -> None:
        """Start tracking a device, after saying what that means."""
        if device.tracker is not None:
            self._app.notify(f"{device.name} is tracked already", severity="information", markup=False)
            return
        if not device.backends:
            why = (
                f"{device.path} is mounted on {', '.join(device.mount_points)}: unmount it, track it, and mount the"
                " node the tracker shows instead"
                if device.mount_points
                else f"no backend can track {device.path} now; ? tells which there are and what they lack"
            )
            await self._app.push_screen_wait(Notice(f"cannot track {device.name}", why))
            return
        then = (
            "the tracker goes under it, and what uses it goes on."
            if device.mount_points
            else "programs must then use the node the tracker shows, or their writes are not seen."
        )
        question = (
            f"record from now on what changes on {device.path}?\n\nbackend: {device.backends[0]}. {then}"
        )
        if not await self._app.push_screen_wait(Confirm(f"track {device.name}", question, "track")):
            return
        good, _ = await self._do(f"track {device.name}", lambda client: client.attach(device.object_path))
        if good:
            self._app.notify(f"{device.name} is tracked", markup=False)

    async def untrack(self, device: Device) -> None:
        """Stop tracking a device, after saying what is lost."""
        if device.tracker is None:
            self._app.notify(
                f"{device.name} is not tracked: t tracks it", severity="information", markup=False
            )
            return
        node = device.tracker.node
        stays = node in {device.path, *device.symlinks}
        question = (
            f"stop recording what changes on {device.path}?\n\n"
            "its history ends: the next backup has to be a full one. "
            + ("programs that use it go on." if stays else f"programs that use {node} lose it.")
        )
        if not await self._app.push_screen_wait(Confirm(f"untrack {device.name}", question, "untrack")):
            return
        good, _ = await self._do(f"untrack {device.name}", lambda client: client.detach(device.object_path))
        if good:
            self._app.notify(f"{device.name} is no longer tracked", markup=False)

    async def snapshot(self, chosen: Device, state: State) -> None:
        """Ask for the particulars of a snapshot and take it."""
        tracked = [device for device in state.devices if device.tracker is not None]
        if chosen.tracker is None:
            self._app.notify(f"{chosen.name} is not tracked: press t first", severity="warning", markup=False)
            return
        storage = "" if state.manager is None else state.manager.default_storage_directory
        wish = await self._app.push_screen_wait(AskSnapshot(tracked, chosen, storage))
        if wish is None:
            return
        good, _ = await self._do(
            "take the snapshot",
            lambda client: client.create_snapshot(
                wish.devices, limit=wish.limit, storage=wish.storage, description=wish.description
            ),
        )
        if good:
            self._app.notify("the snapshot is taken")

    async def destroy(self, snapshot: Snapshot, state: State) -> None:
        """Destroy a snapshot, after saying what is lost."""
        names = [
            path.rpartition("/")[2] if device is None else device.name
            for path, device in ((path, state.device(path)) for path in snapshot.devices)
        ]
        what = f"the snapshot of {', '.join(names) or 'nothing'}"
        question = (
            f"destroy {what}"
            + (f" ({snapshot.description})" if snapshot.description else "")
            + "?\n\nits images go, also for programs that read them now. the devices are not touched."
        )
        if not await self._app.push_screen_wait(Confirm("destroy a snapshot", question, "destroy")):
            return
        good, _ = await self._do(
            f"destroy {what}", lambda client: client.destroy_snapshot(snapshot.object_path)
        )
        if good:
            self._app.notify("the snapshot is destroyed")
