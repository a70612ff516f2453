# SPDX-License-Identifier: GPL-2.0-or-later
"""The D-Bus library, reduced to what is used of it: values to message bodies.

What it is: the choice between dbus-next and dbus-fast and the two private names of theirs that are touched
(`Marshaller`, `SignatureTree._cache`). What it is not: a connection. Sockets, framing, headers, file descriptors and
dispatch are ours, because those of both libraries can be stopped or made to leak by any local user. Nor does either
read what others send (`_reading`): the unmarshaller of dbus-fast 5 is C without bounds checks.

dbus-next cannot be imported from Python 3.15 on (typing.no_type_check_decorator is gone); dbus-fast is used there.
BLKSNAP_DBUS_LIBRARY=next|fast chooses one, for tests.
"""

from __future__ import annotations

import os
import struct
import warnings
from itertools import chain
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

_CACHED_SIGNATURES: Final = 512
_RANGES: Final = "a(tt)"


class _BoundedCache(dict[str, Any]):
    """A cache that starts again when full. dbus-next keeps every signature it ever saw, 1.7 kB each."""

    def __setitem__(self, key: str, value: Any) -> None:
        if len(self) >= _CACHED_SIGNATURES:
            self.clear()
        super().__setitem__(key, value)


def _load_next() -> tuple[Any, Any]:
    with warnings.catch_warnings():
        # Python 3.13 and 3.14 warn about what 3.15 removed; nothing a user could do about it.
        warnings.simplefilter("ignore", DeprecationWarning)
        from dbus_next import signature
        from dbus_next._private import marshaller
    cache = _BoundedCache(signature.SignatureTree._cache)  # noqa: SLF001 - see the module's docstring
    signature.SignatureTree._cache = cache  # noqa: SLF001
    return signature.Variant, marshaller.Marshaller


def _load_fast() -> tuple[Any, Any]:
    from dbus_fast import signature
    from dbus_fast._private import marshaller

    return signature.Variant, marshaller.Marshaller


def _load() -> tuple[str, tuple[Any, Any]]:
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


LIBRARY_NAME, (Variant, _Marshaller) = _load()


def encode_body(signature: str, values: Sequence[Any]) -> bytes:
    """Marshal `values` (as `_values.to_library` made them) to a little-endian message body.

    A leading a(tt) is packed here: 65 536 ranges take dbus-next over a second, and the loop stands still meanwhile.
    One that is an array (n, 2) of uint64 is copied as it lies in memory.
    Raised when a value does not fit its type, a defect of ours: TypeError or ValueError.
    """
    if not signature:
        return b""
    try:
        if not signature.startswith(_RANGES):
            return bytes(_Marshaller(signature, list(values)).marshall())
        packed = _pack_ranges(values[0])
    except struct.error as error:
        raise ValueError(f"a value does not fit {signature}: {error}") from error
    # The rest begins on a multiple of 8, as a body of its own would.
    return struct.pack("<II", len(packed), 0) + packed + encode_body(signature[len(_RANGES) :], values[1:])


def _pack_ranges(ranges: Any) -> bytes:
    if isinstance(ranges, np.ndarray):
        return ranges.astype("<u8", copy=False).tobytes()
    return struct.pack(f"<{2 * len(ranges)}Q", *chain.from_iterable(ranges))
