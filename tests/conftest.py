# SPDX-License-Identifier: GPL-2.0-or-later
"""What holds for every test: property tests have no time limit of their own, since a busy machine is not a defect."""

from __future__ import annotations

import os

# A guest has no property tests, and importing Hypothesis takes seconds there.
if "BLKSNAP_VM_GUEST" not in os.environ:
    from hypothesis import settings

    settings.register_profile("blksnap", deadline=None)
    settings.load_profile("blksnap")
