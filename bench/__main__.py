# SPDX-License-Identifier: GPL-2.0-or-later
"""
`make bench` or `python -m bench [PART…]`: measure, print the table of docs/performance.md, say which bars are met.

Everything it makes is in one directory that is removed at the end, with every process ended. The status is 0 when all
bars are met, 1 when one is missed, 2 when it could not measure.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench.datapath_memory import datapath_memory
from bench.filtermap import filter_map
from bench.firsttouch import first_touch
from bench.maps import maps
from bench.nbd import nbd
from bench.processes import Gone
from bench.report import Figure, as_json, document, surroundings
from bench.service import service
from bench.ublk import ublk
from blksnap_service.datapath.process import find_binary
from blksnap_service.errors import BlksnapError
from blksnap_tui.errors import BlksnapError as ClientError
from demo.programs import DemoError

PARTS = ("nbd", "cow", "maps", "filter", "service", "memory")
UBLK = "ublk"
"""Not one of all: it boots a guest on a kernel that has to be fetched, and exact figures need no second reading."""
KERNELS = ("6.12", "7")
ROUNDS, UBLK_ROUNDS = 12, 3
_BUILT = Path(__file__).resolve().parents[1] / "datapath" / "target" / "release" / "blksnap-datapath"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the parts asked for; returns the exit status."""
    options = _options(arguments)
    figures: list[Figure] = []
    status = 0
    try:
        with tempfile.TemporaryDirectory(prefix="bsbench-", dir=options.directory) as name:
            directory = Path(name)
            around = surroundings(directory)
            asyncio.run(_measure(options, directory, figures))
    except (asyncio.CancelledError, KeyboardInterrupt):
        print("bench: told to stop", file=sys.stderr)
        status = 2
    except (DemoError, Gone, BlksnapError, ClientError, OSError) as error:
        print(f"bench: {error}", file=sys.stderr)
        status = 2
    if not figures:
        return status
    print(document(figures, around))
    if options.json:
        options.json.write_text(json.dumps(as_json(figures, around), indent=1, ensure_ascii=False) + "\n")
    missed = [figure for figure in figures if figure.met is False]
    print(f"\n{sum(figure.met is True for figure in figures)} bars met, {len(missed)} missed")
    return status or int(bool(missed))


async def _measure(options: argparse.Namespace, directory: Path, figures: list[Figure]) -> None:
    """Measure part by part into `figures`: what is there stays when a later part fails."""
    # As Ctrl-C: the servers are in sessions of their own and must be ended from here.
    if (task := asyncio.current_task()) is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    # A copy: the sources may be built again meanwhile, and a benchmark compares one program with itself.
    binary = directory / "blksnap-datapath"
    shutil.copy2(options.datapath or (_BUILT if _BUILT.is_file() else find_binary()), binary)
    os.environ["BLKSNAP_DATAPATH"] = str(binary)
    rounds = options.rounds or ROUNDS
    for part in options.part or PARTS:
        print(f"bench: {part}", file=sys.stderr)
        match part:
            case "nbd":
                figures += await nbd(binary, directory, rounds, options.attempts)
            case "cow":
                figures += await first_touch(binary, directory, rounds)
            case "maps":
                figures += maps(rounds)
            case "filter":
                figures += await filter_map(directory, rounds)
            case "service":
                figures += await service(directory, rounds)
            case "memory":
                figures += await datapath_memory(binary, directory)
            case "ublk":
                figures += await ublk(binary, options.kernel or KERNELS, options.rounds or UBLK_ROUNDS)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench", description="Measures blksnap against its bars.")
    # argparse checks an empty list against the choices too: no `choices` here.
    parser.add_argument(
        "part",
        nargs="*",
        metavar="PART",
        help=f"one of {', '.join(PARTS)} (default: all, in this order), or {UBLK}",
    )
    parser.add_argument(
        "--kernel",
        choices=KERNELS,
        action="append",
        help=f"of {UBLK}: the kernel to measure on; may be repeated (default: all)",
    )
    parser.add_argument(
        "--rounds", type=int, help=f"readings of each figure (default: {ROUNDS}; of {UBLK} {UBLK_ROUNDS})"
    )
    parser.add_argument(
        "--attempts",
        type=int,
        default=3,
        help="how often a round of nbd is tried when others use the machine (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")
    parser.add_argument(
        "--directory",
        type=Path,
        default=Path("/var/tmp"),  # noqa: S108 - a private directory is made in it; /tmp is memory on many machines
        help="where the image files go: 2.5 GB, on a file system that knows holes (default: %(default)s)",
    )
    parser.add_argument("--datapath", type=Path, metavar="PATH", help="the program blksnap-datapath")
    options = parser.parse_args(arguments)
    if unknown := set(options.part) - {*PARTS, UBLK}:
        parser.error(f"there is no part {', '.join(sorted(unknown))}; there are: {', '.join((*PARTS, UBLK))}")
    if (options.rounds is not None and options.rounds < 1) or options.attempts < 1:
        parser.error("at least one round and one attempt are needed")
    return options


if __name__ == "__main__":
    sys.exit(main())
