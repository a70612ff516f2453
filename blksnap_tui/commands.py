# SPDX-License-Identifier: GPL-2.0-or-later
"""What the command palette offers: every key's action on the screen it was opened on, and every device by name."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from textual.app import App, SystemCommand
from textual.screen import Screen

from blksnap_tui.model import State


def commands(app: App[Any], screen: Screen[Any], state: State) -> Iterable[SystemCommand]:
    """List the commands; an action that has no key cannot exist, nor a key that is not listed."""
    seen: set[str] = set()
    for node, binding, enabled, tooltip in screen.active_bindings.values():
        if not binding.id or not enabled or binding.action in seen or binding.id.startswith("focus."):
            continue
        if not (tooltip or binding.tooltip or binding.show):
            continue
        seen.add(binding.action)
        key = app.get_key_display(binding)
        yield SystemCommand(
            f"{binding.description} ({key})",
            tooltip or binding.tooltip or binding.description,
            partial(app.run_action, binding.action, node),
        )
    for device in state.devices:
        yield SystemCommand(
            f"show {device.name}",
            f"the map of {device.path}",
            partial(app.run_action, f"show_device({str(device.object_path)!r})", app),
        )
