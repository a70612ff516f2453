# SPDX-License-Identifier: GPL-2.0-or-later
"""The one error of the VM harness. What goes wrong *inside* a guest is no error here but an exit code."""


class VmError(Exception):
    """No guest could be run: a program, a package or a mirror is missing, or qemu would not start.

    The text says what to do about it.
    """
