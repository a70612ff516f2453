# SPDX-License-Identifier: GPL-2.0-or-later
"""Numbers and structures of the kernel filter against the values a C compiler gives for the headers (x86-64)."""

from __future__ import annotations

import struct
import uuid

import pytest

from blksnap_service.backends.blkfilter import uapi
from blksnap_service.backends.blkfilter.uapi import V6, V7, V615, CbtInfo, Event, SnapshotInfo


@pytest.mark.parametrize(
    "generation, attach, detach, ctl, size",
    [
        (V6, 0xC020128C, 0xC020128D, 0xC030128E, 32),
        (V7, 0xC020128C, 0xC020128D, 0xC030128E, 32),
        (V615, 0xC030128E, 0xC020128F, 0xC0301290, 48),
    ],
)
def test_requests_on_block_devices(
    generation: uapi.Generation, attach: int, detach: int, ctl: int, size: int
) -> None:
    """The number is computed from what it is made of."""
    assert (generation.attach, generation.detach, generation.ctl) == (attach, detach, ctl)
    argument = generation.attach_argument()
    assert len(argument) == size
    assert bytes(argument) == b"blksnap".ljust(size, b"\0")


@pytest.mark.parametrize(
    "number, value",
    [
        (uapi.IOCTL_VERSION, 0x80085600),
        (uapi.IOCTL_CREATE, 0xC0205601),
        (uapi.IOCTL_DESTROY, 0x40105602),
        (uapi.IOCTL_TAKE, 0x40105603),
        (uapi.IOCTL_COLLECT, 0x80105604),
        (uapi.IOCTL_WAIT_EVENT, 0x90005605),
        (uapi.VAL7_ATTACH, 0xC028468C),
        (uapi.VAL7_DETACH, 0xC028468D),
        (uapi.VAL7_CTL_REQUEST, 0xC038468E),
        (uapi.VAL7_MOD, 0x80285620),
        (uapi.VAL7_SETLOG, 0x40185621),
        (uapi.VAL7_APPEND_STORAGE, 0x40285622),
    ],
)
def test_requests_on_control_nodes(number: int, value: int) -> None:
    """The number is computed from what it is made of."""
    assert number == value


@pytest.mark.parametrize(
    "structure, size",
    [
        (uapi.NAME, 32),
        (uapi.ATTACH, 48),
        (uapi.CTL, 48),
        (uapi.CBTINFO, 40),
        (uapi.CBTMAP, 16),
        (uapi.CBTDIRTY, 16),
        (uapi.SECTORS, 16),
        (uapi.SNAPSHOTADD, 16),
        (uapi.SNAPSHOTINFO, 36),
        (uapi.VERSION, 8),
        (uapi.CREATE_BY_FD, 32),
        (uapi.CREATE_BY_NAME, 32),
        (uapi.UUID, 16),
        (uapi.COLLECT, 16),
        (uapi.EVENT, 4096),
        (uapi.EVENT_CORRUPTED, 12),
        (uapi.EVENT_SPACE, 8),
        (uapi.VAL7_NAME, 40),
        (uapi.VAL7_CTL, 56),
    ],
)
def test_sizes(structure: struct.Struct, size: int) -> None:
    """No padding but what the compiler puts in."""
    assert structure.size == size


def test_fields_are_where_the_kernel_looks() -> None:
    """Each field has a byte pattern of its own."""
    assert uapi.ATTACH.pack(b"n" * 32, 0x1122334455667788, 0x99AABBCC)[32:44] == struct.pack(
        "=QI", 0x1122334455667788, 0x99AABBCC
    )
    assert uapi.CTL.pack(b"", 1, 2, 3)[32:] == struct.pack("=IIQ", 1, 2, 3)
    assert uapi.CREATE_BY_FD.pack(5, 6, b"i" * 16) == struct.pack("=QI", 5, 6) + b"i" * 16 + bytes(4)
    assert uapi.CREATE_BY_NAME.pack(5, 6, b"i" * 16) == struct.pack("=QQ", 5, 6) + b"i" * 16
    assert uapi.CBTDIRTY.pack(1, 2) == struct.pack("=IIQ", 1, 0, 2)
    assert uapi.COLLECT.pack(1, 2) == struct.pack("=IIQ", 1, 0, 2)
    event = uapi.EVENT.pack(b"i" * 16, 1, 2, 3, b"data")
    assert event[:36] == b"i" * 16 + struct.pack("=IIq", 1, 2, 3) + b"data"


def test_no_modern_request_is_one_of_the_oldest_modules() -> None:
    """They go by the last byte: what creates a snapshot here removes a tracker there, so they must be told apart before."""
    assert uapi.LEGACY["TRACKER_REMOVE"] & 0xFF == uapi.IOCTL_CREATE & 0xFF
    assert V615.attach == V6.ctl


def test_map_information_is_read_without_the_bytes_behind_it() -> None:
    """Seven bytes of the kernel's stack follow the number (defect 13)."""
    generation = uuid.uuid4()
    raw = struct.pack("=QII", 1 << 40, 524_288, 2_097_152) + generation.bytes + b"\7" + b"\xaa" * 7
    info = CbtInfo.parse(raw)
    assert (info.capacity, info.block_size, info.block_count) == (1 << 40, 524_288, 2_097_152)
    assert (info.generation, info.changes, info.wrapped) == (str(generation), 7, False)


def test_the_number_255_is_number_0_of_the_new_generation() -> None:
    """Defect 6: with it beside the new id, a client would look for bytes above 255 next time, and find none."""
    raw = struct.pack("=QII16sB7x", 1 << 20, 65_536, 16, uuid.uuid4().bytes, 255)
    info = CbtInfo.parse(raw)
    assert (info.changes, info.wrapped) == (0, True)


@pytest.mark.parametrize("code", [28, -28])
def test_snapshot_information(code: int) -> None:
    """The error has either sign; the name ends at the first zero."""
    info = SnapshotInfo.parse(struct.pack("=i32s", code, b"blksnap-8-1\0junk"))
    assert info == SnapshotInfo(28, "blksnap-8-1")


def test_events() -> None:
    """Codes mean what they mean in their generation, and unknown ones nothing."""
    corrupted = uapi.EVENT.pack(b"", 0, 0, 0, struct.pack("=IIi", 8, 1, -28))
    full = uapi.EVENT.pack(b"", 0, 1, 0, struct.pack("=Q", 2048))
    unknown = uapi.EVENT.pack(b"", 0, 7, 0, b"")
    for generation in uapi.GENERATIONS:
        assert uapi.parse_event(generation, corrupted) == Event("corrupted", (8, 1), 28)
        assert uapi.parse_event(generation, unknown) is None
    assert uapi.parse_event(V615, full) == Event("no-space", requested=1 << 20)
    assert uapi.parse_event(V6, full) is None
    assert uapi.parse_event(V7, full) is None
