# SPDX-License-Identifier: GPL-2.0-or-later
"""The tests marked `blkfilter`, on the kernel $BLKSNAP_TEST_KERNEL names, which has the filter; collected only with that."""

from tests.unit.blkfilter.conftest import REQUIRED_VARIABLE
from tests.vm.kernels import OWN
from tests.vm.machine import Guest, Machine
from tests.vm.selection import inner_pytest


def test_a_kernel_with_the_filter_passes_what_the_model_passes() -> None:
    """Not a test of them is left to the model; that the kernel has no filter fails them."""
    tests = "tests/unit/blkfilter/test_filter.py"
    # What is built in cannot be loaded, and need not be.
    command = f"modprobe -qa loop blksnap; exec {inner_pytest(['-q', '-m', 'blkfilter', tests])}"
    with Guest(Machine(OWN, time_limit_s=1800), command, {REQUIRED_VARIABLE: "1"}) as guest:
        output = list(guest.output)
        assert guest.wait() == 0, "\n".join(output[-60:])
