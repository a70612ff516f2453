# SPDX-License-Identifier: GPL-2.0-or-later
"""Fixtures of the tests that run in a guest. On the host they are never set up: see tests/vm/conftest.py."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.nbd.datapath import Datapath
from tests.vm.guest import devices, system, ublk
from tests.vm.selection import wanted_kernels


@pytest.fixture(scope="session", autouse=True, params=wanted_kernels())
def kernel(request: pytest.FixtureRequest) -> str:
    """The series of the kernel that was asked for."""
    series: str = request.param
    return series


@pytest.fixture(scope="class")
def udevd() -> Iterator[None]:
    """A systemd-udevd for the tests of one class (or one test)."""
    with devices.udevd():
        yield


@pytest.fixture(scope="class")
def rules() -> Iterator[None]:
    """A udevd with our rules."""
    system.install_rules()
    with devices.udevd():
        yield


@pytest.fixture
def datapath() -> Iterator[Datapath]:
    """A running data path, with device-mapper loaded."""
    devices.modprobe("dm-mod")
    with ublk.datapath() as running:
        yield running


@pytest.fixture
def file() -> Iterator[Path]:
    """A sparse file of 64 MiB."""
    with tempfile.NamedTemporaryFile() as one:
        os.truncate(one.name, 64 * system.MIB)
        yield Path(one.name)
