# SPDX-License-Identifier: GPL-2.0-or-later
"""
Everything that can go wrong between a client and the service, as exceptions whose text may be shown as it is.

Not here: mistakes in arguments of a command line (argparse words those).
"""

from __future__ import annotations

ERROR_PREFIX = "org.blksnap.Blksnap1.Error."


class BlksnapError(Exception):
    """Base of every error a client raises on purpose."""


class BusUnavailableError(BlksnapError):
    """Raised when the message bus cannot be reached, or when the connection to it ends during a call."""


class ServiceUnavailableError(BlksnapError):
    """Raised when nobody owns the service's name on the bus, or its owner leaves during a call."""


class ProtocolError(BlksnapError):
    """Raised when an answer is not what the interface promises (another version, most likely)."""


class CallTimeoutError(BlksnapError):
    """Raised when a call got no answer in its time; the service may still carry it out."""


class ServiceError(BlksnapError):
    """
    Raised when the service refuses or fails a call, in its own words.

    `name` is the whole D-Bus error name, `kind` its last part (`NotTracked`, `Busy`, …; the list is in the
    interface description), `text` what the service said.
    """

    def __init__(self, name: str, text: str) -> None:
        super().__init__(text or name)
        self.name = name
        self.text = text or name

    @property
    def kind(self) -> str:
        """Give the last part of the error's name: `NotTracked` of `org.blksnap.Blksnap1.Error.NotTracked`."""
        return self.name.rpartition(".")[2]


class NotAuthorizedError(ServiceError):
    """Raised when the service or polkit says no, or the question was dismissed (see `kind`)."""


class GenerationChangedError(ServiceError):
    """Raised when a number belongs to a map that has restarted: an increment since it is void."""


_CLASSES: dict[str, type[ServiceError]] = {
    "NotAuthorized": NotAuthorizedError,
    "NotAuthorizedCanObtain": NotAuthorizedError,
    "NotAuthorizedDismissed": NotAuthorizedError,
    "GenerationChanged": GenerationChangedError,
}

# The bus daemon's own answers when there is no service to answer, see "Message Bus Messages" in the D-Bus
# specification.
_NO_SERVICE = (
    "org.freedesktop.DBus.Error.ServiceUnknown",
    "org.freedesktop.DBus.Error.NameHasNoOwner",
    "org.freedesktop.DBus.Error.NoReply",
    "org.freedesktop.DBus.Error.Disconnected",
)


def from_dbus(name: str, text: str) -> BlksnapError:
    """Turn an error reply into the exception that stands for it."""
    if name in _NO_SERVICE or name.startswith("org.freedesktop.DBus.Error.Spawn."):
        return ServiceUnavailableError(
            f"the service is not on the bus: is blksnapd running? ({text or name})"
        )
    kind = name.removeprefix(ERROR_PREFIX) if name.startswith(ERROR_PREFIX) else ""
    return _CLASSES.get(kind, ServiceError)(name, text)
