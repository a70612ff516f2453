# SPDX-License-Identifier: GPL-2.0-or-later
"""The demo's NBD client, against nbdkit."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from demo.copies import apply_increment, full_copy, is_true
from demo.nbd import Export, parse_uri
from demo.programs import DemoError
from tests.demo.servers import nbdkit

SIZE = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """Give a file of which every page differs."""
    path = tmp_path / "disk.img"
    path.write_bytes(b"".join(page.to_bytes(4, "big") * 1024 for page in range(SIZE // 4096)))
    return path


@pytest.fixture
async def uri(disk: Path, tmp_path: Path) -> AsyncIterator[str]:
    """Serve the file; gives its URI."""
    async with nbdkit(tmp_path, "file", disk) as uri:
        yield uri


async def test_reads_what_the_export_holds(uri: str, disk: Path) -> None:
    """A read returns exactly the bytes asked for, wherever they lie."""
    content = disk.read_bytes()

    with Export(uri) as export:
        assert export.size == SIZE
        for offset, length in ((0, 1), (4095, 2), (SIZE - 512, 512), (0, SIZE)):
            assert export.read(offset, length) == content[offset : offset + length]


async def test_a_read_past_the_end_is_an_error_and_not_the_end(uri: str) -> None:
    """The server's refusal is raised in words, and the next read works."""
    with Export(uri) as export:
        with pytest.raises(DemoError, match="failed with NBD error"):
            export.read(SIZE, 4096)
        assert len(export.read(0, 4096)) == 4096


async def test_an_export_that_is_not_there_is_named(tmp_path: Path) -> None:
    """A wrong export name is refused with the server's reason, not with a hang."""
    async with nbdkit(
        tmp_path, "memory", "1M", "--filter=exportname", "exportname=only", "exportname-strict=true"
    ) as uri:
        with pytest.raises(DemoError, match="refuses the export"):
            Export(uri.replace("///", "///another"))


def test_nobody_listening_is_named(tmp_path: Path) -> None:
    """A socket without a server raises and says which."""
    with pytest.raises(DemoError, match="nowhere"):
        Export(f"nbd+unix:///?socket={tmp_path}/nowhere")


@pytest.mark.parametrize("wrong", ["nbd://host/", "nbd+unix:///", "/a/path", "nbd+unix:///?socket="])
def test_only_unix_sockets_are_uris_of_ours(wrong: str) -> None:
    """Any other kind of URI is refused."""
    with pytest.raises(DemoError, match="no NBD URI"):
        parse_uri(wrong)


def test_an_export_name_and_a_path_may_be_escaped() -> None:
    """Percent signs of a URI are undone, in the path of the socket too."""
    assert parse_uri("nbd+unix:///a%20name?socket=/tmp/a%2Bb") == ("/tmp/a+b", "a name")  # noqa: S108 - only a name


async def test_a_copy_is_true_until_one_byte_differs(uri: str, disk: Path, tmp_path: Path) -> None:
    """The proof notices a single wrong byte, and an increment of just that range repairs it."""
    copy = tmp_path / "copy.img"
    await full_copy(uri, copy)
    assert await is_true(uri, copy)

    with disk.open("r+b") as file:
        file.seek(700_000)
        file.write(b"!")

    assert not await is_true(uri, copy)
    assert await apply_increment(uri, [(688_128, 65_536)], copy) == 65_536
    assert await is_true(uri, copy)


async def test_an_increment_copies_no_more_than_its_ranges(uri: str, disk: Path, tmp_path: Path) -> None:
    """Bytes outside the ranges stay as they were, so a missed block cannot be copied by luck."""
    copy = tmp_path / "copy.img"
    copy.write_bytes(bytes(SIZE))

    assert await apply_increment(uri, [(4096, 4096), (SIZE - 4096, 4096)], copy) == 8192

    expected = bytearray(SIZE)
    for offset in (4096, SIZE - 4096):
        expected[offset : offset + 4096] = disk.read_bytes()[offset : offset + 4096]
    assert copy.read_bytes() == expected


async def test_a_copy_of_another_size_is_refused(uri: str, tmp_path: Path) -> None:
    """An image that grew or shrank is no increment of this copy."""
    copy = tmp_path / "copy.img"
    copy.write_bytes(b"short")

    with pytest.raises(DemoError, match="5 bytes"):
        await apply_increment(uri, [(0, 4096)], copy)
