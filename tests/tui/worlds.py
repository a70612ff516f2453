# SPDX-License-Identifier: GPL-2.0-or-later
"""Services to look at, and the program on them. The same every time: fixed seeds, a fixed clock."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from textual.pilot import Pilot
from textual.widgets import Footer
from textual.widgets._footer import FooterKey

from blksnap_tui import model
from blksnap_tui.app import BlksnapApp
from blksnap_tui.client import Client
from blksnap_tui.fakemap import believable_map
from blksnap_tui.model import MANAGER_PATH, ObjectPath
from blksnap_tui.settings import Settings
from blksnap_tui.testing import START_US, FakeService

DISK = ObjectPath(f"{model.ROOT_PATH}/devices/disk_2eimg")

PATIENCE_S = 30.0


def busy() -> FakeService:
    """A disk image and a partition with histories, two devices without, three snapshots of which one has failed."""
    made = FakeService()
    disk = made.add_device("/srv/images/disk.img", 1 << 30)
    home = made.add_device("/dev/nvme0n1p2", 128 << 30, IdType="xfs", MountPoints=["/home"])
    made.add_device("/dev/sda", 2 << 40, IdType="", Model="Example Disk", MountPoints=["/"])
    made.add_device("/dev/vg0/mail", 80 << 30, Backends=[])
    made.track(disk, believable_map(16_384))
    made.track(home, believable_map((128 << 30) // 65_536, 9, 7))
    for devices, description, share in (
        ([disk], "nightly", 0.31),
        ([disk, home], "before the upgrade", 0.82),
        ([home], "", 1.0),
    ):
        options = {"description": description, "limit": 2 << 30}
        (path,), _ = made.answer(MANAGER_PATH, "CreateSnapshot", (devices, options))
        made.set_snapshot(path, StorageUsed=int(share * (2 << 30)))
    made.set_snapshot(path, State="failed", Error="the difference storage is full: 2.00 GiB of 2.00 GiB")
    made.write(disk, 5000, 40)
    made.write(home, 700_000, 9000)
    made.calls.clear()
    return made


@contextlib.asynccontextmanager
async def running(
    service: FakeService, size: tuple[int, int] = (80, 24), *, settings: Settings | None = None
) -> AsyncIterator[tuple[BlksnapApp, Pilot[None]]]:
    """Run the program on a service, in a terminal of `size` cells that is not there."""
    app = BlksnapApp(
        make_client=lambda: Client("system", wait_for_service=True, transport=service.connect),
        now_us=lambda: START_US + 10 * 60_000_000,
        settings=settings or Settings(rate_hz=10),
    )
    async with app.run_test(size=size, notifications=True) as pilot:
        yield app, pilot


async def until(pilot: Pilot[None], true: Callable[[], bool]) -> None:
    """Let the program work until something holds, and then until it has nothing to do."""
    async with asyncio.timeout(PATIENCE_S):
        while not true():
            await pilot.pause(0.01)
        await pilot.pause()
        # The footer writes its keys some time after everything else is there.
        while not all(footer.query(FooterKey) for footer in pilot.app.screen.query(Footer)):
            await pilot.pause(0.01)
    await pilot.pause()


async def drawn(app: BlksnapApp, pilot: Pilot[None]) -> None:
    """Wait until the map and the facts of the chosen device are there."""
    await until(pilot, lambda: app.main.is_drawn)
