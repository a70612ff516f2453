# SPDX-License-Identifier: GPL-2.0-or-later
"""What every interface of ours needs: the service behind it, and a check of who calls."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from blksnap_service.authority import ACTIONS, OTHER_USER, Authority
from blksnap_service.bus.wire import Call
from blksnap_service.devices import Device
from blksnap_service.service import Service


@dataclass(frozen=True, slots=True)
class Context:
    """The service, and who decides what callers may do. ``bus_id`` tells one run of a bus from the next."""

    service: Service
    authority: Authority
    bus_id: str

    async def allow(self, call: Call, devices: Sequence[Device] = (), owner_uid: int | None = None) -> int:
        """Check that the caller may call this method now; returns its uid.

        ``owner_uid`` is whose object it is, where that matters. Raises ``errors.NotAuthorized`` and its kin. State may have
        changed when it returns: a check may wait for a person.
        """
        uid = await call.uid()
        action = ACTIONS[call.interface.rpartition(".")[2], call.member]
        if action is not None and owner_uid is not None and owner_uid != uid:
            action = OTHER_USER.get(action, action)
        if action is not None:
            details = {"devices": ", ".join(device.path for device in devices)}
            await self.authority.check(call, action, details)
        return uid

    def trusted(self, uid: int) -> bool:
        """Whether a caller may have the service open any path: it could do so itself."""
        return uid in {0, os.geteuid()}
