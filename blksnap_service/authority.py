# SPDX-License-Identifier: GPL-2.0-or-later
"""Who may do what.

Every method of the bus interfaces needs one action or none (``ACTIONS``). Two authorities decide about actions:

``OwnerAuthority`` (``--authority owner``, for private and session buses): the service's own uid may do everything, nobody
else anything. ``PolkitAuthority`` (``--authority polkit``, for the system bus): polkit is not asked yet, so the rule for
"polkit is absent" holds (DESIGN section 6): uid 0 may do everything, nobody else anything. Both refuse when in doubt.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from enum import StrEnum
from typing import Literal, Protocol

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


class _OneUid:
    """Lets one uid do everything."""

    def __init__(self, uid: int, why: str) -> None:
        self._uid = uid
        self._why = why

    async def check(self, subject: Subject, action: Action, details: Mapping[str, str]) -> None:
        """Raises ``errors.NotAuthorized`` for any other uid: authenticating would not help."""
        uid = await subject.uid()
        if uid != self._uid:
            about = f" ({details['devices']})" if details.get("devices") else ""
            raise errors.NotAuthorized(f"uid {uid} may not do this{about}: {action.value} needs {self._why}")


class OwnerAuthority(_OneUid):
    """Only the uid the service runs as."""

    def __init__(self) -> None:
        """Ask the kernel for that uid."""
        uid = os.geteuid()
        super().__init__(uid, f"uid {uid}, which runs this service")


class PolkitAuthority(_OneUid):
    """Only uid 0: what holds while polkit is not asked."""

    def __init__(self) -> None:
        """Need nothing."""
        super().__init__(0, "root, as this service does not ask polkit")


def authority_of(name: Literal["owner", "polkit"]) -> Authority:
    """Return the authority of that name."""
    return OwnerAuthority() if name == "owner" else PolkitAuthority()
