# SPDX-License-Identifier: GPL-2.0-or-later
"""The control socket of a data path that is none: lines, descriptors, refusals and delays on demand.

What operations do is the business of ``datapath``.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import json
import os
import socket
import threading
from pathlib import Path
from typing import Any


class Refusal(Exception):
    """Raised to answer a request with an error."""

    def __init__(self, code: str, message: str, **more: object) -> None:
        super().__init__(message)
        self.answer = {"code": code, "message": message, **more}


class ControlServer:
    """Listens on ``DIR/datapath.sock`` in threads of its own, and calls ``self._OPERATION(fds, **arguments)``."""

    def __init__(self, runtime_dir: Path) -> None:
        self.runtime_dir = runtime_dir
        self.requests: list[dict[str, Any]] = []
        self.refuse: dict[str, Refusal] = {}
        """What to answer to an operation, until it is taken out."""
        self.hold: dict[str, threading.Event] = {}
        """Operations that are answered only when the event is set."""
        self.accepting = threading.Event()
        """Cleared: who connects is thrown out at once, as by a data path that is starting."""
        self.accepting.set()
        self._losing: set[str] = set()
        self._lock = threading.Lock()
        self._connections: list[socket.socket] = []
        self._subscribed: list[socket.socket] = []
        runtime_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        with contextlib.suppress(FileNotFoundError):
            (runtime_dir / "datapath.sock").unlink()
        self._listener.bind(str(runtime_dir / "datapath.sock"))
        self._listener.listen()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def close(self) -> None:
        """End all connections and threads."""
        for event in self.hold.values():
            event.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.drop_connections()
        for thread in self._threads:
            thread.join()

    async def asked(self, op: str) -> None:
        """Wait until an operation has been asked for."""
        async with asyncio.timeout(60):
            while not any(one["op"] == op for one in list(self.requests)):  # noqa: ASYNC110 - another thread's list
                await asyncio.sleep(0.01)

    def die_after(self, op: str) -> None:
        """End all connections in place of the next answer to an operation, which is carried out."""
        self._losing.add(op)

    def drop_connections(self) -> None:
        """End all connections; new ones are accepted."""
        with self._lock:
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            self._connections.clear()
            self._subscribed.clear()

    def tell(self, **event: object) -> None:
        """Send an event to all who subscribed."""
        with self._lock:
            for connection in self._subscribed:
                connection.sendall(json.dumps(event).encode() + b"\n")

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            if not self.accepting.is_set():
                connection.close()
                continue
            with self._lock:
                self._connections.append(connection)
            thread = threading.Thread(target=self._serve, args=(connection,))
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            buffer, fds = b"", list[int]()
            while True:
                data, new, _, _ = socket.recv_fds(connection, 65_536, 8)
                fds += new
                if not data:
                    break
                buffer += data
                while b"\n" in buffer:
                    line, _, buffer = buffer.partition(b"\n")
                    self._answer(connection, json.loads(line), fds)
        for fd in fds:
            os.close(fd)

    def _answer(self, connection: socket.socket, request: dict[str, Any], fds: list[int]) -> None:
        mine = [fds.pop(0) for _ in range(request.pop("fds", 0))]
        number, op = request.pop("id"), request.pop("op")
        self.requests.append({"op": op, **request})
        if op in self.hold:
            self.hold[op].wait()
        answer: dict[str, Any] = {"id": number}
        out: list[int] = []
        try:
            if op in self.refuse:
                raise self.refuse[op]
            if op == "subscribe":
                with self._lock:
                    self._subscribed.append(connection)
            handler = getattr(self, "_" + op.replace(".", "_").replace("-", "_"))
            with self._lock:
                answer["ok"], out = handler(mine, **request)
        except Refusal as refusal:
            answer["error"] = refusal.answer
        finally:
            for fd in mine:
                os.close(fd)
        if op in self._losing:
            self._losing.discard(op)
            for fd in out:
                os.close(fd)
            self.drop_connections()
            return
        if out:
            answer["fds"] = len(out)
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", out))] if out else []
        connection.sendmsg([json.dumps(answer).encode() + b"\n"], ancillary)
        for fd in out:
            os.close(fd)
