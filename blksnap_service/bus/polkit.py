# SPDX-License-Identifier: GPL-2.0-or-later
"""Asks polkit who may do what, over the connection the service has.

Asked at first without a person: a polkit that hangs is known by that. Only when polkit says that authenticating would
help, and the caller agrees, it is asked to let a person decide; that ends when the caller leaves. uid 0 may do everything,
as polkit itself has it, so that the service can be used where there is no polkit. It knows nothing of methods.
"""

from __future__ import annotations

import asyncio
import itertools
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from blksnap_service import errors
from blksnap_service.authority import Action, Subject, about
from blksnap_service.bus._values import Value

NAME: Final = "org.freedesktop.PolicyKit1"
PATH: Final = "/org/freedesktop/PolicyKit1/Authority"
INTERFACE: Final = "org.freedesktop.PolicyKit1.Authority"

ANSWER_S: Final = 25.0
"""How long polkit may take to answer where no person is asked; it may have to be started."""
PERSON_S: Final = 300.0
"""How long a person may take."""
MAX_QUESTIONS_PER_UID: Final = 8
"""How many people, or dialogs before one, the callers of one uid may keep waiting."""
MAX_DETAIL: Final = 1024

_MAY_ASK_A_PERSON: Final = 1
_DISMISSED: Final = "polkit.dismissed"
_ABSENT: Final = re.compile(
    r"org\.freedesktop\.(DBus\.Error\.(ServiceUnknown|NameHasNoOwner|Spawn\..*)|systemd1\..*)"
)
_UNPRINTABLE: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


class Bus(Protocol):
    """The connection."""

    async def call(
        self,
        destination: str,
        path: str,
        interface: str,
        member: str,
        signature: str = "",
        arguments: Sequence[Any] = (),
        *,
        timeout: float | None = ...,  # noqa: ASYNC109 - as the connection has it
    ) -> list[Any]:
        """Call a method and return what it returns."""

    def watch_name(self, unique: str, callback: Callable[[str], None]) -> Callable[[], None]:
        """Call ``callback`` once when nobody has the name (any more). Returns how to stop that."""


@dataclass(frozen=True, slots=True)
class _Verdict:
    authorized: bool
    challenge: bool
    dismissed: bool


class PolkitAuthority:
    """Whom polkit lets. ``answer_s`` and ``person_s`` bound how long it and a person may take."""

    def __init__(self, bus: Bus, *, answer_s: float = ANSWER_S, person_s: float = PERSON_S) -> None:
        """Ask over ``bus``, which need not have polkit on it."""
        self._bus = bus
        self._answer_s = answer_s
        self._person_s = person_s
        self._numbers = itertools.count(1)
        self._questions: Counter[int] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()

    async def check(self, subject: Subject, action: Action, details: Mapping[str, str]) -> None:
        """Return if the caller may do it now.

        Raises ``errors.NotAuthorized``, ``errors.NotAuthorizedCanObtain`` (a person could allow it),
        ``errors.NotAuthorizedDismissed`` (one would not), ``errors.TimedOut``, ``errors.LimitExceeded``,
        ``errors.Cancelled`` (the caller left) and ``errors.NotAvailable`` (polkit has a defect, or does not know the action).
        """
        uid = await subject.uid()
        if uid == 0:
            return
        shown = {name: _shown(value) for name, value in details.items()}
        verdict = await self._ask(subject, uid, action, shown, 0, self._answer_s)
        if not verdict.authorized and verdict.challenge and subject.interactive:
            verdict = await self._ask_a_person(subject, uid, action, shown)
        if verdict.authorized:
            return
        what = f"{about(uid, shown)}: {action.id}"
        if verdict.dismissed:
            raise errors.NotAuthorizedDismissed(f"{what} was asked for, and authentication declined")
        if not verdict.challenge:
            raise errors.NotAuthorized(f"{what} is not granted by polkit")
        if subject.interactive:
            raise errors.NotAuthorizedCanObtain(
                f"{what} needs authentication, and no agent asks for it in this session: start one, e.g. pkttyagent, or be root"
            )
        raise errors.NotAuthorizedCanObtain(f"{what} needs authentication, which the caller did not agree to")

    async def _ask_a_person(
        self, subject: Subject, uid: int, action: Action, details: Mapping[str, str]
    ) -> _Verdict:
        """Ask, until the caller leaves."""
        if self._questions[uid] >= MAX_QUESTIONS_PER_UID:
            raise errors.LimitExceeded(
                f"uid {uid} is being asked {MAX_QUESTIONS_PER_UID} times already: answer those first"
            )
        self._questions[uid] += 1
        asking = asyncio.ensure_future(
            self._ask(subject, uid, action, details, _MAY_ASK_A_PERSON, self._person_s)
        )
        left: list[str] = []

        def leave(name: str) -> None:
            left.append(name)
            asking.cancel()

        unwatch = self._bus.watch_name(subject.sender, leave)
        try:
            return await asking
        except asyncio.CancelledError:
            asking.cancel()
            if left:
                raise errors.Cancelled("the caller left the bus before it was allowed") from None
            raise
        finally:
            unwatch()
            self._questions -= Counter({uid: 1})

    async def _ask(
        self,
        subject: Subject,
        uid: int,
        action: Action,
        details: Mapping[str, str],
        flags: int,
        within_s: float,
    ) -> _Verdict:
        who = ("system-bus-name", {"name": Value("s", subject.sender)})
        # One name of ours for one question: what is taken back is this one and no other.
        number = f"blksnap-{next(self._numbers)}"
        try:
            ((authorized, challenge, more),) = await self._bus.call(
                NAME,
                PATH,
                INTERFACE,
                "CheckAuthorization",
                "(sa{sv})sa{ss}us",
                [who, action.id, details, flags, number],
                timeout=within_s,
            )
        except errors.RemoteError as error:
            raise _trouble(error, uid, action, details) from error
        except errors.TimedOut as error:
            self._take_back(number)
            late = "nobody answered polkit" if flags else "polkit did not answer"
            raise errors.TimedOut(
                f"{about(uid, details)}: {late} within {within_s:.0f} s; try again"
            ) from error
        except asyncio.CancelledError:
            self._take_back(number)
            raise
        except ValueError as error:
            raise errors.NotAvailable(f"polkit gave no answer this service understands: {error}") from error
        return _Verdict(bool(authorized), bool(challenge), more.get(_DISMISSED, "") != "")

    def _take_back(self, number: str) -> None:
        """Tell polkit that nobody waits for its answer; what it says to that does not matter."""

        async def tell() -> None:
            try:
                await self._bus.call(NAME, PATH, INTERFACE, "CancelCheckAuthorization", "s", [number])
            except errors.BlksnapError:
                return

        task = asyncio.get_running_loop().create_task(tell())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _trouble(
    error: errors.RemoteError, uid: int, action: Action, details: Mapping[str, str]
) -> errors.BlksnapError:
    """Return what a caller is told when polkit gives no verdict."""
    if _ABSENT.fullmatch(error.remote_name):
        return errors.NotAuthorized(
            f"{about(uid, details)}: {action.value} needs root where there is no polkit"
        )
    if "not registered" in str(error):
        return errors.NotAvailable(
            f"{about(uid, details)}: polkit does not know {action.id}; the policy file of this service is not installed"
        )
    return errors.NotAvailable(f"{about(uid, details)}: polkit cannot tell: {error}")


def _shown(text: str) -> str:
    """Return a detail as a person may be shown it: callers choose file names, and those must not look like a message."""
    plain = _UNPRINTABLE.sub("\ufffd", text)
    return plain if len(plain) <= MAX_DETAIL else plain[: MAX_DETAIL - 1] + "…"
