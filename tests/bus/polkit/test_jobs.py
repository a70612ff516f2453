# SPDX-License-Identifier: GPL-2.0-or-later
"""Who may cancel a job: its owner as polkit says, others as polkit says about others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from blksnap_service.authority import Action
from blksnap_service.bus.paths import JOB, MANAGER, MANAGER_PATH
from tests.bus.daemons import START_S, Bus, Client, Daemon, standing_still
from tests.bus.polkitd import NOBODY, Agent, Polkit, Unprivileged

DAEMON_UID = 1


@asynccontextmanager
async def a_job(
    daemon: Daemon, root: Client, starter: Unprivileged, polkit: Polkit, device: str
) -> AsyncIterator[str]:
    """Have a snapshot of nobody's not get on for as long as the block lasts; it is cancelled in it."""
    with standing_still(daemon):
        polkit.rule("yes")
        starter.begin(MANAGER_PATH, MANAGER, "CreateSnapshot", "ao", [device])
        async with asyncio.timeout(START_S):
            while not (found := [path for path, one in (await root.objects()).items() if JOB in one]):  # noqa: ASYNC110 - asks another process
                await asyncio.sleep(0.02)
        polkit.rule("")
        yield found[0]
    assert (await starter.end())[0] == "Cancelled"


async def test_cancelling_is_asked_for(
    daemon: Daemon, polkit: Polkit, root: Client, bus: Bus, nobody: Unprivileged, agent: Agent, image: Path
) -> None:
    """Without a rule, with one, with an agent that says no or yes, and by root, as for every method."""
    device = await root.attach(image)
    starter = Unprivileged(bus)
    try:
        async with a_job(daemon, root, starter, polkit, device) as job:
            for interactive in (True, False):
                answer = await nobody.call(job, JOB, "Cancel", interactive=interactive)
                assert answer[0] == "NotAuthorizedCanObtain"
            polkit.rule("no")
            assert (await nobody.call(job, JOB, "Cancel"))[0] == "NotAuthorized"
            polkit.rule("")
            await agent.register(nobody.process.pid, NOBODY)
            agent.answer = "no"
            assert (await nobody.call(job, JOB, "Cancel"))[0] == "NotAuthorizedDismissed"
            assert agent.messages == [f"Authentication is required to cancel what is being done to {image}"]
            agent.answer = "yes"
            assert (await nobody.call(job, JOB, "Cancel"))[0] == ""
        async with a_job(daemon, root, starter, polkit, device) as job:
            polkit.rule("yes")
            assert (await nobody.call(job, JOB, "Cancel"))[0] == ""
        async with a_job(daemon, root, starter, polkit, device) as job:
            await root.call(job, JOB, "Cancel", "")
    finally:
        starter.leave()


async def test_cancelling_what_another_has_begun_is_another_action(
    daemon: Daemon, polkit: Polkit, root: Client, bus: Bus, nobody: Unprivileged, image: Path
) -> None:
    """Of every other user's."""
    device = await root.attach(image)
    other = Unprivileged(bus, DAEMON_UID)
    try:
        async with a_job(daemon, root, nobody, polkit, device) as job:
            error, text = await other.call(job, JOB, "Cancel")
            assert error == "NotAuthorizedCanObtain"
            assert Action.CANCEL_JOB_OTHER_USER.id in text
            polkit.rule("yes")
            assert (await other.call(job, JOB, "Cancel"))[0] == ""
    finally:
        other.leave()
