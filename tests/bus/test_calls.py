# SPDX-License-Identifier: GPL-2.0-or-later
"""How calls are answered: the rules of the D-Bus specification, and errors by name."""

from __future__ import annotations

import contextlib
import os
import struct
from typing import Any

import pytest

from blksnap_service import errors
from tests.bus import publisher
from tests.bus.conftest import NAME, Service
from tests.bus.hostile import (
    DBUS,
    INTERACTIVE,
    INTROSPECTABLE,
    NO_OPTIONS,
    NO_REPLY,
    OBJECT_MANAGER,
    PEER,
    PROPERTIES,
    Caller,
    options,
    padded,
    strings,
    text,
)

OURS = "org.blksnap.Blksnap1.Error"
STANDARD = f"{DBUS}.Error"
NO_INTERACTION: dict[str, Any] = {"auth__no_user_interaction": ("b", struct.pack("<I", 1))}


def names() -> list[str]:
    """Return the names of DESIGN section 6."""
    return [
        "Failed",
        "NotAuthorized",
        "NotAuthorizedCanObtain",
        "NotAuthorizedDismissed",
        "NotAvailable",
        "NotSupported",
        "InvalidArgument",
        "OptionNotPermitted",
        "NotFound",
        "AlreadyTracked",
        "NotTracked",
        "Busy",
        "InvalidState",
        "NoSpace",
        "Corrupted",
        "GenerationChanged",
        "Cancelled",
        "TimedOut",
        "LimitExceeded",
    ]


def test_there_is_one_class_per_error_name_of_the_design() -> None:
    """No more and no fewer, each with the name it has on the bus."""
    classes = [
        kind
        for kind in errors.BlksnapError.__subclasses__()
        if kind.__module__ == errors.__name__ and kind is not errors.RemoteError
    ]
    assert {kind.__name__ for kind in classes} == set(names())
    assert all(kind.dbus_name == f"{OURS}.{kind.__name__}" for kind in classes)


def test_every_error_arrives_with_its_name_and_text(caller: Caller) -> None:
    """What a method raises is what the caller reads."""
    for name in names():
        answer = caller.call("Fail", "sa{sv}", options(text(name)))
        assert (answer.error, answer.body) == (f"{OURS}.{name}", [f"{name} happened to /dev/sda"])


@pytest.mark.parametrize(
    "member, more, error",
    [
        ("Echo", {"path": "/nowhere"}, "UnknownObject"),
        ("Echo", {"path": publisher.ROOT + "/thing/below"}, "UnknownObject"),
        ("GetAll", {"path": "/nowhere", "interface": PROPERTIES}, "UnknownObject"),
        ("Introspect", {"path": "/nowhere", "interface": INTROSPECTABLE}, "UnknownObject"),
        ("Echo", {"interface": "org.example.Nothing1"}, "UnknownInterface"),
        ("Echo", {"path": publisher.ROOT}, "UnknownInterface"),
        ("GetAll", {"path": publisher.ROOT, "interface": PROPERTIES}, "UnknownInterface"),
        ("GetManagedObjects", {"interface": OBJECT_MANAGER}, "UnknownInterface"),
        ("Nothing", {}, "UnknownMethod"),
        ("Nothing", {"interface": ""}, "UnknownMethod"),
        ("Nothing", {"interface": PEER}, "UnknownMethod"),
        ("properties", {}, "UnknownMethod"),
        ("__init__", {}, "UnknownMethod"),
    ],
)
def test_what_is_not_there_is_named(caller: Caller, member: str, more: dict[str, Any], error: str) -> None:
    """Object, interface or method, as the specification has names for them."""
    assert caller.call(member, **more).error == f"{STANDARD}.{error}"


@pytest.mark.parametrize(
    "signature, body",
    [
        ("", b""),
        ("s", text("x")),
        ("ua{sv}", options(bytes(4))),
        ("sa{ss}", options(text("x"))),
        ("v", b"\x01y\0\1"),
    ],
)
def test_a_wrong_signature_is_refused(service: Service, caller: Caller, signature: str, body: bytes) -> None:
    """With both signatures in the text."""
    answer = caller.call("Echo", signature, body)
    assert answer.error == f"{STANDARD}.InvalidArgs"
    assert "'sa{sv}'" in answer.body[0]
    assert f"'{signature}'" in answer.body[0]
    service.assert_alive()


def test_a_call_without_an_interface_finds_the_method(caller: Caller) -> None:
    """The specification allows it, for standard methods too."""
    assert caller.call("Echo", "sa{sv}", options(text("x")), interface="").body == ["x"]
    assert not caller.call("Ping", interface="").error
    assert caller.call("Introspect", interface="").body[0].startswith("<!DOCTYPE")
    assert caller.call("GetManagedObjects", interface="", path=publisher.ROOT).body


def test_a_call_that_wants_no_answer_gets_none(caller: Caller) -> None:
    """Neither a result nor an error of any kind comes back."""
    for member, signature, body in (
        ("Echo", "sa{sv}", options(text("x"))),
        ("Echo", "u", bytes(4)),
        ("Fail", "sa{sv}", options(text("Busy"))),
        ("Crash", "a{sv}", NO_OPTIONS),
        ("OpenFile", "ua{sv}", options(struct.pack("<I", 1))),
        ("Nothing", "", b""),
    ):
        caller.send(caller.message(member, signature, body, flags=NO_REPLY))
    caller.send(caller.message("Ping", interface=PEER))
    # The bus itself sends NameAcquired, a signal, at the beginning; a signal has no reply serial.
    replies = (message.reply_serial for message in iter(caller.receive, None))
    assert next(filter(None, replies)) == caller.serial


def test_a_descriptor_nobody_wants_is_closed(service: Service, caller: Caller) -> None:
    """A method that opens a file runs for a caller that wants no answer."""
    before = service.resources()[0]
    for _ in range(20):
        caller.send(caller.message("OpenFile", "ua{sv}", options(struct.pack("<I", 1)), flags=NO_REPLY))
    assert not caller.ping().error
    assert service.resources()[0] == before


def test_a_descriptor_arrives_and_is_closed_here(service: Service, caller: Caller) -> None:
    """A file the method opened, with a{sv} beside it; the service keeps no copy."""
    before = service.resources()[0]
    for size in range(1, 21):
        answer = caller.call("OpenFile", "ua{sv}", options(struct.pack("<I", size)))
        assert [answer.body[0], answer.body[1]["size"].value] == [0, size]
        assert (answer.body[1]["names"].signature, answer.body[1]["names"].value) == ("as", ["a", "b"])
        (fd,) = answer.fds
        assert os.fstat(fd).st_size == size
        os.close(fd)
    assert service.resources()[0] == before


def test_the_caller_is_known_by_name_and_uid(caller: Caller) -> None:
    """Both from the bus, not from the caller."""
    assert caller.call("WhoAmI", "a{sv}", NO_OPTIONS).body == [caller.name, os.getuid(), False]


def test_interaction_needs_the_flag_and_no_option_against_it(caller: Caller) -> None:
    """ALLOW_INTERACTIVE_AUTHORIZATION, unless auth.no_user_interaction says no."""
    refused = options(**NO_INTERACTION)
    allowed = options(auth__no_user_interaction=("b", bytes(4)))
    for flags, body, expected in (
        (INTERACTIVE, NO_OPTIONS, True),
        (INTERACTIVE, refused, False),
        (INTERACTIVE, allowed, True),
        (0, allowed, False),
    ):
        assert caller.call("WhoAmI", "a{sv}", body, flags=flags).body[2] is expected


def test_options_are_checked_by_name_and_type(caller: Caller) -> None:
    """An unknown option and one of a wrong type are different errors, both naming it."""
    good = options(limit=("t", struct.pack("<Q", 2**40)), **NO_INTERACTION)
    assert caller.call("Options", "a{sv}", good).body == [f"{{'limit': {2**40}}}"]
    unknown = caller.call("Options", "a{sv}", options(limt=("t", bytes(8))))
    assert unknown.error == f"{OURS}.OptionNotPermitted"
    assert "'limt'" in unknown.body[0]
    wrong = caller.call("Options", "a{sv}", options(limit=("u", bytes(4))))
    assert wrong.error == f"{OURS}.InvalidArgument"
    assert wrong.body == [
        "option 'limit' must have type t (unsigned 64-bit number), not u (unsigned 32-bit number)"
    ]
    assert caller.call("Options", "a{sv}", options(auth__no_user_interaction=("s", text("yes")))).error == (
        f"{OURS}.InvalidArgument"
    )


def test_properties_are_read_by_name_and_together(caller: Caller) -> None:
    """Get and GetAll, also without naming the interface."""
    one = caller.call("Get", "ss", strings(publisher.INTERFACE, "Number"), interface=PROPERTIES)
    assert (one.body[0].signature, one.body[0].value) == ("u", 0)
    assert caller.call("Get", "ss", strings("", "Fixed"), interface=PROPERTIES).body[0].value == "stays"
    everything = caller.call("GetAll", "s", text(publisher.INTERFACE), interface=PROPERTIES).body[0]
    assert list(everything) == ["Number", "Label", "Fixed"]
    assert caller.call("GetAll", "s", text(""), interface=PROPERTIES).body[0].keys() == everything.keys()
    assert caller.call("GetAll", "s", text(PEER), interface=PROPERTIES).body == [{}]


@pytest.mark.parametrize(
    "interface, name, error",
    [
        (publisher.INTERFACE, "Number", "PropertyReadOnly"),
        (publisher.INTERFACE, "Nothing", "UnknownProperty"),
        ("org.example.Nothing1", "Number", "UnknownInterface"),
        ("", "Number", "PropertyReadOnly"),
    ],
)
def test_no_property_can_be_set(caller: Caller, interface: str, name: str, error: str) -> None:
    """Whatever the value's type."""
    for value in (b"\x01y\0\7", padded(b"\x01s\0", 4) + text("x")):
        head = strings(interface, name)
        body = head + (value if value[1:2] == b"y" else b"\x01s\0" + bytes(-(len(head) + 3) % 4) + text("x"))
        assert caller.call("Set", "ssv", body, interface=PROPERTIES).error == f"{STANDARD}.{error}"


def test_get_says_what_is_not_there(caller: Caller) -> None:
    """Property and interface."""
    assert caller.call("Get", "ss", strings(publisher.INTERFACE, "Nothing"), interface=PROPERTIES).error == (
        f"{STANDARD}.UnknownProperty"
    )
    assert caller.call("Get", "ss", strings("a.b", "Number"), interface=PROPERTIES).error == (
        f"{STANDARD}.UnknownInterface"
    )


def test_a_big_endian_caller_is_understood(caller: Caller) -> None:
    """The other byte order, in header and body."""
    assert not caller.call("Ping", interface=PEER, order=">").error
    body = padded(text("grüße", ">"), 4) + padded(struct.pack(">I", 0), 8)
    assert len(body) % 8 == 0 or body.endswith(bytes(4))
    answer = caller.call("Echo", "sa{sv}", _big_endian_echo("grüße"), order=">")
    assert answer.body == ["grüße"]


def _big_endian_echo(value: str) -> bytes:
    body = padded(text(value, ">"), 4) + bytes(4)
    return padded(body, 8)


@pytest.mark.parametrize(
    "extra",
    [
        bytes([200, 1]) + b"u\0" + struct.pack("<I", 7),
        bytes([10, 1]) + b"o\0" + text("/a"),
        bytes([77, 1]) + b"v\0" + b"\x01v\0\x01y\0\x05",
        bytes([99, 5]) + b"a{sv}\0" + bytes(4) + bytes(8),
    ],
)
def test_unknown_header_fields_are_ignored(service: Service, extra: bytes) -> None:
    """The specification demands it; some versions of dbus-daemon drop them or the caller."""
    with service.caller() as caller, contextlib.suppress(EOFError, ConnectionError):
        assert not caller.call("Ping", interface=PEER, extra=extra).error
    service.assert_alive()


def test_unknown_flags_are_ignored(caller: Caller) -> None:
    """All that are not defined, together."""
    assert not caller.call("Ping", interface=PEER, flags=0xF8).error


def test_unknown_message_types_are_ignored(service: Service) -> None:
    """Neither an answer nor an end."""
    with service.caller() as caller:
        caller.send(caller.message("Ping", interface=PEER, kind=9))
    service.assert_alive()


def test_ping_is_answered_for_any_path_and_the_machine_has_an_id(caller: Caller) -> None:
    """org.freedesktop.DBus.Peer is about the connection, not about an object."""
    assert not caller.call("Ping", interface=PEER, path="/nowhere").error
    answer = caller.call("GetMachineId", interface=PEER)
    assert answer.error in {"", f"{STANDARD}.FileNotFound"}
    assert answer.error or len(answer.body[0]) == 32


def test_the_name_is_the_service_s(caller: Caller) -> None:
    """The bus knows its owner, and calls to the unique name arrive as well."""
    owner = caller.call(
        "GetNameOwner", "s", text(NAME), destination=DBUS, path="/org/freedesktop/DBus", interface=DBUS
    )
    assert not caller.call("Ping", interface=PEER, destination=NAME).error
    assert owner.body[0].startswith(":")
