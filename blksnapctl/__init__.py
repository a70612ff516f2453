# SPDX-License-Identifier: GPL-2.0-or-later
"""
`blksnapctl`, the command line of blksnap: one call of the service per command, on the client module of the
terminal program.
"""
