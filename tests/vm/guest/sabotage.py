# SPDX-License-Identifier: GPL-2.0-or-later
"""Tests that go wrong, for tests/vm/test_harness.py; the name keeps them out of every other run."""

import time
from pathlib import Path

import pytest


def test_passes() -> None:
    """It did before the guest died."""


def test_fails() -> None:
    """An ordinary failure."""
    print("printed before")
    assert Path("/dev/null").is_dir()


def test_skips() -> None:
    """A reason travels too."""
    pytest.skip("the reason")


def test_panics() -> None:
    """Takes the guest down."""
    Path("/proc/sysrq-trigger").write_text("c")
    time.sleep(60)


def test_after_the_panic() -> None:
    """Runs in the next guest."""
