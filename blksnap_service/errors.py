# SPDX-License-Identifier: GPL-2.0-or-later
"""Every error this service reports, one class per D-Bus error name.

What it is: the whole vocabulary of DESIGN section 6, "Errors". Any part of the service raises these; the bus
layer answers a call with `dbus_name` and the text. What it is not: a place for OSError and the like, which are
translated where they are understood and otherwise pass through to the edge, where they become `Failed`
without their text.

The text goes to the user as it is: lower case, plain, what happened, to which device, why, what to do next.
"""

from __future__ import annotations

from typing import ClassVar, Final

ERROR_PREFIX: Final = "org.blksnap.Blksnap1.Error."


class BlksnapError(Exception):
    """Base of all errors that may be shown to a caller.

    Never raised itself. `str(error)` is the text for the user.
    """

    dbus_name: ClassVar[str] = ERROR_PREFIX + "Failed"


class Failed(BlksnapError):
    """Raised when an operation failed for a reason no other error names; also for every defect of ours."""

    dbus_name: ClassVar[str] = ERROR_PREFIX + "Failed"


class NotAuthorized(BlksnapError):
    """Raised when the caller may not do this, and no authentication would change that."""

    dbus_name: ClassVar[str] = ERROR_PREFIX + "NotAuthorized"


class NotAuthorizedCanObtain(BlksnapError):
    """Raised when the caller may not do this now, but could after authenticating interactively."""

    dbus_name: ClassVar[str] = ERROR_PREFIX + "NotAuthorizedCanObtain"


class NotAuthorizedDismissed(BlksnapError):
    """Raised when the caller was asked to authenticate and declined."""

    dbus_name: ClassVar[str] = ERROR_PREFIX + "NotAuthorizedDismissed"


class NotAvailable(BlksnapError):
    """Raised when a part the request needs is not there: a kernel interface, a tool, the bus."""

    dbus_name: ClassVar[str] = ERROR_PREFIX + "NotAvailable"


class NotSupported(BlksnapError):
    """Raised when the device, backend or kernel cannot do what was asked, now or later."""

    dbus_name: ClassVar[str] = ERROR_PREFIX + "NotSupported"


class InvalidArgument(BlksnapError):
    """Raised when an argument or option has a wrong type or a value outside its range."""

    dbus_name: ClassVar[str] = ERROR_PREFIX + "InvalidArgument"


class OptionNotPermitted(BlksnapError):
    """Raised when an option is unknown to the method, or known but not allowed to this caller."""

    dbus_name: ClassVar[str] = ERROR_PREFIX + "OptionNotPermitted"


class NotFound(BlksnapError):
    """Raised when the named device, file, snapshot, generation or caller does not exist (any more)."""

    dbus_name: ClassVar[str] = ERROR_PREFIX + "NotFound"


class AlreadyTracked(BlksnapError):
    """Raised when a tracker is to be attached to a device that has one."""

    dbus_name: ClassVar[str] = ERROR_PREFIX + "AlreadyTracked"


class NotTracked(BlksnapError):
    """Raised when a request needs a tracker and the device has none."""

    dbus_name: ClassVar[str] = ERROR_PREFIX + "NotTracked"


class Busy(BlksnapError):
    """Raised when something else holds what the request needs: a device, a file, a name, a snapshot."""

    dbus_name: ClassVar[str] = ERROR_PREFIX + "Busy"


class InvalidState(BlksnapError):
    """Raised when the object exists but is in a state in which the request makes no sense."""

    dbus_name: ClassVar[str] = ERROR_PREFIX + "InvalidState"


class NoSpace(BlksnapError):
    """Raised when difference storage or another file system is full, or a limit on bytes is reached."""

    dbus_name: ClassVar[str] = ERROR_PREFIX + "NoSpace"


class Corrupted(BlksnapError):
    """Raised when stored or mapped data does not pass its checks, or an image has lost chunks."""

    dbus_name: ClassVar[str] = ERROR_PREFIX + "Corrupted"


class GenerationChanged(BlksnapError):
    """Raised when numbers or maps are used with another generation, or are older than it remembers."""

    dbus_name: ClassVar[str] = ERROR_PREFIX + "GenerationChanged"


class Cancelled(BlksnapError):
    """Raised when the operation was cancelled, or the service stops before it is done."""

    dbus_name: ClassVar[str] = ERROR_PREFIX + "Cancelled"


class TimedOut(BlksnapError):
    """Raised when something did not answer or finish in the time it was given."""

    dbus_name: ClassVar[str] = ERROR_PREFIX + "TimedOut"


class LimitExceeded(BlksnapError):
    """Raised when a caller has too many calls, holds, jobs or pending checks, or a message is too large."""

    dbus_name: ClassVar[str] = ERROR_PREFIX + "LimitExceeded"


class RemoteError(BlksnapError):
    """Raised when another service on the bus answers a call of ours with an error.

    `remote_name` is the D-Bus error name it gave, e.g. ``org.freedesktop.PolicyKit1.Error.Failed``. A
    caller of ours who gets to see it sees `Failed` with the text.
    """

    __slots__ = ("remote_name",)

    def __init__(self, remote_name: str, text: str) -> None:
        super().__init__(text)
        self.remote_name = remote_name
