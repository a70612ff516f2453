# SPDX-License-Identifier: GPL-2.0-or-later
"""
`blksnapctl`: parses the command line, runs one command, turns errors into one line on stderr and an exit
status.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from blksnap_tui.client import Client
from blksnap_tui.defects import record
from blksnap_tui.errors import (
    BlksnapError,
    BusUnavailableError,
    GenerationChangedError,
    NotAuthorizedError,
    ServiceUnavailableError,
)
from blksnap_tui.units import parse_size
from blksnapctl import commands
from blksnapctl.output import say

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_UNREACHABLE = 3
EXIT_NOT_AUTHORIZED = 4
EXIT_GENERATION_CHANGED = 5
EXIT_INTERRUPTED = 130

EPILOG = """\
a DEVICE is a path (/dev/sda1, an added image file), a link to one, or its last part when that is unique.
a SIZE is bytes or a number with a unit: K M G T (or KiB …) are powers of 1024, KB MB GB TB powers of 1000.

exit status: 0 done, 1 the service refused or failed, 2 wrong arguments, 3 no service or no bus,
4 not authorized, 5 the history restarted (a full copy is needed), 130 interrupted.
"""

Command = Callable[[Client, argparse.Namespace], Coroutine[Any, Any, None]]


def size(text: str) -> int:
    """Parse a size for argparse, keeping the text of the mistake."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def byte_range(text: str) -> tuple[int, int]:
    """Parse OFFSET:LENGTH for argparse."""
    offset, colon, length = text.partition(":")
    if not colon:
        raise argparse.ArgumentTypeError(f"{text!r} is not OFFSET:LENGTH")
    pair = size(offset), size(length)
    if not pair[1]:
        raise argparse.ArgumentTypeError(f"{text!r} is empty")
    return pair


def number(text: str) -> int:
    """Parse a snapshot number for argparse, with or without the #."""
    digits = text.removeprefix("#")
    if not (digits.isascii() and digits.isdigit()) or int(digits) >= 1 << 32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a snapshot number")
    return int(digits)


def parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON document")
    device = argparse.ArgumentParser(add_help=False)
    device.add_argument("device", metavar="DEVICE")

    made = argparse.ArgumentParser(
        prog="blksnapctl",
        description="Track changes of block devices and take snapshots of them.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "--bus", default="system", metavar="BUS", help="system (default), session, or a D-Bus address"
    )
    verbs = made.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def verb(
        name: str, run: Command, text: str, *parents: argparse.ArgumentParser
    ) -> argparse.ArgumentParser:
        added = verbs.add_parser(
            name, parents=[common, *parents], help=text, description=text.capitalize() + "."
        )
        added.set_defaults(run=run)
        return added

    verb("status", commands.status, "show devices, trackers and snapshots")
    verb("add", commands.add, "make a device of an image file").add_argument("file", metavar="FILE")

    one = verb("attach", commands.attach, "start tracking a device", device)
    one.add_argument("--backend", default="", metavar="NAME", help="default: the best that can")
    one.add_argument("--block-size", type=size, default=0, metavar="SIZE", help="4K to 64M, a power of two")
    one.add_argument("--persistent", action="store_true", help="attach again at boot")

    one = verb("detach", commands.detach, "stop tracking a device", device)
    one.add_argument("--force", action="store_true", help="also with clients or snapshots")

    _snapshot_verbs(verbs, common)

    one = verb("changes", commands.changes, "print what changed since a snapshot: offset, length", device)
    one.add_argument("--since", type=number, required=True, metavar="N", help="the snapshot's number")
    one.add_argument("--generation", default="", metavar="UUID", help="the one N belongs to; else an error")
    _add_view(one, "taken")

    one = verb("map", commands.map_, "copy the map, a byte per block", device)
    one.add_argument("-o", "--output", required=True, metavar="FILE", help="where to; - is stdout")
    _add_view(one, "taken")

    verb("info", commands.info, "show all about a device", device)

    one = verb("mark", commands.mark, "mark byte ranges as changed", device)
    one.add_argument("range", nargs="*", type=byte_range, metavar="OFFSET:LENGTH")
    one.add_argument("--all", action="store_true", help="everything: the next increment is a full copy")

    one = verb("export", commands.export, "serve an image over NBD and print the URI")
    one.add_argument("image", metavar="SNAPSHOT[:DEVICE]")
    return made


def _snapshot_verbs(verbs: Any, common: argparse.ArgumentParser) -> None:
    text = "create, list, destroy"
    snapshot = verbs.add_parser("snapshot", help=text, description=f"Snapshots: {text}.")
    acts = snapshot.add_subparsers(title="commands", metavar="COMMAND", required=True)

    one = acts.add_parser("create", parents=[common], help="take one, of all devices at one instant")
    one.set_defaults(run=commands.snapshot_create)
    one.add_argument("device", nargs="+", metavar="DEVICE")
    one.add_argument("--limit", type=size, default=0, metavar="SIZE", help="most bytes of difference storage")
    one.add_argument("--storage", default="", metavar="PATH", help="file, directory or device to keep it in")
    one.add_argument("--chunk-size", type=size, default=0, metavar="SIZE", help="unit of copy-before-write")
    one.add_argument("--description", default="", metavar="TEXT")
    one.add_argument("--attach", action="store_true", help="start tracking where it is not on")

    one = acts.add_parser("list", parents=[common], help="list them")
    one.set_defaults(run=commands.snapshot_list)

    one = acts.add_parser("destroy", parents=[common], help="destroy them and their images")
    one.set_defaults(run=commands.snapshot_destroy)
    one.add_argument("snapshot", nargs="+", metavar="SNAPSHOT")


def _add_view(command: argparse.ArgumentParser, default: str) -> None:
    command.add_argument(
        "--view",
        choices=("taken", "live"),
        default=default,
        help=f"the map as of the last snapshot, or as it is being written (default {default})",
    )


async def _run(options: argparse.Namespace) -> None:
    async with Client(options.bus) as client:
        await options.run(client, options)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; gives the exit status (see EPILOG)."""
    made = parser()
    options = made.parse_args(arguments)
    if options.run is commands.mark and bool(options.range) == options.all:
        made.error("mark takes ranges (OFFSET:LENGTH) or --all")
    try:
        asyncio.run(_run(options))
        sys.stdout.flush()
    except BlksnapError as error:
        say(str(error))
        return _status_of(error)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read us has enough; Python would complain again when it flushes at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except OSError as error:
        say(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        return EXIT_FAILED
    except Exception as error:  # noqa: BLE001 - the edge: a traceback helps nobody who only wanted a list
        say(record(error))
        return EXIT_FAILED
    return EXIT_OK


def _status_of(error: BlksnapError) -> int:
    match error:
        case BusUnavailableError() | ServiceUnavailableError():
            return EXIT_UNREACHABLE
        case NotAuthorizedError():
            return EXIT_NOT_AUTHORIZED
        case GenerationChangedError():
            return EXIT_GENERATION_CHANGED
        case _:
            return EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
