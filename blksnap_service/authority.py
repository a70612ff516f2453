# SPDX-License-Identifier: GPL-2.0-or-later
"""Who may do what.

Every method of the bus interfaces needs one action or none (``ACTIONS``). Two authorities decide about actions, and refuse
when in doubt: ``OwnerAuthority`` (``--authority owner``, for private and session buses), for which the service's own uid may
do everything and nobody else anything, and polkit (``--authority polkit``, for the system bus), which ``bus.polkit`` asks.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from enum import StrEnum
from typing import Protocol

from blksnap_service import errors


class Action(StrEnum):
    """The polkit actions; each is ``org.blksnap.blksnap1.`` and the value."""

    TRACKER_ATTACH = "tracker-attach"
    TRACKER_DETACH = "tracker-detach"
    TRACKER_READ_MAP = "tracker-read-map"
    TRACKER_MARK_DIRTY = "tracker-mark-dirty"
    SNAPSHOT_CREATE = "snapshot-create"
    SNAPSHOT_DESTROY = "snapshot-destroy"
    SNAPSHOT_DESTROY_OTHER_USER = "snapshot-destroy-other-user"
    IMAGE_OPEN = "image-open"
    CANCEL_JOB = "cancel-job"
    CANCEL_JOB_OTHER_USER = "cancel-job-other-user"

    @property
    def id(self) -> str:
        """The action id polkit knows."""
        return f"org.blksnap.blksnap1.{self.value}"


ACTIONS: Mapping[tuple[str, str], Action | None] = {
    ("Manager", "ResolveDevice"): None,
    ("Manager", "AddImageFile"): Action.TRACKER_ATTACH,
    ("Manager", "CreateSnapshot"): Action.SNAPSHOT_CREATE,
    ("Manager", "Collect"): Action.SNAPSHOT_CREATE,
    ("Device", "Attach"): Action.TRACKER_ATTACH,
    ("Device", "Detach"): Action.TRACKER_DETACH,
    ("Tracker", "GetInfo"): Action.TRACKER_READ_MAP,
    ("Tracker", "ReadMap"): Action.TRACKER_READ_MAP,
    ("Tracker", "OpenMap"): Action.TRACKER_READ_MAP,
    ("Tracker", "GetChangedRanges"): Action.TRACKER_READ_MAP,
    ("Tracker", "Summarize"): Action.TRACKER_READ_MAP,
    ("Tracker", "MarkDirty"): Action.TRACKER_MARK_DIRTY,
    ("Tracker", "MarkAllDirty"): Action.TRACKER_MARK_DIRTY,
    ("Snapshot", "AddDevice"): Action.SNAPSHOT_CREATE,
    ("Snapshot", "Take"): Action.SNAPSHOT_CREATE,
    ("Snapshot", "Destroy"): Action.SNAPSHOT_DESTROY,
    ("Snapshot", "Release"): Action.SNAPSHOT_DESTROY,
    ("Image", "Open"): Action.IMAGE_OPEN,
    ("Image", "Export"): Action.IMAGE_OPEN,
    ("Job", "Cancel"): Action.CANCEL_JOB,
}
"""The action of each method, by interface (its last word) and name; None: free to all."""

OTHER_USER: Mapping[Action, Action] = {
    Action.SNAPSHOT_DESTROY: Action.SNAPSHOT_DESTROY_OTHER_USER,
    Action.CANCEL_JOB: Action.CANCEL_JOB_OTHER_USER,
}
"""The action that is needed instead when the snapshot or job belongs to another uid."""


MESSAGES: Mapping[tuple[str, str], str] = {
    ("Manager", "AddImageFile"): "Authentication is required to have changes of the file $(devices) tracked",
    ("Manager", "Collect"): "Authentication is required to look for snapshots others have made",
    ("Snapshot", "AddDevice"): "Authentication is required to add $(devices) to a snapshot",
    (
        "Snapshot",
        "Release",
    ): "Authentication is required to keep a snapshot of $(devices) that would end by itself",
}
"""What a person is asked where the message of the action would not say it; polkit puts the details in."""


class Subject(Protocol):
    """The caller of a method."""

    @property
    def sender(self) -> str:
        """Its unique bus name."""

    @property
    def interactive(self) -> bool:
        """Whether it may be asked to authenticate."""

    async def uid(self) -> int:
        """Its uid, from the bus. Raises ``errors.NotFound`` when it has left."""


class Authority(Protocol):
    """Decides about actions."""

    async def check(self, subject: Subject, action: Action, details: Mapping[str, str]) -> None:
        """Return if the caller may do it now. Raises ``errors.NotAuthorized`` or one of its kin."""


def about(uid: int, details: Mapping[str, str]) -> str:
    """Return the beginning of what a refused caller reads."""
    devices = f" ({details['devices']})" if details.get("devices") else ""
    return f"uid {uid} may not do this{devices}"


class OwnerAuthority:
    """Only the uid the service runs as."""

    def __init__(self) -> None:
        """Ask the kernel for that uid."""
        self._uid = os.geteuid()

    async def check(self, subject: Subject, action: Action, details: Mapping[str, str]) -> None:
        """Raises ``errors.NotAuthorized`` for any other uid: authenticating would not help."""
        uid = await subject.uid()
        if uid != self._uid:
            raise errors.NotAuthorized(
                f"{about(uid, details)}: {action.value} needs uid {self._uid}, which runs this service"
            )
