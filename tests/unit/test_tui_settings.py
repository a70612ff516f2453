# SPDX-License-Identifier: GPL-2.0-or-later
"""The file of settings, and what is said about mistakes in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from blksnap_tui.settings import Settings, SettingsError, load

FULL = """
theme = "blksnap-light"
ramp = "cividis"
rate = 4
mouse = false
read-only = true
[keys]
"map.mode" = "f5,m"
"""


def test_no_file_means_no_settings(tmp_path: Path) -> None:
    """Nobody has to write one."""
    assert load(tmp_path / "tui.toml") == Settings()


def test_everything_can_be_settled(tmp_path: Path) -> None:
    """Each setting arrives where it is looked for."""
    (tmp_path / "tui.toml").write_text(FULL)
    assert load(tmp_path / "tui.toml") == Settings(
        "blksnap-light", "cividis", 4.0, mouse=False, read_only=True, keys={"map.mode": "f5,m"}
    )


@pytest.mark.parametrize(
    "text, words",
    [
        ('ramp = "rainbow"', "ramp cannot be 'rainbow'; there are: viridis, cividis, inferno"),
        ("rate = 60", "rate 60 is not between 0.1 and 10"),
        ("rate = true", "rate cannot be True"),
        ('mouse = "no"', "mouse cannot be 'no'"),
        ("colour = 1", "there is no setting colour"),
        ('[keys]\n"map.mode" = ""', "keys.map.mode must be a key"),
        ("ramp =", "Invalid value"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, text: str, words: str) -> None:
    """With the file, never ignored."""
    path = tmp_path / "tui.toml"
    path.write_text(text)
    with pytest.raises(SettingsError) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert words in str(caught.value)
