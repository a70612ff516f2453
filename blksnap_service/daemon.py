# SPDX-License-Identifier: GPL-2.0-or-later
"""The program blksnapd: options, directories, start in the right order, a clean stop.

Stopping it, also with SIGKILL, stops no I/O: the data path goes on and is found again. It ends with status 0 when told to
stop, 1 when it cannot start or loses its bus, 2 for bad options; each with one line that says why.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import stat
import sys
from collections.abc import Sequence
from pathlib import Path

from blksnap_service import __version__, boot, errors, udevfiles
from blksnap_service.authority import Authority, OwnerAuthority
from blksnap_service.bus import paths, wire
from blksnap_service.bus.polkit import PolkitAuthority
from blksnap_service.bus.tree import Tree, bus_id
from blksnap_service.catalogue import Catalogue
from blksnap_service.datapath.process import Datapath, check_socket_paths, find_binary
from blksnap_service.persistent import SYSTEM_DIR, Record, Records
from blksnap_service.service import Service
from blksnap_service.udev import BlockDevices

_log = logging.getLogger("blksnapd")

SYSTEM_STATE_DIR = Path("/var/lib/blksnap")
SYSTEM_RUNTIME_DIR = Path("/run/blksnap")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the service until it is told to stop; returns the exit status."""
    options = _options(arguments)
    logging.basicConfig(
        stream=sys.stderr, level=options.log_level.upper(), format="blksnapd: %(levelname)s: %(message)s"
    )
    try:
        asyncio.run(_attach_at_boot(options) if options.attach_at_boot else _run(options))
    except errors.BlksnapError as error:
        _log.critical("%s", error)
        return 1
    return 0


async def _run(options: argparse.Namespace) -> None:
    """Serve until SIGTERM or SIGINT. Raises ``errors.BlksnapError`` when that is not possible (any more)."""
    os.umask(0o077)
    runtime_dir = _absolute(options.runtime_dir)
    state_dir = _absolute(options.state_dir)
    check_socket_paths(runtime_dir)
    datapath = _datapath(options, runtime_dir)
    # The data path inherits it and outlives this process: no file system is to be kept from being unmounted.
    os.chdir("/")
    _make_private(runtime_dir, "runtime")
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    with Catalogue(state_dir) as catalogue:
        storage_directory = state_dir / "storage"
        _make_private(storage_directory, "difference storage")
        connection = await wire.connect(options.bus)
        try:
            publisher = wire.Publisher(connection, paths.ROOT, wire.load_interfaces())
            tree = Tree(publisher, connection)
            records = Records(_absolute(options.persistent_dir))
            blocks = BlockDevices(runtime_dir / udevfiles.DIRECTORY, records)
            service = Service(catalogue, datapath, blocks, storage_directory, tree, records)
            try:
                identity = await bus_id(connection)
                tree.serve(service, _authority(options, connection), identity)
                await service.start(identity)
                try:
                    await connection.request_name(paths.BUS_NAME)
                except errors.BlksnapError:
                    await datapath.stop_if_started_for_nothing()
                    raise
                _log.info("ready on %s", options.bus)
                await _serve(service, connection, stop)
                if options.bus == "system" and await _machine_stops(connection):
                    await _end_snapshots(service)
                await publisher.stop()
            finally:
                tree.close()
                service.close()
        finally:
            connection.close()


def _datapath(options: argparse.Namespace, runtime_dir: Path) -> Datapath:
    """Return the data path that was asked for. Raises ``errors.NotAvailable`` when it is to be started and is not there."""
    if options.connect_only:
        return Datapath(runtime_dir, connect_only=True)
    return Datapath(runtime_dir, find_binary(options.datapath and _absolute(options.datapath)))


def _authority(options: argparse.Namespace, connection: wire.Connection) -> Authority:
    return OwnerAuthority() if options.authority == "owner" else PolkitAuthority(connection)


async def _attach_at_boot(options: argparse.Namespace) -> None:
    """Track one device without a bus. Raises ``errors.BlksnapError``."""
    os.umask(0o077)
    runtime_dir, state_dir = _absolute(options.runtime_dir), _absolute(options.state_dir)
    records = Records(_absolute(options.persistent_dir))
    ours = runtime_dir / udevfiles.DIRECTORY

    async def track(catalogue: Catalogue, record: Record) -> None:
        datapath = _datapath(options, runtime_dir)
        _make_private(runtime_dir, "runtime")
        service = Service(
            catalogue,
            datapath,
            BlockDevices(ours, records),
            state_dir / "storage",
            boot.Silence(),
            records,
        )
        try:
            await service.attach_recorded(record)
        finally:
            service.close()

    await boot.attach(
        options.attach_at_boot, records, BlockDevices(ours, records), lambda: Catalogue(state_dir), track
    )


async def _machine_stops(connection: wire.Connection) -> bool:
    """Whether it is not this service alone that is to stop, as far as systemd says."""
    names = ["org.freedesktop.systemd1.Manager", "SystemState"]
    with contextlib.suppress(errors.BlksnapError):
        (state,) = await connection.call(
            "org.freedesktop.systemd1",
            "/org/freedesktop/systemd1",
            "org.freedesktop.DBus.Properties",
            "Get",
            "ss",
            names,
            timeout=5,
        )
        return bool(state.value == "stopping")
    return False


async def _end_snapshots(service: Service) -> None:
    """End all: none outlives the machine, and while one has a file its storage's file system cannot be unmounted."""
    for one in service.snapshots:
        try:
            await service.snapshots.destroy(one)
        except errors.BlksnapError as error:
            _log.warning("snapshot %s ends with the machine, not before: %s", one.id, error)


async def _serve(service: Service, connection: wire.Connection, stop: asyncio.Event) -> None:
    """Return when ``stop`` is set; raise what ends the bus or the service before."""
    tasks = [
        asyncio.create_task(stop.wait(), name="stop"),
        asyncio.create_task(connection.wait_disconnected(), name="bus"),
        asyncio.create_task(service.run(), name="service"),
    ]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError, errors.NotAvailable):
                await task


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    root = os.geteuid() == 0
    parser = argparse.ArgumentParser(
        prog="blksnapd",
        description="Tracks what changes on block devices and image files, and takes snapshots of them, for D-Bus clients.",
    )
    parser.add_argument("--version", action="version", version=f"blksnapd {__version__}")
    parser.add_argument(
        "--bus",
        default="system",
        metavar="system|session|ADDRESS",
        help="the message bus (default: %(default)s)",
    )
    parser.add_argument(
        "--authority",
        choices=("polkit", "owner"),
        default="polkit",
        help="who may do what: as polkit says (root only where there is none), or owner: the user this service runs as (default: %(default)s)",
    )
    parser.add_argument(
        "--state-dir",
        type=Path,
        default=SYSTEM_STATE_DIR if root else _user_dir("XDG_STATE_HOME", ".local/state"),
        help="what survives a restart (default: %(default)s)",
    )
    parser.add_argument(
        "--runtime-dir",
        type=Path,
        default=SYSTEM_RUNTIME_DIR if root else _user_dir("XDG_RUNTIME_DIR", ".cache"),
        help="sockets; their names are part of NBD URIs (default: %(default)s)",
    )
    parser.add_argument(
        "--persistent-dir",
        type=Path,
        default=SYSTEM_DIR if root else _user_dir("XDG_CONFIG_HOME", ".config") / "attach",
        help="which block devices are tracked after every boot (default: %(default)s)",
    )
    parser.add_argument(
        "--attach-at-boot",
        default="",
        metavar="NAME",
        help="track that one of them, without a message bus, and end; for blksnap-attach@NAME.service",
    )
    parser.add_argument(
        "--datapath", type=Path, metavar="PATH", help="the program blksnap-datapath (default: searched)"
    )
    parser.add_argument(
        "--connect-only",
        action="store_true",
        help="never start blksnap-datapath: a unit of its own does",
    )
    parser.add_argument(
        "--log-level",
        choices=("debug", "info", "warning", "error"),
        default="info",
        help="default: %(default)s",
    )
    return parser.parse_args(arguments)


def _user_dir(variable: str, otherwise: str) -> Path:
    base = os.environ.get(variable)
    return (Path(base) if base else Path.home() / otherwise) / "blksnap"


def _absolute(path: Path) -> Path:
    # Links stay as given: what is shown to users is what they chose.
    return Path.cwd() / path


def _make_private(directory: Path, what: str) -> None:
    """Create a directory if need be, and check that others cannot write it. Raises ``errors.NotAvailable``."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = directory.stat()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise errors.NotAvailable(f"the {what} directory {directory} cannot be used: {reason}") from error
    if not stat.S_ISDIR(status.st_mode) or not os.access(directory, os.W_OK | os.X_OK):
        raise errors.NotAvailable(
            f"the {what} directory {directory} cannot be used: it is not a writable directory"
        )
    if status.st_mode & 0o022 or status.st_uid not in {0, os.geteuid()}:
        raise errors.NotAvailable(f"the {what} directory {directory} cannot be used: others may write to it")
