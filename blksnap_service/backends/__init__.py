# SPDX-License-Identifier: GPL-2.0-or-later
"""The ways to track a device; see ``tracker`` for what they implement. They know nothing of the bus.

``nbd`` and ``ublk`` are front ends of the data path and share ``datapath``; ``planned`` are those not written yet.
"""
