# SPDX-License-Identifier: GPL-2.0-or-later
"""The data path is killed with -9 under a block device and comes back: no I/O fails, no change is missed."""

import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.nbd.survival import Held
from tests.vm.guest import devices, ublk
from tests.vm.guest.ublk import MIB

SIZE = 64 * MIB
DEATHS = 12


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Held]:
    """A data path with a holder, with the driver loaded; what it still serves is stopped by force."""
    devices.modprobe("ublk_drv")
    held = Held(tmp_path)
    try:
        yield held
        held.control.call("stop", force=True)
        assert held.process.wait(30) == 0, held.story()
    finally:
        held.kill()


def test_deaths_under_verified_writing_lose_nothing(held: Held) -> None:
    """fio sees no error through any death; the held image is what the device was; what changed is marked."""
    chance = random.Random(1)
    with devices.brd(SIZE) as disk:
        tracked = ublk.track(held, disk)
        ublk.fio("before", *ublk.verified_writes(tracked.node, 8 * MIB))
        content = ublk.read(tracked.node)
        snapshot, (image,) = ublk.take(tracked)
        number = snapshot.info().images[0].number
        failures: list[BaseException] = []

        def work() -> None:
            try:
                for seed in range(1000):
                    ublk.fio("w", *ublk.verified_writes(tracked.node, 16 * MIB, f"--randseed={seed}"))
                    if held.deaths >= DEATHS:
                        return
            except BaseException as failure:  # noqa: BLE001 - raised again below, in the thread of the test
                failures.append(failure)

        writer = threading.Thread(target=work)
        writer.start()
        while held.deaths < DEATHS and writer.is_alive():
            time.sleep(chance.random() * 0.5)
            held.die()
        writer.join()
        assert not failures, (failures, held.story())
        assert held.deaths == DEATHS
        assert ublk.read(image) == content
        after = ublk.read(tracked.node)
        maps = tracked.maps()
        block = maps.reading.block_size
        different = ublk.differing(content, after, block)
        assert different
        assert different <= maps.changed(number, live=True)
        assert maps.reading.changes == number
        snapshot.destroy()
        assert not image.exists()
        tracked.remove()
        assert not tracked.node.exists()
