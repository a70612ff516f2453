# SPDX-License-Identifier: GPL-2.0-or-later
"""The list of devices: state, name, size, what tracks it."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from blksnap_tui.model import Device
from blksnap_tui.units import format_size
from blksnap_tui.widgets.table import Cell, RowTable
from blksnap_tui.widgets.words import device_state, style_of

_NARROW = (("device", "device", 17), ("size", "    size", 8))
_WIDE = (("device", "device", 21), ("size", "    size", 8), ("state", "by", 9))


class DeviceTable(RowTable):
    """One row per device; the row under the cursor is the device everything else is about."""

    HELP = (
        "Block devices and added image files. The chosen one is drawn on the right: t tracks its changes, "
        "d ends that, s takes a snapshot, a adds an image file to the list."
    )

    def __init__(self, *, id: str) -> None:  # noqa: A002 - Textual's name for it
        super().__init__(_NARROW, id=id)
        self._wide = False

    def show(self, devices: Sequence[Device], *, wide: bool, words: str = "") -> None:
        """Show the devices that have all the words, with what tracks them when there is room."""
        self._wide = wide
        self.set_columns(_WIDE if wide else _NARROW)
        self.show_rows(
            {device.object_path: self._row(device) for device in devices if matches(device, words)}
        )

    def _row(self, device: Device) -> tuple[Cell, ...]:
        glyph, word, tone = device_state(device)
        style = style_of(self.app, tone)
        name = Text.assemble((glyph, style), " ", device.name, overflow="ellipsis", no_wrap=True)
        if device.tracker is not None and device.tracker.state == "tracking":
            word = device.tracker.backend
        size = Text(format_size(device.size), justify="right")
        return (name, size, Text("-" if tone == "dim" else word, style=style)) if self._wide else (name, size)


def matches(device: Device, words: str) -> bool:
    """Say whether every word occurs in something one would know a device by."""
    state = device_state(device)[1]
    known = (device.path, *device.symlinks, device.model, device.serial, device.id_type, device.id_label)
    line = " ".join((*known, device.id_uuid, *device.mount_points, state)).casefold()
    return all(word in line for word in words.casefold().split())
