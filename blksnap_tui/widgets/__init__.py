# SPDX-License-Identifier: GPL-2.0-or-later
"""The parts of the main screen. Each is given values to show and knows nothing of where they come from."""
