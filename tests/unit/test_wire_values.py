# SPDX-License-Identifier: GPL-2.0-or-later
"""Values of the bus layer: any type there and back, through both libraries, and what must never be sent."""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from numpy.typing import NDArray

from blksnap_service.bus import _library, _values
from blksnap_service.bus._reading import decode
from blksnap_service.bus._values import FdTable, Value, encode, parse_signature
from blksnap_service.fds import OwnedFd
from tests.unit.effort import instructions_at_most

LOADERS: dict[str, Callable[[], tuple[Any, Any]]] = {"fast": _library._load_fast}
if sys.version_info < (3, 15):
    LOADERS["next"] = _library._load_next

BASIC = "ynqiuxtbdsog"
RANGES = _values._INTEGER_RANGES
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
PATHS = st.lists(st.text("azAZ09_", min_size=1, max_size=4), max_size=3).map(
    lambda parts: "/" + "/".join(parts)
)


def signatures() -> st.SearchStrategy[str]:
    """Complete types without file descriptors."""

    def containers(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        return st.one_of(
            inner.map(lambda one: f"a{one}"),
            st.lists(inner, min_size=1, max_size=3).map(lambda many: f"({''.join(many)})"),
            st.tuples(st.sampled_from(BASIC), inner).map(lambda pair: f"a{{{pair[0]}{pair[1]}}}"),
        )

    return st.recursive(st.sampled_from([*BASIC, "v"]), containers, max_leaves=6)


def values(kind: _values.Type) -> st.SearchStrategy[Any]:
    """Plain values of a type."""
    code = kind.code
    if code in RANGES:
        return st.integers(*RANGES[code])
    simple: dict[str, st.SearchStrategy[Any]] = {
        "s": TEXT,
        "b": st.booleans(),
        "d": st.floats(allow_nan=False),
        "o": PATHS,
        "g": st.sampled_from(["", "s", "a{sv}", "(ii)"]),
        "v": st.sampled_from([*BASIC, "as", "a{sv}"]).flatmap(
            lambda one: values(parse_signature(one)[0]).map(lambda value: Value(one, value))
        ),
    }
    if code in simple:
        return simple[code]
    if code == "(":
        return st.tuples(*(values(child) for child in kind.children))
    (child,) = kind.children
    if child.code == "{":
        return st.dictionaries(values(child.children[0]), values(child.children[1]), max_size=3)
    if child.code == "y":
        return st.binary(max_size=20)
    return st.lists(values(child), max_size=4)


BODIES = st.lists(signatures(), max_size=4).flatmap(
    lambda many: st.tuples(
        st.just("".join(many)), st.tuples(*(values(parse_signature(one)[0]) for one in many)).map(list)
    )
)


@pytest.fixture(params=sorted(LOADERS))
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The library that encodes and decodes."""
    for name, part in zip(("Variant", "_Marshaller"), LOADERS[request.param](), strict=True):
        monkeypatch.setattr(_library, name, part)
    return str(request.param)


def round_trip(signature: str, plain: list[Any]) -> list[Any]:
    """Encode and decode."""
    return decode("<", signature, encode(signature, plain, []), FdTable([]))


@given(body=BODIES)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_values_come_back(library: str, body: tuple[str, list[Any]]) -> None:
    """Every type, nested, in a body of several."""
    signature, plain = body
    assert round_trip(signature, plain) == plain


@pytest.mark.skipif(len(LOADERS) == 1, reason="there is one library from Python 3.15 on")
@given(body=BODIES)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_both_libraries_write_the_same_bytes(
    monkeypatch: pytest.MonkeyPatch, body: tuple[str, list[Any]]
) -> None:
    """Each is the other's oracle."""
    written = []
    for load in LOADERS.values():
        for name, part in zip(("Variant", "_Marshaller"), load(), strict=True):
            monkeypatch.setattr(_library, name, part)
        written.append(encode(*body, []))
    assert written[0] == written[1]


@given(
    ranges=st.lists(st.tuples(st.integers(*RANGES["t"]), st.integers(*RANGES["t"])), max_size=20),
    rest=st.sampled_from(
        [("", []), ("t", [7]), ("a{sv}", [{"a": Value("u", 1)}]), ("a(tt)y", [[(1, 2)], 3])]
    ),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_ranges_are_packed_as_the_library_would(
    library: str, ranges: list[tuple[int, int]], rest: tuple[str, list[Any]]
) -> None:
    """The quick ways for a leading a(tt), a list or an array, are the same bytes, and it is read in both byte orders."""
    signature, plain = f"a(tt){rest[0]}", [ranges, *rest[1]]
    ours = encode(signature, plain, [])
    fds: list[int] = []
    library_values = [
        _values.to_library(kind, value, fds)
        for kind, value in zip(parse_signature(signature), plain, strict=True)
    ]
    assert ours == bytes(_library._Marshaller(signature, library_values).marshall())
    assert decode("<", signature, ours, FdTable([])) == plain
    array = np.array(ranges, np.uint64).reshape(-1, 2)
    assert encode(signature, [array, *rest[1]], []) == ours
    assert encode(signature, [array.astype(">u8")[::-1][::-1], *rest[1]], []) == ours
    swapped = struct.pack(">II", 16 * len(ranges), 0) + b"".join(struct.pack(">QQ", *pair) for pair in ranges)
    assert decode(">", "a(tt)", swapped, FdTable([])) == [ranges]


def test_the_largest_ranges_take_a_moment(library: str) -> None:
    """65 536 of them are packed and unpacked without a function called for each: the loop stands still meanwhile."""
    ranges = [(number, number) for number in range(65536)]
    with instructions_at_most(16 * len(ranges)):
        result = round_trip("a(tt)", [ranges])
    assert result == [ranges]


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((2, 2), np.int64),
        np.zeros((2, 2), np.uint32),
        np.zeros((2, 2)),
        np.zeros((2, 3), np.uint64),
        np.zeros(4, np.uint64),
    ],
)
def test_an_array_of_something_else_is_not_sent(array: NDArray[Any]) -> None:
    """Its memory goes out as it lies: negative or half as wide numbers would become others."""
    with pytest.raises(TypeError, match=r"instead of ranges: give \(n, 2\) of uint64"):
        encode("a(tt)", [array], [])


@given(signature=st.text("ybnqiuxtdsoghav(){}", max_size=12))
@settings(max_examples=500)
def test_signatures_are_judged_as_the_library_judges(signature: str) -> None:
    """What we take for valid the library does, too; what it refuses we refuse."""
    from dbus_fast import SignatureTree
    from dbus_fast.errors import InvalidSignatureError

    try:
        SignatureTree(signature)
    except (InvalidSignatureError, IndexError):
        with pytest.raises(ValueError, match="is not a D-Bus signature"):
            parse_signature(signature)
        return
    try:
        parsed = parse_signature(signature)
    except ValueError:
        # dbus-fast lets pass a dict entry outside an array, an empty structure and a container as a key.
        assert "{" in signature or "()" in signature
    else:
        assert len(parsed) == len(SignatureTree(signature).types)


@pytest.mark.parametrize(
    "signature, body, fault",
    [
        ("v", b"\0\0", "has the signature ''"),
        ("v", b"\2ss\0", "has the signature 'ss'"),
        ("v", b"\1s\0\0\xff\xff\xff\x7fab\0", "ends inside a value of 2147483647 bytes"),
        ("v", b"\1v\0" * 70, "nested too deep"),
        ("s", b"\3\0\0\0abc", "ends inside"),
        ("s", b"\3\0\0\0abcd", "no.* behind it"),
        ("s", b"\3\0\0\0a\0c\0", "NUL inside"),
        ("s", b"\1\0\0\0\xff\0", "utf-8"),
        ("o", b"\2\0\0\0a/\0", "not an object path"),
        ("g", b"\1{\0", "not a D-Bus signature"),
        ("b", b"\2\0\0\0", "a boolean of a message is 2"),
        ("yu", b"\1\0\1\0\0\0\0\0", "padding"),
        ("at", b"\x08\0\0\0\0\0\0\0\0", "inside an array of 8 bytes"),
        ("at", b"\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0", "inside a value of 8 bytes"),
        ("ay", b"\1\0\0\x04", "inside an array"),
        ("a(tt)", b"\x08\0\0\0" + bytes(20), "inside a value of 8 bytes"),
        ("y", b"\1\2", "longer than 'y'"),
    ],
)
def test_a_malformed_body_is_refused(signature: str, body: bytes, fault: str) -> None:
    """Lengths behind the end, and what the specification forbids; the first ended the process with dbus-fast."""
    with pytest.raises(ValueError, match=fault):
        decode("<", signature, body, FdTable([]))


@given(body=st.binary(max_size=64), signature=signatures())
@settings(max_examples=1000, deadline=None)
def test_a_body_of_chance_bytes_is_read_or_refused(body: bytes, signature: str) -> None:
    """ValueError is all that comes of it."""
    with suppress(ValueError):
        decode("<", signature, body, FdTable([]))


@pytest.mark.parametrize(
    "signature, value",
    [
        ("y", 256), ("y", -1), ("n", 2**15), ("u", 2**32), ("u", True), ("t", -1), ("t", 1.0), ("x", 2**63),
        ("b", 1), ("s", b"x"), ("s", 7), ("o", "/a/"), ("o", "a"), ("o", ""), ("o", "/a b"), ("o", "/ä"), ("g", "{"), ("g", "y" * 256), ("a(tt)", [(1, 2, 3), (4,)]), ("a(tt)", [(1, 2**64)]),
        ("a(tt)", [(1, "x")]), ("as", "text"), ("ao", ["/", "x"]), ("ay", "text"), ("ay", 7), ("(ss)", ("a",)), ("v", "x"), ("v", ("s", 7)),
        ("v", ("ss", "x")), ("a{sv}", {"a": 1}), ("a{su}", {1: 1}), ("h", "x"), ("d", "x"),
    ],
)  # fmt: skip
def test_a_value_that_is_not_of_the_type_is_not_sent(library: str, signature: str, value: Any) -> None:
    """A bus throws off who sends an invalid one, so it is a defect found here."""
    with pytest.raises((TypeError, ValueError)):
        encode(signature, [value], [])
    with pytest.raises((TypeError, ValueError)):
        encode(f"y{signature}", [1, value], [])


@pytest.mark.parametrize("plain", [[], ["a", "b"]])
def test_the_number_of_values_must_be_that_of_the_types(plain: list[str]) -> None:
    """Too few and too many."""
    with pytest.raises(ValueError, match="values for the signature 's'"):
        encode("s", plain, [])


@pytest.mark.parametrize(
    "text, sent",
    [
        ("a\0b", "a\ufffdb"),
        ("\udcff", "\ufffd"),
        ("ä\udce4\0", "ä\ufffd\ufffd"),
        ("ok", "ok"),
        ("\U0001f4be", "\U0001f4be"),
    ],
)
def test_text_d_bus_forbids_is_replaced(library: str, text: str, sent: str) -> None:
    """NUL, and what os.fsdecode makes of bytes that are not UTF-8; also inside containers and as a key."""
    assert round_trip("s", [text]) == [sent]
    assert round_trip("a{sv}", [{text: Value("as", [text])}]) == [{sent: Value("as", [sent])}]


def test_a_surrogate_that_stands_for_no_byte_is_replaced(library: str) -> None:
    """U+D800 is not the escape of any byte."""
    assert round_trip("s", ["a\ud800b"]) == ["a\ufffdb"]


def test_descriptors_are_numbered_in_order_and_owned(library: str) -> None:
    """Plain numbers and OwnedFd, at the top and in a variant; the numbers in the body are indices."""
    pipes = [os.pipe() for _ in range(2)]
    owned = OwnedFd(pipes[1][0])
    fds: list[int] = []
    body = encode("hsa{sv}h", [pipes[0][0], "x", {"fd": ("h", owned)}, pipes[0][1]], fds)
    assert fds == [pipes[0][0], pipes[0][1], pipes[1][0]]
    with pytest.raises(ValueError, match="is closed"):
        owned.fileno()
    table = FdTable(fds)
    first, _, options, last = decode("<", "hsa{sv}h", body, table)
    assert [first.fileno(), options["fd"].value.fileno(), last.fileno()] == [
        pipes[0][0],
        pipes[1][0],
        pipes[0][1],
    ]
    table.close()
    for fd in (*pipes[0], pipes[1][0]):
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
    os.close(pipes[1][1])


def test_descriptors_of_an_answer_that_cannot_be_sent_are_still_owned(library: str) -> None:
    """One before and one after the value that is wrong."""
    read, write = os.pipe()
    fds: list[int] = []
    with pytest.raises(TypeError):
        encode("hsh", [read, 7, write], fds)
    assert fds == [read, write]
    os.close(read)
    os.close(write)


def test_a_descriptor_named_twice_is_two(library: str) -> None:
    """Each closed for itself, neither inherited by programs that are started."""
    read, write = os.pipe()
    table = FdTable([read])
    one, other = decode("<", "hh", struct.pack("<II", 0, 0), table)
    assert one.fileno() != other.fileno()
    assert not os.get_inheritable(other.fileno())
    with one:
        pass
    assert os.fstat(other.release())
    table.close()
    os.close(other_fd := write)
    assert other_fd == write


def test_descriptors_are_closed_when_a_body_is_refused(library: str) -> None:
    """Those already taken as well."""
    read, write = os.pipe()
    table = FdTable([read, write])
    with pytest.raises(ValueError, match="file descriptor 5 of a message with 2"):
        decode("<", "hh", struct.pack("<II", 0, 5), table)
    for fd in (read, write):
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


def test_a_forgotten_descriptor_is_closed_with_a_warning() -> None:
    """As Python does with files."""
    read, write = os.pipe()
    os.close(write)
    forgotten = OwnedFd(read)
    with pytest.warns(ResourceWarning, match=f"file descriptor {read} was not closed"):
        del forgotten
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(read)


@pytest.mark.skipif("next" not in LOADERS, reason="dbus-next cannot be imported")
def test_the_signature_cache_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """dbus-next keeps every signature it ever saw."""
    import dbus_next.signature

    _library._load_next()
    cache = dbus_next.signature.SignatureTree._cache
    for number in range(2000):
        dbus_next.signature.SignatureTree._get(f"{number:b}".replace("0", "y").replace("1", "u"))
    assert len(cache) <= _library._CACHED_SIGNATURES
