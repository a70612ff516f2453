# SPDX-License-Identifier: GPL-2.0-or-later
"""Images of the kernel filter: what can be said of one, whose a device's is, and why one failed. All functions block."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass

from blksnap_service import errors
from blksnap_service.backends.blkfilter.tracker import FilterTracker, look
from blksnap_service.backends.blkfilter.uapi import CbtInfo
from blksnap_service.engines import ImageStatus

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Member:
    """An image, and the errno the kernel gave for its failure: 0 when there is none, or it did not notice."""

    status: ImageStatus
    errno: int


def failure_of(number: int) -> str:
    """Why an image failed, from the errno the kernel gives."""
    if number == errno.ENOSPC:
        return "the difference storage overflowed"
    return f"old bytes could not be kept: {os.strerror(number).lower()}"


def image_of(origin: str, tracker: FilterTracker | None, failure: str) -> Member:
    """What can be said of the image of an origin; ``failure`` is what was known to be wrong before."""
    gone = "the filter was taken off its device, or the device is gone: the image is of no instant any more"
    if tracker is None:
        return Member(ImageStatus(origin, 0, "", 0, False, failure or gone, "", ""), 0)
    last = tracker.last
    status = ImageStatus(origin, last.capacity, last.generation, last.changes, False, failure, "", "")
    try:
        snapshot = tracker.device.snapshot_info()
        info, wrong = look(tracker.device)
    except errors.BlksnapError:
        return Member(_failed(status, failure or gone), 0)
    error, number = failure, 0
    if not error and not snapshot.image:
        error = gone
    if not error and snapshot.errno:
        error, number = failure_of(snapshot.errno), snapshot.errno
    if not error and wrong:
        # The kernel copies nothing for a write its map has no place for, and does not tell.
        error = f"it may have lost old bytes: {wrong}"
    path = f"/dev/{snapshot.image}" if snapshot.image else ""
    return Member(
        ImageStatus(origin, info.capacity, info.generation, info.changes, False, error, path, ""), number
    )


def _failed(status: ImageStatus, error: str) -> ImageStatus:
    return ImageStatus(
        status.origin, status.size, status.generation, status.number, False, error, status.path, status.uri
    )


def take_reason(before: CbtInfo, after: CbtInfo) -> str:
    """Why a take ended a generation; empty if it did not."""
    if before.generation == after.generation:
        return ""
    if after.wrapped:
        return "the 255 numbers of the kernel filter are used up: a full copy is needed"
    if before.capacity != after.capacity:
        return f"its size changed from {before.capacity} to {after.capacity} bytes: a full copy is needed"
    return "the kernel missed writes: a full copy is needed"


def find_members(trackers: Sequence[FilterTracker], snapshots: Sequence[str]) -> dict[str, list[str]]:
    """Which of the kernel's snapshots the devices with an image are in: origins by the kernel's id.

    With more than one snapshot the kernel is asked by adding the device, which is refused for one that is in a snapshot,
    and with another errno when it is that one.
    """
    found: dict[str, list[str]] = {}
    for tracker in trackers:
        try:
            if not tracker.device.snapshot_info().image:
                continue
            for snapshot in snapshots:
                if len(snapshots) == 1 or tracker.device.add_to(snapshot) == errno.EALREADY:
                    found.setdefault(snapshot, []).append(tracker.origin)
                    break
        except errors.BlksnapError as error:
            _log.warning("%s cannot be asked for its snapshot: %s", tracker.node, error)
    return found
