# SPDX-License-Identifier: GPL-2.0-or-later
"""What every interface of ours needs: the service behind it, and a check of who calls."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Final

from blksnap_service import errors
from blksnap_service.authority import ACTIONS, MESSAGES, OTHER_USER, Action, Authority
from blksnap_service.bus.job import Jobs, Operation
from blksnap_service.bus.wire import Call
from blksnap_service.devices import Device
from blksnap_service.service import Service
from blksnap_service.work import Work

GETTEXT_DOMAIN: Final = "blksnap"


@dataclass(frozen=True, slots=True)
class Context:
    """The service, and who decides what callers may do. ``bus_id`` tells one run of a bus from the next."""

    service: Service
    authority: Authority
    bus_id: str
    jobs: Jobs

    async def allow(
        self,
        call: Call,
        devices: Sequence[Device | str] = (),
        *,
        owner_uid: int | None = None,
        also: Collection[Action] = (),
        **details: object,
    ) -> int:
        """Check that the caller may call this method now; returns its uid.

        ``devices`` are what it is about, or what that is called; ``owner_uid`` is whose object it is, where that matters;
        ``also`` is what else it must be allowed; ``details`` are for polkit's rules, ``_`` in their names stands for ``.``.
        Raises ``errors.NotAuthorized`` and its kin, and ``errors.NotFound`` when the object is gone meanwhile: a check may
        wait for a person. All else may have changed too when it returns.
        """
        uid = await call.uid()
        method = call.interface.rpartition(".")[2], call.member
        needed = ACTIONS[method]
        if needed is not None and owner_uid is not None and owner_uid != uid:
            needed = OTHER_USER.get(needed, needed)
        named = [one if isinstance(one, str) else one.path for one in devices]
        told = {
            "devices": ", ".join(named),
            "device.count": str(len(named)),
            "method": ".".join(method),
            **{name.replace("_", "."): _text(value) for name, value in details.items()},
        }
        if owner_uid is not None:
            told["owner.uid"] = str(owner_uid)
        if needed is not None:
            message = MESSAGES.get(method)
            more = {"polkit.message": message, "polkit.gettext_domain": GETTEXT_DOMAIN} if message else {}
            await self.authority.check(call, needed, told | more)
        for action in also:
            await self.authority.check(call, action, told)
        if not call.present():
            raise errors.NotFound(f"{call.path} is gone, or another one has its name now; nothing was done")
        return uid

    def same(self, devices: Sequence[Device]) -> list[Device]:
        """Return what is known now of devices that were looked up before a check.

        Raises ``errors.NotFound`` when one is gone, or another one has its name.
        """
        found = [self.service.inventory.get(device.name) for device in devices]
        for before, now in zip(devices, found, strict=True):
            if (before.identity, before.diskseq) != (now.identity, now.diskseq):
                raise errors.NotFound(f"{now.path} is another device than it was; nothing was done")
        return found

    def run(
        self, name: str, uid: int, devices: Sequence[Device | str], objects: Sequence[str]
    ) -> AbstractAsyncContextManager[Work]:
        """Show an operation of that user while the block lasts. Raises ``errors.LimitExceeded``."""
        named = [one if isinstance(one, str) else one.path for one in devices]
        return self.jobs.run(self, Operation(name, named, objects, uid))

    def trusted(self, uid: int) -> bool:
        """Whether a caller may have the service open any path: it could do so itself."""
        return uid in {0, os.geteuid()}


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
