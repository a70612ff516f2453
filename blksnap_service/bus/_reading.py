# SPDX-License-Identifier: GPL-2.0-or-later
"""Values out of the bytes of a message: header fields and bodies.

What it is: the marshalling rules of the D-Bus specification ("Marshaling (Wire Format)"), reading side; the Python
types are those of `_values`. What it is not: writing (`_library`), or the frame around it (`_frame`).

The bytes come from any local user. dbus-broker hands bodies on as they are, and the libraries' own readers either end
the process (dbus-fast 5, a variant with an empty signature) or accept lengths behind the end. Here every length is
compared with what is there before it is believed.
"""

from __future__ import annotations

import re
import struct
from typing import TYPE_CHECKING, Any, Final

from blksnap_service.bus._values import OBJECT_PATH, RANGE, FdTable, Type, Value, parse_signature

if TYPE_CHECKING:
    from collections.abc import Callable

_FORMATS: Final = {
    "y": "B", "n": "h", "q": "H", "b": "I", "i": "i", "u": "I", "h": "I", "x": "q", "t": "Q", "d": "d",
}  # fmt: skip
_SIZES: Final = {code: struct.calcsize(f"<{form}") for code, form in _FORMATS.items()}
_ALIGNMENTS: Final = _SIZES | {"s": 4, "o": 4, "a": 4, "g": 1, "v": 1, "(": 8, "{": 8}
_MAX_ARRAY_BYTES: Final = 64 * 2**20
_MAX_DEPTH: Final = 64
_NOT_ZERO: Final = re.compile(rb"[^\0]")


class Reader:
    """Reads values one after another from `data`, a message or a part of it that begins on a multiple of 8.

    `take_fd` makes a value of the index that stands for a file descriptor.
    """

    def __init__(
        self, order: str, data: bytes, position: int = 0, *, take_fd: Callable[[int], Any] = int
    ) -> None:
        """Begin at `position` of `data`, in byte order `order` (``<`` or ``>``)."""
        self.position = position
        self._order = order
        self._data = data
        self._end = len(data)
        self._take_fd = take_fd

    def align(self, size: int) -> None:
        """Go on to the next multiple of `size`. Raised when bytes between are missing or not 0: ValueError."""
        to = self.position + -self.position % size
        if to > self._end or _NOT_ZERO.search(self._data, self.position, to):
            raise ValueError("padding of a message is not zero, or is missing")
        self.position = to

    def byte(self) -> int:
        """Read a y."""
        (number,) = self._unpack("B", 1)
        return int(number)

    def variant(self, depth: int = 0) -> Value:
        """Read a v. Raised when it is malformed: ValueError."""
        signature = self._text("g")
        kinds = parse_signature(signature)
        if len(kinds) != 1:
            raise ValueError(f"a variant of a message has the signature {signature!r}")
        return Value(signature, self.read(kinds[0], depth + 1))

    def read(self, kind: Type, depth: int = 0) -> Any:
        """Read a value of type `kind`. Raised when the bytes are not one: ValueError."""
        if depth > _MAX_DEPTH:
            raise ValueError("containers of a message are nested too deep")
        code = kind.code
        self.align(_ALIGNMENTS[code])
        if code in _SIZES:
            (number,) = self._unpack(_FORMATS[code], _SIZES[code])
            return self._number(code, number)
        if code in "sog":
            return self._text(code)
        if code == "v":
            return self.variant(depth)
        if code == "a":
            return self._array(kind.children[0], depth + 1)
        return tuple(self.read(child, depth + 1) for child in kind.children)

    def _unpack(self, form: str, size: int) -> tuple[Any, ...]:
        return struct.unpack(f"{self._order}{form}", self._bytes(size))

    def _bytes(self, size: int) -> bytes:
        start, end = self.position, self.position + size
        if end > self._end:
            raise ValueError(f"a message ends inside a value of {size} bytes")
        self.position = end
        return self._data[start:end]

    def _number(self, code: str, number: Any) -> Any:
        if code == "h":
            return self._take_fd(number)
        if code != "b":
            return number
        if number > 1:
            raise ValueError(f"a boolean of a message is {number}")
        return bool(number)

    def _text(self, code: str) -> str:
        (size,) = self._unpack("B", 1) if code == "g" else self._unpack("I", 4)
        raw = self._bytes(size)
        if self._bytes(1) != b"\0" or b"\0" in raw:
            raise ValueError("a string of a message has a NUL inside, or none behind it")
        text = raw.decode("utf-8")
        if code == "o" and not OBJECT_PATH.fullmatch(text):
            raise ValueError(f"{text!r} is not an object path")
        if code == "g":
            parse_signature(text)
        return text

    def _array(self, child: Type, depth: int) -> Any:
        (size,) = self._unpack("I", 4)
        self.align(_ALIGNMENTS[child.code])
        end = self.position + size
        if size > _MAX_ARRAY_BYTES or end > self._end:
            raise ValueError(f"a message ends inside an array of {size} bytes")
        if child.code == "y":
            return self._bytes(size)
        if child == RANGE and not size % 16:  # 65 536 of them, one by one, take too long
            return list(struct.iter_unpack(f"{self._order}QQ", self._bytes(size)))
        outer, self._end = self._end, end
        items = []
        while self.position < end:
            items.append(self.read(child, depth))
        self._end = outer
        return dict(items) if child.code == "{" else items


def decode(order: str, signature: str, body: bytes, fds: FdTable) -> list[Any]:
    """Return the plain values in a message body.

    If this raises, all of `fds` are closed.
    Raised when the body does not hold what the signature says: ValueError.
    """
    try:
        reader = Reader(order, body, take_fd=fds.take)
        values = [reader.read(kind) for kind in parse_signature(signature)]
        if reader.position != len(body):
            raise ValueError(f"a message body is longer than {signature!r}")
    except BaseException:
        fds.close()
        raise
    return values
