# SPDX-License-Identifier: GPL-2.0-or-later
"""Style sheets of the screens; a package so that they are installed with the program."""
