# SPDX-License-Identifier: GPL-2.0-or-later
"""Tracking through the data path's ublk devices: the origin is used by way of a block device over it.

What to mount instead of the origin is a device-mapper device over that block device, where the kernel has device-mapper.
Under a device-mapper device in use the tracker goes by itself: that one stays what is mounted.
"""
