# SPDX-License-Identifier: GPL-2.0-or-later
"""Block devices come, go, grow and change under the real service, with the real udevd and without one."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from blksnap_service.bus.paths import DEVICE, MANAGER, MANAGER_PATH, TRACKER, device_path
from tests.bus import daemons
from tests.bus.daemons import Bus, Client, Daemon, client, program, scratch
from tests.vm.guest import devices
from tests.vm.machine import TREE

MIB = 1 << 20
RUNTIME = Path("/run/blksnap")
RECORDS = Path("/etc/blksnap/attach")
FOLLOW_S = 5.0
"""A machine has 1 s; emulation is slower. What it took is printed."""
UUID = "11111111-2222-3333-4444-555555555555"


class Rig:
    """A service with the system's directories."""

    def __init__(self, directory: Path) -> None:
        self.bus = Bus(directory)
        self.daemon = Daemon(directory, self.bus, f"--runtime-dir={RUNTIME}")
        self.daemon.run = RUNTIME

    @contextlib.asynccontextmanager
    async def user(self) -> AsyncIterator[Client]:
        """A client of it."""
        async with client(self.bus) as one:
            yield one

    def end(self) -> None:
        """End all."""
        self.daemon.clean_up()
        self.bus.stop()
        said = self.daemon.log.read_text()
        print(said)
        assert "Traceback" not in said


def start(directory: Path) -> Rig:
    """Start a service, which takes its time under emulation."""
    daemons.START_S = 120
    rig = Rig(directory)
    asyncio.run(rig.daemon.start())
    return rig


def install_rules() -> None:
    """Put the rules where udevd finds them; not below /usr, as that is the host's."""
    target = Path("/run/udev/rules.d")
    target.mkdir(parents=True, exist_ok=True)
    for rules in (TREE / "dbus" / "udev").glob("*.rules"):
        shutil.copy(rules, target)


async def follows(
    user: Client, what: str, name: str, expected: Callable[[dict[str, Any] | None], bool]
) -> None:
    """Wait until the object of a device is as expected; says how long that took."""
    begin = time.monotonic()
    while not expected((await user.objects()).get(device_path(name), {}).get(DEVICE)):
        assert time.monotonic() < begin + FOLLOW_S, f"{what}: not seen"
        await asyncio.sleep(0.02)
    print(f"{what}: seen after {time.monotonic() - begin:.2f} s")


async def written(user: Client, path: str) -> None:
    """Wait until a load has begun."""
    count = 0
    while count < 50:
        await asyncio.sleep(0.1)
        count = (await user.call(path, TRACKER, "GetInfo", ""))["writes"].value


async def breaks(user: Client, path: str) -> None:
    """Wait until the tracker is broken; says how long that took."""
    begin = time.monotonic()
    while await user.get(path, TRACKER, "State") != "broken":
        assert time.monotonic() < begin + FOLLOW_S, "not broken"
        await asyncio.sleep(0.02)
    print(f"broken: seen after {time.monotonic() - begin:.2f} s")


def there(found: dict[str, Any] | None) -> bool:
    """Whether there is an object."""
    return found is not None


def gone(found: dict[str, Any] | None) -> bool:
    """Whether there is none."""
    return found is None


def has(name: str, value: object) -> Callable[[dict[str, Any] | None], bool]:
    """Whether a property of an object has a value."""
    return lambda found: found is not None and found[name] == value


def make_partitions(node: Path, *sizes_mib: int) -> None:
    """Write an MBR with partitions of these sizes, the first one at 1 MiB."""
    sectors, entries = 2048, b""
    for size_mib in sizes_mib:
        entries += bytes((0, 0, 0, 0, 0x83, 0, 0, 0)) + struct.pack("<II", sectors, size_mib * 2048)
        sectors += size_mib * 2048
    with node.open("r+b", buffering=0) as file:
        file.write((bytes(446) + entries).ljust(510, b"\0") + b"\x55\xaa")
        os.fsync(file.fileno())


def properties(node: Path | str) -> dict[str, str]:
    """What udev's database says of a device."""
    devices.run("udevadm", "settle")
    lines = devices.run("udevadm", "info", "--query=property", str(node)).splitlines()
    return dict(line.split("=", 1) for line in lines)


def poke(node: Path) -> None:
    """Have udev look again."""
    Path("/sys/class/block", node.name, "uevent").write_text("change")
    devices.run("udevadm", "settle")


@contextlib.contextmanager
def load(uri: str) -> Iterator[subprocess.Popen[bytes]]:
    """Random writes, for longer than any test waits."""
    words = f"fio --name=load --ioengine=nbd --uri={uri} --rw=randwrite --bs=4k --iodepth=8 --size=32m --time_based"
    process = subprocess.Popen(
        [*words.split(), "--runtime=250"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def make_ext4(node: Path) -> None:
    """Make a file system with a known UUID."""
    devices.run("mkfs.ext4", "-q", "-F", "-U", UUID, "-L", "data", str(node))


@pytest.fixture(scope="class", params=["udevd", "kernel"])
def source(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where events come from."""
    if request.param == "kernel":
        yield "kernel"
        return
    install_rules()
    with devices.udevd():
        yield "udevd"


@pytest.fixture(scope="class")
def rig(source: str) -> Iterator[Rig]:
    """A running service."""
    with scratch() as directory:
        one = start(directory)
        try:
            yield one
        finally:
            one.end()


@pytest.fixture
def file() -> Iterator[Path]:
    """A sparse file of 64 MiB."""
    with tempfile.NamedTemporaryFile() as one:
        os.truncate(one.name, 64 * MIB)
        yield Path(one.name)


class TestFollowing:
    """Objects follow devices."""

    async def test_a_loop_device_comes_grows_and_goes(self, rig: Rig, file: Path) -> None:
        """Attach, `losetup -c`, detach."""
        async with rig.user() as user:
            with devices.loop(file) as node:
                await follows(user, "loop attached", node.name, has("Size", 64 * MIB))
                os.truncate(file, 96 * MIB)
                devices.run("losetup", "--set-capacity", str(node))
                await follows(user, "loop grown", node.name, has("Size", 96 * MIB))
            await follows(user, "loop detached", node.name, gone)

    async def test_a_ram_disk_comes_and_goes(self, rig: Rig) -> None:
        """A module that is loaded and removed."""
        async with rig.user() as user:
            with devices.brd(16 * MIB) as node:
                await follows(user, "brd loaded", node.name, there)
            await follows(user, "brd removed", node.name, gone)

    async def test_partitions_are_read_again(self, rig: Rig) -> None:
        """A table is written and replaced by another one."""
        async with rig.user() as user:
            with devices.scsi_debug(64 * MIB) as disk:
                for sizes in ([8, 8], [16]):
                    make_partitions(disk, *sizes)
                    devices.run("blockdev", "--rereadpt", str(disk))
                    seen = has("Size", sizes[0] * MIB)
                    await follows(user, f"{len(sizes)} partitions", f"{disk.name}1", seen)
                await follows(user, "second partition gone", f"{disk.name}2", gone)
            await follows(user, "disk removed", f"{disk.name}1", gone)

    async def test_a_partition_is_given_another_size(self, rig: Rig) -> None:
        """By BLKPG, as resizepart(8) does it: there is no event. A tracker of it goes on, and has the new part marked."""
        async with rig.user() as user:
            with devices.scsi_debug(64 * MIB) as disk:
                make_partitions(disk, 8)
                devices.run("blockdev", "--rereadpt", str(disk))
                name = f"{disk.name}1"
                await follows(user, "partition", name, has("Size", 8 * MIB))
                devices.run("resizepart", str(disk), "1", str(16 * MIB // 512))
                await follows(user, "partition grown", name, has("Size", 16 * MIB))
                path = device_path(name)
                await user.call(path, DEVICE, "Attach", "", backend=("s", "nbd"))
                devices.run("resizepart", str(disk), "1", str(32 * MIB // 512))
                await follows(user, "tracked partition grown", name, has("Size", 32 * MIB))
                begin = time.monotonic()
                while await user.get(path, TRACKER, "Capacity") != 32 * MIB:
                    assert time.monotonic() < begin + FOLLOW_S
                    await asyncio.sleep(0.02)
                await user.call(path, DEVICE, "Detach", "")

    async def test_mounts_are_followed(self, rig: Rig, file: Path, tmp_path: Path) -> None:
        """Nobody sends an event for those."""
        make_ext4(file)
        async with rig.user() as user:
            with devices.loop(file) as node:
                devices.run("mount", str(node), str(tmp_path))
                try:
                    await follows(
                        user,
                        "mounted",
                        node.name,
                        has("MountPoints", [str(tmp_path)]),
                    )
                finally:
                    devices.run("umount", str(tmp_path))
                await follows(user, "unmounted", node.name, has("MountPoints", []))

    async def test_a_device_mapper_device_is_renamed(self, rig: Rig, source: str) -> None:
        """Its object stays, its links change; links are udev's."""
        async with rig.user() as user:
            devices.modprobe("dm-mod")
            devices.run("dmsetup", "create", "before", "--table", "0 2048 linear /dev/vda 0")
            try:
                # Without udevd it is a node of its own and no link.
                name = f"dm-{os.minor(Path('/dev/mapper/before').stat().st_rdev)}"
                await follows(user, "dm created", name.replace("-", "_2d"), there)
                devices.run("dmsetup", "rename", "before", "after")
                if source == "udevd":
                    await follows(
                        user,
                        "dm renamed",
                        name.replace("-", "_2d"),
                        lambda at: at is not None and "/dev/mapper/after" in at["Symlinks"],
                    )
            finally:
                for one in ("before", "after"):
                    with contextlib.suppress(subprocess.CalledProcessError):
                        devices.run("dmsetup", "remove", one)
            await follows(user, "dm removed", name.replace("-", "_2d"), gone)

    async def test_lost_events_are_made_up_for(self, rig: Rig, file: Path) -> None:
        """The service sleeps while more happens than the kernel keeps for it (ENOBUFS)."""
        assert rig.daemon.process is not None
        # Of any device: the kernel's channel has them all, and udevd is soon done with this one.
        uevent = Path("/sys/class/mem/null/uevent")
        async with rig.user() as user:
            rig.daemon.process.send_signal(signal.SIGSTOP)
            try:
                count = 0
                while not lost_events(rig.daemon.process.pid):
                    assert count < 20_000, "nothing was lost"
                    for _ in range(100):
                        uevent.write_text("change")
                    count += 100
                with devices.loop(file) as node:
                    rig.daemon.process.send_signal(signal.SIGCONT)
                    await follows(user, "after a flood", node.name, there)
                await follows(user, "after a flood, detached", node.name, gone)
            finally:
                rig.daemon.process.send_signal(signal.SIGCONT)
            if devices.udevd_runs():
                devices.run("udevadm", "settle")
            await asyncio.sleep(3)
            before = cpu_s(rig.daemon.process.pid)
            await asyncio.sleep(3)
            # An error of the socket that nobody takes would keep the loop busy.
            assert cpu_s(rig.daemon.process.pid) - before < 1.5

    async def test_a_disk_that_is_pulled_out_under_load_breaks_its_tracker(self, rig: Rig) -> None:
        """State and reason are told, clients get errors, nothing hangs, and the object goes with the tracker."""
        async with rig.user() as user:
            with devices.scsi_debug(64 * MIB) as disk:
                path = device_path(disk.name)
                await follows(user, "disk found", disk.name, there)
                await user.call(path, DEVICE, "Attach", "", backend=("s", "nbd"))
                node = await user.get(path, TRACKER, "Node")
                with load(node) as writer:
                    await written(user, path)
                    Path("/sys/class/block", disk.name, "device/delete").write_text("1")
                    await breaks(user, path)
                    info = await user.call(path, TRACKER, "GetInfo", "")
                    # The kernel takes its size away a moment before its name.
                    assert re.search("gone|smaller", info["reason"].value)
                    assert await user.get(path, TRACKER, "LastReset") == info["reason"].value
                    assert await asyncio.to_thread(writer.wait, 60) != 0
                await user.call(path, DEVICE, "Detach", "", force=("b", True))
                await follows(user, "detached", disk.name, gone)

    async def test_a_partition_whose_disk_is_pulled_out_breaks_its_tracker(self, rig: Rig) -> None:
        """It keeps its size for who has it open; its place in sysfs is gone."""
        async with rig.user() as user:
            with devices.scsi_debug(64 * MIB) as disk:
                make_partitions(disk, 60)
                devices.run("blockdev", "--rereadpt", str(disk))
                name = f"{disk.name}1"
                await follows(user, "partition found", name, there)
                path = device_path(name)
                await user.call(path, DEVICE, "Attach", "", backend=("s", "nbd"))
                Path("/sys/class/block", disk.name, "device/delete").write_text("1")
                await breaks(user, path)
                await user.call(path, DEVICE, "Detach", "", force=("b", True))
                await follows(user, "detached", name, gone)

    async def test_a_tracker_follows_a_device_that_grows(self, rig: Rig, file: Path) -> None:
        """Its generation goes on, with the new part marked."""
        async with rig.user() as user:
            with devices.loop(file) as node:
                path = device_path(node.name)
                await follows(user, "loop attached", node.name, there)
                await user.call(path, DEVICE, "Attach", "", backend=("s", "nbd"))
                generation = await user.get(path, TRACKER, "GenerationId")
                os.truncate(file, 96 * MIB)
                devices.run("losetup", "--set-capacity", str(node))
                begin = time.monotonic()
                while await user.get(path, TRACKER, "Capacity") != 96 * MIB:
                    assert time.monotonic() < begin + FOLLOW_S
                    await asyncio.sleep(0.02)
                assert await user.get(path, TRACKER, "GenerationId") == generation
                ranges, _ = await user.call(
                    path, TRACKER, "GetChangedRanges", "utu", 0, 0, 10, view=("s", "live")
                )
                assert [[offset, length] for offset, length in ranges] == [[64 * MIB, 32 * MIB]]
                await user.call(path, DEVICE, "Detach", "")


def lost_events(pid: int) -> int:
    """How many events did not fit into the sockets of a process (proc_net_netlink: protocol 15, column Drops)."""
    rows = [line.split() for line in Path("/proc/net/netlink").read_text().splitlines()[1:]]
    inodes = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        if found := re.fullmatch(r"socket:\[(\d+)\]", os.fspath(fd.readlink())):
            inodes.add(found[1])
    return sum(int(row[8]) for row in rows if row[1] == "15" and row[9] in inodes)


def cpu_s(pid: int) -> float:
    """The processor time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.fixture(scope="class")
def rules() -> Iterator[None]:
    """A udevd with our rules."""
    install_rules()
    with devices.udevd():
        yield


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


@pytest.mark.usefixtures("rules")
class TestUblk:
    """The data path's own devices, as they are."""

    async def test_only_the_node_is_a_disk(self) -> None:
        """The origin, what lies between and the images are hidden; all of it is undone by the detach."""
        devices.modprobe("ublk_drv")
        devices.modprobe("dm-mod")
        disk = Path("/dev/vdb")
        path = device_path("vdb")
        make_ext4(disk)
        poke(disk)
        by_uuid = Path(f"/dev/disk/by-uuid/{UUID}")
        with scratch() as directory:
            rig = await asyncio.to_thread(start, directory)
            try:
                async with rig.user() as user:
                    await user.call(path, DEVICE, "Attach", "", backend=("s", "ublk"))
                    node = Path(await user.get(path, TRACKER, "Node")).resolve()
                    found = properties(disk)
                    assert (found["SYSTEMD_READY"], found["ID_FS_TYPE"]) == ("0", "blksnap_member")
                    assert by_uuid.resolve() == node
                    found = properties(node)
                    assert found["ID_FS_TYPE"] == "ext4"
                    assert found.get("SYSTEMD_READY", "1") == "1"
                    if node.name.startswith("dm-"):
                        (between,) = Path("/sys/class/block", node.name, "slaves").iterdir()
                        found = properties(f"/dev/{between.name}")
                        assert (found["BLKSNAP_ROLE"], found["SYSTEMD_READY"]) == ("device", "0")
                        assert "ID_FS_TYPE" not in found
                    objects = await user.objects()
                    assert not [name for name in objects if re.search(r"/devices/(ublkb|dm_2d)", name)]
                    assert await user.call(MANAGER_PATH, MANAGER, "ResolveDevice", "s", str(node)) == path
                    await user.snapshot(path, limit=("t", 64 * MIB))
                    devices.run("udevadm", "settle")
                    (image,) = Path("/dev/blksnap").glob("*/vdb")
                    found = properties(image.resolve())
                    assert (found["BLKSNAP_ROLE"], found["SYSTEMD_READY"]) == ("image", "0")
                    assert "ID_FS_TYPE" not in found
                    assert by_uuid.resolve() == node
                    await user.call(path, DEVICE, "Detach", "", force=("b", True))
                    devices.run("udevadm", "settle")
                    assert by_uuid.resolve() == disk
                    assert list((RUNTIME / "udev").iterdir()) == []
            finally:
                rig.end()
