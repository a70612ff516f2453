# SPDX-License-Identifier: GPL-2.0-or-later
"""The backend ``blkfilter``: attaches the kernel filter to devices as they are, in use or not, and finds those it is on.

Nothing moves: the device itself stays what is used, and all who write to it are seen. What the filter does not see, or does
badly, is refused before it is attached.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from blksnap_service import errors, sysblock
from blksnap_service.backends.blkfilter import probe
from blksnap_service.backends.blkfilter.control import Control
from blksnap_service.backends.blkfilter.kernel import FilteredDevice, RealSystem, System, Target
from blksnap_service.backends.blkfilter.probe import Found, Sign
from blksnap_service.backends.blkfilter.threads import to_the_end
from blksnap_service.backends.blkfilter.tracker import NAME, FilterTracker, look, reading_of
from blksnap_service.backends.blkfilter.uapi import FILTER_NAME, Generation
from blksnap_service.catalogue import FilterDeviceEntry, Table
from blksnap_service.devices import Device, origin_name
from blksnap_service.storage import Identity
from blksnap_service.tracker import NOWHERE, Attached, BackendInfo, Placement, Tracker

_log = logging.getLogger(__name__)


class FilterBackend:
    """The kernel filter of whatever generation there is, or none."""

    def __init__(
        self,
        table: Table[FilterDeviceEntry] | None = None,
        system: System | None = None,
        look_around: Callable[[], Sign] = probe.look,
        detect: Callable[[Sign], Found] = lambda sign: probe.detect(sign, probe.loop_device),
    ) -> None:
        """Use ``system``; nothing is asked before ``refresh``. In ``table`` stands what the kernel does not keep."""
        self._table = table
        self._system = system or RealSystem()
        self._look_around = look_around
        self._detect = detect
        self._sign: Sign | None = None
        self._found = Found(None, "it was not looked for yet")
        self._trackers: dict[str, FilterTracker] = {}
        # What is attached meanwhile would be missing from a list made before.
        self._lock = asyncio.Lock()
        self._met_another = False

    @property
    def info(self) -> BackendInfo:
        """Available while a generation was found that is spoken here."""
        available = self._found.generation is not None
        return BackendInfo(
            NAME, available, self._found.reason, snapshots=True, live_map=False, live_attach=True
        )

    @property
    def generation(self) -> Generation | None:
        """The generation there is."""
        return self._found.generation

    @property
    def is_hoped_for(self) -> bool:
        """Whether there may be one although it cannot be used now."""
        return self._found.passing

    def control(self) -> Control:
        """The control node. Raises ``errors.NotAvailable``."""
        return Control(self._system, self._spoken())

    def _spoken(self) -> Generation:
        if self._found.generation is None:
            raise errors.NotAvailable(f"the kernel filter cannot be used: {self._found.reason}")
        return self._found.generation

    async def refresh(self) -> bool:
        """Look whether the module came or went; returns whether what can be said of it is different."""
        sign = await asyncio.to_thread(self._look_around)
        if sign == self._sign and not self._found.passing:
            return False
        before = self._found
        self._found = await asyncio.to_thread(self._detect, sign)
        self._sign = sign
        if self._found == before:
            return False
        if self._found.generation is not None:
            _log.info("the kernel has the filter blksnap, generation %s", self._found.generation.name)
        elif sign.nodes or sign.classes:
            _log.warning("the kernel filter is not used: %s", self._found.reason)
        return True

    def rank(self, device: Device) -> int:
        """First for a device in use: nothing else can do without moving its users. For others a live map is better."""
        return 0 if device.mount_points or sysblock.holders(device.number) else 2

    def refusal(self, device: Device) -> errors.BlksnapError | None:
        """Return why not: no filter, no block device, of a kind whose writes it does not see."""
        info = self.info
        if not info.available:
            return errors.NotAvailable(f"{device.path} cannot be tracked by {NAME}: {info.reason}")
        if device.kind != "block":
            return errors.NotSupported(f"{device.path} is an image file: use the backend nbd")
        reason = "it is read-only" if device.read_only else sysblock.unsupported(device.number)
        if reason:
            return errors.NotSupported(f"{device.path} cannot be tracked by {NAME}: {reason}")
        if partitions := sysblock.partitions(device.number):
            names = ", ".join(sysblock.device_path(number) for number in partitions)
            return errors.NotSupported(
                f"{device.path} cannot be tracked by {NAME}: the filter on a disk does not see writes to its partitions; track"
                f" {names}"
            )
        return None

    @property
    def is_to_be_searched(self) -> bool:
        """Whether to look for filters others attached.

        Always, but in generations that stop a device to be asked for its filter: there only when one was found.
        """
        generation = self._found.generation
        return generation is not None and (generation.quiet_sysfs or self._met_another)

    async def attach(self, device: Device, block_size: int, before: Placement = NOWHERE) -> Attached:
        """Attach the filter. Raises what ``refusal`` returns, ``errors.AlreadyTracked`` (by another program), ``errors.Busy``.

        The kernel freezes the file system for a moment.
        """
        del before
        if (refusal := self.refusal(device)) is not None:
            raise refusal
        if block_size:
            raise errors.NotSupported(
                f"{device.path} cannot be tracked by {NAME} in blocks of {block_size} bytes: the kernel filter chooses"
                " their size itself; leave the option block-size out"
            )
        async with self._lock:
            filtered = await asyncio.to_thread(self._device, device.path, device.identity, 0)
            try:
                tracker = await to_the_end(
                    lambda: self._attach(filtered, device.origin), lambda made: made.device.detach()
                )
            except errors.AlreadyTracked:
                self._met_another = True
                raise
            self._forget(device.origin)
            self._trackers[device.origin] = tracker
            await self._note(tracker)
        return Attached(tracker, "attached")

    def _attach(self, device: FilteredDevice, origin: str) -> FilterTracker:
        device.attach()
        try:
            info, reason = look(device)
            tracker = FilterTracker(device, origin, reading_of(info, reason))
            tracker.begin_interval(tracker.written_now(), info)
        except BaseException:
            device.detach()
            raise
        return tracker

    async def detach(self, tracker: Tracker, last_reset: str, *, force: bool) -> None:
        """Take the filter off. Raises ``errors.Busy`` while it is part of a snapshot, forced or not.

        The kernel would do it, and the image would silently take over what is written then.
        """
        del last_reset, force
        if not isinstance(tracker, FilterTracker):
            raise errors.NotTracked(f"{tracker.origin} is not tracked by {NAME}")
        async with self._lock:
            try:
                snapshot = await asyncio.to_thread(tracker.device.snapshot_info)
                if snapshot.image:
                    raise errors.Busy(
                        f"{tracker.node} cannot be detached: it is part of a snapshot (image /dev/{snapshot.image}), which"
                        " would go wrong unnoticed; destroy that first"
                    )
                await asyncio.to_thread(tracker.device.detach)
            except (errors.NotFound, errors.NotTracked):
                _log.info("the filter on %s was gone before it was detached", tracker.node)
            self._forget(tracker.origin)
            tracker.close()
            if self._table is not None:
                await self._table.drop(tracker.origin)

    async def discover(self, known: Mapping[str, Identity]) -> list[tuple[Tracker, str]]:
        """Return the trackers of all devices the filter is on, whoever attached it."""
        del known
        if self._found.generation is None:
            return []
        async with self._lock:
            return await self._discover()

    async def _discover(self) -> list[tuple[Tracker, str]]:
        self._met_another = False
        found: list[tuple[Tracker, str]] = []
        numbers = await asyncio.to_thread(sysblock.filtered, FILTER_NAME)
        for origin in [one.origin for one in self.trackers() if one.identity.device not in numbers]:
            self._forget(origin)
        for number in numbers:
            path = sysblock.device_path(number)
            try:
                found.append((await self._tracker_at(path, Identity(number, 0)), path))
            except errors.BlksnapError as error:
                _log.warning("%s has the kernel filter, but cannot be used: %s", path, error)
        return found

    async def _tracker_at(self, path: str, identity: Identity) -> FilterTracker:
        origin = origin_name(path)
        known = self._trackers.get(origin)
        if known is not None and known.identity == identity:
            # Not read: what is different from the last reading is for the registry to find, and to tell.
            return known
        entry = self._table.get(origin) if self._table is not None else None
        noted = entry.diskseq if entry is not None and entry.boot_id == _boot_id() else 0
        device = await asyncio.to_thread(self._device, path, identity, noted)
        info, reason = await asyncio.to_thread(look, device)
        self._forget(origin)
        tracker = self._trackers[origin] = FilterTracker(device, origin, reading_of(info, reason))
        await self._note(tracker)
        return tracker

    def _device(self, path: str, identity: Identity, diskseq: int) -> FilteredDevice:
        """Return a device with the medium that is in it now, unless ``diskseq`` says which one was. Blocks."""
        generation = self._spoken()
        # Of a device-mapper device another table is no other medium.
        if not diskseq and not sysblock.dm_name(identity.device):
            diskseq = FilteredDevice(self._system, generation, Target(path, identity)).diskseq()
        return FilteredDevice(self._system, generation, Target(path, identity, diskseq))

    async def _note(self, tracker: FilterTracker) -> None:
        """Write down which medium is tracked: it may be another one when the service comes back."""
        if self._table is not None:
            try:
                await self._table.put(
                    FilterDeviceEntry(tracker.origin, _boot_id(), tracker.device.target.diskseq)
                )
            except errors.BlksnapError as error:
                _log.error("%s", error)

    def tracker(self, origin: str) -> FilterTracker:
        """Return the tracker of an origin. Raises ``errors.NotTracked``."""
        found = self._trackers.get(origin)
        if found is None:
            raise errors.NotTracked(f"{origin} is not tracked by {NAME}")
        return found

    def trackers(self) -> list[FilterTracker]:
        """Return all trackers that were made here."""
        return list(self._trackers.values())

    def _forget(self, origin: str) -> None:
        if (tracker := self._trackers.pop(origin, None)) is not None:
            tracker.close()

    def close(self) -> None:
        """Let go of all maps; the kernel goes on tracking."""
        for tracker in self._trackers.values():
            tracker.close()
        self._trackers.clear()


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
