# SPDX-License-Identifier: GPL-2.0-or-later
"""The service's side of the border to the native process that serves I/O (docs/datapath-protocol.md).

``framing`` moves lines and descriptors, ``client`` pairs requests with replies, ``model`` is what replies say, ``process``
finds, starts and adopts the process. Nothing here knows about D-Bus, devices or snapshots of users.
"""
