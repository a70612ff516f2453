# SPDX-License-Identifier: GPL-2.0-or-later
"""Values: plain Python on our side, what the D-Bus library wants on the other.

What it is: D-Bus types parsed from signatures, `Value` (a variant), descriptors by index, and what goes out.
What it is not: the byte format (`_library` writes it, `_reading` reads it).

| type | in Python |
|---|---|
| y n q i u x t | int |
| b, d, s o g | bool, float, str |
| h | OwnedFd coming in, int (consumed) or OwnedFd going out |
| ay | bytes |
| a | list; going out, a leading a(tt) is also an array (n, 2) of uint64 |
| (...) | tuple |
| a{..} | dict |
| v | Value; going out also a tuple (signature, value) |

Everything that goes out is checked here: a bus throws a service off that sends an invalid string or object path.
"""

from __future__ import annotations

import fcntl
import os
import re
from dataclasses import dataclass
from functools import lru_cache
from operator import index
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from blksnap_service.bus import _library
from blksnap_service.fds import OwnedFd

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

MAX_FDS: Final = 16  # dbus-daemon's limit per message on a system bus (max_message_unix_fds)
_MAX_DEPTH: Final = 64
_INTEGER_RANGES: Final = {
    "y": (0, 2**8 - 1),
    "n": (-(2**15), 2**15 - 1),
    "q": (0, 2**16 - 1),
    "i": (-(2**31), 2**31 - 1),
    "u": (0, 2**32 - 1),
    "x": (-(2**63), 2**63 - 1),
    "t": (0, 2**64 - 1),
}
_BASIC: Final = frozenset("ynqiuxtbdsogh")
_MAX_SIGNATURE: Final = 255
_FORBIDDEN: Final = re.compile("[\0\ud800-\udfff]")
OBJECT_PATH: Final = re.compile(r"/|(/[A-Za-z0-9_]+)+")


@dataclass(frozen=True, slots=True)
class Type:
    """One complete D-Bus type: its code and, for a container, the types inside."""

    code: str
    children: tuple[Type, ...] = ()


RANGE: Final = Type("(", (Type("t"), Type("t")))
RANGES: Final = Type("a", (RANGE,))


@dataclass(frozen=True, slots=True)
class Value:
    """A variant: a plain value with its signature (one complete type)."""

    signature: str
    value: Any


class FdTable:
    """The file descriptors of one received message, by index: owns them until they are taken."""

    def __init__(self, fds: list[int]) -> None:
        """Take the descriptors out of `fds`."""
        self._unused: dict[int, int] = dict(enumerate(fds))
        self._numbers = dict(self._unused)
        self._taken: list[OwnedFd] = []
        fds.clear()

    def take(self, number: int) -> OwnedFd:
        """Return the descriptor an h value stands for; a second h with the same number gets a duplicate.

        Raised when the message has no such descriptor: ValueError.
        """
        if number in self._unused:
            owned = OwnedFd(self._unused.pop(number))
        elif number in self._numbers:
            owned = OwnedFd(fcntl.fcntl(self._numbers[number], fcntl.F_DUPFD_CLOEXEC, 0))
        else:
            raise ValueError(f"file descriptor {number} of a message with {len(self._numbers)}")
        self._taken.append(owned)
        return owned

    def close(self) -> None:
        """Close all that were not taken, and of those taken all that were not released."""
        while self._unused:
            os.close(self._unused.popitem()[1])
        while self._taken:
            self._taken.pop().close()


@lru_cache(maxsize=512)
def parse_signature(signature: str) -> tuple[Type, ...]:
    """Return the complete types of `signature`.

    Raised when it is not a valid D-Bus signature: ValueError.
    """
    if len(signature) > _MAX_SIGNATURE:
        raise ValueError(f"a signature of {len(signature)} characters is not a D-Bus signature")
    types = []
    position = 0
    while position < len(signature):
        one, position = _parse(signature, position, 0)
        types.append(one)
    return tuple(types)


def _parse(signature: str, position: int, depth: int) -> tuple[Type, int]:
    code = signature[position : position + 1]
    if depth > _MAX_DEPTH or not code or code not in "ynqiuxtbdsoghav(":
        raise ValueError(f"{signature!r} is not a D-Bus signature")
    position += 1
    if code == "a":
        if signature[position : position + 1] == "{":
            key, position = _parse(signature, position + 1, depth + 1)
            value, position = _parse(signature, position, depth + 1)
            if signature[position : position + 1] != "}" or key.code not in _BASIC:
                raise ValueError(f"{signature!r} is not a D-Bus signature")
            return Type("a", (Type("{", (key, value)),)), position + 1
        child, position = _parse(signature, position, depth + 1)
        return Type("a", (child,)), position
    if code == "(":
        children = []
        while signature[position : position + 1] != ")":
            child, position = _parse(signature, position, depth + 1)
            children.append(child)
        if not children:
            raise ValueError(f"{signature!r} is not a D-Bus signature")
        return Type("(", tuple(children)), position + 1
    return Type(code), position


def to_library(kind: Type, value: Any, fds: list[int]) -> Any:  # noqa: C901, PLR0912 - one branch per type
    """Return a plain value as the library encodes it; file descriptors are appended to `fds`, which owns them.

    Raised when the value is not of the type, a defect of ours: TypeError or ValueError.
    """
    code = kind.code
    if code in _INTEGER_RANGES:
        return _integer(code, value)
    if code == "s":
        return clean_text(value)
    if code == "b":
        return _expect(value, bool)
    if code == "d":
        return float(value)
    if code == "o":
        if not OBJECT_PATH.fullmatch(_expect(value, str)):
            raise ValueError(f"{value!r} is not an object path")
        return str(value)
    if code == "g":
        parse_signature(_expect(value, str))
        return value
    if code == "v":
        return _to_variant(value, fds)
    if code == "h":
        fds.append(value.release() if isinstance(value, OwnedFd) else _integer("i", value))
        return len(fds) - 1
    if code == "(":
        return [to_library(child, item, fds) for child, item in zip(kind.children, value, strict=True)]
    (child,) = kind.children
    if child.code == "{":
        key, item = child.children
        return {to_library(key, k, fds): to_library(item, v, fds) for k, v in value.items()}
    if child.code == "y":
        return bytes(value) if not isinstance(value, int) else _expect(value, bytes)
    if isinstance(value, str | bytes):
        raise TypeError(f"{type(value).__name__} instead of a sequence")
    if child == RANGE:  # checked where they are packed
        return [[first, second] for first, second in value]
    return [to_library(child, item, fds) for item in value]


def encode(signature: str, values: Sequence[Any], fds: list[int]) -> bytes:
    """Return the message body for plain `values`; file descriptors in them are appended to `fds`, which owns them.

    Raised when they are not of the signature, a defect of ours: TypeError or ValueError.
    """
    types = parse_signature(signature)
    # First, so that they are owned whatever happens to the other values.
    done: dict[int, Any] = {
        place: to_library(kind, values[place], fds) for place, kind in enumerate(types) if kind.code == "h"
    }
    if len(types) != len(values):
        raise ValueError(f"{len(values)} values for the signature {signature!r}")
    if types and types[0] == RANGES and isinstance(values[0], np.ndarray):
        done[0] = _array(values[0])
    ready = [
        done[place] if place in done else to_library(kind, values[place], fds)
        for place, kind in enumerate(types)
    ]
    return _library.encode_body(signature, ready)


def clean_text(text: Any) -> str:
    """Return `text` with U+FFFD for what D-Bus forbids in a string: NUL and bytes that are not UTF-8.

    Paths and labels of devices hold such things; a bus throws out a service that sends them.
    """
    text = _expect(text, str)
    if text.isascii() and "\0" not in text:
        return str(text)
    return _FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", text)


def _expect(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{type(value).__name__} instead of {kind.__name__}")
    return value


def _array(ranges: NDArray[Any]) -> NDArray[Any]:
    if ranges.dtype.kind != "u" or ranges.itemsize != 8 or ranges.ndim != 2 or ranges.shape[1] != 2:
        raise TypeError(f"an array {ranges.shape} of {ranges.dtype} instead of ranges: give (n, 2) of uint64")
    return ranges


def _integer(code: str, value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError(f"bool instead of an integer ({code})")
    number = index(value)
    low, high = _INTEGER_RANGES[code]
    if not low <= number <= high:
        raise ValueError(f"{number} does not fit type {code}")
    return number


def _to_variant(value: Any, fds: list[int]) -> Any:
    if isinstance(value, tuple):
        value = Value(*value)
    if not isinstance(value, Value):
        raise TypeError(f"{type(value).__name__} instead of a variant: give (signature, value)")
    (kind,) = parse_signature(value.signature)
    return _library.Variant(value.signature, to_library(kind, value.value, fds))
