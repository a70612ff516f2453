# SPDX-License-Identifier: GPL-2.0-or-later
"""A data path under its holder, that can be killed and comes back, and clients of others that connect again.

qemu-nbd stands between: its NBD driver waits for a server that went away and sends again what was not answered, which
fio's does not. What has to be true after a death is the tests' business.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tests.nbd.control import Control, HungUp
from tests.nbd.datapath import Datapath, Origin, uri_of

PATIENCE_S = 30.0


class Held(Datapath):
    """A data path with a holder; ``process`` is the holder."""

    def __init__(self, directory: Path) -> None:
        """Start the holder and wait until the data path is ready."""
        super().__init__(directory, "--hold")
        self.deaths = 0

    def pid(self) -> int:
        """Return the process that serves."""
        return int((self.directory / "datapath.pid").read_text())

    def slay(self) -> int:
        """Kill the process that serves, as nothing can be prepared for; returns its pid."""
        pid = self.pid()
        os.kill(pid, signal.SIGKILL)
        self.deaths += 1
        return pid

    def again(self) -> None:
        """Connect to the process that follows, however long it takes to come."""
        self.control.close()
        end = time.monotonic() + PATIENCE_S
        while True:
            control = Control(self.control_socket)
            try:
                hello = control.call("hello", protocol=1)
            except (HungUp, OSError):
                # It was the dead one that had taken the call.
                control.close()
                assert time.monotonic() < end, self.story()
                continue
            assert hello["survives"]
            self.control = control
            return

    def die(self) -> None:
        """Kill the process that serves and connect to the one that follows."""
        self.slay()
        self.again()

    def kill(self) -> None:
        """Leave nothing running: first the holder, or it would start another."""
        pid = self.pid()
        super().kill()
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def kept(self) -> int:
        """Return how many descriptors the holder has."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))


class Patient(Origin):
    """The same origin behind a client that waits: what connects to it never sees a death."""

    def __init__(self, datapath: Datapath, origin: Origin, socket: Path) -> None:
        """Name its socket."""
        super().__init__(datapath, origin.name, origin.path)
        self._socket = socket

    @property
    def socket(self) -> Path:
        """The socket of the client between."""
        return self._socket

    def uri(self, export: str = "") -> str:
        """Return the URI of the origin; there are no images here."""
        assert not export
        return uri_of(self._socket)


@contextlib.contextmanager
def patient(datapath: Datapath, origin: Origin) -> Iterator[Patient]:
    """Run qemu-nbd between a client and ``origin``."""
    socket = datapath.directory / f"patient-{origin.name}.sock"
    options = (
        f"driver=nbd,server.type=unix,server.path={origin.socket},reconnect-delay={PATIENCE_S:.0f},"
        f"open-timeout={PATIENCE_S:.0f}"
    )
    with (datapath.directory / "patient.log").open("ab") as log:
        process = subprocess.Popen(
            ["qemu-nbd", "--image-opts", options, "-k", socket, "--persistent", "--shared=0"], stderr=log
        )
    try:
        end = time.monotonic() + PATIENCE_S
        while not socket.exists():
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.01)
        yield Patient(datapath, origin, socket)
        assert process.poll() is None
    finally:
        process.terminate()
        process.wait()
