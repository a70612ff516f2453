# SPDX-License-Identifier: GPL-2.0-or-later
"""Fixtures of the tests that run in a guest. On the host they are never set up: see tests/vm/conftest.py."""

from collections.abc import Iterator

import pytest

from tests.vm.guest import devices
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
