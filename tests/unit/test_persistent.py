# SPDX-License-Identifier: GPL-2.0-or-later
"""Which devices are tracked after every boot."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from blksnap_service import errors
from blksnap_service.devices import Device
from blksnap_service.persistent import _DISK_ONLY, _PROPERTIES, Record, Records, stable_key
from blksnap_service.storage import Identity

SDB1 = Device("sdb1", "block", "/dev/sdb1", Identity(0x811, 0), 1 << 30, stable_key="partuuid-1234-01")


@pytest.mark.parametrize(
    "properties, key",
    [
        ({"DM_UUID": "LVM-abc", "ID_FS_UUID_ENC": "1-2"}, "dm-LVM-abc"),
        (
            {"DEVTYPE": "partition", "ID_PART_ENTRY_UUID": "1234-01", "ID_SERIAL": "disk"},
            "partuuid-1234-01",
        ),
        ({"DEVTYPE": "partition", "ID_SERIAL": "disk", "ID_FS_UUID_ENC": "1-2"}, "fsuuid-1-2"),
        ({"DEVTYPE": "disk", "ID_SERIAL": "QEMU_1", "ID_FS_UUID_ENC": "1-2"}, "serial-QEMU_1"),
        ({"DEVTYPE": "disk", "ID_SERIAL": "../../etc/x", "ID_FS_UUID_ENC": "1-2"}, "fsuuid-1-2"),
        ({}, "name-sdb1"),
    ],
)
def test_a_device_is_known_by_what_outlives_a_boot(properties: dict[str, str], key: str) -> None:
    """A partition is not known by what belongs to its disk, and what is no file name is no key."""
    assert stable_key(properties, "sdb1") == key


def test_the_rules_look_for_the_same_keys_in_the_same_order() -> None:
    """Else a device would be attached at boot that udev does not hide."""
    rules = (Path(__file__).parents[2] / "dbus" / "udev" / "62-blksnap.rules").read_text(encoding="utf-8")
    tested = re.findall(r'ENV\{BLKSNAP_KEY\}="([a-z]+)-\$(?:env\{(\w+)\}|kernel)"', rules)
    assert tested[0] == ("name", "")
    # There the last one that fits is taken.
    assert [(name, prefix) for prefix, name in reversed(tested[1:])] == list(_PROPERTIES)
    for line in rules.splitlines():
        if found := re.search(r'="[a-z]+-\$env\{(\w+)\}"', line):
            assert ('ENV{DEVTYPE}=="disk"' in line) == (found[1] in _DISK_ONLY)
            assert f'ENV{{{found[1]}}}!="*[!A-Za-z0-9_.:+-]*"' in line


def test_what_was_written_down_is_found_again(tmp_path: Path) -> None:
    """By key and by name."""
    records = Records(tmp_path / "attach")
    record = records.remember(SDB1, owner_uid=1000, backend="ublk", block_size=65536)
    assert record == Record("partuuid-1234-01", "sdb1", 1000, "ublk", 65536)
    assert records.all() == {record.key: record}
    assert records.named("sdb1") == record


def test_a_device_keeps_its_name_when_the_kernel_gives_it_another(tmp_path: Path) -> None:
    """Its node is in somebody's fstab."""
    records = Records(tmp_path)
    records.remember(SDB1, owner_uid=0, backend="", block_size=0)
    moved = Device("sdc1", "block", "/dev/sdc1", SDB1.identity, SDB1.size, stable_key=SDB1.stable_key)
    assert records.remember(moved, owner_uid=0, backend="ublk", block_size=0).name == "sdb1"


def test_what_an_administrator_forbade_stays_forbidden(tmp_path: Path) -> None:
    """Attaching again writes the file anew."""
    records = Records(tmp_path)
    records.remember(SDB1, owner_uid=0, backend="", block_size=0)
    file = tmp_path / SDB1.stable_key
    file.write_text(file.read_text().replace("BYPASS=yes", "BYPASS=no"))
    assert not records.remember(SDB1, owner_uid=5, backend="", block_size=0).bypass
    assert not records.named("sdb1").bypass


def test_two_devices_of_one_name_are_told_apart(tmp_path: Path) -> None:
    """The first one's name stays its own."""
    records = Records(tmp_path)
    records.remember(SDB1, owner_uid=0, backend="", block_size=0)
    other = Device("sdb1", "block", "/dev/sdb1", SDB1.identity, SDB1.size, stable_key="partuuid-9")
    assert records.remember(other, owner_uid=0, backend="", block_size=0).name == "sdb1-2"


@given(st.text(st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), min_size=1))
def test_names_suit_units_and_device_mapper(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    """Whatever a logical volume is called."""
    records = Records(tmp_path_factory.mktemp("records"))
    device = Device(
        "dm_2d0", "block", "/dev/dm-0", Identity(1, 0), 512,
        symlinks=("/dev/disk/by-id/x", f"/dev/mapper/{name}"), stable_key="dm-LVM-x",
    )  # fmt: skip
    record = records.remember(device, owner_uid=0, backend="", block_size=0)
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.:-]*", record.name)
    assert len(f"blksnap-{record.name}") <= 80
    assert records.all() == {record.key: record}


def test_a_forgotten_device_is_not_found(tmp_path: Path) -> None:
    """With what to do."""
    records = Records(tmp_path)
    records.remember(SDB1, owner_uid=0, backend="", block_size=0)
    records.forget(SDB1.stable_key)
    records.forget(SDB1.stable_key)
    records.forget("")
    with pytest.raises(errors.NotFound, match="option persistent"):
        records.named("sdb1")


@pytest.mark.parametrize(
    "text, wrong",
    [
        ("", "BLKSNAP_ATTACH=''"),
        ("BLKSNAP_ATTACH=../x\n", "BLKSNAP_ATTACH='../x'"),
        ("BLKSNAP_ATTACH=x\nBLKSNAP_ATTACH_UID=-1\n", "BLKSNAP_ATTACH_UID='-1'"),
        ("BLKSNAP_ATTACH=x\nBLKSNAP_ATTACH_BYPASS=maybe\n", "neither yes nor no"),
    ],
)
def test_a_damaged_record_is_said_and_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str, wrong: str
) -> None:
    """The others count."""
    records = Records(tmp_path)
    record = records.remember(SDB1, owner_uid=0, backend="", block_size=0)
    (tmp_path / "serial-x").write_text(text)
    assert records.all() == {record.key: record}
    assert f"{tmp_path}/serial-x is not used" in caplog.text
    assert wrong in caplog.text


def test_an_image_file_needs_no_record(tmp_path: Path) -> None:
    """The catalogue remembers it, and nobody else could use it before the service does."""
    image = Device("x", "file", "/srv/x", Identity(1, 1), 512)
    with pytest.raises(errors.NotSupported, match="no block device"):
        Records(tmp_path).remember(image, owner_uid=0, backend="", block_size=0)


def test_a_directory_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    """With its name and the reason."""
    (tmp_path / "attach").write_bytes(b"")
    with pytest.raises(errors.Failed, match="cannot be written, so /dev/sdb1 cannot be tracked after a boot"):
        Records(tmp_path / "attach").remember(SDB1, owner_uid=0, backend="", block_size=0)
