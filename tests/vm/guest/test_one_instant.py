# SPDX-License-Identifier: GPL-2.0-or-later
"""A take over several block devices is one instant: raw ones, with no file system that could be frozen."""

import contextlib
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.nbd.causality import RECORD, SIZE, Causality, Connect, Put
from tests.nbd.control import opened
from tests.nbd.datapath import Datapath
from tests.nbd.load import running
from tests.vm.guest import devices, nodes, ublk

TAKES = 210


@pytest.fixture
def datapath() -> Iterator[Datapath]:
    """A running data path, with device-mapper loaded."""
    devices.modprobe("dm-mod")
    with ublk.datapath() as running_:
        yield running_


def connect(node: Path) -> Connect:
    """Return how a writer reaches a node: past the page cache, so that what is written is at the device."""

    @contextlib.contextmanager
    def writable() -> Iterator[Put]:
        with opened(node, os.O_WRONLY | os.O_DIRECT) as fd, mmap.mmap(-1, RECORD) as memory:

            def put(place: int, record: bytes) -> None:
                memory[:] = record
                assert os.pwritev(fd, [memory], place) == RECORD

            yield put

    return writable


@pytest.mark.timeout(1500)
def test_no_effect_is_seen_without_its_cause(datapath: Datapath) -> None:
    """Two writers each write B only after A is acknowledged; over 210 takes no image shows B without A, and all are exact.

    One of the devices has a device-mapper node, which is suspended for some takes.
    """
    with devices.brd(SIZE) as one, devices.null_blk(SIZE) as other:
        first = ublk.track(datapath, one, block_size=RECORD)
        second = nodes.tracked_top(datapath, other, "blksnap-test", block_size=RECORD)
        # Writers that never rest leave no processor to who takes and looks.
        causality = Causality(connect(first.node), connect(second.node), pause_s=0.02)
        with running(*causality.works()) as going:
            while causality.takes < TAKES:
                assert going()
                done = causality.done()
                # Not for all: the gates would find nothing in flight on the second.
                freeze = causality.takes % 8 == 0
                snapshot = datapath.create(limit=8 * SIZE)
                taken = nodes.take_all([first, second], snapshot=snapshot, freeze=freeze)
                begun = causality.begun()
                contents = [ublk.read(Path(image["path"])) for image in taken["images"]]
                maps = [origin.maps() for origin in (first, second)]
                marked = [map_.changed(map_.reading.changes - 1) for map_ in maps]
                causality.judge(done, begun, contents, marked)
                snapshot.destroy()
        print(causality)
        assert causality.written > 4 * TAKES
        assert causality.between > 0
        first.remove()
        second.remove()
