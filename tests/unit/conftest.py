# SPDX-License-Identifier: GPL-2.0-or-later
"""A service over a fake data path, for the tests that ask for `rig`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.unit.fakes.datapath import FakeDatapath, running
from tests.unit.fakes.service import Running, running_service


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeDatapath]:
    """A fake data path."""
    with running(tmp_path / "run") as one:
        yield one


@pytest.fixture
async def rig(tmp_path: Path, fake: FakeDatapath) -> AsyncIterator[Running]:
    """A service over it."""
    async with running_service(tmp_path, fake) as one:
        yield one
