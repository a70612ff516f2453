# SPDX-License-Identifier: GPL-2.0-or-later
"""
What a person has settled in a file of theirs: colours, theme, rate, keys. No Textual; the command line goes before it.

The file is `blksnap/tui.toml` in $XDG_CONFIG_HOME (~/.config). It need not exist; what is wrong in it is an error that names the file and the
key, since a setting that is silently ignored is worse than none.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from blksnap_tui.heat.ramp import ANCHORS, DEFAULT_RAMP

DEFAULT_RATE_HZ: Final = 2.0
LEAST_RATE_HZ, MOST_RATE_HZ = 0.1, 10.0


class SettingsError(Exception):
    """Raised when the file of settings cannot be used; the text says which, where and why."""


@dataclass(frozen=True, slots=True)
class Settings:
    """`keys` maps the id of an action (they are in the documentation) to the keys that lead to it, separated by commas."""

    theme: str = ""
    ramp: str = DEFAULT_RAMP
    rate_hz: float = DEFAULT_RATE_HZ
    mouse: bool = True
    read_only: bool = False
    keys: Mapping[str, str] = field(default_factory=dict)


def settings_path() -> Path:
    """Give where the file is looked for."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "blksnap" / "tui.toml"


def load(path: Path) -> Settings:
    """Read settings. Raises SettingsError; a file that is not there has none."""
    try:
        text = path.read_text(encoding="utf8")
    except FileNotFoundError:
        return Settings()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: cannot be read: {error}") from None
    try:
        return parse(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{path}: {error}") from None
    except ValueError as error:
        raise SettingsError(f"{path}: {error}") from None


def parse(values: Mapping[str, Any]) -> Settings:
    """Check settings. Raises ValueError that names the key and what it may be."""
    known: dict[str, type | tuple[type, ...]] = {
        "theme": str,
        "ramp": str,
        "rate": (int, float),
        "mouse": bool,
        "read-only": bool,
        "keys": dict,
    }
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"there is no setting {name}; there are: {', '.join(known)}")
        if not isinstance(value, known[name]) or (name == "rate" and isinstance(value, bool)):
            raise ValueError(f"{name} cannot be {value!r}")
    ramp, rate = values.get("ramp", DEFAULT_RAMP), values.get("rate", DEFAULT_RATE_HZ)
    if ramp not in ANCHORS:
        raise ValueError(f"ramp cannot be {ramp!r}; there are: {', '.join(ANCHORS)}")
    if not LEAST_RATE_HZ <= rate <= MOST_RATE_HZ:
        raise ValueError(f"rate {rate:g} is not between {LEAST_RATE_HZ:g} and {MOST_RATE_HZ:g}")
    for action, keys in values.get("keys", {}).items():
        if not isinstance(keys, str) or not keys:
            raise ValueError(f'keys.{action} must be a key, or several with commas between: "f5,ctrl+r"')
    return Settings(
        values.get("theme", ""),
        ramp,
        float(rate),
        values.get("mouse", True),
        values.get("read-only", False),
        values.get("keys", {}),
    )
