# SPDX-License-Identifier: GPL-2.0-or-later
"""A data path of its own for each test that wants one; a test that leaves it dead has failed."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.nbd.datapath import Datapath, Origin
from tests.nbd.load import Report


@pytest.fixture
def directory() -> Iterator[Path]:
    """A private directory with a path short enough for a socket (unix(7): 107 bytes)."""
    with tempfile.TemporaryDirectory(prefix="blksnap-nbd-", dir="/tmp") as name:
        yield Path(name)


@pytest.fixture
def start(directory: Path) -> Iterator[Callable[[], Datapath]]:
    """Start data paths on the private directory; whatever becomes of them is the test's business."""
    with contextlib.ExitStack() as stack:

        def begin() -> Datapath:
            datapath = Datapath(directory)
            stack.callback(datapath.kill)
            return datapath

        yield begin


@pytest.fixture
def datapath(start: Callable[[], Datapath]) -> Iterator[Datapath]:
    """A running data path that has to be running, and to answer, when the test is over."""
    datapath = start()
    yield datapath
    assert datapath.process.poll() is None, f"the data path died: {datapath.story()}"
    with datapath.connect() as control:
        control.call("list")


@pytest.fixture
def report(record_property: Callable[[str, object], None]) -> Report:
    """Print a figure, and keep it in the report of the run."""

    def tell(text: str) -> None:
        record_property("figure", text)
        sys.stdout.write(f"{text}\n")

    return tell


@pytest.fixture
def origin(datapath: Datapath) -> Origin:
    """A tracked image file of 16 MiB, all zero, with blocks of 64 KiB."""
    return datapath.add()
