# SPDX-License-Identifier: GPL-2.0-or-later
"""Saved maps: when a generation goes on over a detach, and why it does not."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from blksnap_service.fds import OwnedFd
from blksnap_service.savedmaps import Fingerprint, MapHeader, SavedMaps, UnusableMap

FINGERPRINT = Fingerprint("file 1:2", 1 << 20, "100:100")
HEADER = MapHeader(
    path="/srv/disk.img",
    fingerprint=FINGERPRINT,
    block_size=65_536,
    block_count=16,
    generation="11111111-2222-3333-4444-555555555555",
    base=0,
    active=3,
    last_reset="first attach",
    saved_at=5,
    saves=1,
)
DATA = bytes([0, 1, 2, 3] * 4)


@pytest.fixture
def maps(tmp_path: Path) -> SavedMaps:
    """An empty directory of saved maps."""
    return SavedMaps(tmp_path)


def save(maps: SavedMaps, data: bytes = DATA, header: MapHeader = HEADER) -> None:
    """Save as a clean detach does."""
    with OwnedFd(os.memfd_create("map")) as fd:
        os.write(fd.fileno(), data)
        maps.save("disk", header, fd)


def why_not(maps: SavedMaps, fingerprint: Fingerprint = FINGERPRINT, block_size: int = 0) -> str:
    """Claim a map that must not be usable; returns the reason."""
    with pytest.raises(UnusableMap) as caught:
        maps.claim("disk", fingerprint, block_size)
    return str(caught.value)


def test_a_saved_map_comes_back_with_what_it_belongs_to(maps: SavedMaps) -> None:
    """Its bytes in a file of their own, from the start."""
    save(maps)
    claimed = maps.claim("disk", FINGERPRINT, 0)
    with claimed.data:
        assert claimed.header == HEADER
        assert os.pread(claimed.data.fileno(), 100, 0) == DATA


def test_the_first_attach_has_no_map(maps: SavedMaps) -> None:
    """And says so."""
    assert why_not(maps) == "first attach"


def test_a_map_is_claimed_once(maps: SavedMaps) -> None:
    """If the service ends without a detach, what was written since is unknown."""
    save(maps)
    maps.claim("disk", FINGERPRINT, 0).data.close()
    assert "without a clean detach" in why_not(maps)


def test_an_attach_without_a_map_leaves_its_mark_too(maps: SavedMaps) -> None:
    """Otherwise the next attach would call itself the first."""
    why_not(maps)
    assert "without a clean detach" in why_not(maps)


def test_a_failed_attach_gives_the_map_back(maps: SavedMaps) -> None:
    """Nothing was written: the generation can still go on."""
    save(maps)
    maps.claim("disk", FINGERPRINT, 0).data.close()
    maps.give_back("disk")
    maps.claim("disk", FINGERPRINT, 0).data.close()


def test_a_failed_first_attach_leaves_nothing(maps: SavedMaps, tmp_path: Path) -> None:
    """The next one is the first."""
    why_not(maps)
    maps.give_back("disk")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_attach_does_not_make_an_unclean_stop_clean(maps: SavedMaps) -> None:
    """The old map must not come back as one that may be trusted."""
    save(maps)
    maps.claim("disk", FINGERPRINT, 0).data.close()
    why_not(maps)
    maps.give_back("disk")
    assert "without a clean detach" in why_not(maps)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"identity": "file 1:3"}, "another file"),
        ({"size": 2 << 20}, "size changed from 1048576 to 2097152"),
        ({"stamp": "100:101"}, "written to"),
    ],
)
def test_an_origin_that_is_not_as_it_was_starts_a_generation(
    maps: SavedMaps, change: dict[str, str], reason: str
) -> None:
    """The reason says what was seen."""
    save(maps)
    assert reason in why_not(maps, replace(FINGERPRINT, **change))  # type: ignore[arg-type]


def test_another_block_size_starts_a_generation(maps: SavedMaps) -> None:
    """The one that was saved does not."""
    save(maps)
    maps.claim("disk", FINGERPRINT, 65_536).data.close()
    maps.give_back("disk")
    assert "block size" in why_not(maps, block_size=4096)


@pytest.mark.parametrize("place", [0, 14, 30, 200, -1])
def test_one_flipped_bit_is_noticed(maps: SavedMaps, tmp_path: Path, place: int) -> None:
    """Wherever it is: in the magic, the checksum, the header or the map."""
    save(maps)
    path = tmp_path / "disk.map"
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    assert "saved map" in why_not(maps)


@pytest.mark.parametrize("length", [0, 10, 22, 100, -1])
def test_a_short_file_is_noticed(maps: SavedMaps, tmp_path: Path, length: int) -> None:
    """As a power cut without our fsync could leave it."""
    save(maps)
    path = tmp_path / "disk.map"
    path.write_bytes(path.read_bytes()[:length])
    assert "saved map" in why_not(maps)


def test_saving_ends_the_use(maps: SavedMaps, tmp_path: Path) -> None:
    """One file, the new one, which counts the saves."""
    save(maps)
    maps.claim("disk", FINGERPRINT, 0).data.close()
    assert maps.saves("disk") == 1
    save(maps, header=replace(HEADER, saves=2))
    assert [one.name for one in tmp_path.iterdir()] == ["disk.map"]
    assert maps.saves("disk") == 2


def test_a_map_shorter_than_it_says_is_not_saved(maps: SavedMaps, tmp_path: Path) -> None:
    """Nothing is better than a wrong map."""
    with pytest.raises(OSError, match="15 bytes instead of 16"):
        save(maps, DATA[:-1])
    assert list(tmp_path.iterdir()) == []


def test_discarding_leaves_nothing(maps: SavedMaps, tmp_path: Path) -> None:
    """Neither map nor mark."""
    save(maps)
    maps.discard("disk")
    assert list(tmp_path.iterdir()) == []
