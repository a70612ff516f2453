# SPDX-License-Identifier: GPL-2.0-or-later
"""`blksnap-tui`: what changes where, in a terminal. Textual is imported only when it is going to draw."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from blksnap_tui.recording import Recorder, RecordingError, Replay
from blksnap_tui.settings import (
    LEAST_RATE_HZ,
    MOST_RATE_HZ,
    Settings,
    SettingsError,
    load,
    settings_path,
)

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
        "--rate", type=float, metavar="HZ", help="look at the map this often: 0.1 to 10, default 2"
    )
    made.add_argument(
        "--config", type=Path, metavar="FILE", help="settings; default ~/.config/blksnap/tui.toml"
    )
    film = made.add_mutually_exclusive_group()
    film.add_argument("--record", type=Path, metavar="FILE", help="write what is seen to a new file")
    film.add_argument("--replay", type=Path, metavar="FILE", help="play such a file; no service is needed")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; gives the exit status: 0, 1 when something cannot be reached or read, 2 for wrong arguments."""
    made = parser()
    options = made.parse_args(arguments)
    if options.json and not options.once:
        made.error("--json goes with --once")
    if options.rate is not None and not LEAST_RATE_HZ <= options.rate <= MOST_RATE_HZ:
        made.error(f"--rate {options.rate:g} is not between 0.1 and 10")
    if options.once:
        from blksnap_tui.once import print_state

        return print_state(options.bus, as_json=options.json)
    if not sys.stdout.isatty():
        print("blksnap-tui: not a terminal; --once prints the state without one", file=sys.stderr)
        return EXIT_FAILED
    try:
        settings = _settings(options)
        return _show(options, settings)
    except (SettingsError, RecordingError) as error:
        print(f"blksnap-tui: {error}", file=sys.stderr)
        return EXIT_FAILED


def _settings(options: argparse.Namespace) -> Settings:
    """Put the command line before the file of settings."""
    if options.config is not None and not options.config.exists():
        raise SettingsError(f"{options.config}: there is no such file")
    settings = load(options.config or settings_path())
    return replace(
        settings,
        rate_hz=options.rate or settings.rate_hz,
        mouse=settings.mouse and not options.no_mouse,
        read_only=settings.read_only or options.read_only or options.replay is not None,
    )


def _show(options: argparse.Namespace, settings: Settings) -> int:
    """Draw, until it is enough."""
    from blksnap_tui.app import BlksnapApp, wall_clock_us

    # A library's remark on stderr would land in the middle of the screen, which Textual draws there.
    logging.getLogger().addHandler(logging.NullHandler())
    if options.replay is not None:
        film = Replay(options.replay)
        app = BlksnapApp(
            settings=settings,
            make_client=film.client,
            now_us=film.clock_us,
            source=f"recording {options.replay.name}",
        )
        app.background = film.play
    elif options.record is not None:
        recorder = Recorder(options.record)
        app = BlksnapApp(options.bus, settings=settings, now_us=wall_clock_us, recorder=recorder)
    else:
        app = BlksnapApp(options.bus, settings=settings)
    app.run(mouse=settings.mouse)
    return app.return_code or EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
