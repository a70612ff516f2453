# SPDX-License-Identifier: GPL-2.0-or-later
"""Takes the guest down before there is a test. For test_harness.py; not collected by itself."""

from pathlib import Path

from tests.vm.selection import guest_kernel

if guest_kernel() is not None:
    Path("/proc/sysrq-trigger").write_text("c")


def test_never_runs() -> None:
    """It does not come to this."""
