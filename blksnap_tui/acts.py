# SPDX-License-Identifier: GPL-2.0-or-later
"""
What a person may do to the service: ask when it matters, call, say how it went.

Each act is a coroutine run as a worker of the app. Refusals are shown in the service's own words. Drawing is not done here.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

from textual.app import App

from blksnap_tui.client import Client
from blksnap_tui.errors import BlksnapError
from blksnap_tui.export import export_ranges
from blksnap_tui.model import Device, Image, Manager, ObjectPath, Snapshot, State
from blksnap_tui.screens.dialogs import AskFile, AskSnapshot, Confirm, Notice
from blksnap_tui.screens.questions import AskLine, AskTrack
from blksnap_tui.units import format_size, parse_range

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

    async def track(self, device: Device, manager: Manager | None) -> None:
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
        wish = await self._app.push_screen_wait(AskTrack(device, manager, then))
        if wish is None:
            return
        good, _ = await self._do(
            f"track {device.name}",
            lambda client: client.attach(
                device.object_path,
                backend=wish.backend,
                block_size=wish.block_size,
                persistent=wish.persistent,
            ),
        )
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
                wish.devices,
                limit=wish.limit,
                storage=wish.storage,
                description=wish.description,
                hold=wish.hold,
            ),
        )
        if good:
            self._app.notify("the snapshot is taken")

    async def release(self, snapshot: Snapshot) -> None:
        """Let a held snapshot stay when who holds it leaves."""
        if not snapshot.held:
            self._app.notify("this snapshot is not held: it stays until it is destroyed")
            return
        good, _ = await self._do("release it", lambda client: client.release_snapshot(snapshot.object_path))
        if good:
            self._app.notify("the snapshot stays until it is destroyed")

    async def mark(self, device: Device, chosen: tuple[int, int] | None) -> None:
        """Ask which bytes to mark as changed, and mark them; `chosen` are those under the cursor."""
        tracker = device.tracker
        if tracker is None:
            self._app.notify(f"{device.name} is not tracked: there is no map to mark", markup=False)
            return
        question = (
            "the next increment will read what is marked, changed or not. write OFFSET:LENGTH, or the word"
            " all: then it is a full copy."
        )
        marked = await self._app.push_screen_wait(
            AskLine(
                f"mark {device.name} as changed",
                question,
                lambda text: (0, tracker.capacity) if text == "all" else parse_range(text, tracker.capacity),
                value="" if chosen is None else f"{chosen[0]}:{chosen[1]}",
                example="12G:64K",
                yes="mark",
            )
        )
        if marked is None:
            return
        everything = marked == (0, tracker.capacity)
        good, _ = await self._do(
            f"mark {device.name}",
            lambda client: (
                client.mark_all_dirty(device.object_path)
                if everything
                else client.mark_dirty(device.object_path, [marked])
            ),
        )
        if good:
            self._app.notify("marked: the next increment reads it")

    async def export(self, device: Device, since: int) -> None:
        """Ask for a file, and write there what changed on a device since a number."""
        if device.tracker is None:
            self._app.notify(f"{device.name} is not tracked: nothing is known of it", markup=False)
            return
        question = (
            f"what changed on {device.name} since #{since}, up to now, as ranges of bytes. the name says how: .csv"
            " or .json."
        )
        path = await self._app.push_screen_wait(
            AskLine(
                "write what changed to a file",
                question,
                file_named,
                value=f"{device.name}-since-{since}.csv",
                yes="write",
            )
        )
        if path is None:
            return
        try:
            _, written = await self._do(
                f"write {path.name}", lambda client: export_ranges(client, device, since, path)
            )
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            await self._app.push_screen_wait(Notice(f"could not write {path.name}", why))
            return
        if written is not None:
            ranges = f"{written.ranges} range{'' if written.ranges == 1 else 's'}"
            self._app.notify(
                f"{ranges}, {format_size(written.size)}, in {written.path}", timeout=10, markup=False
            )

    async def open_image(self, image: Image, name: str) -> None:
        """Have an image served if it is not, and say and copy where it is."""
        where: str | None = image.path
        if not where:
            _, where = await self._do(
                f"open the image of {name}", lambda client: client.export_image(image.object_path)
            )
        if where:
            self._app.copy_to_clipboard(where)
            how = f"mount -o ro {where} /mnt" if image.path else f"nbdinfo '{where}'"
            text = f"{where}\n\nit is in the clipboard, if the terminal lets programs write there. look at it with:\n\n{how}"
            await self._app.push_screen_wait(Notice(f"the image of {name}", text, trouble=False))

    async def unlock(self, device: Device) -> None:
        """Ask for the permission to read a device's map."""
        good, _ = await self._do("read the map", lambda client: client.get_info(device.object_path))
        if good:
            self._app.notify("the map may be read now")

    async def cancel(self, job: ObjectPath) -> None:
        """Ask a job to stop."""
        good, _ = await self._do("cancel it", lambda client: client.cancel_job(job))
        if good:
            self._app.notify("it was asked to stop")

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


def file_named(text: str) -> Path:
    """Read the name of a file to write ranges to. Raises ValueError whose text names what is wrong."""
    if not text:
        raise ValueError("write a name first")
    path = Path(text).expanduser().absolute()
    if path.suffix not in (".csv", ".json"):
        raise ValueError("the name must end in .csv or .json")
    if not path.parent.is_dir():
        raise ValueError(f"there is no directory {path.parent}")
    return path
