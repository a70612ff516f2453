# SPDX-License-Identifier: GPL-2.0-or-later
"""What the real udevd makes of devices of ours by our rules, and devices that are tracked after every boot."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blksnap_service.bus.paths import DEVICE, TRACKER, device_path
from tests.bus.daemons import program, scratch
from tests.vm.guest import devices
from tests.vm.guest.system import (
    MIB,
    RECORDS,
    RUNTIME,
    UUID,
    follows,
    has,
    make_ext4,
    poke,
    properties,
    start,
)
from tests.vm.machine import TREE


@pytest.fixture
def says() -> Iterator[Callable[[str, str], None]]:
    """Say what a device is for, as the data path does."""
    directory = RUNTIME / "udev"
    directory.mkdir(parents=True, exist_ok=True)
    said = []

    def say(name: str, lines: str) -> None:
        (directory / name).write_text(lines)
        said.append(directory / name)

    yield say
    for one in said:
        one.unlink(missing_ok=True)


@pytest.mark.usefixtures("rules")
class TestRules:
    """What udev makes of devices of ours."""

    def test_an_image_is_hidden_and_has_a_name(self, says: Callable[[str, str], None], file: Path) -> None:
        """Nothing of its content is looked at."""
        make_ext4(file)
        with devices.loop(file) as node:
            says(
                node.name,
                f"BLKSNAP_ROLE=image\nBLKSNAP_ORIGIN=vda\nBLKSNAP_SNAPSHOT={UUID}\nBLKSNAP_NAME=vda\n",
            )
            poke(node)
            found = properties(node)
            assert (found["SYSTEMD_READY"], found["UDISKS_IGNORE"]) == ("0", "1")
            assert not [name for name in found if name.startswith("ID_FS")]
            assert Path(f"/dev/blksnap/{UUID}/vda").resolve() == node
            assert not Path(f"/dev/disk/by-uuid/{UUID}").exists()

    def test_an_origin_is_hidden_and_its_node_has_the_links(
        self, says: Callable[[str, str], None], file: Path
    ) -> None:
        """Until it is tracked no more."""
        make_ext4(file)
        by_uuid = Path(f"/dev/disk/by-uuid/{UUID}")
        with devices.loop(file) as node:
            devices.run("udevadm", "settle")
            assert by_uuid.resolve() == node
            says(node.name, "BLKSNAP_ROLE=origin\n")
            poke(node)
            found = properties(node)
            assert (found["SYSTEMD_READY"], found["UDISKS_IGNORE"]) == ("0", "1")
            assert (found["ID_FS_TYPE"], found["BLKSNAP_FS_TYPE"]) == ("blksnap_member", "ext4")
            top = ("dmsetup", "create", "blksnap-test", "--uuid", "BLKSNAP-top-test")
            devices.run(*top, "--table", f"0 {64 * MIB // 512} linear {node} 0")
            try:
                devices.run("udevadm", "settle")
                mapped = Path("/dev/mapper/blksnap-test").resolve()
                assert by_uuid.resolve() == mapped
                assert Path("/dev/disk/by-label/data").resolve() == mapped
                poke(node)
                assert by_uuid.resolve() == mapped
                assert properties(mapped)["ID_FS_TYPE"] == "ext4"
                assert properties(mapped).get("SYSTEMD_READY", "1") == "1"
            finally:
                devices.run("dmsetup", "remove", "blksnap-test")
            (RUNTIME / "udev" / node.name).unlink()
            poke(node)
            assert by_uuid.resolve() == node
            assert "SYSTEMD_READY" not in properties(node)

    def test_a_logical_volume_group_on_an_origin_is_not_activated(
        self, says: Callable[[str, str], None], file: Path
    ) -> None:
        """LVM goes by ID_FS_TYPE."""
        devices.modprobe("dm-mod")
        with devices.loop(file) as node:
            devices.run("lvm", "pvcreate", "--yes", str(node))
            assert properties(node)["ID_FS_TYPE"] == "LVM2_member"
            says(node.name, "BLKSNAP_ROLE=origin\n")
            poke(node)
            assert properties(node)["ID_FS_TYPE"] == "blksnap_member"

    def test_what_lies_below_a_live_device_is_hidden(self) -> None:
        """It shows the same bytes as the device above."""
        devices.modprobe("dm-mod")
        create = ("dmsetup", "create", "lv-blksnap", "--uuid", "BLKSNAP-lower-lv")
        devices.run(*create, "--table", "0 2048 linear /dev/vda 0")
        try:
            found = properties("/dev/mapper/lv-blksnap")
            assert (found["SYSTEMD_READY"], found["UDISKS_IGNORE"]) == ("0", "1")
        finally:
            devices.run("dmsetup", "remove", "lv-blksnap")

    @pytest.mark.parametrize("key", ["serial-disk0", f"fsuuid-{UUID}"])
    def test_a_configured_device_is_an_origin_before_anything_tracks_it(self, key: str, file: Path) -> None:
        """Found by what outlives a boot, and its unit would be started."""
        make_ext4(file)
        RECORDS.mkdir(parents=True, exist_ok=True)
        (RECORDS / key).write_text("BLKSNAP_ATTACH=data\n")
        Path("/run/systemd/system").mkdir(parents=True, exist_ok=True)
        try:
            with devices.loop(file) as loop:
                node = Path("/dev/vda") if key.startswith("serial") else loop
                poke(node)
                found = properties(node)
                assert found["BLKSNAP_KEY"] == key
                assert (found["SYSTEMD_READY"], found["ID_FS_TYPE"]) == ("0", "blksnap_member")
                test = devices.run("udevadm", "test", "--action=add", f"/sys/class/block/{node.name}")
                assert "start blksnap-attach@data.service" in test
                test = devices.run("udevadm", "test", "--action=change", f"/sys/class/block/{node.name}")
                assert "blksnap-attach@" not in test
        finally:
            (RECORDS / key).unlink()
            Path("/run/systemd/system").rmdir()
            poke(Path("/dev/vda"))


@pytest.mark.usefixtures("rules")
class TestAlways:
    """A device that is tracked after every boot."""

    async def test_it_is_hidden_tracked_again_without_a_bus_and_adopted(self) -> None:
        """Detaching ends it."""
        disk = Path("/dev/vdb")
        path = device_path("vdb")
        make_ext4(disk)
        with scratch() as directory:
            rig = await asyncio.to_thread(start, directory)
            try:
                async with rig.user() as user:
                    await follows(user, "file system found", "vdb", has("IdType", "ext4"))
                    await user.call(path, DEVICE, "Attach", "", backend=("s", "nbd"), persistent=("b", True))
                    assert "BLKSNAP_ATTACH=vdb\n" in (RECORDS / "serial-disk1").read_text()
                    assert properties(disk)["SYSTEMD_READY"] == "0"
                    await follows(user, "still shown", "vdb", has("IdType", "ext4"))
                await rig.daemon.end(signal.SIGKILL)
                rig.daemon.lose_datapath()
                poke(disk)
                assert properties(disk)["SYSTEMD_READY"] == "0"
                words = (
                    "env",
                    f"PYTHONPATH={TREE}",
                    sys.executable,
                    "-m",
                    "blksnap_service",
                    f"--state-dir={rig.daemon.state}",
                )
                said = await program(*words, "--attach-at-boot=vdb")
                assert "/dev/vdb is tracked again" in said
                pid = rig.daemon.datapath_pid()
                await rig.daemon.start()
                assert rig.daemon.datapath_pid() == pid
                async with rig.user() as user:
                    assert await user.get(path, TRACKER, "State") == "tracking"
                    await user.call(path, DEVICE, "Detach", "")
                assert not (RECORDS / "serial-disk1").exists()
                assert properties(disk)["ID_FS_TYPE"] == "ext4"
            finally:
                rig.end()

    def test_without_a_data_path_it_is_used_untracked(self, tmp_path: Path) -> None:
        """Its node is there, and has the links; where that is forbidden it is not."""
        devices.modprobe("dm-mod")
        disk = Path("/dev/vdb")
        make_ext4(disk)
        RECORDS.mkdir(parents=True, exist_ok=True)
        record = RECORDS / "serial-disk1"
        words = (sys.executable, "-m", "blksnap_service", f"--state-dir={tmp_path}", "--attach-at-boot=data")
        environment = os.environ | {"BLKSNAP_DATAPATH": "/bin/false"}

        def run() -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                words, check=False, capture_output=True, text=True, cwd=TREE, env=environment, timeout=100
            )

        try:
            record.write_text("BLKSNAP_ATTACH=data\nBLKSNAP_ATTACH_BYPASS=no\n")
            poke(disk)
            said = run()
            assert said.returncode == 1
            assert not Path("/dev/mapper/blksnap-data").exists()
            record.write_text("BLKSNAP_ATTACH=data\n")
            said = run()
            assert said.returncode == 0, said.stderr
            assert "/dev/vdb is used untracked" in said.stderr
            devices.run("udevadm", "settle")
            node = Path("/dev/mapper/blksnap-data").resolve()
            assert Path(f"/dev/disk/by-uuid/{UUID}").resolve() == node
            assert run().returncode == 0
        finally:
            record.unlink()
            devices.run("dmsetup", "remove", "blksnap-data")
            poke(disk)
