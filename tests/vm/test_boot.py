# SPDX-License-Identifier: GPL-2.0-or-later
"""A machine with systemd as process 1, its units and udev rules: three boots of one disk that is tracked always."""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.vm.machine import DIED, Disk, Guest, Machine
from tests.vm.selection import wanted_kernels

MIB = 1 << 20
PARTITION_OFFSET = MIB
SYSTEMD = Path(__file__).with_name("systemd.sh")
APPEND = "systemd.condition-needs-update=0 systemd.gpt_auto=0"
BOOT_LIMIT_S = 900

FUNCTIONS = r"""
set -eu
name=org.blksnap.Blksnap1 root=/org/blksnap/Blksnap1 device=/org/blksnap/Blksnap1/devices/vdb1
node=/dev/mapper/blksnap-vdb1
get() { busctl get-property $name "$1" "$name.$2" "$3" | cut -d' ' -f2- | tr -d '"'; }
call() { path=$1 interface=$2; shift 2; busctl --timeout=300 call $name "$path" "$name.$interface" "$@"; }
tell() { for property; do echo "$property=$(get $device Tracker $property)"; done; }
show() { echo "$1.$2=$(systemctl show --value --property "$2" "$1")"; }
await() { for _ in $(seq 1000); do if eval "$1"; then return; fi; sleep 0.3; done; echo "never: $1"; exit 1; }
snapshot() { call $root/Manager Manager CreateSnapshot 'aoa{sv}' 1 $device 1 limit t 100000000 | cut -d'"' -f2; }
image_of() { get "$(get "$1" Snapshot Images | cut -d' ' -f2)" Image Path; }
tracking() { [ "$(get $device Tracker State)" = tracking ]; }
sum_of() { sha256sum <"$1" | cut -d' ' -f1; }
"""

FIRST = (
    FUNCTIONS
    + r"""
await "busctl get-property $name $device $name.Device Path >/dev/null 2>&1"
call $device Device Attach 'a{sv}' 1 persistent b true
mkfs.ext4 -q $node
echo "$node /srv ext4 defaults,nofail,x-systemd.requires=blksnap-attach@vdb1.service 0 2" >/run/kept/fstab
cp /run/kept/fstab /etc/fstab
systemctl daemon-reload
systemctl start srv.mount
head -c 8000000 /dev/urandom >/srv/one
taken=$(snapshot)
image=$(image_of "$taken")
echo "before: $(get $device Tracker GenerationId) $(get $device Tracker ChangesNumber) $(sum_of "$image")"
fio --name=load --filename=/srv/load --size=24M --rw=randwrite --bsrange=4k-64k --ioengine=psync --direct=1 \
    --verify=crc32c --output=/run/fio &
load=$!
systemctl restart blksnapd
echo "restarted: $(get $device Tracker GenerationId) $(get $device Tracker ChangesNumber) $(sum_of "$image")"
for count in 1 2; do
    systemctl kill --signal=KILL blksnap-datapath
    await "[ $(systemctl show --value --property NRestarts blksnap-datapath) -ge $count ]"
    await '[ "$(systemctl is-active blksnap-datapath)" = active ]'
    await tracking
done
if wait $load; then echo load=verified; else cat /run/fio; fi
echo "killed: $(get $device Tracker GenerationId) $(get $device Tracker ChangesNumber) $(sum_of "$image")"
echo "snapshot=$(get "$taken" Snapshot State)"
echo "changed=$(call $device Tracker GetChangedRanges 'utua{sv}' "$(get $device Tracker ChangesNumber)" 0 1 1 view s live)"
show blksnap-datapath NFileDescriptorStore
call "$taken" Snapshot Destroy 'a{sv}' 0
echo "one=$(sum_of /srv/one)"
# In the page cache only: that it is on the disk after the shutdown shows in what order things ended.
echo words >/srv/last
"""
)

AGAIN = (
    FUNCTIONS
    + r"""
await '[ "$(systemctl is-active srv.mount)" = active ]'
echo "source=$(findmnt --noheadings --output SOURCE /srv)"
show blksnap-attach@vdb1 ActiveState
show blksnap-attach@vdb1 ActiveEnterTimestampMonotonic
show srv.mount ActiveEnterTimestampMonotonic
echo "one=$(sum_of /srv/one)"
echo "last=$(cat /srv/last)"
"""
)

CUT = (
    AGAIN
    + r"""
await tracking
tell Backend State GenerationId LastReset
snapshot >/dev/null
echo synced >/srv/synced
sync /srv/synced
head -c 8000000 /dev/urandom >/srv/unsynced
echo ready
sleep 1000
"""
)

RECOVERED = (
    AGAIN
    + r"""
await tracking
tell Backend State GenerationId LastReset
echo "synced=$(cat /srv/synced)"
call $device Device Detach 'a{sv}' 0 || echo detach=refused
"""
)

# modprobe obeys this only when it is asked to, as the unit of the data path does.
WITHOUT_UBLK = "modprobe.blacklist=ublk_drv"
UNTRACKED = (
    AGAIN
    + r"""
echo "table=$(dmsetup table $node | cut -d' ' -f3,4)"
echo "tracked=$(get $device Device Tracked)"
modprobe ublk_drv
call $device Device Attach 'a{sv}' 1 persistent b true
await tracking
tell Backend State Node
echo "table now=$(dmsetup table $node | cut -d' ' -f3,4)"
echo tracked >/srv/last
snapshot >/dev/null
"""
)


class Told:
    """What a boot said: ``NAME=VALUE`` lines by name."""

    def __init__(self, lines: list[str]) -> None:
        self.lines = lines
        self._values = dict(line.split("=", 1) for line in lines if "=" in line)

    def __getitem__(self, name: str) -> str:
        return self._values[name]

    def after(self, word: str) -> str:
        """The rest of the line that begins so."""
        return next(line.removeprefix(f"{word}: ") for line in self.lines if line.startswith(f"{word}: "))

    def check_mounted(self) -> None:
        """It was mounted by its node, after its unit had made that."""
        assert self["source"] == "/dev/mapper/blksnap-vdb1"
        assert self["blksnap-attach@vdb1.ActiveState"] == "active"
        entered = "ActiveEnterTimestampMonotonic"
        assert 0 < int(self[f"blksnap-attach@vdb1.{entered}"]) < int(self[f"srv.mount.{entered}"])


class Machinery:
    """One machine, booted again and again."""

    def __init__(self, kernel: str, directory: Path) -> None:
        self.kept, self.disk = directory / "kept", directory / "disk"
        with self.disk.open("wb") as file:
            # A table with one partition; its identifier is what the partition is known by after a boot.
            entry = struct.pack("<B3xB3xII", 0, 0x83, PARTITION_OFFSET // 512, 128 * MIB // 512)
            file.write(struct.pack("<440xI2x16s48x2s", 0x11223344, entry, b"\x55\xaa"))
            file.truncate(256 * MIB)
        self.machine = Machine(
            kernel,
            memory_mib=2048,
            disks=(Disk(256 * MIB, self.kept), Disk(path=self.disk)),
            time_limit_s=BOOT_LIMIT_S,
            init=SYSTEMD,
        )

    def boot(self, command: str, *, cut_at: str = "", append: str = "") -> Told:
        """Run a command to its end and an orderly shutdown, or until its line ``cut_at``; then the power goes."""
        machine = replace(self.machine, append=f"{APPEND} {append}")
        with Guest(machine, command) as guest:
            lines = []
            for line in guest.output:
                print(line)
                lines.append(line)
                if line == cut_at:
                    guest.cut_power()
                    break
            status = guest.wait()
            assert status == (DIED if cut_at else 0), f"kept {guest.directory}"
        if cut_at:
            guest.remove()
        return Told(lines)


@pytest.fixture(params=wanted_kernels())
def machine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Machinery]:
    """Its disks are in ``tmp_path`` and do not stay there."""
    one = Machinery(request.param, tmp_path)
    yield one
    one.kept.unlink()
    one.disk.unlink()


def test_a_disk_is_tracked_over_boots_deaths_and_a_power_cut(machine: Machinery) -> None:
    """It is tracked before it is mounted; nothing of a life of the machine is lost to a restart or to kill -9.

    An orderly shutdown ends the data path last: the file system is whole, with what was in the page cache. The history
    begins anew with each boot, and says why.
    """
    first = machine.boot(FIRST)
    generation, number, image = first.after("before").split()
    assert number == "1"
    assert first.after("restarted") == first.after("killed") == f"{generation} {number} {image}"
    assert (first["load"], first["snapshot"]) == ("verified", "taken")
    assert first["changed"].startswith("a(tt)t 1 ")
    assert int(first["blksnap-datapath.NFileDescriptorStore"]) > 0
    check_unmounted(machine.disk, PARTITION_OFFSET)
    check_unmounted(machine.kept)

    second = machine.boot(CUT, cut_at="ready")
    second.check_mounted()
    assert (second["Backend"], second["State"]) == ("ublk", "tracking")
    assert (second["one"], second["last"]) == (first["one"], "words")
    assert second["GenerationId"] != generation
    assert "clean detach" in second["LastReset"]

    third = machine.boot(RECOVERED)
    third.check_mounted()
    assert (third["Backend"], third["State"], third["detach"]) == ("ublk", "tracking", "refused")
    assert (third["one"], third["last"], third["synced"]) == (first["one"], "words", "synced")
    assert third["GenerationId"] not in {generation, second["GenerationId"]}
    assert "clean detach" in third["LastReset"]
    check_unmounted(machine.disk, PARTITION_OFFSET)

    # Without the driver it is used untracked; and tracked while it is mounted when that has come.
    fourth = machine.boot(UNTRACKED, append=WITHOUT_UBLK)
    fourth.check_mounted()
    assert (fourth["one"], fourth["last"]) == (first["one"], "words")
    assert (fourth["tracked"], fourth["table"].split()[0]) == ("false", "linear")
    assert (fourth["Backend"], fourth["State"]) == ("ublk", "tracking")
    assert fourth["Node"] == "/dev/mapper/blksnap-vdb1"
    assert fourth["table now"] != fourth["table"]
    check_unmounted(machine.disk, PARTITION_OFFSET)
    check_unmounted(machine.kept)


def check_unmounted(file: Path, offset: int = 0) -> None:
    """An ext4 file system there was unmounted in order, and is whole."""
    where = f"{file}?offset={offset}"
    told = subprocess.run(["dumpe2fs", "-h", where], check=True, capture_output=True, text=True).stdout
    assert "needs_recovery" not in told
    assert "Filesystem state:         clean" in told
    checked = subprocess.run(["e2fsck", "-f", "-n", where], check=False, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
