# SPDX-License-Identifier: GPL-2.0-or-later
"""What the backends over the data path share: opening origins, their trackers and saved maps, snapshots of them.

How an origin is used, and so where it is put among the system's devices, is the part of ``nbd`` and ``ublk``.
"""
