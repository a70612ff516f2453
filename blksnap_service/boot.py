# SPDX-License-Identifier: GPL-2.0-or-later
"""``blksnapd --attach-at-boot NAME``: tracks a device before it is mounted, long before there is a message bus.

The data path is there (blksnap-datapath.service) and goes on; the service, when it comes, adopts what runs. Where a service
runs already, the device is its business and this only waits for the node. When the device cannot be tracked, its node
becomes a plain device-mapper device over it, unless that is forbidden: a machine that boots with a history to be
begun anew is better than one that does not boot.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

from blksnap_service import errors
from blksnap_service.catalogue import Catalogue
from blksnap_service.devices import Device
from blksnap_service.persistent import Record, Records
from blksnap_service.udev import BlockDevices

_log = logging.getLogger(__name__)

DEVICE_S = 60.0
"""How long to wait for the device; the unit has 90 s."""
SERVICE_S = 20.0
"""How long to wait for a running service, and for others that attach at the same time."""
_ASK_S = 0.2
_MAPPER = Path("/dev/mapper")


class Silence:
    """A ``service.Watcher`` that tells nobody: there is no bus yet."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        """Return what does nothing, for any of its methods."""
        return _nothing


def _nothing(*_: object) -> None:
    """Do nothing."""


def node_of(record: Record) -> Path:
    """Return the node that is to be mounted."""
    return _MAPPER / f"blksnap-{record.name}"


async def attach(
    name: str,
    records: Records,
    blocks: BlockDevices,
    open_catalogue: Callable[[], Catalogue],
    track: Callable[[Catalogue, Record], Awaitable[None]],
) -> None:
    """Have the node of a recorded device there, tracked if it can be.

    ``track`` tracks it, with the catalogue, which only one process at a time has. Raises ``errors.NotFound`` (no record, or
    no device in time) and, where no bypass is allowed, what stood in the way.
    """
    record = await asyncio.to_thread(records.named, name)
    device = await _device(record, blocks)
    end = asyncio.get_running_loop().time() + SERVICE_S
    while not node_of(record).exists():
        try:
            with open_catalogue() as catalogue:
                try:
                    await track(catalogue, record)
                except errors.BlksnapError as error:
                    await _bypass(record, device, error)
                return
        except errors.Busy as error:
            if asyncio.get_running_loop().time() > end:
                await _bypass(record, device, error)
                return
            await asyncio.sleep(_ASK_S)
        except errors.NotAvailable as error:
            await _bypass(record, device, error)
            return
    _log.info("%s is there already", node_of(record))


async def _device(record: Record, blocks: BlockDevices) -> Device:
    """Wait for the device."""
    changed = asyncio.Event()
    blocks.watch(changed.set)
    try:
        async with asyncio.timeout(DEVICE_S):
            while True:
                for device in (await asyncio.to_thread(blocks.list)).values():
                    if device.stable_key == record.key:
                        return device
                await changed.wait()
                changed.clear()
    except TimeoutError:
        raise errors.NotFound(
            f"the block device {record.key}, which is to be tracked as {record.name}, did not appear within"
            f" {DEVICE_S:.0f} s"
        ) from None
    finally:
        blocks.close()


async def _bypass(record: Record, device: Device, reason: errors.BlksnapError) -> None:
    """Put a plain device-mapper device where the node should be. Raises ``reason`` if that is not allowed."""
    if not record.bypass:
        raise reason
    sectors = device.size // 512
    words = (
        "dmsetup", "create", f"blksnap-{record.name}", "--uuid", f"BLKSNAP-bypass-{record.name}",
        "--table", f"0 {sectors} linear {device.path} 0",
    )  # fmt: skip
    said = "dmsetup cannot be run"
    with contextlib.suppress(OSError):
        process = await asyncio.create_subprocess_exec(
            *words, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
        )
        _, output = await process.communicate()
        if process.returncode == 0:
            _log.error(
                "%s is used untracked until it is attached again, and its history ends here: %s",
                device.path,
                reason,
            )
            return
        said = output.decode(errors="replace").strip().splitlines()[0] if output else "dmsetup failed"
    raise errors.Failed(f"{device.path} can be neither tracked ({reason}) nor used untracked ({said})")
