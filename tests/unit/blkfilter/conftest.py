# SPDX-License-Identifier: GPL-2.0-or-later
"""A kernel with the filter: the model in each generation, and the one this runs on if it has it."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.unit.blkfilter.lab import Lab, ModelLab, RealLab, real_kernel, running
from tests.unit.blkfilter.model import ModelKernel
from tests.unit.fakes.machine import Machine

REQUIRED_VARIABLE = "BLKSNAP_TEST_FILTER"
"""Set: the filter of this kernel is what is tested, and one that is not there fails."""
GENERATIONS = ("v6", "v7", "6.15")
if os.environ.get(REQUIRED_VARIABLE):
    KERNELS: tuple[str, ...] = ("real",)
else:
    KERNELS = (*GENERATIONS, "real") if real_kernel() else GENERATIONS


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine without devices."""
    return Machine(tmp_path, monkeypatch)


@pytest.fixture(params=GENERATIONS)
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


@pytest.fixture(params=KERNELS)
async def lab(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Lab]:
    """Each model, and the real one."""
    if request.param == "real":
        made: Lab = RealLab(tmp_path)
    else:
        made = ModelLab(tmp_path, request.getfixturevalue("machine"), request.param)
    async with running(made) as one:
        yield one


@pytest.fixture
async def model(generation: str, tmp_path: Path, machine: Machine) -> AsyncIterator[ModelLab]:
    """Each model, to make it do what no kernel can be made to."""
    made = ModelLab(tmp_path, machine, generation)
    async with running(made):
        yield made
