# SPDX-License-Identifier: GPL-2.0-or-later
"""Checks the options a{sv} every method ends with.

What it is: names and types, so that a misspelt option is an error and not a silent default. What it is not: checks of
ranges or permissions, which the method makes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from blksnap_service.bus._values import Value
from blksnap_service.errors import InvalidArgument, OptionNotPermitted

NO_INTERACTION: Final = "auth.no_user_interaction"
_EVERYWHERE: Final = {NO_INTERACTION: "b"}
_TYPE_NAMES: Final = {
    "b": "boolean",
    "u": "unsigned 32-bit number",
    "t": "unsigned 64-bit number",
    "s": "string",
    "o": "object path",
    "h": "file descriptor",
}


def take(options: Mapping[str, Value], spec: Mapping[str, str]) -> dict[str, Any]:
    """Return the plain values of the options that are given; `spec` maps those the method knows to their types.

    auth.no_user_interaction b is always allowed and not returned: `Call.interactive` has it.
    Raised when an option is unknown: OptionNotPermitted; when one has a wrong type: InvalidArgument.
    """
    known = {**_EVERYWHERE, **spec}
    values = {}
    for name, given in options.items():
        expected = known.get(name)
        if expected is None:
            choice = ", ".join(sorted(known))
            raise OptionNotPermitted(f"there is no option {name!r} here; there are: {choice}")
        if given.signature != expected:
            raise InvalidArgument(
                f"option {name!r} must have type {_describe(expected)}, not {_describe(given.signature)}"
            )
        if name not in _EVERYWHERE:
            values[name] = given.value
    return values


def _describe(signature: str) -> str:
    name = _TYPE_NAMES.get(signature)
    return f"{signature} ({name})" if name else signature
