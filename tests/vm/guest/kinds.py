# SPDX-License-Identifier: GPL-2.0-or-later
"""The kinds of disks that are tracked, each the way it is tracked most often, and the file systems on them."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.nbd.control import opened
from tests.nbd.datapath import Datapath
from tests.vm.guest import devices, nodes, ublk
from tests.vm.guest.ublk import MIB, Tracked

KINDS = ("brd", "null_blk", "scsi_debug", "loop", "lvm")
FILE_SYSTEMS = ("ext4", "xfs")
IMAGE_OPTIONS = {"ext4": "ro,noload", "xfs": "ro,norecovery,nouuid"}
"""How an image is mounted: its journal is not replayed, which would write."""


@contextlib.contextmanager
def disk(kind: str, size_bytes: int, directory: Path) -> Iterator[Path]:
    """A disk of a kind; `directory` is for the file of a loop device."""
    with contextlib.ExitStack() as stack:
        match kind:
            case "brd":
                yield stack.enter_context(devices.brd(size_bytes))
            case "null_blk":
                yield stack.enter_context(devices.null_blk(size_bytes, discard=True, cache_bytes=MIB))
            case "scsi_debug":
                yield stack.enter_context(devices.scsi_debug(size_bytes, lbpu=1))
            case "loop":
                file = directory / "disk"
                with file.open("wb") as made:
                    made.truncate(size_bytes)
                yield stack.enter_context(devices.loop(file))
                file.unlink()
            case "lvm":
                below = stack.enter_context(devices.brd(size_bytes + 8 * MIB))
                yield stack.enter_context(devices.lvm_lv(below, size_bytes))


@dataclass(frozen=True, slots=True)
class Placed:
    """A tracked disk, and what lies below the tracker."""

    tracked: Tracked
    below: Path
    """Holds the bytes of the origin: reading it needs nothing of ours."""


def place(running: Datapath, kind: str, device: Path, **options: int) -> Placed:
    """Track a disk: a logical volume where it is, one of each other two with a device-mapper node on top."""
    if kind == "lvm":
        name = nodes.mapped_name(device)
        return Placed(nodes.insert(running, name, **options), Path(f"/dev/mapper/{name}-blksnap"))
    if kind in {"null_blk", "loop"}:
        return Placed(nodes.tracked_top(running, device, f"blksnap-{kind}", **options), device)
    return Placed(ublk.track(running, device, **options), device)


@contextlib.contextmanager
def to_be_frozen(tracked: Tracked, directory: Path) -> Iterator[Sequence[int]]:
    """Descriptors that a take needs to freeze what is mounted there; device-mapper nodes are found without."""
    if tracked.origin.info().clients and tracked.node.name.startswith("ublkb"):
        with opened(directory, 0) as fd:
            yield [fd]
    else:
        yield []
