# SPDX-License-Identifier: GPL-2.0-or-later
"""Change maps on disk, between a clean detach and the next attach.

A saved map may be trusted only if nobody wrote to the origin in between and if the last attach ended cleanly. The
first is what the fingerprint tells, the second the marker: while an origin is attached its map file is called ``NAME.in-use``,
and only a clean detach brings ``NAME.map`` back. All functions block; the rules of the numbers are in ``cbt``.

A file is one line with magic, version and the CRC-32 of all that follows, one line of JSON, and the map's bytes.
"""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from blksnap_service import durable
from blksnap_service.fds import OwnedFd

if TYPE_CHECKING:
    from pathlib import Path

_MAGIC = "blksnap-map 1"
_FIRST_LINE_BYTES = len(f"{_MAGIC} 00000000\n")
_MAX_HEADER_BYTES = 64 << 10
_UNCLEAN = b"unclean\n"


class UnusableMap(Exception):
    """Raised when there is no saved map that continues a generation; the text is the reason for a new one."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What tells whether an origin is the same and was not written to: who it is, its bytes, and a stamp of changes.

    For a file: device and inode, and its modification and change times. For a block device: boot, number and
    disk sequence, and the sectors ever written to it.
    """

    identity: str
    size: int
    stamp: str


@dataclass(frozen=True, slots=True)
class MapHeader:
    """What a saved map belongs to. ``saves`` counts the saves of this origin; ``base`` and ``active`` as in ``cbt``."""

    path: str
    fingerprint: Fingerprint
    block_size: int
    block_count: int
    generation: str
    base: int
    active: int
    last_reset: str
    saved_at: int
    saves: int


@dataclass(frozen=True, slots=True)
class ClaimedMap:
    """A saved map that continues its generation; the descriptor (a memfd of the bytes) belongs to the receiver."""

    header: MapHeader
    data: OwnedFd


class SavedMaps:
    """The directory of saved maps. Names are origin names, made of ``[A-Za-z0-9_-]`` only."""

    def __init__(self, directory: Path) -> None:
        """Use ``directory``, which exists."""
        self._directory = directory

    def _saved(self, name: str) -> Path:
        return self._directory / f"{name}.map"

    def _in_use(self, name: str) -> Path:
        return self._directory / f"{name}.in-use"

    def claim(self, name: str, fingerprint: Fingerprint, block_size: int) -> ClaimedMap:
        """Take the saved map of an origin about to be attached, and mark it in use.

        ``block_size`` 0: as saved. Raises ``UnusableMap`` with the reason (the mark is set all the same) and ``OSError``.
        """
        saved, in_use = self._saved(name), self._in_use(name)
        if not saved.exists():
            unclean = in_use.exists()
            # An old map left in use must not come back as a clean one.
            durable.replace_bytes(in_use, _UNCLEAN if unclean else b"")
            if unclean:
                raise UnusableMap(
                    "tracking ended without a clean detach: what was written since may not have been seen"
                )
            raise UnusableMap("first attach")
        durable.move(saved, in_use)
        header, data = self._read(in_use)
        try:
            _check(header, fingerprint, block_size)
        except UnusableMap:
            data.close()
            raise
        return ClaimedMap(header, data)

    def give_back(self, name: str) -> None:
        """Undo a claim: the attach failed before anything could be written to the origin. Raises ``OSError``."""
        in_use = self._in_use(name)
        try:
            with in_use.open("rb") as file:
                begins = file.read(_FIRST_LINE_BYTES)
        except FileNotFoundError:
            return
        if begins.startswith(_MAGIC.encode()):
            durable.move(in_use, self._saved(name))
        elif begins != _UNCLEAN:
            durable.remove(in_use)

    def save(self, name: str, header: MapHeader, data: OwnedFd) -> None:
        """Save the final map of a clean detach; ``data`` holds at least ``block_count`` bytes. Raises ``OSError``."""
        with durable.replacing(self._saved(name)) as fd:
            line = json.dumps(asdict(header)).encode() + b"\n"
            os.write(fd, b" " * _FIRST_LINE_BYTES)
            os.write(fd, line)
            crc = zlib.crc32(line)

            def add(part: memoryview) -> None:
                nonlocal crc
                crc = zlib.crc32(part, crc)

            copied = durable.copy_stream(data.fileno(), fd, header.block_count, add)
            if copied != header.block_count:
                raise OSError(f"the map has {copied} bytes instead of {header.block_count}")
            os.pwrite(fd, f"{_MAGIC} {crc:08x}\n".encode(), 0)
        durable.remove(self._in_use(name))

    def saves(self, name: str) -> int:
        """How often the map now in use, or saved, has been saved; 0 when unknown."""
        for path in (self._in_use(name), self._saved(name)):
            try:
                with path.open("rb") as file:
                    file.readline(_MAX_HEADER_BYTES)
                    return _parse(file.readline(_MAX_HEADER_BYTES)).saves
            except (OSError, UnusableMap):
                continue
        return 0

    def discard(self, name: str) -> None:
        """Forget the origin: neither map nor mark stays. Raises ``OSError``."""
        durable.remove(self._saved(name))
        durable.remove(self._in_use(name))

    def _read(self, path: Path) -> tuple[MapHeader, OwnedFd]:
        with path.open("rb") as file:
            first, line = file.readline(_MAX_HEADER_BYTES), file.readline(_MAX_HEADER_BYTES)
            magic, _, crc_text = first.decode("ascii", "replace").rstrip("\n").rpartition(" ")
            if magic != _MAGIC:
                raise UnusableMap("the saved map is not of a known format")
            header = _parse(line)
            crc = zlib.crc32(line)
            remaining = os.fstat(file.fileno()).st_size - len(first) - len(line)
            memory = OwnedFd(os.memfd_create("blksnap-saved-map", os.MFD_CLOEXEC))
            try:
                while part := file.read(1 << 20):
                    crc = zlib.crc32(part, crc)
                    durable.write_all(memory.fileno(), part)
            except BaseException:
                memory.close()
                raise
        if remaining != header.block_count or f"{crc:08x}" != crc_text:
            memory.close()
            raise UnusableMap("the saved map is damaged (checksum or length do not match)")
        return header, memory


def _parse(line: bytes) -> MapHeader:
    try:
        source = json.loads(line)
        fingerprint = source.pop("fingerprint")
        header = MapHeader(fingerprint=Fingerprint(**fingerprint), **source)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UnusableMap("the saved map has an unreadable header") from error
    numbers = (
        header.block_size,
        header.block_count,
        header.base,
        header.active,
        header.saves,
        header.saved_at,
    )
    texts = (header.path, header.generation, header.last_reset)
    if not all(type(number) is int and number >= 0 for number in numbers) or not all(
        isinstance(text, str) for text in texts
    ):
        raise UnusableMap("the saved map has an unreadable header")
    return header


def _check(header: MapHeader, fingerprint: Fingerprint, block_size: int) -> None:
    was = header.fingerprint
    if was.identity != fingerprint.identity:
        reason = "another file or device is at this path now"
    elif was.size != fingerprint.size:
        reason = f"its size changed from {was.size} to {fingerprint.size} bytes while it was not tracked"
    elif was.stamp != fingerprint.stamp:
        reason = "it was written to while it was not tracked"
    elif block_size not in {0, header.block_size}:
        reason = f"the block size changed from {header.block_size} to {block_size} bytes"
    else:
        return
    raise UnusableMap(reason)
