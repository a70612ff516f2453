# SPDX-License-Identifier: GPL-2.0-or-later
"""A device is tracked at boot, waited for, or used untracked."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from blksnap_service import boot, errors
from blksnap_service.catalogue import Catalogue
from blksnap_service.devices import Device
from blksnap_service.persistent import Record, Records
from blksnap_service.storage import Identity
from tests.unit.fakes.service import Blocks

SDB = Device("sdb", "block", "/dev/sdb", Identity(0x810, 0), 1 << 20, stable_key="serial-x")


class Late(Blocks):
    """Block devices of which one comes after the first look."""

    def __init__(self) -> None:
        super().__init__()
        self._looks = 0

    def watch(self, changed: Callable[[], None]) -> None:
        """Tell once, some time later."""
        asyncio.get_running_loop().call_later(0.05, changed)

    def list(self) -> dict[str, Device]:
        """Return nothing at first."""
        self._looks += 1
        return {"sdb": SDB} if self._looks > 1 else {}


class Rig:
    """A record, a state directory and a `dmsetup` that writes down what it is asked for."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.state = directory / "state"
        self.records = Records(directory / "attach")
        self.records.remember(SDB, owner_uid=7, backend="ublk", block_size=0)
        self.blocks: Blocks = Blocks()
        self.blocks.devices = {"sdb": SDB}
        self.mapper = directory / "mapper"
        self.mapper.mkdir()
        self.asked = directory / "asked"
        self.tracked: list[Record] = []
        self.refuse: errors.BlksnapError | None = None
        program = directory / "bin" / "dmsetup"
        program.parent.mkdir()
        program.write_text(
            f'#!/bin/sh\nif [ -e "{directory}/broken" ]; then echo no dm here >&2; exit 1; fi\necho "$@" >{self.asked}\n'
        )
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
        monkeypatch.setattr(boot, "_MAPPER", self.mapper)
        monkeypatch.setattr(boot, "_ASK_S", 0.01)
        monkeypatch.setattr(boot, "SERVICE_S", 0.2)
        monkeypatch.setattr(boot, "DEVICE_S", 0.2)

    async def _track(self, catalogue: Catalogue, record: Record) -> None:
        assert list(catalogue.trackers) == []
        if self.refuse is not None:
            raise self.refuse
        self.tracked.append(record)

    async def attach(self) -> None:
        """Do it."""
        await boot.attach("sdb", self.records, self.blocks, lambda: Catalogue(self.state), self._track)


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rig:
    """A machine at boot."""
    return Rig(tmp_path, monkeypatch)


async def test_it_is_tracked(rig: Rig) -> None:
    """As it was recorded."""
    await rig.attach()
    assert [(one.name, one.owner_uid, one.backend) for one in rig.tracked] == [("sdb", 7, "ublk")]
    assert not rig.asked.exists()


async def test_it_is_waited_for(rig: Rig) -> None:
    """Disks take their time."""
    rig.blocks = Late()
    await rig.attach()
    assert len(rig.tracked) == 1


async def test_a_device_that_does_not_come_is_said(rig: Rig) -> None:
    """There is nothing to bypass to."""
    rig.blocks.devices = {}
    with pytest.raises(errors.NotFound, match="serial-x, which is to be tracked as sdb, did not appear"):
        await rig.attach()


async def test_a_node_that_is_there_is_left_alone(rig: Rig) -> None:
    """The unit was started again."""
    (rig.mapper / "blksnap-sdb").touch()
    await rig.attach()
    assert rig.tracked == []


async def test_a_running_service_does_it(rig: Rig) -> None:
    """It has the state directory; its node is waited for."""
    (rig.records._directory / "serial-y").write_text("BLKSNAP_ATTACH=other\n")

    def open_catalogue() -> Catalogue:
        (rig.mapper / "blksnap-sdb").touch()
        raise errors.Busy("another blksnapd runs")

    await boot.attach("sdb", rig.records, rig.blocks, open_catalogue, rig._track)
    assert rig.tracked == []
    assert not rig.asked.exists()


async def test_a_service_that_does_not_do_it_is_not_waited_for_for_ever(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    """The machine boots."""
    with Catalogue(rig.state):
        await rig.attach()
    assert "0 2048 linear /dev/sdb 0" in rig.asked.read_text()
    assert "/dev/sdb is used untracked" in caplog.text


async def test_what_cannot_be_tracked_is_used_untracked(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    """By the name it would have, and the reason is in the log."""
    rig.refuse = errors.NotAvailable("no ublk_drv")
    await rig.attach()
    assert rig.asked.read_text().startswith(
        "create blksnap-sdb --uuid BLKSNAP-bypass-sdb --table 0 2048 linear"
    )
    assert "no ublk_drv" in caplog.text


async def test_where_that_is_forbidden_it_is_not_used_at_all(rig: Rig) -> None:
    """A history without a gap was worth more to somebody."""
    file = rig.records._directory / "serial-x"
    file.write_text(file.read_text().replace("BYPASS=yes", "BYPASS=no"))
    rig.refuse = errors.NotAvailable("no ublk_drv")
    with pytest.raises(errors.NotAvailable, match="no ublk_drv"):
        await rig.attach()
    assert not rig.asked.exists()


async def test_both_reasons_are_said_when_nothing_works(rig: Rig, tmp_path: Path) -> None:
    """Neither tracked nor untracked."""
    (tmp_path / "broken").touch()
    rig.refuse = errors.NotAvailable("no ublk_drv")
    with pytest.raises(errors.Failed, match=r"no ublk_drv.*no dm here"):
        await rig.attach()
