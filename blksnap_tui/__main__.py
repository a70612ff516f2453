# SPDX-License-Identifier: GPL-2.0-or-later
"""`blksnap-tui`: what changes where, in a terminal. Textual is imported only when it is going to draw."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

EXIT_OK, EXIT_FAILED = 0, 1


def parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    made = argparse.ArgumentParser(
        prog="blksnap-tui", description="Show what changes on block devices, and their snapshots."
    )
    made.add_argument(
        "--bus",
        default="system",
        metavar="BUS",
        help="the message bus: system (default), session, or a D-Bus address",
    )
    made.add_argument(
        "--once", action="store_true", help="print the whole state once and leave, with or without a terminal"
    )
    made.add_argument("--json", action="store_true", help="with --once: print JSON")
    made.add_argument(
        "--read-only", action="store_true", help="only look: the keys that change something are gone"
    )
    made.add_argument("--no-mouse", action="store_true", help="leave the mouse to the terminal")
    made.add_argument(
        "--rate",
        type=float,
        default=2.0,
        metavar="HZ",
        help="look at the map this often: 0.1 to 10, default 2",
    )
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; gives the exit status: 0, 1 when the service or its bus cannot be reached, 2 for wrong arguments."""
    made = parser()
    options = made.parse_args(arguments)
    if options.json and not options.once:
        made.error("--json goes with --once")
    if not 0.1 <= options.rate <= 10:
        made.error(f"--rate {options.rate:g} is not between 0.1 and 10")
    if options.once:
        from blksnap_tui.once import print_state

        return print_state(options.bus, as_json=options.json)
    if not sys.stdout.isatty():
        print("blksnap-tui: not a terminal; --once prints the state without one", file=sys.stderr)
        return EXIT_FAILED
    from blksnap_tui.app import BlksnapApp

    # A library's remark on stderr would land in the middle of the screen, which Textual draws there.
    logging.getLogger().addHandler(logging.NullHandler())
    app = BlksnapApp(options.bus, rate_hz=options.rate, read_only=options.read_only)
    app.run(mouse=not options.no_mouse)
    return app.return_code or EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
