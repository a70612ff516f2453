# SPDX-License-Identifier: GPL-2.0-or-later
"""What becomes of an error nobody expected: a file for who will mend it, one line for who met it."""

from __future__ import annotations

import os
import tempfile
import traceback
from pathlib import Path


def record(error: BaseException) -> str:
    """
    Write the details of a defect to a file of the user's; gives the line to show.

    The file is `blksnap/defect.txt` in $XDG_STATE_HOME, or a new file where temporary files go when that
    cannot be written.
    """
    details = "".join(traceback.format_exception(error))
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    path = state / "blksnap" / "defect.txt"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(details, encoding="utf8")
    except OSError:
        descriptor, name = tempfile.mkstemp(prefix="blksnap-defect-", suffix=".txt")
        path = Path(name)
        with os.fdopen(descriptor, "w", encoding="utf8") as file:
            file.write(details)
    return f"this program met a defect of its own ({type(error).__name__}); please report it with {path}"
