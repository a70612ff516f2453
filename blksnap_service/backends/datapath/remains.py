# SPDX-License-Identifier: GPL-2.0-or-later
"""What is left of an origin when its data path has ended, and whether a generation may go on from it.

The data path marks a block in the live map before it submits the write, and the map outlives it here, as an open memory
file. So the map is whole if it is the one that was written last, which the state page tells (docs/datapath-protocol.md,
"Memory files"), and if nobody wrote to the origin since. This module only judges; ``backend`` attaches.
"""

from __future__ import annotations

import os
import struct
import uuid
from dataclasses import dataclass

from blksnap_service.backends.datapath.origin import Origin, fingerprint_of
from blksnap_service.datapath.client import OriginMaps
from blksnap_service.datapath.model import OriginReading
from blksnap_service.fds import OwnedFd, close_all
from blksnap_service.savedmaps import ClaimedMap, Fingerprint, MapHeader, UnusableMap
from blksnap_service.storage import Identity

_MAGIC = b"BLKSNAP1"
_WORDS = struct.Struct("<8sQ16s4Q")


@dataclass(frozen=True, slots=True)
class StatePage:
    """What the data path keeps in an origin's state page. Sizes in bytes, numbers as in ``cbt``."""

    base: int
    active: int
    generation: str
    size: int
    block_size: int
    live_sequence: int
    taken_sequence: int

    @classmethod
    def read(cls, page: OwnedFd) -> StatePage:
        """Read it. Raises ``UnusableMap`` when it is none."""
        data = os.pread(page.fileno(), _WORDS.size, 0)
        if len(data) != _WORDS.size or not data.startswith(_MAGIC):
            raise UnusableMap("it left no state that can be read")
        _, numbers, generation, size, block_size, live, taken = _WORDS.unpack(data)
        # Two little-endian words, the high one first.
        high, low = struct.unpack("<2Q", generation)
        return cls(
            base=numbers >> 32,
            active=numbers & 0xFFFF_FFFF,
            generation=str(uuid.UUID(int=high << 64 | low)),
            size=size,
            block_size=block_size,
            live_sequence=live,
            taken_sequence=taken,
        )


class Remains:
    """The live map and the state page of one origin, held open, with the reading they came with."""

    def __init__(self, maps: OriginMaps, identity: Identity, page: OwnedFd) -> None:
        """Hold duplicates of the descriptors of ``maps``, whose state page is ``page``."""
        self.reading: OriginReading = maps.reading
        self._identity = identity
        self._live = maps.live.dup()
        self._page = page.dup()
        self._at_end: Fingerprint | None = None

    def close(self) -> None:
        """Close the descriptors."""
        close_all((self._live, self._page))

    def note_end(self) -> None:
        """Note how the origin is, now that the data path does not write it any more. Blocks for some milliseconds."""
        self._at_end = fingerprint_of(self.reading.label, self._identity)

    def claim(self, origin: Origin, last_reset: str) -> ClaimedMap:
        """Return the map that continues the generation for the reopened ``origin``.

        Raises ``UnusableMap`` with the reason when that cannot be proved. The map in the result is a duplicate.
        """
        page, held = StatePage.read(self._page), self.reading
        if origin.size != page.size:
            raise UnusableMap(f"its size changed from {page.size} to {origin.size} bytes")
        # The page is written word by word: a data path killed in between leaves words of two maps, told by these three.
        known = (held.live_sequence, held.generation, held.base, held.block_size)
        if (page.live_sequence, page.generation, page.base, page.block_size) != known:
            raise UnusableMap("its last map was not in reach of the service")
        if self._at_end is None or self._at_end != origin.fingerprint:
            raise UnusableMap("it was written to, or replaced, while nothing tracked it")
        header = MapHeader(
            path=held.label,
            fingerprint=origin.fingerprint,
            block_size=page.block_size,
            block_count=held.block_count,
            generation=page.generation,
            base=page.base,
            active=page.active,
            last_reset=last_reset,
            saved_at=0,
            saves=0,
        )
        return ClaimedMap(header, self._live.dup())
