# SPDX-License-Identifier: GPL-2.0-or-later
"""Tracking through the data path's NBD server: the origin is used by way of ``nbd+unix://``, never directly.

Works without privileges for image files. A block device can be served too when the service may open it exclusively.
"""
