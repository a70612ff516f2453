# SPDX-License-Identifier: GPL-2.0-or-later
"""The service's face on D-Bus.

What it is: `wire` (connection, values, dispatch by the interface XML), `options` (checking a{sv}), and one module per
interface. The only package that imports a D-Bus library. What it is not: the place where anything is decided about
trackers or snapshots.
"""
