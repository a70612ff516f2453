# SPDX-License-Identifier: GPL-2.0-or-later
"""Which kernels, and how pytest is run on one."""

import os
import shlex
import sys
from collections.abc import Sequence

from tests.vm.errors import VmError
from tests.vm.kernels import SUITES
from tests.vm.machine import KERNEL_VARIABLE

KERNELS_VARIABLE = "BLKSNAP_VM_KERNELS"
DEFAULT_KERNELS = "6.12"
# Emulation is ten to thirty times slower than the machines the timeout of the project is for.
TEST_TIMEOUT_S = 300


def guest_kernel() -> str | None:
    """The series of the kernel of this guest; None on the host."""
    return os.environ.get(KERNEL_VARIABLE)


def wanted_kernels() -> list[str]:
    """The series the tests run on: in a guest its own, on the host those of $BLKSNAP_VM_KERNELS.

    Raises VmError for one that is not known.
    """
    wanted = (guest_kernel() or os.environ.get(KERNELS_VARIABLE, DEFAULT_KERNELS)).split()
    if unknown := sorted(set(wanted) - set(SUITES)):
        raise VmError(f"{KERNELS_VARIABLE}: no kernel {', '.join(unknown)}: there are {', '.join(SUITES)}")
    return wanted


def inner_pytest(arguments: Sequence[str], *, color: bool = False) -> str:
    """The shell command for `pytest ARGUMENTS`; a cache would be written to memory that goes away."""
    fixed = (
        "-p",
        "no:cacheprovider",
        "-o",
        f"timeout={TEST_TIMEOUT_S}",
        f"--color={'yes' if color else 'no'}",
    )
    return shlex.join((sys.executable, "-m", "pytest", *fixed, *arguments))
