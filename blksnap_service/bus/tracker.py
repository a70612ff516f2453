# SPDX-License-Identifier: GPL-2.0-or-later
"""The interface Tracker: numbers, maps and marks of a tracked device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blksnap_service import errors
from blksnap_service.bus import options as bus_options
from blksnap_service.bus.access import Context
from blksnap_service.bus.wire import Call, OwnedFd, Value, variant
from blksnap_service.cbt import View
from blksnap_service.mapview import Mode, Ranges
from blksnap_service.tracker import OpenMap
from blksnap_service.trackers import Tracked


class Tracker:
    """The tracker of one device."""

    def __init__(self, context: Context, name: str) -> None:
        """Speak for whatever tracks the device ``name``."""
        self._context = context
        self._registry = context.service.registry
        self._name = name

    @property
    def _tracked(self) -> Tracked:
        return self._registry.get(self._name)

    def properties(self) -> dict[str, Any]:
        """Return all properties, from the last reading."""
        tracker, entry = self._tracked.tracker, self._tracked.entry
        reading = tracker.last
        return {
            "Backend": tracker.backend,
            "Node": tracker.node,
            "State": reading.state,
            "MapIsLive": tracker.map_is_live,
            "Capacity": reading.capacity,
            "BlockSize": reading.block_size,
            "BlockCount": reading.block_count,
            "GenerationId": reading.generation,
            "ChangesNumber": reading.changes,
            "OldestNumber": reading.oldest,
            "AttachedAt": entry.attached_at,
            "AttachedByUID": entry.owner_uid,
            "LastReset": entry.last_reset,
        }

    async def GetInfo(self, call: Call, options: Mapping[str, Value]) -> dict[str, Value]:  # noqa: N802
        """Make one consistent reading, with what was counted."""
        bus_options.take(options, {})
        await self._allow(call)
        tracked = self._tracked
        counted = await tracked.reader.count()
        reading = counted.reading
        counters = {name.replace("_", "-"): variant("t", value) for name, value in reading.counters.items()}
        return {
            **counters,
            "backend": variant("s", tracked.tracker.backend),
            "node": variant("s", tracked.tracker.node),
            "state": variant("s", reading.state),
            "reason": variant("s", reading.reason),
            "capacity": variant("t", reading.capacity),
            "block-size": variant("u", reading.block_size),
            "block-count": variant("t", reading.block_count),
            "generation-id": variant("s", reading.generation),
            "base": variant("u", reading.base),
            "active": variant("u", reading.active),
            "changes-number": variant("u", reading.changes),
            "oldest-number": variant("u", reading.oldest),
            "clients": variant("u", reading.clients),
            "changed-blocks": variant("a{ut}", counted.changed),
        }

    async def ReadMap(  # noqa: N802
        self, call: Call, offset: int, length: int, options: Mapping[str, Value]
    ) -> bytes:
        """Read part of a map."""
        chosen = bus_options.take(options, {"view": "s"})
        await self._allow(call)
        return await self._tracked.reader.read(_view(chosen, View.LIVE), offset, length)

    async def OpenMap(  # noqa: N802
        self, call: Call, options: Mapping[str, Value]
    ) -> tuple[OwnedFd, dict[str, Value]]:
        """Hand over the memory file of a map."""
        chosen = bus_options.take(options, {"view": "s"})
        await self._allow(call)
        opened = await self._tracked.tracker.open_map(_view(chosen, View.LIVE))
        return opened.fd, _map_info(opened)

    async def GetChangedRanges(  # noqa: N802
        self, call: Call, since: int, offset: int, most: int, options: Mapping[str, Value]
    ) -> tuple[Ranges, int]:
        """Return what changed since a number."""
        chosen = bus_options.take(options, {"generation-id": "s", "view": "s"})
        await self._allow(call)
        return await self._tracked.reader.changed_ranges(
            _view(chosen, View.TAKEN), since, offset, most, chosen.get("generation-id", "")
        )

    async def Summarize(  # noqa: N802
        self, call: Call, first: int, count: int, bins: int, mode: str, options: Mapping[str, Value]
    ) -> tuple[bytes, int]:
        """Fold a part of the map into a few bytes."""
        chosen = bus_options.take(options, {"since": "u", "view": "s"})
        await self._allow(call)
        try:
            wanted = Mode(mode)
        except ValueError:
            raise errors.InvalidArgument(f"there is no mode {mode!r}; there are: {', '.join(Mode)}") from None
        tracked = self._tracked
        since = chosen.get("since", tracked.tracker.last.oldest)
        return await tracked.reader.summarize(_view(chosen, View.LIVE), first, count, bins, wanted, since)

    async def MarkDirty(  # noqa: N802
        self, call: Call, ranges: list[tuple[int, int]], options: Mapping[str, Value]
    ) -> None:
        """Mark byte ranges as changed."""
        bus_options.take(options, {})
        await self._allow(call)
        await self._registry.mark(self._name, ranges)

    async def MarkAllDirty(self, call: Call, options: Mapping[str, Value]) -> None:  # noqa: N802
        """Mark everything as changed."""
        bus_options.take(options, {})
        await self._allow(call)
        await self._registry.mark_all(self._name)

    async def _allow(self, call: Call) -> None:
        await self._context.allow(call, [self._context.service.inventory.get(self._name)])


def _view(chosen: Mapping[str, Any], default: View) -> View:
    name = chosen.get("view", default.value)
    try:
        return View(name)
    except ValueError:
        raise errors.InvalidArgument(f"there is no view {name!r}; there are: {', '.join(View)}") from None


def _map_info(opened: OpenMap) -> dict[str, Value]:
    reading = opened.reading
    return {
        "generation-id": variant("s", reading.generation),
        "base": variant("u", opened.base),
        "active": variant("u", reading.active),
        "changes-number": variant("u", reading.changes),
        "oldest-number": variant("u", reading.oldest),
        "block-size": variant("u", reading.block_size),
        "block-count": variant("t", reading.block_count),
        "sequence": variant("t", opened.sequence),
        "view": variant("s", opened.view.value),
    }
