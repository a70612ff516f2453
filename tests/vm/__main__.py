# SPDX-License-Identifier: GPL-2.0-or-later
"""Run a pytest selection, or a shell command, on a stock kernel: `python -m tests.vm 6.12 -- tests/vm/guest -k brd`.

The exit status is that of the inner run; 124 when the time limit ended it, 125 when the guest died.
"""

import argparse
import signal
import sys
import time
from pathlib import Path

from tests.vm.errors import VmError
from tests.vm.kernels import OWN, OWN_VARIABLE, SUITES
from tests.vm.machine import DEFAULT_DISKS, DIED, TIMED_OUT, Disk, Guest, Machine
from tests.vm.selection import inner_pytest

UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_size(text: str) -> int:
    """`4096`, `512M` or `8G` in bytes. Raises ValueError for anything else."""
    unit = UNITS.get(text[-1:].upper(), 1)
    return int(text if unit == 1 else text[:-1]) * unit


def parse_disk(text: str) -> Disk:
    """`SIZE` is a fresh disk, `FILE` one that is there, `FILE:SIZE` one that is made when it is missing."""
    path, _, size = text.rpartition(":")
    try:
        size_bytes = parse_size(size)
    except ValueError:
        if not Path(text).exists():
            raise argparse.ArgumentTypeError(f"{text} is neither a file nor a size") from None
        return Disk(path=Path(text).resolve())
    return Disk(size_bytes, Path(path).resolve() if path else None)


def main(arguments: list[str]) -> int:
    """Parse, boot, copy the output, pass the exit status on."""
    # argparse takes what follows options for none of its positionals (bpo-14191): what is behind -- is not shown to it.
    end = arguments.index("--") if "--" in arguments else len(arguments)
    parser = _parser()
    options = parser.parse_args(arguments[:end])
    selection = arguments[end + 1 :] or ["tests/vm/guest"]
    if options.shell is not None and end < len(arguments):
        parser.error("either --shell or arguments for pytest")
    started = time.monotonic()
    machine = Machine(
        series=options.kernel,
        memory_mib=options.memory >> 20,
        cpus=options.cpus,
        time_limit_s=options.time_limit,
        append=options.append,
        qemu=tuple(options.qemu),
        disks=tuple(options.disk) or DEFAULT_DISKS,
    )
    command = options.shell or f"exec {inner_pytest(selection, color=sys.stdout.isatty())}"
    # The first line is the guest's own, so that the time to the first test can be told from the boot.
    with Guest(machine, f"echo; {command}") as guest:
        for number, line in enumerate(guest.output):
            if number:
                print(line, flush=True)
            else:
                _say(f"linux {guest.kernel.release}, up after {time.monotonic() - started:.1f} s")
        status = guest.wait()
        if status == TIMED_OUT:
            _say(f"ended after {machine.time_limit_s:.0f} s, the time limit")
        elif status == DIED:
            _say("the guest died; the end of its console:")
            _say("\n".join(guest.console.read_text(errors="replace").splitlines()[-40:]))
        if status:
            _say(f"kept {guest.console}")
    return status


def _say(text: str) -> None:
    print(f"vm: {text}", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.vm",
        usage="%(prog)s KERNEL [OPTION …] [--shell COMMAND | -- PYTEST-ARGUMENT …]",
        description=__doc__,
        allow_abbrev=False,
    )
    parser.add_argument(
        "kernel", choices=(*SUITES, OWN), help=f"which stock kernel, or {OWN}: that of ${OWN_VARIABLE}"
    )
    parser.add_argument(
        "--memory", type=parse_size, default=4 << 30, metavar="SIZE", help="of the guest (4G)"
    )
    parser.add_argument("--cpus", type=int, default=2, metavar="N", help="of the guest (2)")
    parser.add_argument(
        "--disk",
        type=parse_disk,
        action="append",
        default=[],
        metavar="SIZE|FILE[:SIZE]",
        help="a disk, empty or kept; may be repeated (8G and 8G)",
    )
    parser.add_argument(
        "--time-limit", type=float, default=900, metavar="SECONDS", help="of the whole run (900)"
    )
    parser.add_argument("--append", default="", metavar="WORDS", help="for the kernel's command line")
    parser.add_argument(
        "--qemu", action="append", default=[], metavar="WORD", help="for qemu's; may be repeated"
    )
    parser.add_argument("--shell", metavar="COMMAND", help="run this instead of pytest")
    return parser


if __name__ == "__main__":
    # timeout(1) and CI end it like this; a guest's disks may be gigabytes, and go away only when its block is left.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        sys.exit(main(sys.argv[1:]))
    except VmError as error:
        _say(str(error))
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
