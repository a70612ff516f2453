# SPDX-License-Identifier: GPL-2.0-or-later
"""What survives a restart, and what becomes of it when the disk did not keep it well."""

from __future__ import annotations

import errno
import json
import logging
import os
from dataclasses import replace
from pathlib import Path

import pytest

from blksnap_service import durable, errors
from blksnap_service.catalogue import Catalogue, ImageEntry, SnapshotEntry, TrackerEntry

TRACKER = TrackerEntry(
    key="disk_2eimg",
    path="/srv/disk.img",
    backend="nbd",
    origin="disk-img-1234",
    owner_uid=1000,
    attached_at=1,
    persistent=True,
    last_reset="first attach",
    block_size=0,
    identity="1:2",
)
SNAPSHOT = SnapshotEntry(
    key="11111111-2222-3333-4444-555555555555",
    devices=("disk_2eimg", "vda"),
    owner_uid=1000,
    description="before the update",
    storage_path="/srv",
    storage_made="",
    limit=0,
    created_at=2,
    holder=":1.7",
    bus_id="0123",
)


async def test_entries_come_back_as_they_were(tmp_path: Path) -> None:
    """Of each kind."""
    with Catalogue(tmp_path / "state") as first:
        await first.images.put(ImageEntry("disk_2eimg", "/srv/disk.img"))
        await first.trackers.put(TRACKER)
        await first.snapshots.put(SNAPSHOT)
    with Catalogue(tmp_path / "state") as second:
        assert list(second.images) == [ImageEntry("disk_2eimg", "/srv/disk.img")]
        assert second.trackers.get("disk_2eimg") == TRACKER
        assert second.snapshots.get(SNAPSHOT.key) == SNAPSHOT


async def test_a_dropped_entry_stays_away(tmp_path: Path) -> None:
    """Dropping it again changes nothing."""
    with Catalogue(tmp_path / "state") as first:
        await first.trackers.put(TRACKER)
        await first.trackers.drop(TRACKER.key)
        await first.trackers.drop(TRACKER.key)
    with Catalogue(tmp_path / "state") as second:
        assert list(second.trackers) == []


def test_a_second_service_on_one_directory_is_refused(tmp_path: Path) -> None:
    """It says which directory; when the first has ended, it may."""
    with Catalogue(tmp_path / "state"), pytest.raises(errors.Busy, match=str(tmp_path / "state")):
        Catalogue(tmp_path / "state")
    with Catalogue(tmp_path / "state"):
        pass


def test_a_directory_that_is_none_is_refused(tmp_path: Path) -> None:
    """With its name and the reason."""
    (tmp_path / "state").write_text("")
    with pytest.raises(errors.NotAvailable, match=r"state cannot be used: "):
        Catalogue(tmp_path / "state")


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"version": 2, "entries": []}', '{"version": 1}', '"\\ud800"', "[" * 100_000]
)
def test_a_damaged_file_is_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str) -> None:
    """The service starts without it, says so, and keeps the damaged file."""
    (tmp_path / "trackers.json").write_text(content)
    with Catalogue(tmp_path) as catalogue:
        assert list(catalogue.trackers) == []
    assert "trackers.json is damaged" in caplog.text
    kept = list(tmp_path.glob("trackers.json.damaged-*"))
    assert [one.read_text() for one in kept] == [content]
    assert not (tmp_path / "trackers.json").exists()


@pytest.mark.parametrize(
    "damage",
    [
        {"owner_uid": "root"},
        {"owner_uid": -1},
        {"owner_uid": True},
        {"persistent": 1},
        {"path": None},
        {"something_new": 1},
    ],
)
async def test_entries_beside_a_damaged_one_are_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: dict[str, object]
) -> None:
    """One wrong value does not cost the others."""
    with Catalogue(tmp_path) as catalogue:
        await catalogue.trackers.put(TRACKER)
    document = json.loads((tmp_path / "trackers.json").read_text())
    document["entries"].append({**document["entries"][0], "key": "other", **damage})
    (tmp_path / "trackers.json").write_text(json.dumps(document))
    with Catalogue(tmp_path) as catalogue:
        assert list(catalogue.trackers) == [TRACKER]
    assert "damaged" in caplog.text


async def test_a_full_disk_is_reported_and_the_entry_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory and disk say the same afterwards."""

    def full(_path: Path, _data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Catalogue(tmp_path) as catalogue:
        await catalogue.trackers.put(TRACKER)
        monkeypatch.setattr(durable, "replace_bytes", full)
        with pytest.raises(errors.NoSpace, match=r"trackers.json: no space left on device"):
            await catalogue.trackers.put(replace(TRACKER, key="other"))
        assert list(catalogue.trackers) == [TRACKER]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    """A crash in the middle is like one before."""
    path = tmp_path / "file"
    durable.replace_bytes(path, b"old")

    def write_half() -> None:
        with durable.replacing(path) as fd:
            os.write(fd, b"new")
            raise OSError("half way")

    with pytest.raises(OSError, match="half way"):
        write_half()
    assert path.read_bytes() == b"old"
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


def test_a_temporary_file_left_by_a_crash_does_not_matter(tmp_path: Path) -> None:
    """It is replaced."""
    (tmp_path / ".file.new").write_bytes(b"half")
    durable.replace_bytes(tmp_path / "file", b"whole")
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


@pytest.fixture(autouse=True)
def _log_level(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
