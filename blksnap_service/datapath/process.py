# SPDX-License-Identifier: GPL-2.0-or-later
"""Finds, adopts or starts the data path process.

The process outlives the service: it is started detached (own session, own standard streams) and never killed from here.
What is started is a holder, which starts the data path itself, and again when that dies. Of a runtime directory there
is one; its lock decides who is first, the data path's control socket is the way in. Under systemd a unit does all that
before the service starts. What is served is the business of ``client``.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from blksnap_service import errors
from blksnap_service.datapath.client import DatapathClient
from blksnap_service.datapath.framing import UNIX_PATH_MAX_BYTES
from blksnap_service.datapath.model import Hello
from blksnap_service.fds import OwnedFd

if TYPE_CHECKING:
    from collections.abc import Callable

    from blksnap_service.datapath.model import Event

_log = logging.getLogger(__name__)

BINARY = "blksnap-datapath"
SOCKET = "datapath.sock"
LOCK = "datapath.pid"
LOG = "datapath.log"
READY_TIMEOUT_S = 15.0
_POLL_S = 0.05
_EXIT_LOCKED = 3
"""Exit status of a second data path on one runtime directory."""
ORIGIN_NAME_MAX = 29
"""Characters in the longest name of an origin this service makes (``devices.Device.origin``)."""
_LONGEST_SOCKET_NAME = "nbd/" + "x" * ORIGIN_NAME_MAX + ".sock"


def find_binary(explicit: Path | None = None) -> Path:
    """Return the data path program.

    Looks at ``explicit``, the environment's ``BLKSNAP_DATAPATH``, beside the Python interpreter (a virtual
    environment), in ``PATH`` and in the build directory of a source checkout. Raises ``errors.NotAvailable``.
    """
    named = explicit or (Path(value) if (value := os.environ.get("BLKSNAP_DATAPATH")) else None)
    if named is not None:
        if os.access(named, os.X_OK) and named.is_file():
            return named.absolute()
        raise errors.NotAvailable(f"the data path program {named} is missing or not executable")
    checkout = Path(__file__).resolve().parents[2]
    candidates = [Path(sys.executable).parent / BINARY]
    if (found := shutil.which(BINARY)) is not None:
        candidates.append(Path(found))
    if (checkout / "datapath" / "Cargo.toml").is_file():
        candidates += [
            checkout / "target" / "release" / BINARY,
            checkout / "datapath" / "target" / "release" / BINARY,
        ]
    for candidate in candidates:
        if os.access(candidate, os.X_OK) and candidate.is_file():
            return candidate.absolute()
    raise errors.NotAvailable(
        f"{BINARY} is not installed: not beside {sys.executable} and not in PATH; name it with --datapath"
    )


def check_socket_paths(runtime_dir: Path) -> None:
    """Raise ``errors.InvalidArgument`` when sockets in ``runtime_dir`` would have names too long for unix(7)."""
    longest = len(os.fsencode(runtime_dir / _LONGEST_SOCKET_NAME))
    if longest > UNIX_PATH_MAX_BYTES:
        allowed = UNIX_PATH_MAX_BYTES - len(_LONGEST_SOCKET_NAME) - 1
        raise errors.InvalidArgument(
            f"the runtime directory {runtime_dir} has a name of {len(os.fsencode(runtime_dir))} bytes; sockets in it"
            f" allow {allowed}: choose a shorter one with --runtime-dir"
        )


class Datapath:
    """The data path of one runtime directory: connected to a running one, or to one just started."""

    def __init__(self, runtime_dir: Path, binary: Path | None = None, *, connect_only: bool = False) -> None:
        """Name the directory; ``binary`` overrides the search. Nothing is started yet, with ``connect_only`` never."""
        self._runtime_dir = runtime_dir
        self._binary = binary
        self._connect_only = connect_only
        self._client: DatapathClient | None = None
        self._started = False
        self._trouble = "the service is not connected to the data path"

    @property
    def socket(self) -> Path:
        """The control socket."""
        return self._runtime_dir / SOCKET

    def origin_socket(self, origin: str) -> Path:
        """The NBD socket of an origin."""
        return self._runtime_dir / "nbd" / f"{origin}.sock"

    @property
    def trouble(self) -> str:
        """Why there is no data path now; empty while there is one."""
        return self._trouble

    @property
    def client(self) -> DatapathClient:
        """The connected client. Raises ``errors.NotAvailable`` while there is none."""
        if self._client is None:
            raise errors.NotAvailable(self._trouble)
        return self._client

    @property
    def hello(self) -> Hello:
        """What the data path said of itself when it was last asked."""
        return Hello.NOTHING if self._client is None else self._client.hello

    async def greet(self) -> bool:
        """Ask what the data path can do now; returns whether that is something else. Raises as a request does."""
        before = self.hello
        return await self.client.greet() != before

    async def stop_if_started_for_nothing(self) -> None:
        """End a data path that was started by this process and has nothing to serve; any other one goes on."""
        if self._client is not None and self._started:
            with contextlib.suppress(errors.BlksnapError):
                await self._client.stop()

    def close(self) -> None:
        """Disconnect; the process goes on."""
        if self._client is not None:
            self._client.close()
            self._client = None
            self._trouble = "the service is not connected to the data path"

    async def connect(self, on_event: Callable[[Event], None], on_lost: Callable[[str], None]) -> None:
        """Connect to the running data path, which is started if there is none.

        ``on_lost(reason)`` is called once when the connection ends by itself. Raises ``errors.NotAvailable`` when the data
        path cannot be found, started or reached.
        """

        def lost(reason: str) -> None:
            self._client = None
            self._trouble = f"the data path is gone: {reason}"
            on_lost(reason)

        try:
            self._client = await self._connected(on_event, lost)
        except errors.NotAvailable as error:
            self._trouble = str(error)
            raise
        self._trouble = ""

    async def _connected(
        self, on_event: Callable[[Event], None], on_lost: Callable[[str], None]
    ) -> DatapathClient:
        deadline = asyncio.get_running_loop().time() + READY_TIMEOUT_S
        while True:
            client = DatapathClient(on_event, on_lost)
            try:
                await client.open(self.socket)
            except (FileNotFoundError, ConnectionRefusedError):
                if asyncio.get_running_loop().time() > deadline:
                    raise errors.NotAvailable(
                        f"the data path in {self._runtime_dir} does not accept connections; its log says why"
                    ) from None
                if self._connect_only or self._is_held():
                    # It is starting, or starting again.
                    await asyncio.sleep(_POLL_S)
                else:
                    await self._start()
            except OSError as error:
                raise errors.NotAvailable(
                    f"the data path at {self.socket} cannot be reached: {(error.strerror or str(error)).lower()}"
                ) from error
            else:
                return client

    def _is_held(self) -> bool:
        """Whether somebody holds the lock: a holder, or a data path without one."""
        try:
            with OwnedFd(os.open(self._runtime_dir / LOCK, os.O_RDONLY | os.O_CLOEXEC)) as lock:
                fcntl.flock(lock.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    async def _start(self) -> None:
        """Start a holder and wait until its data path accepts, or until another one turns out to hold the lock."""
        binary = find_binary(self._binary)
        read_end, write_end = os.pipe2(os.O_CLOEXEC)
        with OwnedFd(read_end) as ready:
            with OwnedFd(write_end) as output:
                pid = self._spawn(binary, output)
            try:
                async with asyncio.timeout(READY_TIMEOUT_S):
                    line = await _first_line(ready)
            except TimeoutError:
                raise errors.NotAvailable(
                    f"{binary} was started but is not ready after {READY_TIMEOUT_S:.0f} s; see {self._log_path}"
                ) from None
        watch = asyncio.get_running_loop().create_task(_reap(pid))
        _reapers.add(watch)
        watch.add_done_callback(_reapers.discard)
        if line == b"ready":
            self._started = True
            _log.info("started the data path, pid %d", pid)
            return
        status = await watch
        if status == _EXIT_LOCKED:
            # Another service started one at the same time.
            await asyncio.sleep(_POLL_S)
            return
        raise errors.NotAvailable(
            f"{binary} ended with status {status} instead of getting ready: {self._last_log_line()}"
        )

    @property
    def _log_path(self) -> Path:
        return self._runtime_dir / LOG

    def _spawn(self, binary: Path, output: OwnedFd) -> int:
        try:
            log = os.open(
                self._log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
            )
        except OSError as error:
            raise errors.NotAvailable(
                f"{self._log_path} cannot be written: {(error.strerror or str(error)).lower()}"
            ) from error
        with OwnedFd(log) as stderr:
            try:
                # No object of subprocess or asyncio: those warn about, or kill, a child that outlives them.
                return os.posix_spawn(
                    binary,
                    [str(binary), "--hold", "--runtime-dir", str(self._runtime_dir)],
                    os.environ,
                    file_actions=[
                        (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
                        (os.POSIX_SPAWN_DUP2, output.fileno(), 1),
                        (os.POSIX_SPAWN_DUP2, stderr.fileno(), 2),
                    ],
                    setsid=True,
                    setsigmask=[],
                    setsigdef=[signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT],
                )
            except OSError as error:
                raise errors.NotAvailable(
                    f"{binary} cannot be started: {(error.strerror or str(error)).lower()}"
                ) from error

    def _last_log_line(self) -> str:
        with contextlib.suppress(OSError):
            lines = self._log_path.read_text(errors="replace").split("\n")
            for line in reversed(lines):
                if line.strip():
                    return line.strip()
        return f"nothing in {self._log_path}"


_reapers: set[asyncio.Task[int]] = set()


async def _first_line(fd: OwnedFd) -> bytes:
    """Return what arrives on a pipe up to the first newline or the end."""
    loop = asyncio.get_running_loop()
    os.set_blocking(fd.fileno(), False)
    data = b""
    while b"\n" not in data:
        readable = asyncio.Event()
        loop.add_reader(fd.fileno(), readable.set)
        try:
            await readable.wait()
        finally:
            loop.remove_reader(fd.fileno())
        part = os.read(fd.fileno(), 4096)
        if not part:
            break
        data += part
    return data.partition(b"\n")[0].strip()


async def _reap(pid: int) -> int:
    """Wait for a child of ours and return its exit status (negative: the signal), so that it leaves no zombie."""
    loop = asyncio.get_running_loop()
    with OwnedFd(os.pidfd_open(pid)) as process:
        ended = asyncio.Event()
        loop.add_reader(process.fileno(), ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(process.fileno())
        _, status = os.waitpid(pid, os.WNOHANG)  # noqa: ASYNC222 - it has ended: the pidfd is readable
    code = os.waitstatus_to_exitcode(status)
    _log.log(
        logging.INFO if code in {0, _EXIT_LOCKED} else logging.ERROR,
        "the data path ended with status %d",
        code,
    )
    return code
