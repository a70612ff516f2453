# SPDX-License-Identifier: GPL-2.0-or-later
"""A kernel with the filter, of each generation, and disks in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.blkfilter.model import ModelKernel
from tests.unit.fakes.machine import Machine


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine without devices."""
    return Machine(tmp_path, monkeypatch)


@pytest.fixture(params=["v6", "v7", "6.15"])
def generation(request: pytest.FixtureRequest) -> str:
    """Each generation."""
    name: str = request.param
    return name


@pytest.fixture
def kernel(tmp_path: Path, machine: Machine, generation: str) -> Iterator[ModelKernel]:
    """A kernel of that generation."""
    one = ModelKernel(tmp_path, generation)
    yield one
    one.close()
