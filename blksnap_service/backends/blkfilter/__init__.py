# SPDX-License-Identifier: GPL-2.0-or-later
"""The backend ``blkfilter``: devices in use, tracked and snapshotted by the kernel module blksnap (docs/kernel-filter.md).

``uapi`` is what the kernel's interface looks like, ``kernel`` and ``control`` call it, ``probe`` finds out which of its
generations this kernel has; ``tracker``, ``engine`` and ``backend`` are the service's side.
"""
