# SPDX-License-Identifier: GPL-2.0-or-later
"""blksnapctl from arguments to output and exit status, against a service inside the process."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import blksnapctl.__main__ as ctl
from blksnap_tui import model
from blksnap_tui.client import Client
from blksnap_tui.fakelink import Refusal
from blksnap_tui.fakemap import FakeMap
from blksnap_tui.model import ObjectPath
from blksnap_tui.testing import FakeService


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> FakeService:
    """A service with two devices, which every command reaches."""
    made = FakeService()
    made.add_device("/srv/disk.img", 1 << 30)
    made.add_device("/dev/sda", 4 << 30)
    monkeypatch.setattr(ctl, "Client", partial(Client, transport=made.connect))
    return made


@pytest.fixture
def disk(service: FakeService) -> ObjectPath:
    """The image file, tracked, with blocks 1 and 2 changed before its first snapshot."""
    path = ObjectPath(f"{model.ROOT_PATH}/devices/disk_2eimg")
    shown = FakeMap(bytearray(16_384))
    shown.write(1, 2)
    shown.take()
    service.track(path, shown)
    return path


def run(*words: str) -> int:
    """Run a command; gives the exit status, also of a refused command line."""
    try:
        return ctl.main(words)
    except SystemExit as refused:
        return int(refused.code or 0)


def json_of(capsys: pytest.CaptureFixture[str]) -> Any:
    """Give what was printed, as JSON."""
    return json.loads(capsys.readouterr().out)


def test_status_lists_devices_and_snapshots(
    service: FakeService, disk: ObjectPath, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is there, and what to use of it."""
    assert run("status") == 0
    out = capsys.readouterr().out
    assert "/srv/disk.img" in out
    assert service.objects[disk][model.TRACKER]["Node"] in out
    assert "no snapshots" in out


def test_status_as_json_is_the_whole_state(
    service: FakeService, disk: ObjectPath, capsys: pytest.CaptureFixture[str]
) -> None:
    """Field names of the model, sizes in bytes."""
    assert run("status", "--json") == 0
    shown = json_of(capsys)
    assert [device["path"] for device in shown["devices"]] == ["/dev/sda", "/srv/disk.img"]
    assert shown["devices"][1]["tracker"]["block_size"] == 65_536
    assert shown["devices"][1]["object_path"] == disk
    assert shown["manager"]["version"] == service.objects[model.MANAGER_PATH][model.MANAGER]["Version"]


def test_add_prints_the_path(service: FakeService, capsys: pytest.CaptureFixture[str]) -> None:
    """As the service knows it."""
    assert run("add", "/srv/new.img") == 0
    assert capsys.readouterr().out == "/srv/new.img\n"
    assert service.calls[-1][0] == "AddImageFile"


def test_attach_passes_its_options_and_prints_the_node(
    service: FakeService, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sizes are parsed; a device may be named by its last part."""
    assert run("attach", "sda", "--block-size", "1M", "--persistent", "--backend", "nbd") == 0
    assert service.calls[-1] == ("Attach", ({"backend": "nbd", "block-size": 1 << 20, "persistent": True},))
    assert capsys.readouterr().out.startswith("nbd+unix://")


def test_detach_forces_only_when_told(service: FakeService, disk: ObjectPath) -> None:
    """The option is passed on."""
    assert run("detach", "--force", "/srv/disk.img") == 0
    assert service.calls[-1] == ("Detach", ({"force": True},))
    assert model.TRACKER not in service.objects[disk]


def test_a_snapshot_is_created_listed_and_destroyed(
    service: FakeService, disk: ObjectPath, capsys: pytest.CaptureFixture[str]
) -> None:
    """The uuid is the only thing on stdout; where images are goes to stderr."""
    words = ("--limit", "10G", "--storage", "/var/tmp", "--description", "nightly")  # noqa: S108 - a name only
    assert run("snapshot", "create", "disk.img", *words) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 1
    assert "nbd+unix" in err
    assert service.calls[-1][1][1] == {"limit": 10 << 30, "storage": "/var/tmp", "description": "nightly"}  # noqa: S108
    assert run("snapshot", "list") == 0
    assert "nightly" in capsys.readouterr().out
    assert run("snapshot", "destroy", out[:8]) == 0
    assert run("snapshot", "list", "--json") == 0
    assert json_of(capsys) == {"snapshots": [], "images": []}
    assert service.objects[disk][model.DEVICE]["Tracked"]


def test_changes_are_offset_and_length(
    service: FakeService, disk: ObjectPath, capsys: pytest.CaptureFixture[str]
) -> None:
    """One range per line, a tab between; a short answer takes one call."""
    assert disk
    assert run("changes", "disk.img", "--since", "#0") == 0
    assert capsys.readouterr().out == "65536\t131072\n"
    assert [name for name, _ in service.calls].count("GetChangedRanges") == 1


def test_changes_name_the_generation_they_belong_to(
    service: FakeService, disk: ObjectPath, capsys: pytest.CaptureFixture[str]
) -> None:
    """The one that was read with the state is sent along, so that nothing of another is mixed in."""
    assert run("changes", "disk.img", "--since", "0", "--json", "--view", "live") == 0
    shown = json_of(capsys)
    assert (shown["bytes"], shown["ranges"]) == (131_072, [[65_536, 131_072]])
    assert shown["generation_id"] == service.objects[disk][model.TRACKER]["GenerationId"]
    assert service.calls[-1][1][3] == {"generation-id": shown["generation_id"], "view": "live"}


def test_the_map_is_copied_to_a_file(
    disk: ObjectPath, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Byte for byte, with what the bytes mean on stdout."""
    assert disk
    assert run("map", "disk.img", "-o", str(tmp_path / "map"), "--json") == 0
    assert (tmp_path / "map").read_bytes() == b"\0\1\1" + bytes(16_381)
    assert json_of(capsys)["block-count"] == 16_384


def test_the_map_goes_to_stdout_alone(disk: ObjectPath, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    """Nothing else is written there."""
    assert disk
    assert run("map", "disk.img", "-o", "-") == 0
    assert capfdbinary.readouterr().out == b"\0\1\1" + bytes(16_381)


def test_a_file_that_cannot_be_written_is_named(
    disk: ObjectPath, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a traceback."""
    assert disk
    assert run("map", "disk.img", "-o", str(tmp_path / "no" / "map")) == 1
    assert str(tmp_path / "no" / "map") in capsys.readouterr().err


def test_info_shows_a_reading(disk: ObjectPath, capsys: pytest.CaptureFixture[str]) -> None:
    """Properties and counters; what is unknown is a dash."""
    assert disk
    assert run("info", "disk.img") == 0
    out = capsys.readouterr().out
    assert "changed-blocks" in out
    assert "mounted on" in out.replace("  -", "  -\n")


def test_mark_sends_ranges(service: FakeService, disk: ObjectPath) -> None:
    """Offset and length with units."""
    assert disk
    assert run("mark", "disk.img", "1M:64K", "0:1") == 0
    assert service.calls[-1] == ("MarkDirty", ([[1 << 20, 65_536], [0, 1]], {}))


def test_export_prints_the_uri(
    service: FakeService, disk: ObjectPath, capsys: pytest.CaptureFixture[str]
) -> None:
    """An image is named by its snapshot, and device where there are several."""
    assert disk
    run("attach", "sda")
    run("snapshot", "create", "disk.img", "sda", "--json")
    made = json.loads(capsys.readouterr().out.split("\n", 1)[1])["snapshot"]["id"]
    assert run("export", made) == 1
    assert f"write {made}:DEVICE" in capsys.readouterr().err
    assert run("export", f"{made}:sda") == 0
    assert capsys.readouterr().out.startswith("nbd+unix:///")
    assert service.calls[-1][0] == "Export"


@pytest.mark.parametrize(
    "kind, status",
    [("Busy", 1), ("NotAuthorized", 4), ("NotAuthorizedDismissed", 4), ("GenerationChanged", 5)],
)
def test_exit_statuses_tell_refusals_apart(
    service: FakeService, disk: ObjectPath, capsys: pytest.CaptureFixture[str], kind: str, status: int
) -> None:
    """And the service's words are on stderr, alone."""
    assert disk
    service.refuse["GetChangedRanges"] = Refusal(kind, "because of something")
    assert run("changes", "disk.img", "--since", "1") == status
    assert capsys.readouterr() == ("", "blksnapctl: because of something\n")


@pytest.mark.parametrize("missing", ["bus_up", "service_up"])
def test_an_absent_service_has_its_own_status(
    service: FakeService, capsys: pytest.CaptureFixture[str], missing: str
) -> None:
    """So that a script can wait for it."""
    setattr(service, missing, False)
    assert run("status") == 3
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "words, said",
    [
        (("snapshot", "create", "sda", "--limit", "10Q"), "'Q' in '10Q' is not a unit"),
        (("mark", "sda", "10"), "is not OFFSET:LENGTH"),
        (("mark", "sda", "10:0"), "is empty"),
        (("mark", "sda"), "takes ranges"),
        (("mark", "sda", "1:1", "--all"), "takes ranges"),
        (("changes", "sda"), "--since"),
        (("changes", "sda", "--since", "one"), "is not a snapshot number"),
        (("changes", "sda", "--since", "1", "--view", "past"), "invalid choice"),
        (("map", "sda"), "--output"),
        ((), "COMMAND"),
    ],
)
def test_wrong_arguments_are_explained(
    service: FakeService, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str
) -> None:
    """With status 2, and before anything is sent."""
    assert run(*words) == 2
    assert said in capsys.readouterr().err
    assert service.calls == []


def test_an_ambiguous_name_lists_the_choices(
    service: FakeService, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is guessed."""
    service.add_device("/other/disk.img", 1 << 20)
    assert run("info", "disk.img") == 1
    assert "/other/disk.img, /srv/disk.img" in capsys.readouterr().err


def test_a_defect_leaves_no_traceback(
    service: FakeService, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It goes to a file that the message names."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(service, "answer", None)
    assert run("status") == 1
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert str(tmp_path / "blksnap" / "defect.txt") in err
    assert "Traceback" in (tmp_path / "blksnap" / "defect.txt").read_text(encoding="utf8")
