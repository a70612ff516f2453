# SPDX-License-Identifier: GPL-2.0-or-later
"""How polkit is asked: in whose name, in which words, for how long, and what holds when the answer comes."""

from __future__ import annotations

import asyncio
import os
import subprocess
from pathlib import Path

import pytest

from blksnap_service import errors
from blksnap_service.authority import Action
from blksnap_service.bus import polkit as asking, wire
from blksnap_service.bus.paths import DEVICE, MANAGER, MANAGER_PATH, SNAPSHOT, TRACKER
from tests.bus.daemons import REPOSITORY, START_S, Bus, Client, Daemon, make_image
from tests.bus.polkitd import NOBODY, Agent, Polkit, Unprivileged

DAEMON_UID = 1


class Subject:
    """A caller by its unique name."""

    interactive = False

    def __init__(self, sender: str, uid: int) -> None:
        self.sender, self._uid = sender, uid

    async def uid(self) -> int:
        """Return it."""
        return self._uid


async def begun(agent: Agent) -> None:
    """Wait until a person is being asked."""
    async with asyncio.timeout(START_S):
        await agent.begun.wait()


async def test_polkit_knows_the_actions(polkit: Polkit, root: Client) -> None:
    """The policy file is one to polkitd: every action, whom it lets by itself, and its message."""
    (actions,) = await root.connection.call(
        asking.NAME, asking.PATH, asking.INTERFACE, "EnumerateActions", "s", ["C"]
    )
    ours = {one[0]: one for one in actions if one[0].startswith("org.blksnap.")}
    assert set(ours) == {action.id for action in Action}
    for name, (_, description, message, vendor, *_rest) in ours.items():
        assert description, name
        assert vendor == "blksnap"
        assert message.startswith("Authentication is required to ")
        assert "$(devices)" in message
    # 2 is auth_admin, 4 auth_admin_keep (PolkitImplicitAuthorization).
    assert tuple(ours[Action.IMAGE_OPEN.id][6:9]) == (2, 2, 2)
    assert tuple(ours[Action.SNAPSHOT_CREATE.id][6:9]) == (2, 2, 4)


def test_the_files_are_valid() -> None:
    """To the document types they name."""
    policy = REPOSITORY / "dbus" / "polkit" / "org.blksnap.blksnap1.policy"
    dtd = "/usr/share/polkit-1/policyconfig-1.dtd"
    subprocess.run(["xmllint", "--noout", "--nonet", "--dtdvalid", dtd, policy], check=True)
    bus = REPOSITORY / "dbus" / "system.d" / "org.blksnap.Blksnap1.conf"
    subprocess.run(["xmllint", "--noout", "--nonet", bus], check=True)


async def test_a_person_reads_which_device(
    daemon: Daemon, root: Client, nobody: Unprivileged, agent: Agent, directory: Path
) -> None:
    """By its path; what would look like words of ours in it does not."""
    await agent.register(nobody.process.pid, NOBODY)
    devices = [await root.attach(make_image(directory / name)) for name in ("a.img", "b\nroot said yes.img")]
    error, _ = await nobody.call(MANAGER_PATH, MANAGER, "CreateSnapshot", "ao", devices)
    assert not error
    shown = f"{directory}/a.img, {directory}/b\ufffdroot said yes.img"
    assert agent.messages == [f"Authentication is required to take a snapshot of {shown}"]
    assert await nobody.call(MANAGER_PATH, MANAGER, "Collect") == ("", [list(await _snapshots(root))])
    assert agent.messages[1] == "Authentication is required to look for snapshots others have made"


async def _snapshots(root: Client) -> list[str]:
    return [path for path, one in (await root.objects()).items() if SNAPSHOT in one]


async def test_rules_see_the_details(
    daemon: Daemon, root: Client, nobody: Unprivileged, polkit: Polkit, directory: Path
) -> None:
    """So that an administrator can let a user have one device and not the other."""
    first, second = [await root.attach(make_image(directory / f"{name}.img")) for name in ("a", "b")]
    polkit.rule(f"{directory}/a.img")
    assert (await nobody.call(first, TRACKER, "GetInfo"))[0] == ""
    assert (await nobody.call(second, TRACKER, "GetInfo"))[0] == "NotAuthorizedCanObtain"


@pytest.mark.parametrize("how", ["flag", "option"])
async def test_nobody_is_asked_whose_caller_does_not_want_it(
    daemon: Daemon, root: Client, nobody: Unprivileged, agent: Agent, image: Path, how: str
) -> None:
    """By the flag of the message that is not set, or the option that is."""
    await agent.register(nobody.process.pid, NOBODY)
    device = await root.attach(image)
    nobody.begin(
        device,
        DEVICE,
        "Detach",
        interactive=how == "option",
        quiet=how == "option",
    )
    error, text = await nobody.end()
    assert error == "NotAuthorizedCanObtain"
    assert f"uid {NOBODY} may not do this ({image})" in text
    assert agent.messages == []


async def test_a_question_ends_when_the_caller_leaves(
    daemon: Daemon, root: Client, nobody: Unprivileged, agent: Agent, image: Path
) -> None:
    """The dialog goes away, and nothing is done."""
    await agent.register(nobody.process.pid, NOBODY)
    device = await root.attach(image)
    agent.gate.clear()
    nobody.begin(device, DEVICE, "Detach")
    await begun(agent)
    nobody.leave()
    async with asyncio.timeout(START_S):
        await agent.cancelled.wait()
    assert (await root.objects())[device][DEVICE]["Tracked"]


async def test_what_was_allowed_must_still_be_there(
    daemon: Daemon, root: Client, nobody: Unprivileged, agent: Agent, image: Path
) -> None:
    """A yes for one tracker is none for the one that is in its place by then."""
    await agent.register(nobody.process.pid, NOBODY)
    device = await root.attach(image)
    agent.gate.clear()
    nobody.begin(device, TRACKER, "MarkAllDirty")
    await begun(agent)
    await root.call(device, DEVICE, "Detach", "")
    await root.call(device, DEVICE, "Attach", "")
    agent.gate.set()
    error, text = await nobody.end()
    assert error == "NotFound"
    assert "another one has its name now" in text


async def test_a_snapshot_is_of_the_device_that_was_asked_about(
    daemon: Daemon, root: Client, nobody: Unprivileged, agent: Agent, image: Path, directory: Path
) -> None:
    """An image file of the same name that was put in its place meanwhile is another device."""
    await agent.register(nobody.process.pid, NOBODY)
    device = await root.add(image)
    agent.gate.clear()
    nobody.begin(device, DEVICE, "Attach")
    await begun(agent)
    make_image(directory / "other.img").replace(image)
    assert await root.add(image) == device
    agent.gate.set()
    error, text = await nobody.end()
    assert error == "NotFound"
    assert "another device than it was" in text
    assert not (await root.objects())[device][DEVICE]["Tracked"]


async def test_people_are_asked_a_few_times_at_once(
    daemon: Daemon, root: Client, nobody: Unprivileged, agent: Agent, image: Path
) -> None:
    """Per user: more dialogs than that only hide each other. Others are served."""
    await agent.register(nobody.process.pid, NOBODY)
    device = await root.attach(image)
    agent.gate.clear()
    for _ in range(asking.MAX_QUESTIONS_PER_UID + 1):
        nobody.begin(device, TRACKER, "GetInfo")
    error, text = await nobody.end()
    assert error == "LimitExceeded"
    assert f"uid {NOBODY} is being asked 8 times already" in text
    await root.call(device, TRACKER, "GetInfo", "")
    agent.gate.set()
    assert [(await nobody.end())[0] for _ in range(asking.MAX_QUESTIONS_PER_UID)] == [""] * 8


async def test_without_polkit_only_root_may_act(
    daemon: Daemon, root: Client, nobody: Unprivileged, image: Path
) -> None:
    """Nobody is on the bus whom one could ask."""
    device = await root.attach(image)
    error, text = await nobody.call(device, DEVICE, "Detach")
    assert error == "NotAuthorized"
    assert (
        text == f"uid {NOBODY} may not do this ({image}): tracker-detach needs root where there is no polkit"
    )
    await root.call(device, DEVICE, "Detach", "")


async def test_a_polkit_that_hangs_is_not_waited_for(polkit: Polkit, bus: Bus, nobody: Unprivileged) -> None:
    """The caller is told, and root does not notice."""
    connection = await wire.connect(bus.address)
    authority = asking.PolkitAuthority(connection, answer_s=0.5)
    polkit.hang()
    try:
        with pytest.raises(errors.TimedOut, match="polkit did not answer within"):
            await authority.check(
                Subject(nobody.name, NOBODY), Action.TRACKER_DETACH, {"devices": "/dev/sda"}
            )
        await authority.check(Subject(connection.unique_name, 0), Action.TRACKER_DETACH, {})
    finally:
        polkit.go_on()
        connection.close()


async def test_a_person_who_does_not_answer_is_not_waited_for_for_ever(
    polkit: Polkit, bus: Bus, nobody: Unprivileged, agent: Agent
) -> None:
    """The dialog goes away."""
    await agent.register(nobody.process.pid, NOBODY)
    agent.gate.clear()
    connection = await wire.connect(bus.address)
    authority = asking.PolkitAuthority(connection, person_s=1)
    subject = Subject(nobody.name, NOBODY)
    subject.interactive = True
    with pytest.raises(errors.TimedOut, match="nobody answered polkit within"):
        await authority.check(subject, Action.TRACKER_DETACH, {"devices": "/dev/sda"})
    async with asyncio.timeout(START_S):
        await agent.cancelled.wait()
    connection.close()


async def test_polkit_that_ends_while_it_is_asked_is_a_no(
    daemon: Daemon, polkit: Polkit, root: Client, nobody: Unprivileged, agent: Agent, image: Path
) -> None:
    """And the service goes on."""
    await agent.register(nobody.process.pid, NOBODY)
    device = await root.attach(image)
    agent.gate.clear()
    nobody.begin(device, DEVICE, "Detach")
    await begun(agent)
    polkit.stop()
    assert (await nobody.end())[0] == "NotAvailable"
    assert (await root.objects())[device][DEVICE]["Tracked"]


# Whose snapshot it is.


async def hold(nobody: Unprivileged, polkit: Polkit, device: str, **options: tuple[str, object]) -> str:
    """Have nobody make a snapshot."""
    polkit.rule("yes")
    error, result = await nobody.call(MANAGER_PATH, MANAGER, "CreateSnapshot", "ao", [device], **options)
    polkit.rule("")
    assert not error, result
    return str(result[0])


async def test_a_held_snapshot_ends_with_its_caller(
    daemon: Daemon, root: Client, nobody: Unprivileged, polkit: Polkit, image: Path
) -> None:
    """Also where ending it would need authentication: it is the service that does it."""
    device = await root.attach(image)
    snapshot = await hold(nobody, polkit, device, hold=("b", True))
    assert await root.get(snapshot, SNAPSHOT, "Held")
    nobody.leave()
    async with asyncio.timeout(START_S):
        while snapshot in await root.objects():  # noqa: ASYNC110 - asks another process
            await asyncio.sleep(0.02)


async def test_snapshots_of_others_are_another_action(
    daemon: Daemon, root: Client, bus: Bus, nobody: Unprivileged, polkit: Polkit, image: Path
) -> None:
    """To end one; and to change what one covers is not to be had at all."""
    device = await root.attach(image)
    snapshot = await hold(nobody, polkit, device, take=("b", False))
    other = Unprivileged(bus, DAEMON_UID)
    try:
        error, text = await other.call(snapshot, SNAPSHOT, "Destroy")
        assert error == "NotAuthorizedCanObtain"
        assert Action.SNAPSHOT_DESTROY_OTHER_USER.id in text
        polkit.rule("yes")
        error, text = await other.call(snapshot, SNAPSHOT, "Take")
        assert error == "NotAuthorized"
        assert f"the snapshot belongs to uid {NOBODY}" in text
        assert (await other.call(snapshot, SNAPSHOT, "Destroy"))[0] == ""
    finally:
        other.leave()


async def test_a_forced_detach_that_ends_snapshots_of_others_says_so(
    daemon: Daemon, root: Client, nobody: Unprivileged, agent: Agent, image: Path
) -> None:
    """Two questions are asked: one about the tracker, one about the snapshot."""
    await agent.register(nobody.process.pid, NOBODY)
    device = await root.attach(image)
    await root.snapshot(device)
    assert (await nobody.call(device, DEVICE, "Detach", force=("b", True)))[0] == ""
    assert agent.messages == [
        f"Authentication is required to stop tracking changes of {image}",
        f"Authentication is required to end a snapshot of {image} that another user has taken",
    ]


async def test_tracking_with_a_snapshot_is_asked_for_too(
    daemon: Daemon, root: Client, nobody: Unprivileged, agent: Agent, image: Path
) -> None:
    """The option attach does what Attach does."""
    await agent.register(nobody.process.pid, NOBODY)
    device = await root.add(image)
    error, _ = await nobody.call(MANAGER_PATH, MANAGER, "CreateSnapshot", "ao", [device], attach=("b", True))
    assert not error
    assert agent.messages[1] == f"Authentication is required to have changes of {image} tracked"


# Where difference storage may be.


async def test_storage_by_path_is_in_the_directory_for_it(
    daemon: Daemon, root: Client, nobody: Unprivileged, polkit: Polkit, image: Path, directory: Path
) -> None:
    """The service could write anywhere: whose path it is could not. Links do not help, and root may."""
    device = await root.attach(image)
    polkit.rule("yes")
    link = directory / "link"
    link.symlink_to(directory)
    words = (MANAGER_PATH, MANAGER, "CreateSnapshot", "ao", [device])
    inside = daemon.state / "storage"
    for path in (directory / "x", inside / ".." / "x", link / "x", Path("/etc/shadow"), directory):
        error, text = await nobody.call(*words, storage=("s", str(path)))
        assert error == "OptionNotPermitted", path
        assert f"in {inside} only" in text
    assert not (directory / "x").exists()
    assert (await nobody.call(*words, storage=("s", str(inside / "mine"))))[0] == ""
    await root.snapshot(device, storage=("s", str(directory / "x")))


async def test_storage_by_descriptor_is_what_the_caller_could_open(
    daemon: Daemon, root: Client, nobody: Unprivileged, polkit: Polkit, image: Path, directory: Path
) -> None:
    """Anywhere."""
    device = await root.attach(image)
    polkit.rule("yes")
    mine = directory / "mine"
    mine.touch()
    os.chown(mine, NOBODY, NOBODY)
    words = (MANAGER_PATH, MANAGER, "CreateSnapshot", "ao", [device])
    error, result = await nobody.call(*words, storage_fd=("h", str(mine)))
    assert not error, result
    assert await root.get(result[0], SNAPSHOT, "StoragePath") == str(mine)


async def test_an_image_file_is_added_by_who_can_open_it(
    daemon: Daemon, root: Client, nobody: Unprivileged, agent: Agent, polkit: Polkit, image: Path
) -> None:
    """By name only root may; the person who is asked reads the file's own name, whatever the caller calls it."""
    await agent.register(nobody.process.pid, NOBODY)
    error, text = await nobody.call(MANAGER_PATH, MANAGER, "AddImageFile", "s", str(image))
    assert error == "OptionNotPermitted"
    assert "give the option path-fd" in text
    error, _ = await nobody.call(
        MANAGER_PATH, MANAGER, "AddImageFile", "s", "/dev/sda", path_fd=("h", str(image))
    )
    assert error == "InvalidArgument"
    assert agent.messages == [f"Authentication is required to have changes of the file {image} tracked"]


async def test_a_link_in_the_place_of_an_image_file_leads_nowhere(
    daemon: Daemon, root: Client, nobody: Unprivileged, polkit: Polkit, image: Path, directory: Path
) -> None:
    """Who added a file by right cannot have the service open another one by its name."""
    polkit.rule("yes")
    secret = make_image(directory / "secret")
    error, result = await nobody.call(
        MANAGER_PATH, MANAGER, "AddImageFile", "s", "", path_fd=("h", str(image))
    )
    assert not error, result
    image.unlink()
    image.symlink_to(secret)
    error, text = await nobody.call(result[0], DEVICE, "Attach")
    assert error == "NotFound"
    assert f"{image} is not there any more" in text
    # The service looks at sizes of image files by itself, at least when it starts.
    assert await daemon.end() == 0
    await daemon.start()
    assert all(one.get(DEVICE, {}).get("Path") != str(secret) for one in (await root.objects()).values())
