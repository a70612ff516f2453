# SPDX-License-Identifier: GPL-2.0-or-later
"""The ways to track a device, one package each; see ``trackers`` for what they implement. They know nothing of the bus."""
