# SPDX-License-Identifier: GPL-2.0-or-later
"""Who may do what."""

from __future__ import annotations

import os
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import pytest

from blksnap_service import errors
from blksnap_service.authority import (
    ACTIONS,
    OTHER_USER,
    Action,
    Authority,
    OwnerAuthority,
)
from blksnap_service.bus.polkit import PolkitAuthority

XML = Path(__file__).parents[2] / "dbus" / "interfaces" / "org.blksnap.Blksnap1.xml"


class Caller:
    """A subject with a uid."""

    sender = ":1.1"
    interactive = True

    def __init__(self, uid: int) -> None:
        self._uid = uid

    async def uid(self) -> int:
        """Return it."""
        return self._uid


class WithoutPolkit:
    """A bus without polkit on it; every question is an error."""

    async def call(self, *words: object, **more: object) -> list[object]:
        """Answer as dbus-daemon does."""
        raise errors.RemoteError("org.freedesktop.DBus.Error.ServiceUnknown", "The name was not provided")

    def watch_name(self, unique: str, callback: Callable[[str], None]) -> Callable[[], None]:
        """Watch nothing."""
        return lambda: None


AUTHORITIES = [OwnerAuthority(), PolkitAuthority(WithoutPolkit())]


class Gone(Caller):
    """A caller that has left the bus."""

    async def uid(self) -> int:
        """Know nothing."""
        raise errors.NotFound("the caller has left")


def test_every_method_of_the_xml_has_its_action() -> None:
    """A new method cannot be forgotten here, nor an old one stay."""
    methods = {
        (str(interface.get("name")).rpartition(".")[2], method.get("name"))
        for interface in ET.parse(XML).getroot().findall("interface")  # noqa: S314 - our own file
        for method in interface.findall("method")
    }
    assert set(ACTIONS) == methods


def test_only_finding_a_device_is_free() -> None:
    """Properties are free too, but are no methods of ours."""
    assert [method for method, action in ACTIONS.items() if action is None] == [("Manager", "ResolveDevice")]


def test_every_action_is_used() -> None:
    """Those of other users instead of their own."""
    assert {action for action in ACTIONS.values() if action} | set(OTHER_USER.values()) == set(Action)


def test_action_ids_are_polkits() -> None:
    """Lower case, as DESIGN section 6 has them."""
    assert Action.SNAPSHOT_DESTROY_OTHER_USER.id == "org.blksnap.blksnap1.snapshot-destroy-other-user"


@pytest.mark.parametrize("authority", AUTHORITIES)
@pytest.mark.parametrize("action", list(Action))
async def test_nobody_may_do_nothing(authority: Authority, action: Action) -> None:
    """The text says who asked for what, and about which device."""
    with pytest.raises(errors.NotAuthorized, match=r"uid 65534 may not do this \(/dev/sda\)"):
        await authority.check(Caller(65_534), action, {"devices": "/dev/sda"})


async def test_the_owner_may_do_everything() -> None:
    """The uid the service runs as."""
    for action in Action:
        await OwnerAuthority().check(Caller(os.geteuid()), action, {})


async def test_the_owner_is_not_root_but_the_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a private bus of a user, root has no say."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    authority = OwnerAuthority()
    await authority.check(Caller(1000), Action.TRACKER_ATTACH, {})
    with pytest.raises(errors.NotAuthorized):
        await authority.check(Caller(0), Action.TRACKER_ATTACH, {})


async def test_without_polkit_root_may_do_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever the service runs as."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    authority = PolkitAuthority(WithoutPolkit())
    await authority.check(Caller(0), Action.IMAGE_OPEN, {})
    with pytest.raises(errors.NotAuthorized, match="root"):
        await authority.check(Caller(1000), Action.IMAGE_OPEN, {})


@pytest.mark.parametrize("authority", AUTHORITIES)
async def test_who_has_left_may_do_nothing(authority: Authority) -> None:
    """Not knowing who asked is a no."""
    with pytest.raises(errors.BlksnapError):
        await authority.check(Gone(0), Action.TRACKER_ATTACH, {})


def test_the_policy_file_has_every_action() -> None:
    """An action polkit does not know is refused to all but root."""
    policy = XML.parents[1] / "polkit" / "org.blksnap.blksnap1.policy"
    ids = [one.get("id") for one in ET.parse(policy).getroot().iter("action")]  # noqa: S314
    assert sorted(map(str, ids)) == sorted(action.id for action in Action)
