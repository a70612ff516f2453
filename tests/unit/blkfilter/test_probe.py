# SPDX-License-Identifier: GPL-2.0-or-later
"""Telling generations of the kernel filter apart, and what is never sent while doing so."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from blksnap_service import sysblock
from blksnap_service.backends.blkfilter import probe, uapi
from blksnap_service.backends.blkfilter.backend import FilterBackend
from blksnap_service.backends.blkfilter.kernel import RealSystem
from blksnap_service.backends.blkfilter.probe import Found, Sign
from blksnap_service.fds import OwnedFd
from tests.unit.blkfilter.model import ModelKernel

UPSTREAM = Sign((("blksnap-control", 1),), frozenset())


async def test_what_was_in_the_way_is_tried_again(tmp_path: Path) -> None:
    """The module loop may be loaded later, which nothing of the filter shows."""
    found = [Found(None, "no loop device", passing=True), Found(uapi.V615, ""), Found(None, "asked again")]
    kernel = ModelKernel(tmp_path)
    backend = FilterBackend(None, kernel, lambda: UPSTREAM, lambda _: found.pop(0))
    assert [await backend.refresh() for _ in range(3)] == [True, True, False]
    assert backend.generation == uapi.V615
    kernel.close()


@contextlib.contextmanager
def no_loop() -> Iterator[OwnedFd]:
    """A machine without loop devices."""
    raise FileNotFoundError(2, "No such file or directory")
    yield


def test_a_generation_is_known_by_what_it_answers(
    kernel: ModelKernel, tmp_path: Path, generation: str
) -> None:
    """And nothing that any of them could carry out is sent: no attach, and CREATE only when DETACH has told the family."""
    found = probe.detect(UPSTREAM, kernel.scratch, kernel, tmp_path)
    assert found == Found({one.name: one for one in uapi.GENERATIONS}[generation], "")
    assert not {0xC030128E, 0xC020128C, uapi.IOCTL_TAKE, uapi.IOCTL_DESTROY} & set(kernel.requests)
    assert kernel.requests[:2] == [0xC020128F, 0xC020128D]
    assert kernel.requests[2:] == ([] if generation == "6.15" else [uapi.IOCTL_CREATE])
    assert not kernel.snapshots


def test_a_kernel_without_the_filter_is_not_taken_for_one_that_has_it() -> None:
    """A loop device says EINVAL to every number it does not know; this is the kernel the test runs on."""
    if os.geteuid() != 0:
        pytest.skip("not root: a loop device cannot be made")
    if probe.look().nodes:
        pytest.skip("this kernel has the filter")
    with contextlib.ExitStack() as stack:
        try:
            fd = stack.enter_context(probe.loop_device())
        except OSError as error:
            pytest.skip(f"not root enough: no loop device can be made here ({error.strerror})")
        for number in (uapi.V615.detach, uapi.V6.detach):
            assert not probe._answers(RealSystem(), fd, number)


def test_without_a_loop_device_nothing_is_guessed(kernel: ModelKernel, tmp_path: Path) -> None:
    """The module's own parameters are a hint, and a hint is not enough to send what may be an attach."""
    found = probe.detect(UPSTREAM, no_loop, kernel, tmp_path)
    assert found.generation is None
    assert "loop device" in found.reason
    assert not kernel.requests


def test_contradictory_signs_are_left_alone(kernel: ModelKernel, tmp_path: Path, generation: str) -> None:
    """A parameter that 6.15 does not have, with numbers that it has."""
    (tmp_path / "free_diff_buffer_pool_size").touch()
    found = probe.detect(UPSTREAM, kernel.scratch, kernel, tmp_path)
    assert (found.generation is None) == (generation == "6.15")


@pytest.mark.parametrize(
    "sign, reason",
    [
        (Sign((("bdevfilter", 1), ("veeamblksnap", 2)), frozenset()), "Veeam Agent 7"),
        (Sign((("veeamblksnap", 1),), frozenset({"veeamblksnap"})), "Veeam Agent 6"),
        (Sign((), frozenset({"veeamblksnap"})), "Veeam Agent 6"),
        (Sign((("blksnap", 1),), frozenset({"blksnap"})), r"blksnap 1\.0"),
        (Sign((), frozenset()), "not loaded"),
    ],
)
def test_others_are_refused_by_name(kernel: ModelKernel, tmp_path: Path, sign: Sign, reason: str) -> None:
    """Without sending them anything."""
    found = probe.detect(sign, kernel.scratch, kernel, tmp_path)
    assert found.generation is None
    assert reason.replace("\\", "") in found.reason
    assert not kernel.requests


def test_a_directory_of_links_is_no_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """/dev/blksnap is also where udev puts links to images of ours."""
    monkeypatch.setattr(sysblock, "_SYS", tmp_path / "sys")
    (tmp_path / "blksnap").mkdir()
    assert probe.look(tmp_path) == Sign((), frozenset())
