# SPDX-License-Identifier: GPL-2.0-or-later
"""The blksnap service: owns change trackers and snapshots, and answers on D-Bus."""

__version__ = "0.1.0"
