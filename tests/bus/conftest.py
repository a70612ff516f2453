# SPDX-License-Identifier: GPL-2.0-or-later
"""A private message bus of the system type, and a small service on it, once per D-Bus library."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.bus import publisher
from tests.bus.hostile import NO_OPTIONS, Caller

REPOSITORY = Path(__file__).parents[2]
NAME = "org.example.Hostile"
LIBRARIES = ["next", "fast"] if sys.version_info < (3, 15) else ["fast"]

# The limits are those of a system bus (32 MiB messages, 16 descriptors). Only calls without an answer are not
# limited to 128, so that a flood reaches the service: several connections could send as much.
CONFIG = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>system</type>
  <listen>unix:path={path}</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow user="*"/>
    <allow own="*"/>
    <deny send_type="method_call"/>
    <allow send_type="signal"/>
    <allow send_requested_reply="true" send_type="method_return"/>
    <allow send_requested_reply="true" send_type="error"/>
    <allow receive_type="method_call"/>
    <allow receive_type="method_return"/>
    <allow receive_type="error"/>
    <allow receive_type="signal"/>
    <allow send_destination="org.freedesktop.DBus"/>
    <allow send_destination="org.example.Hostile"/>
    <allow send_destination="org.example.Other"/>
  </policy>
  <limit name="max_replies_per_connection">50000</limit>
</busconfig>
"""


@dataclass
class Bus:
    """A running dbus-daemon."""

    address: str
    process: subprocess.Popen[str]


@dataclass
class Service:
    """A running publisher."""

    bus: Bus
    library: str
    process: subprocess.Popen[str]
    log: Path

    def caller(self) -> Caller:
        """Return a new caller of the service."""
        return Caller(self.bus.address, NAME, publisher.THING, publisher.INTERFACE)

    def resources(self) -> tuple[int, int]:
        """Return the number of open file descriptors and the resident KiB of the service."""
        with self.caller() as caller:
            answer = caller.call("Resources", "a{sv}", NO_OPTIONS)
            assert not answer.error, answer
            return answer.body[0], answer.body[1]

    def assert_alive(self) -> None:
        """Fail unless the service still answers others, and none of its code failed."""
        with self.caller() as caller:
            assert not caller.ping().error
        assert self.process.poll() is None
        assert "Traceback" not in self.log.read_text(encoding="utf-8")


def end(process: subprocess.Popen[str]) -> None:
    """Terminate a process of ours and wait for it."""
    process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout:
        process.stdout.close()


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory any user can enter, with a path short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="blksnap-bus-") as name:
        path = Path(name)
        path.chmod(0o755)
        yield path


@pytest.fixture
def bus(directory: Path) -> Iterator[Bus]:
    """A private dbus-daemon as a system bus is configured."""
    config = directory / "bus.conf"
    config.write_text(CONFIG.format(path=directory / "bus"), encoding="utf-8")
    with (directory / "bus.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            ["dbus-daemon", f"--config-file={config}", "--nofork", "--nopidfile", "--print-address=1"],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        assert address, (directory / "bus.log").read_text(encoding="utf-8")
        yield Bus(address.split(",")[0], process)
    finally:
        end(process)


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest) -> str:
    """The D-Bus library the service uses."""
    return str(request.param)


StartService = Callable[..., Service]


@pytest.fixture
def start_service(bus: Bus, library: str, directory: Path) -> Iterator[StartService]:
    """Start publishers: `start_service(name=NAME, fd_limit=1024)`; they are ended after the test."""
    with contextlib.ExitStack() as stack:

        def start(name: str = NAME, fd_limit: int = 1024) -> Service:
            log = directory / f"{name}.log"
            with log.open("w", encoding="utf-8") as stream:
                process = subprocess.Popen(
                    [sys.executable, "-m", "tests.bus.publisher", bus.address, name, str(fd_limit)],
                    cwd=REPOSITORY,
                    env=os.environ | {"BLKSNAP_DBUS_LIBRARY": library},
                    stdout=subprocess.PIPE,
                    stderr=stream,
                    text=True,
                )
            stack.callback(end, process)
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n", log.read_text(encoding="utf-8")
            return Service(bus, library, process, log)

        yield start


@pytest.fixture
def service(start_service: StartService) -> Service:
    """A publisher on the private bus."""
    return start_service()


@pytest.fixture
def caller(service: Service) -> Iterator[Caller]:
    """A caller of the service."""
    with service.caller() as one:
        yield one
