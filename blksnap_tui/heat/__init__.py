# SPDX-License-Identifier: GPL-2.0-or-later
"""
The heat map: where its cells lie (`grid`), what they look like (`ramp`), and the widget that draws them.
"""
