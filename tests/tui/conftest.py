# SPDX-License-Identifier: GPL-2.0-or-later
"""What every test of the terminal program starts from: one kind of terminal, one time zone, nothing of the developer's."""

# ruff: noqa: E402 - the environment is settled before Textual is imported

from __future__ import annotations

import os

# Textual reads these when it is imported, so they are settled before any test module of this folder is.
for _name in ("NO_COLOR", "TEXTUAL_THEME", "TEXTUAL_FILTERS", "TEXTUAL_COLOR_SYSTEM", "TEXTUAL_FPS"):
    os.environ.pop(_name, None)
os.environ["TEXTUAL_ANIMATIONS"] = "none"
os.environ["COLORTERM"] = "truecolor"
os.environ["TERM"] = "xterm-256color"

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from blksnap_tui.testing import FakeService
from tests.tui import worlds
from tests.tui.golden import Golden


@pytest.fixture(autouse=True)
def _utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Times on screens are those of UTC."""
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """Compares screens with those kept beside the tests."""
    return Golden(Path(request.node.path).parent / "golden")


@pytest.fixture
def busy() -> FakeService:
    """A service with something of everything."""
    return worlds.busy()
