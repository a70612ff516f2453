# SPDX-License-Identifier: GPL-2.0-or-later
"""Block devices for tests in a guest: made and removed by context managers, each giving the path of its node.

Only for the guest: they load modules and need root. A device that is still in use when its block ends is an error of
the test, and raised.
"""

import itertools
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_numbers = itertools.count()
_UDEV_CONTROL = Path("/run/udev/control")
_CONFIGFS = Path("/sys/kernel/config")
_SCSI_DEBUG = Path("/sys/bus/pseudo/drivers/scsi_debug")


def run(*command: str, timeout_s: float = 120) -> str:
    """The standard output of `command`. Raises CalledProcessError, with its standard error as a note, when it fails."""
    # Without udevd libdm makes the nodes itself only when it is told to (libdm-common.c, DM_DISABLE_UDEV).
    environment = dict(os.environ) if udevd_runs() else os.environ | {"DM_DISABLE_UDEV": "1"}
    try:
        return subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=timeout_s, env=environment
        ).stdout
    except subprocess.CalledProcessError as error:
        error.add_note(error.stderr)
        raise


def modprobe(module: str, *parameters: str) -> None:
    """Load `module`; nothing happens when it is loaded."""
    run("modprobe", module, *parameters)


def udevd_runs() -> bool:
    """Whether a systemd-udevd was started in this guest."""
    return _UDEV_CONTROL.exists()


def wait_for(path: Path, timeout_s: float = 30) -> Path:
    """`path`, once it is there. Raises TimeoutError when it does not come."""
    end = time.monotonic() + timeout_s
    while not path.exists():
        if time.monotonic() > end:
            raise TimeoutError(f"{path} did not appear within {timeout_s} s")
        time.sleep(0.01)
    return path


@contextmanager
def udevd() -> Iterator[None]:
    """A systemd-udevd that knows the block devices that are already there."""
    run("/lib/systemd/systemd-udevd", "--daemon")
    try:
        run("udevadm", "trigger", "--subsystem-match=block", "--action=add", "--settle")
        yield
    finally:
        run("udevadm", "control", "--exit")
        _UDEV_CONTROL.unlink(missing_ok=True)


@contextmanager
def brd(size_bytes: int) -> Iterator[Path]:
    """The one RAM disk of the kernel: /dev/ram0. Memory is taken as it is written; logical blocks of 512 bytes."""
    # Module parameters are read once: the size is in KiB (drivers/block/brd.c).
    modprobe("brd", "rd_nr=1", f"rd_size={size_bytes >> 10}")
    try:
        yield wait_for(Path("/dev/ram0"))
    finally:
        _unload("brd")


@contextmanager
def null_blk(
    size_bytes: int,
    *,
    discard: bool = False,
    cache_bytes: int = 0,
    block_size: int = 512,
    queues: int = 1,
    badblocks: str = "",
    zoned: bool = False,
) -> Iterator[Path]:
    """A memory-backed null_blk.

    `zoned` makes it one of sequential zones, `cache_bytes` makes it a device with a volatile write cache; `badblocks` is a range of sectors, `+FIRST-LAST`, that
    answer EIO (Documentation/block/null_blk.rst).
    """
    modprobe("configfs")
    if not os.path.ismount(_CONFIGFS):
        run("mount", "-t", "configfs", "configfs", str(_CONFIGFS))
    modprobe("null_blk", "nr_devices=0")
    name = f"nullb-test{next(_numbers)}"
    directory = _CONFIGFS / "nullb" / name
    directory.mkdir()
    try:
        attributes = {
            "memory_backed": 1,
            "size": size_bytes >> 20,
            "blocksize": block_size,
            "submit_queues": queues,
            "discard": int(discard),
            "cache_size": cache_bytes >> 20,
            "badblocks": badblocks,
            **({"zoned": 1, "zone_size": 4} if zoned else {}),
        }
        for attribute, value in attributes.items():
            if value != "":
                (directory / attribute).write_text(f"{value}\n")
        (directory / "power").write_text("1\n")
        # Named after the directory from 6.0 on (null_blk: allow configfs to name devices).
        yield wait_for(Path("/dev") / name)
    finally:
        directory.rmdir()


@contextmanager
def scsi_debug(size_bytes: int, **parameters: int | str) -> Iterator[Path]:
    """The one disk of the SCSI debug driver; `parameters` are the module's (`lbpu=1` discards, `sector_size=4096` …)."""
    modprobe("sd_mod")
    # delay=0 answers at once; the default of one jiffy per command is most of a test's time.
    given = {"dev_size_mb": size_bytes >> 20, "delay": 0, **parameters}
    modprobe("scsi_debug", *(f"{name}={value}" for name, value in given.items()))
    try:
        yield _scsi_debug_node()
    finally:
        _unload("scsi_debug")


def _scsi_debug_node(timeout_s: float = 30) -> Path:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        for block in _SCSI_DEBUG.glob("adapter*/host*/target*/*/block/sd*"):
            return wait_for(Path("/dev") / block.name)
        time.sleep(0.01)
    raise TimeoutError(f"scsi_debug showed no disk within {timeout_s} s")


def _unload(module: str, timeout_s: float = 10) -> None:
    """Unload, also when udev or a probe still has the device open for some moments."""
    end = time.monotonic() + timeout_s
    while True:
        try:
            run("modprobe", "--remove", module)
        except subprocess.CalledProcessError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)
        else:
            return


@contextmanager
def loop(file: Path, *, direct_io: bool = False) -> Iterator[Path]:
    """A loop device over `file`."""
    modprobe("loop")
    node = run(
        "losetup", "--find", "--show", f"--direct-io={'on' if direct_io else 'off'}", str(file)
    ).strip()
    try:
        yield wait_for(Path(node))
    finally:
        run("losetup", "--detach", node)


@contextmanager
def dm(name: str, table: str) -> Iterator[Path]:
    """A device-mapper device with `table`, as dmsetup reads it."""
    modprobe("dm-mod")
    run("dmsetup", "create", name, "--table", table)
    try:
        yield wait_for(Path("/dev/mapper") / name)
    finally:
        run("dmsetup", "remove", "--retry", name)


@contextmanager
def lvm_lv(device: Path, size_bytes: int) -> Iterator[Path]:
    """A linear logical volume of `size_bytes`, a multiple of 4 MiB, in a volume group of its own on `device`."""
    modprobe("dm-mod")
    group = f"vg-test{next(_numbers)}"
    # What the host's lvm.conf and devices file say about its disks does not hold here.
    synchronised = int(udevd_runs())
    config = (
        f'devices {{ use_devicesfile=0 filter=["a|^{device}$|","r|.*|"] scan="/dev" }} '
        f"activation {{ udev_sync={synchronised} udev_rules={synchronised} monitoring=0 }} "
        "backup { backup=0 archive=0 }"
    )

    def lvm(*command: str) -> None:
        run("lvm", *command, "--config", config)

    lvm("vgcreate", "--yes", group, str(device))
    try:
        lvm("lvcreate", "--yes", "--wipesignatures=n", f"--size={size_bytes}b", "--name=lv", group)
        yield wait_for(Path("/dev") / group / "lv")
    finally:
        lvm("vgremove", "--yes", "--force", group)
