# SPDX-License-Identifier: GPL-2.0-or-later
"""The D-Bus library, reduced to what is used of it: message bodies to bytes and back.

What it is: the choice between dbus-next and dbus-fast and the three private names of theirs that are touched
(`Marshaller`, `Unmarshaller`, `SignatureTree._cache`). What it is not: a connection. Sockets, framing, headers, file
descriptors and dispatch are ours, because those of both libraries can be stopped or made to leak by any local user.

dbus-next cannot be imported from Python 3.15 on (typing.no_type_check_decorator is gone); dbus-fast is used there.
BLKSNAP_DBUS_LIBRARY=next|fast chooses one, for tests.
"""

from __future__ import annotations

import io
import os
import struct
import warnings
from itertools import chain
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

_CACHED_SIGNATURES: Final = 512
_RANGES: Final = "a(tt)"
_RANGE_BYTES: Final = 16


class _BoundedCache(dict[str, Any]):
    """A cache that starts again when full. dbus-next keeps every signature it ever saw, 1.7 kB each."""

    def __setitem__(self, key: str, value: Any) -> None:
        if len(self) >= _CACHED_SIGNATURES:
            self.clear()
        super().__setitem__(key, value)


def _load_next() -> tuple[Any, Any, Any]:
    with warnings.catch_warnings():
        # Python 3.13 and 3.14 warn about what 3.15 removed; nothing a user could do about it.
        warnings.simplefilter("ignore", DeprecationWarning)
        from dbus_next import signature
        from dbus_next._private import marshaller, unmarshaller
    cache = _BoundedCache(signature.SignatureTree._cache)  # noqa: SLF001 - see the module's docstring
    signature.SignatureTree._cache = cache  # noqa: SLF001
    return signature.Variant, marshaller.Marshaller, unmarshaller.Unmarshaller


def _load_fast() -> tuple[Any, Any, Any]:
    from dbus_fast import signature
    from dbus_fast._private import marshaller, unmarshaller

    return signature.Variant, marshaller.Marshaller, unmarshaller.Unmarshaller


def _load() -> tuple[str, tuple[Any, Any, Any]]:
    wanted = os.environ.get("BLKSNAP_DBUS_LIBRARY", "")
    if wanted not in {"", "next", "fast"}:
        raise ImportError(f"BLKSNAP_DBUS_LIBRARY is {wanted!r}; it can be next or fast")
    if wanted != "fast":
        try:
            return "next", _load_next()
        except ImportError:
            if wanted:
                raise
    return "fast", _load_fast()


LIBRARY_NAME, (Variant, _Marshaller, _Unmarshaller) = _load()


def encode_body(signature: str, values: Sequence[Any]) -> bytes:
    """Marshal `values` (as `_values.to_library` made them) to a little-endian message body.

    A leading a(tt) is packed here: 65 536 ranges take dbus-next over a second, and the loop stands still meanwhile.
    Raised when a value does not fit its type, a defect of ours: TypeError or ValueError.
    """
    if not signature:
        return b""
    try:
        if not signature.startswith(_RANGES):
            return bytes(_Marshaller(signature, list(values)).marshall())
        packed = struct.pack(f"<{2 * len(values[0])}Q", *chain.from_iterable(values[0]))
    except struct.error as error:
        raise ValueError(f"a value does not fit {signature}: {error}") from error
    # The rest begins on a multiple of 8, as a body of its own would.
    return struct.pack("<II", len(packed), 0) + packed + encode_body(signature[len(_RANGES) :], values[1:])


def decode_body(order: str, signature: str, body: bytes) -> list[Any]:
    """Unmarshal a message body of byte order `order` (``<`` or ``>``) to the library's values.

    Raised when the body does not hold what the signature says: ValueError.
    """
    if signature.startswith(_RANGES):
        return _decode_ranges(order, signature, body)
    if not signature:
        return []
    try:
        return _decode(order, signature, body)
    except ValueError:
        raise
    # The libraries raise their own classes, EOFError, IndexError, KeyError, RecursionError, struct.error ...
    except Exception as error:
        raise ValueError(f"a message body does not hold {signature}: {type(error).__name__}") from error


def _decode_ranges(order: str, signature: str, body: bytes) -> list[Any]:
    try:
        (length,) = struct.unpack_from(f"{order}I", body)
    except struct.error as error:
        raise ValueError("a message body ends inside an array") from error
    end = 8 + length
    if length % _RANGE_BYTES or end > len(body):
        raise ValueError("an array of ranges has a wrong length")
    ranges = list(struct.iter_unpack(f"{order}QQ", memoryview(body)[8:end]))
    return [ranges, *decode_body(order, signature[len(_RANGES) :], body[end:])]


def _decode(order: str, signature: str, body: bytes) -> list[Any]:
    """Let the library read the body as that of a message with nothing else in it."""
    name = signature.encode("ascii")
    # Header fields: REPLY_SERIAL (5) u 1, SIGNATURE (8) g. A method return (2) needs no others.
    fields = b"\x05\x01u\0" + struct.pack(f"{order}I", 1) + b"\x08\x01g\0" + bytes([len(name)]) + name + b"\0"
    head = struct.pack(
        f"{order}BBBBIII", ord("l" if order == "<" else "B"), 2, 1, 1, len(body), 1, len(fields)
    )
    message = _Unmarshaller(io.BytesIO(head + fields + bytes(-len(fields) % 8) + body)).unmarshall()
    if message is None or len(message.body) != len(message.signature_tree.types):
        raise ValueError(f"a message body is shorter than {signature}")
    values: list[Any] = message.body
    return values
