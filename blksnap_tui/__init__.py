# SPDX-License-Identifier: GPL-2.0-or-later
"""
The terminal program of blksnap, and the client module it shares with `blksnapctl`.

Importing this package imports neither Textual nor a D-Bus library; `client`, `model` and `errors` never
import Textual.
"""
