# SPDX-License-Identifier: GPL-2.0-or-later
"""``python -m blksnap_service`` and the script ``blksnapd``."""

from __future__ import annotations

import os
import sys


def main() -> int:
    """Run blksnapd; returns the exit status."""
    # Before numpy is loaded: its linear algebra, not used here, takes memory for a thread per processor.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # asyncio and hashlib load OpenSSL where it is there, a tenth of all memory used, and do without where it is not. None says
    # that it is not (library reference, sys.modules).
    sys.modules.update(dict.fromkeys(("ssl", "_hashlib")))  # type: ignore[arg-type]
    from blksnap_service import daemon

    return daemon.main()


if __name__ == "__main__":
    sys.exit(main())
