# SPDX-License-Identifier: GPL-2.0-or-later
"""Difference storage: what may be it, what may not, and what is left when it is given back."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from blksnap_service import errors, storage
from blksnap_service.fds import OwnedFd
from blksnap_service.storage import Identity

MIB = 1 << 20
NOBODY: set[Identity] = set()


def test_a_missing_file_is_made_and_removed_again(tmp_path: Path) -> None:
    """Only its owner may read the old data in it."""
    opened = storage.open_path(str(tmp_path / "diff"), NOBODY)
    assert opened.made
    assert (tmp_path / "diff").stat().st_mode & 0o777 == 0o600
    opened.discard()
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_used_and_stays(tmp_path: Path) -> None:
    """It is the caller's."""
    (tmp_path / "diff").write_bytes(b"x")
    opened = storage.open_path(str(tmp_path / "diff"), NOBODY)
    assert not opened.made
    opened.discard()
    assert (tmp_path / "diff").exists()


def test_a_directory_gives_a_file_without_a_name(tmp_path: Path) -> None:
    """Nothing can be left in it, whatever happens."""
    opened = storage.open_path(str(tmp_path), NOBODY)
    assert list(tmp_path.iterdir()) == []
    os.pwrite(opened.fd.fileno(), b"x", 0)
    opened.discard()


def test_a_file_system_without_unnamed_files_does_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a name that is removed at once."""
    real_open = os.open

    def without_tmpfile(path: object, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(95, "Operation not supported")
        return real_open(str(path), flags, mode)

    monkeypatch.setattr(os, "open", without_tmpfile)
    opened = storage.open_path(str(tmp_path), NOBODY)
    assert list(tmp_path.iterdir()) == []
    os.pwrite(opened.fd.fileno(), b"x", 0)
    opened.discard()


def test_a_link_leads_where_it_leads(tmp_path: Path) -> None:
    """The path that is shown is the real one."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    opened = storage.open_path(str(tmp_path / "link" / "diff"), NOBODY)
    assert opened.path == str(tmp_path / "real" / "diff")
    opened.discard()


@pytest.mark.parametrize("path", ["", "diff", "./diff", "/tmp/a\0b"])  # noqa: S108 - refused
def test_a_path_that_is_not_absolute_is_refused(path: str) -> None:
    """The service's directory is none of the caller's business."""
    with pytest.raises(errors.InvalidArgument, match="absolute"):
        storage.open_path(path, NOBODY)


@pytest.mark.parametrize(
    "place, error",
    [
        ("missing/diff", errors.NotFound),
        ("file/diff", errors.NotFound),
        ("fifo", errors.InvalidArgument),
        ("dangling/diff", errors.NotFound),
        ("x" * 300, errors.InvalidArgument),
        ("loop", errors.InvalidArgument),
    ],
)
def test_what_cannot_be_storage_is_refused(
    tmp_path: Path, place: str, error: type[errors.BlksnapError]
) -> None:
    """With its path and the reason."""
    (tmp_path / "file").write_bytes(b"")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(error, match=str(tmp_path / place)):
        storage.open_path(str(tmp_path / place), NOBODY)


def test_a_read_only_place_is_refused_with_advice() -> None:
    """As root one is stopped by read-only file systems only: sysfs takes no new files."""
    with pytest.raises(errors.NotAvailable, match="option storage"):
        storage.open_path("/sys/diff", NOBODY)


def test_a_tracked_file_cannot_be_its_own_storage(tmp_path: Path) -> None:
    """Its old data would overwrite its new data."""
    (tmp_path / "disk").write_bytes(bytes(512))
    origins = {Identity.of((tmp_path / "disk").stat())}
    with pytest.raises(errors.InvalidArgument, match="itself tracked"):
        storage.open_path(str(tmp_path / "disk"), origins)


def test_storage_on_a_tracked_device_is_refused(tmp_path: Path) -> None:
    """And no file is left behind there."""
    origins = {Identity(tmp_path.stat().st_dev, 0)}
    with pytest.raises(errors.InvalidArgument, match="lies on a tracked device"):
        storage.open_path(str(tmp_path / "diff"), origins)
    assert list(tmp_path.iterdir()) == []


def test_storage_on_a_partition_of_a_tracked_disk_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found through sysfs: partitions have their disk above them, device-mapper its devices in `slaves`."""
    tree = tmp_path / "sys"
    disk = tree / "disk"
    (disk / "part").mkdir(parents=True)
    (disk / "dev").write_text("8:0\n")
    mapped = tree / "dm"
    (mapped / "slaves").mkdir(parents=True)
    (mapped / "slaves" / "part").symlink_to(disk / "part")
    (disk / "part" / "dev").write_text("8:1\n")
    places = {"253:0": mapped, "8:1": disk / "part", "8:0": disk}

    class Where(type(Path())):  # type: ignore[misc]
        def resolve(self, strict: bool = False) -> Path:
            number = str(self).removeprefix("/sys/dev/block/")
            return places.get(number, Path(str(self)))

    monkeypatch.setattr(storage, "Path", Where)
    status = os.stat_result([0, 0, os.makedev(253, 0), 0, 0, 0, 0, 0, 0, 0])
    assert storage.origins_below(status, {Identity(os.makedev(8, 0), 0)}) == {Identity(os.makedev(8, 0), 0)}
    assert storage.origins_below(status, {Identity(os.makedev(8, 16), 0)}) == set()


def opened_with(flags: int) -> Callable[[Path], OwnedFd]:
    """How a caller opens storage."""
    return lambda path: OwnedFd(os.open(path, flags))


def test_a_descriptor_of_the_caller_is_used(tmp_path: Path) -> None:
    """Also one of a file without a name."""
    with OwnedFd(os.open(tmp_path, os.O_TMPFILE | os.O_RDWR)) as unnamed:
        opened = storage.open_fd(unnamed.dup(), NOBODY)
        assert opened.identity == Identity.of(os.fstat(unnamed.fileno()))
        opened.discard()


@pytest.mark.parametrize(
    "flags, text",
    [
        (os.O_RDONLY, "reading and writing"),
        (os.O_WRONLY, "reading and writing"),
        (os.O_PATH, "reading and writing"),
        (os.O_RDWR | os.O_APPEND, "appending"),
    ],
)
def test_a_descriptor_that_cannot_be_storage_is_refused_and_closed(
    tmp_path: Path, flags: int, text: str
) -> None:
    """Appending writes go to the end, wherever they are meant for (pwrite(2), BUGS)."""
    (tmp_path / "diff").write_bytes(b"")
    fd = opened_with(flags)(tmp_path / "diff")
    with pytest.raises(errors.InvalidArgument, match=text):
        storage.open_fd(fd, NOBODY)
    assert fd.closed


def test_names_that_are_no_text_do_no_harm(tmp_path: Path) -> None:
    """The path is a property: the bus carries UTF-8 only."""
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/diff\xff"))
    odd.write_bytes(b"")
    (tmp_path / "link").symlink_to(odd)
    with pytest.raises(errors.InvalidArgument, match="not UTF-8"):
        storage.open_path(str(tmp_path / "link"), NOBODY)
    opened = storage.open_fd(OwnedFd(os.open(odd, os.O_RDWR)), NOBODY)
    assert opened.path == f"{tmp_path}/diff?"
    opened.discard()


def test_a_socket_cannot_be_storage() -> None:
    """Nor a pipe, nor a terminal."""
    import socket

    one, other = socket.socketpair()
    with one, other:
        fd = OwnedFd(os.dup(one.fileno()))
        with pytest.raises(errors.InvalidArgument, match="neither a regular file nor a block device"):
            storage.open_fd(fd, NOBODY)
        assert fd.closed


def test_capacity_is_what_may_be_written(tmp_path: Path) -> None:
    """The file system's free space and what the file has already."""
    opened = storage.open_path(str(tmp_path), NOBODY)
    with opened.fd:
        space = os.statvfs(tmp_path)
        assert abs(opened.capacity - space.f_bavail * space.f_frsize) < 256 * MIB


def test_only_the_file_that_was_made_is_removed(tmp_path: Path) -> None:
    """Somebody may have put another one there."""
    path = tmp_path / "diff"
    path.write_bytes(b"")
    identity = str(Identity.of(path.stat()))
    keep = path.with_name("keep")
    path.rename(keep)
    path.write_bytes(b"mine")
    assert not storage.remove_made(str(path), identity)
    assert path.read_bytes() == b"mine"
    keep.replace(path)
    assert storage.remove_made(str(path), identity)
    assert not path.exists()
    assert storage.remove_made(str(path), identity)


@pytest.mark.parametrize(
    "path, expected",
    [
        ("diff", True),
        ("sub/diff", True),
        ("", True),
        ("../diff", False),
        ("link/diff", False),
        ("sub/../../x", False),
    ],
)
def test_inside_follows_links(tmp_path: Path, path: str, expected: bool) -> None:
    """What decides where an unprivileged caller may have files made."""
    directory = tmp_path / "storage"
    directory.mkdir()
    (directory / "link").symlink_to(tmp_path)
    assert bool(storage.inside(str(directory / path), directory)) == expected


def test_identities_survive_being_written_down() -> None:
    """As they are in the catalogue."""
    for identity in (Identity(1, 2), Identity(2**63, 0)):
        assert Identity.parse(str(identity)) == identity
