# SPDX-License-Identifier: GPL-2.0-or-later
"""A caller without rights: gives up its own, connects, and makes the calls it reads, one JSON line each.

python -m tests.bus.nobody ADDRESS UID. Prints its unique name, then for each call [error name, result or text].
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from concurrent.futures.thread import ThreadPoolExecutor  # now: later its file may not be readable
from typing import Any

from blksnap_service.bus import paths, wire
from blksnap_service.errors import BlksnapError, RemoteError


def _plain(value: Any) -> Any:
    if isinstance(value, wire.OwnedFd):
        with value:
            return os.fstat(value.fileno()).st_size
    if isinstance(value, wire.Value):
        return _plain(value.value)
    if isinstance(value, bytes):
        return list(value)
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value if isinstance(value, str | int | float) else str(value)


def _option(signature: str, value: Any) -> wire.Value:
    if signature == "h":
        return wire.variant("h", wire.OwnedFd(os.open(value, os.O_RDWR)))
    return wire.variant(signature, value)


async def _call(connection: wire.Connection, request: dict[str, Any]) -> tuple[str, Any]:
    options = {name: _option(*pair) for name, pair in request["options"].items()}
    try:
        results = await connection.call(
            paths.BUS_NAME,
            request["path"],
            request["interface"],
            request["member"],
            request["signature"] + "a{sv}",
            [*request["arguments"], options],
            timeout=60,
            interactive=request["interactive"],
        )
    except RemoteError as error:
        return error.remote_name, str(error)
    except BlksnapError as error:
        return error.dbus_name, str(error)
    return "", _plain(results)


async def main(address: str) -> None:
    """Serve stdin until it ends."""
    connection = await wire.connect(address)
    print(connection.unique_name, flush=True)
    pool = ThreadPoolExecutor(1)

    async def serve(line: str) -> None:
        print(json.dumps(await _call(connection, json.loads(line))), flush=True)

    async with asyncio.TaskGroup() as group:
        while line := await asyncio.get_running_loop().run_in_executor(pool, sys.stdin.readline):
            group.create_task(serve(line))
    connection.close()


if __name__ == "__main__":
    os.setgroups([])
    os.setresgid(NOGROUP := 65_534, NOGROUP, NOGROUP)
    os.setresuid(*[int(sys.argv[2])] * 3)
    asyncio.run(main(sys.argv[1]))
