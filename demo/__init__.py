# SPDX-License-Identifier: GPL-2.0-or-later
"""The demonstration: the real service on a private bus, a real file system on a tracked image, copies proved byte for byte."""
