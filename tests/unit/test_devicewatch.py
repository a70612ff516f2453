# SPDX-License-Identifier: GPL-2.0-or-later
"""What becomes of trackers when their devices do something."""

from __future__ import annotations

import asyncio

import pytest

from blksnap_service import devicewatch, errors
from blksnap_service.devices import Device
from blksnap_service.devicewatch import DeviceWatch
from blksnap_service.storage import Identity

SDA = Device("sda", "block", "/dev/sda", Identity(0x800, 0), 1 << 30, stable_key="serial-x", node_name="sda")


class Trackers:
    """Trackers that notice after some readings."""

    def __init__(self, notices_after: int) -> None:
        self.readings = 0
        self.reasons: list[str] = []
        self.resized = 0
        self.busy = False
        self._notices_after = notices_after

    async def refresh(self, name: str, reason: str = "") -> None:
        """Count."""
        assert name == "sda"
        self.readings += 1
        self.reasons.append(reason)

    async def resize(self, name: str) -> None:
        """Count, or refuse."""
        assert name == "sda"
        if self.busy:
            raise errors.Busy("a snapshot is held")
        self.resized += 1

    def trouble(self, name: str) -> str | None:
        """Return what was noticed."""
        assert name == "sda"
        return "the device is gone" if self.readings >= self._notices_after else ""


class Rig:
    """A device watch over fake trackers."""

    def __init__(self, notices_after: int = 1) -> None:
        self.trackers = Trackers(notices_after)
        self.attached: list[str] = []
        self.watch = DeviceWatch(self.trackers, self._attach)

    async def _attach(self, device: Device) -> None:
        self.attached.append(device.path)

    async def done(self) -> None:
        """Wait for what is under way."""
        while tasks := list(self.watch._last.values()):
            await asyncio.wait(tasks)


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devicewatch, "_ASK_S", 0.01)
    monkeypatch.setattr(devicewatch, "BROKEN_WITHIN_S", 0.2)


async def test_a_tracker_is_asked_until_it_has_noticed(caplog: pytest.LogCaptureFixture) -> None:
    """And what it says is in the log."""
    rig = Rig(notices_after=3)
    rig.watch.device_lost(SDA)
    await rig.done()
    assert rig.trackers.readings == 3
    assert "the tracker of /dev/sda is broken: the device is gone" in caplog.text


async def test_a_tracker_that_never_notices_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """It is not asked for ever."""
    rig = Rig(notices_after=1 << 30)
    rig.watch.device_lost(SDA)
    await rig.done()
    assert "does not notice that its device is gone" in caplog.text


async def test_a_tracker_grows_with_its_device(caplog: pytest.LogCaptureFixture) -> None:
    """Or it is said why it cannot yet."""
    rig = Rig()
    rig.watch.device_resized(SDA)
    await rig.done()
    assert (rig.trackers.resized, rig.trackers.reasons) == (1, ["the size of the device changed"])
    rig.trackers.busy = True
    rig.watch.device_resized(SDA)
    await rig.done()
    assert "/dev/sda: a snapshot is held" in caplog.text


async def test_a_device_to_be_tracked_always_is_attached_once_the_service_has_begun() -> None:
    """What is there at the start is the start's business."""
    rig = Rig()
    rig.watch.device_found(SDA)
    await rig.done()
    assert rig.attached == []
    rig.watch.begin()
    rig.watch.device_found(SDA)
    await rig.done()
    assert rig.attached == ["/dev/sda"]


async def test_what_happens_to_one_device_is_dealt_with_in_order() -> None:
    """It was lost before it came back."""
    rig = Rig(notices_after=3)
    rig.watch.begin()
    rig.watch.device_lost(SDA)
    rig.watch.device_found(SDA)
    await asyncio.sleep(0)
    assert rig.attached == []
    await rig.done()
    assert rig.attached == ["/dev/sda"]


async def test_closing_ends_what_is_under_way() -> None:
    """Nothing is asked of trackers that are let go of."""
    rig = Rig(notices_after=1 << 30)
    rig.watch.device_lost(SDA)
    await asyncio.sleep(0)
    rig.watch.close()
    await rig.done()
    assert rig.trackers.readings <= 1
