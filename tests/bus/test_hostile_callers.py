# SPDX-License-Identifier: GPL-2.0-or-later
"""What any local user could do to a service on the system bus, and that it goes on serving others."""

from __future__ import annotations

import itertools
import os
import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from tests.bus import publisher
from tests.bus.conftest import Service, StartService
from tests.bus.hostile import (
    DBUS,
    INTROSPECTABLE,
    NO_OPTIONS,
    NO_REPLY,
    PEER,
    Caller,
    options,
    padded,
    strings,
    text,
    zeros,
)

LIMITS_EXCEEDED = f"{DBUS}.Error.LimitsExceeded"


@contextmanager
def null_fds(count: int) -> Iterator[list[int]]:
    """Give `count` numbers of one open file."""
    fd = os.open("/dev/null", os.O_RDONLY)
    try:
        yield [fd] * count
    finally:
        os.close(fd)


def test_twenty_thousand_pings_at_once_are_all_answered(service: Service, caller: Caller) -> None:
    """A caller that sends without reading first fills the service's socket; that is no reason to leave the bus."""
    answers = caller.flood(caller.message("Ping", interface=PEER) for _ in range(20_000))
    assert Counter(answer.error_name for answer in answers) == {None: 20_000}
    service.assert_alive()


def test_five_thousand_introspections_at_once_are_all_answered(service: Service, caller: Caller) -> None:
    """Small calls with large answers."""
    answers = caller.flood(caller.message("Introspect", interface=INTROSPECTABLE) for _ in range(5_000))
    assert Counter(answer.error_name for answer in answers) == {None: 5_000}
    assert len({answer.body[0] for answer in answers}) == 1
    service.assert_alive()


def test_descriptors_on_calls_that_take_none_are_closed(service: Service, caller: Caller) -> None:
    """Sixteen descriptors on each of 80 Pings: as many stay open afterwards as before."""
    before = service.resources()[0]
    with null_fds(16) as fds:
        for _ in range(80):
            assert not caller.call("Ping", interface=PEER, descriptors=fds).error
    assert service.resources()[0] == before
    service.assert_alive()


def test_descriptors_on_refused_calls_are_closed(service: Service, caller: Caller) -> None:
    """The same for unknown members, wrong signatures, failing methods, and calls that want no answer."""
    before = service.resources()[0]
    with null_fds(16) as fds:
        for _ in range(20):
            assert caller.call("Nothing", descriptors=fds).error
            assert caller.call("Echo", "u", bytes(4), descriptors=fds).error
            assert caller.call("Crash", "a{sv}", NO_OPTIONS, descriptors=fds).error
            caller.send(caller.message("Echo", "sa{sv}", options(text("x")), flags=NO_REPLY, fds=16), fds)
        assert not caller.ping().error
    assert service.resources()[0] == before


def test_descriptors_in_arguments_are_closed_after_the_method(service: Service, caller: Caller) -> None:
    """Also those the method did not take, named twice, or not named at all."""
    before = service.resources()[0]
    file = os.memfd_create("test")
    os.truncate(file, 4711)
    body = struct.pack("<II", 0, 0)
    third = options(body, third=("h", struct.pack("<I", 1)))
    for _ in range(20):
        answer = caller.call("MeasureFiles", "hha{sv}", third, descriptors=[file, file, file])
        assert answer.body == [[4711, 4711, 4711]]
    os.close(file)
    assert service.resources()[0] == before


def test_an_index_without_a_descriptor_is_refused(service: Service, caller: Caller) -> None:
    """An h value is an index into descriptors that need not be there."""
    before = service.resources()[0]
    with null_fds(2) as fds:
        for numbers, sent in (((0, 7), fds), ((2**32 - 1, 0), fds), ((0, 0), [])):
            body = options(struct.pack("<II", *numbers))
            answer = caller.call("MeasureFiles", "hha{sv}", body, descriptors=sent)
            assert answer.error == f"{DBUS}.Error.InvalidArgs"
    assert service.resources()[0] == before
    service.assert_alive()


def test_a_full_descriptor_table_is_an_error_and_no_end(start_service: StartService) -> None:
    """Descriptors that cannot be received are lost; the call is refused, and later ones work again."""
    service = start_service(fd_limit=64)
    with service.caller() as caller, null_fds(16) as fds:
        assert not caller.call("TakeFds", "ua{sv}", options(struct.pack("<I", 5))).error
        answers = [caller.call("Ping", interface=PEER, descriptors=fds) for _ in range(5)]
        assert {answer.error for answer in answers} == {LIMITS_EXCEEDED}
        assert not caller.call("TakeFds", "ua{sv}", options(struct.pack("<I", 1000))).error
        assert not caller.call("Ping", interface=PEER, descriptors=fds).error
    service.assert_alive()


def test_a_request_larger_than_the_bus_allows_ends_only_its_sender(service: Service) -> None:
    """33 MiB: dbus-daemon throws off who sends it."""
    with service.caller() as caller:
        body = options(struct.pack("<I", 33 * 2**20) + bytes(33 * 2**20))
        with pytest.raises((EOFError, ConnectionError)):
            caller.call("Echo", "aya{sv}", body)
    service.assert_alive()


def test_the_largest_request_the_bus_allows_is_refused_without_being_kept(
    service: Service, caller: Caller
) -> None:
    """31 MiB reach the service; it answers by the header and does not grow."""
    _, before = service.resources()
    body = strings("x" * (31 * 2**20))
    for _ in range(3):
        assert caller.call("Echo", "s", body).error == LIMITS_EXCEEDED
    _, after = service.resources()
    assert after - before < 4096
    service.assert_alive()


def test_an_overlong_object_path_is_skipped(service: Service, caller: Caller) -> None:
    """Header fields of more than 64 KiB are not looked at; the connection stays in step."""
    caller.send(caller.message("Ping", interface=PEER, path="/a" * 100_000))
    assert not caller.ping().error
    service.assert_alive()


def test_distinct_signatures_are_not_remembered_for_ever(service: Service, caller: Caller) -> None:
    """As signatures of calls, and of variants, which the library parses and caches: 15 000 of them."""
    signatures = ["".join(one) for one in itertools.islice(itertools.product("ybnqiuxtd", repeat=8), 15_000)]

    def flood(some: list[str]) -> None:
        variants = [
            caller.message("Options", "a{sv}", options(limit=(f"({one})", zeros(one)))) for one in some
        ]
        calls = [caller.message("Nothing", one, zeros(one)) for one in some[::5]]
        answers = caller.flood(variants + calls)
        assert Counter(answer.error_name for answer in answers) == {
            "org.blksnap.Blksnap1.Error.InvalidArgument": len(variants),
            f"{DBUS}.Error.UnknownMethod": len(calls),
        }

    flood(signatures[:1])  # who calls is asked at the first call, and more than 128 would wait for that
    flood(signatures[:1_000])
    _, before = service.resources()
    flood(signatures[1_000:])
    _, after = service.resources()
    # dbus-fast keeps 4096, which is 6 MB. dbus-next as it is would keep all, which is 25 MB.
    assert after - before < 10 * 1024
    service.assert_alive()


def test_a_caller_that_reads_no_answers_holds_up_nobody(service: Service) -> None:
    """3000 introspections whose 15 MB of answers nobody takes from the bus."""
    with service.caller() as deaf, service.caller() as other:
        for _ in range(30):
            deaf.send(b"".join(deaf.message("Introspect", interface=INTROSPECTABLE) for _ in range(100)))
            assert not other.ping().error
        assert service.resources()[1] < 60 * 1024
    service.assert_alive()


def test_calls_under_way_are_limited_per_caller(service: Service) -> None:
    """Calls that want no answer are not limited by the bus. The others of the caller are refused, those of others not."""
    with service.caller() as greedy, service.caller() as other:
        greedy.send(b"".join(greedy.message("Hang", "a{sv}", NO_OPTIONS, flags=NO_REPLY) for _ in range(500)))
        answer = greedy.call("Echo", "sa{sv}", options(text("x")))
        assert answer.error == "org.blksnap.Blksnap1.Error.LimitExceeded"
        assert not greedy.ping().error
        assert other.call("Echo", "sa{sv}", options(text("x"))).body == ["x"]
        assert other.call("Release", "a{sv}", NO_OPTIONS).body == [128]
        assert greedy.call("Echo", "sa{sv}", options(text("x"))).body == ["x"]
    service.assert_alive()


def test_a_caller_that_leaves_during_its_call_is_nobodys_trouble(service: Service) -> None:
    """The answer goes to a name that is gone."""
    with service.caller() as leaving:
        # Who calls is asked at the first call; who has left by then is not served.
        assert not leaving.call("Echo", "sa{sv}", options(text("x"))).error
        leaving.send(leaving.message("Hang", "a{sv}", NO_OPTIONS))
        assert not leaving.ping().error
    with service.caller() as caller:
        assert caller.call("Release", "a{sv}", NO_OPTIONS).body == [1]
    service.assert_alive()


def test_sixty_five_thousand_ranges_do_not_stop_the_loop(service: Service, caller: Caller) -> None:
    """The largest call there is, 1 MiB of ranges in and out, with Pings of another between."""
    ranges = struct.pack("<131072Q", *(number * 4096 for number in range(131072)))
    body = options(padded(struct.pack("<I", len(ranges)), 8) + ranges)
    answer = caller.call("CountRanges", "a(tt)a{sv}", body)
    assert answer.body[0] == sum(number * 4096 for number in range(1, 131072, 2))
    assert len(answer.body[1]) == 65536
    assert tuple(answer.body[1][-1]) == (131070 * 4096, 131071 * 4096)
    service.assert_alive()


@pytest.mark.parametrize(
    "body",
    [
        struct.pack("<I", 24) + bytes(4) + bytes(24) + NO_OPTIONS,  # an array of one and a half ranges
        struct.pack("<I", 2**26) + bytes(4) + NO_OPTIONS,  # longer than the message
        struct.pack("<I", 16),  # nothing behind the length
        b"",
    ],
)
def test_malformed_ranges_do_no_harm(service: Service, body: bytes) -> None:
    """The bus throws off who sends what does not fit its signature; if one day it does not, the service refuses it."""
    with service.caller() as caller, suppress(EOFError, ConnectionError):
        assert caller.call("CountRanges", "a(tt)a{sv}", body).error
    service.assert_alive()


@pytest.mark.parametrize("depth", [30, 58, 300])
def test_nested_variants_do_no_harm(service: Service, depth: int) -> None:
    """Variants in variants, up to where the bus itself refuses them (64 containers)."""
    value = b"\x01v\0" * depth + b"\x01y\0\x05"
    with service.caller() as caller:
        try:
            answer = caller.call("Options", "a{sv}", options(deep=("v", value)))
        except (EOFError, ConnectionError):
            assert depth == 300
        else:
            assert not answer.error
            assert answer.body[0].count("Value(") == depth + 1
    service.assert_alive()


def test_a_crash_says_nothing_about_the_program(service: Service, caller: Caller) -> None:
    """The caller reads where to look; the traceback is in the log."""
    answer = caller.call("Crash", "a{sv}", NO_OPTIONS)
    assert answer.error == "org.blksnap.Blksnap1.Error.Failed"
    assert answer.body == ["internal error; see the service's log"]
    assert "a secret of /usr/lib" in service.log.read_text(encoding="utf-8")
    assert not caller.ping().error


@pytest.mark.parametrize("what", ["path", "type", "too few", "large"])
def test_a_wrong_answer_of_ours_is_not_sent(service: Service, caller: Caller, what: str) -> None:
    """A bus throws off a service that sends an invalid object path or more than 32 MiB."""
    before = service.resources()[0]
    answer = caller.call("Answer", "sa{sv}", options(text(what)))
    assert answer.error == "org.blksnap.Blksnap1.Error.Failed"
    assert answer.body == ["internal error; see the service's log"]
    assert not caller.ping().error
    assert service.resources()[0] == before


def test_text_that_is_not_text_is_mended(service: Service, caller: Caller) -> None:
    """Labels and paths hold NUL and bytes that are not UTF-8; the bus throws off who sends them."""
    answer = caller.call("Answer", "sa{sv}", options(text("text")))
    assert answer.body == ["/", "nul \ufffd, not utf-8 \ufffd", b""]
    properties = caller.call("GetAll", "s", text(publisher.INTERFACE), interface=f"{DBUS}.Properties")
    assert properties.body[0]["Label"].value == "bad \ufffd\ufffd label 0"
    service.assert_alive()


def test_errors_of_callers_fill_no_log(service: Service, caller: Caller) -> None:
    """Whatever a caller does wrong, only defects of ours are logged."""
    before = service.log.stat().st_size
    caller.flood(caller.message("Fail", "sa{sv}", options(text("NotFound"))) for _ in range(100))
    caller.flood(caller.message("Echo", "u", bytes(4)) for _ in range(100))
    caller.flood(caller.message("Nothing") for _ in range(100))
    assert service.log.stat().st_size == before
