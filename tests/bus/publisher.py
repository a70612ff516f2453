# SPDX-License-Identifier: GPL-2.0-or-later
"""A small service on the bus layer, with a method for everything a caller could do to it.

Run as a program: `python -m tests.bus.publisher ADDRESS NAME [FD_LIMIT]`; prints "ready" and serves until the bus ends.
Besides its own interface it has an object with all interfaces of the shipped XML, to compare introspection with.
"""

# Methods are called as on the bus, which says what they do; the program prints when it is ready.
# ruff: noqa: D102, N802

from __future__ import annotations

import asyncio
import logging
import os
import resource
import sys
from pathlib import Path
from typing import Any

from blksnap_service import errors
from blksnap_service.bus import options, wire

ROOT = "/org/example/Hostile"
THING = f"{ROOT}/thing"
SHIPPED = f"{ROOT}/shipped"
INTERFACE = "org.example.Hostile1"

XML = """
<node>
  <interface name="org.example.Hostile1">
    <method name="Echo">
      <arg name="text" type="s" direction="in"/>
      <arg name="options" type="a{sv}" direction="in"/>
      <arg name="text" type="s" direction="out"/>
    </method>
    <method name="WhoAmI">
      <arg name="options" type="a{sv}" direction="in"/>
      <arg name="sender" type="s" direction="out"/>
      <arg name="uid" type="u" direction="out"/>
      <arg name="interactive" type="b" direction="out"/>
    </method>
    <method name="OpenFile">
      <arg name="size" type="u" direction="in"/>
      <arg name="options" type="a{sv}" direction="in"/>
      <arg name="fd" type="h" direction="out"/>
      <arg name="info" type="a{sv}" direction="out"/>
    </method>
    <method name="MeasureFiles">
      <arg name="one" type="h" direction="in"/>
      <arg name="other" type="h" direction="in"/>
      <arg name="options" type="a{sv}" direction="in"/>
      <arg name="sizes" type="at" direction="out"/>
    </method>
    <method name="Options">
      <arg name="options" type="a{sv}" direction="in"/>
      <arg name="given" type="s" direction="out"/>
    </method>
    <method name="CountRanges">
      <arg name="ranges" type="a(tt)" direction="in"/>
      <arg name="options" type="a{sv}" direction="in"/>
      <arg name="bytes" type="t" direction="out"/>
      <arg name="ranges" type="a(tt)" direction="out"/>
    </method>
    <method name="Answer">
      <arg name="what" type="s" direction="in"/>
      <arg name="options" type="a{sv}" direction="in"/>
      <arg name="object" type="o" direction="out"/>
      <arg name="text" type="s" direction="out"/>
      <arg name="bytes" type="ay" direction="out"/>
    </method>
    <method name="Fail">
      <arg name="error" type="s" direction="in"/>
      <arg name="options" type="a{sv}" direction="in"/>
    </method>
    <method name="Crash">
      <arg name="options" type="a{sv}" direction="in"/>
    </method>
    <method name="Hang">
      <arg name="options" type="a{sv}" direction="in"/>
    </method>
    <method name="Release">
      <arg name="options" type="a{sv}" direction="in"/>
      <arg name="hanging" type="u" direction="out"/>
    </method>
    <method name="Watch">
      <arg name="name" type="s" direction="in"/>
      <arg name="options" type="a{sv}" direction="in"/>
    </method>
    <method name="TakeFds">
      <arg name="leave" type="u" direction="in"/>
      <arg name="options" type="a{sv}" direction="in"/>
    </method>
    <method name="Change">
      <arg name="options" type="a{sv}" direction="in"/>
    </method>
    <method name="AddChild">
      <arg name="name" type="s" direction="in"/>
      <arg name="options" type="a{sv}" direction="in"/>
    </method>
    <method name="RemoveChild">
      <arg name="name" type="s" direction="in"/>
      <arg name="options" type="a{sv}" direction="in"/>
    </method>
    <method name="Resources">
      <arg name="options" type="a{sv}" direction="in"/>
      <arg name="fds" type="u" direction="out"/>
      <arg name="rss_kib" type="u" direction="out"/>
    </method>
    <signal name="Left">
      <arg name="name" type="s"/>
    </signal>
    <property name="Number" type="u" access="read"/>
    <property name="Label" type="s" access="read">
      <annotation name="org.freedesktop.DBus.Property.EmitsChangedSignal" value="invalidates"/>
    </property>
    <property name="Fixed" type="s" access="read">
      <annotation name="org.freedesktop.DBus.Property.EmitsChangedSignal" value="const"/>
    </property>
  </interface>
  <interface name="org.example.Child1">
    <property name="Name" type="s" access="read"/>
  </interface>
</node>
"""

BLANKS: dict[str, Any] = {"s": "", "o": "/", "b": False, "d": 0.0, "a": [], "a{": {}}


def open_fds() -> int:
    """Return how many file descriptors are open."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


class Child:
    """An object that only has a name."""

    def __init__(self, name: str) -> None:
        self._name = name

    def properties(self) -> dict[str, Any]:
        return {"Name": self._name}


class Thing:
    """Does what its methods are named after."""

    def __init__(self, connection: wire.Connection, publisher: wire.Publisher) -> None:
        self._connection = connection
        self._publisher = publisher
        self._number = 0
        self._released = asyncio.Event()
        self._hanging = 0
        self._none_hangs = asyncio.Event()
        self._none_hangs.set()
        self._fds: list[int] = []

    def properties(self) -> dict[str, Any]:
        return {"Number": self._number, "Label": f"bad \udcff\0 label {self._number}", "Fixed": "stays"}

    async def Echo(self, call: wire.Call, text: str, given: dict[str, wire.Value]) -> str:
        options.take(given, {})
        return text

    async def WhoAmI(self, call: wire.Call, given: dict[str, wire.Value]) -> tuple[str, int, bool]:
        options.take(given, {})
        return call.sender, await call.uid(), call.interactive

    async def OpenFile(
        self, call: wire.Call, size: int, given: dict[str, wire.Value]
    ) -> tuple[int, dict[str, Any]]:
        fd = os.memfd_create("test", os.MFD_CLOEXEC)
        os.truncate(fd, size)
        return fd, {"size": ("t", size), "names": wire.variant("as", ["a", "b"])}

    async def MeasureFiles(
        self, call: wire.Call, one: wire.OwnedFd, other: wire.OwnedFd, given: dict[str, wire.Value]
    ) -> list[int]:
        more = options.take(given, {"third": "h"})
        with one:  # `other` is left to the bus layer to close
            files = [one, other, *more.values()]
            return [os.fstat(file.fileno()).st_size for file in files]

    async def Options(self, call: wire.Call, given: dict[str, wire.Value]) -> str:
        return repr(options.take(given, {"limit": "t", "names": "as", "deep": "v"}))

    async def CountRanges(
        self, call: wire.Call, ranges: list[tuple[int, int]], given: dict[str, wire.Value]
    ) -> tuple[int, list[tuple[int, int]]]:
        return sum(length for _, length in ranges), ranges

    async def Answer(self, call: wire.Call, what: str, given: dict[str, wire.Value]) -> tuple[Any, ...]:
        answers: dict[str, tuple[Any, ...]] = {
            "text": ("/", "nul \0, not utf-8 \udcff", b""),
            "path": ("/not a path/", "", b""),
            "type": ("/", 7, b""),
            "too few": ("/", ""),
            "large": ("/", "", bytes(20 * 2**20)),
        }
        return answers[what]

    async def Fail(self, call: wire.Call, error: str, given: dict[str, wire.Value]) -> None:
        raise getattr(errors, error)(f"{error} happened to /dev/sda")

    async def Crash(self, call: wire.Call, given: dict[str, wire.Value]) -> None:
        raise RuntimeError("a secret of /usr/lib")

    async def Hang(self, call: wire.Call, given: dict[str, wire.Value]) -> None:
        self._hanging += 1
        self._none_hangs.clear()
        try:
            await self._released.wait()
        finally:
            self._hanging -= 1
            if not self._hanging:
                self._none_hangs.set()

    async def Release(self, call: wire.Call, given: dict[str, wire.Value]) -> int:
        hanging = self._hanging
        self._released.set()
        await self._none_hangs.wait()
        return hanging

    async def Watch(self, call: wire.Call, name: str, given: dict[str, wire.Value]) -> None:
        def tell(gone: str) -> None:
            self._publisher.signal(THING, INTERFACE, "Left", gone)

        cancelled = self._connection.watch_name(name, tell)
        cancelled()
        self._connection.watch_name(name, tell)

    async def TakeFds(self, call: wire.Call, leave: int, given: dict[str, wire.Value]) -> None:
        """Use up the file descriptors of the process but for some; with a large number, give them back."""
        while self._fds:
            os.close(self._fds.pop())
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        while open_fds() < limit - leave:
            self._fds.append(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))

    async def Change(self, call: wire.Call, given: dict[str, wire.Value]) -> None:
        self._number += 1
        self._publisher.changed(THING, INTERFACE, ["Number", "Label", "Fixed"])
        self._publisher.changed(THING, INTERFACE, {"Number": self._number + 100})
        self._publisher.changed(THING, INTERFACE, ["Fixed"])

    async def AddChild(self, call: wire.Call, name: str, given: dict[str, wire.Value]) -> None:
        self._publisher.export(f"{ROOT}/{name}", {"org.example.Child1": Child(name)})

    async def RemoveChild(self, call: wire.Call, name: str, given: dict[str, wire.Value]) -> None:
        self._publisher.unexport(f"{ROOT}/{name}")

    async def Resources(self, call: wire.Call, given: dict[str, wire.Value]) -> tuple[int, int]:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return open_fds(), pages * resource.getpagesize() // 1024


def stand_in(interface: wire.Interface) -> Any:
    """Return an implementation of any interface, whose methods all refuse and whose properties are blank."""

    async def refuse(self: object, call: wire.Call, *arguments: Any) -> None:
        raise errors.NotSupported(f"{call.member} is not implemented here")

    blank = {
        name: BLANKS.get(one.signature[:2], BLANKS.get(one.signature[0], 0))
        for name, one in interface.properties.items()
    }
    members: dict[str, Any] = dict.fromkeys(interface.methods, refuse)
    members["properties"] = lambda _self: blank
    return type("StandIn", (), members)()


async def main(address: str, name: str) -> None:
    """Serve until the bus ends."""
    connection = await wire.connect(address)
    interfaces = wire.parse_interfaces(XML) | wire.load_interfaces()
    publisher = wire.Publisher(connection, ROOT, interfaces)
    publisher.export(THING, {INTERFACE: Thing(connection, publisher)})
    publisher.export(SHIPPED, {one: stand_in(interface) for one, interface in wire.load_interfaces().items()})
    await connection.request_name(name)
    print("ready", flush=True)
    await connection.wait_disconnected()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    if len(sys.argv) > 3:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[3]), hard))
    try:
        asyncio.run(main(sys.argv[1], sys.argv[2]))
    except errors.BlksnapError as error:
        sys.exit(f"{type(error).__name__}: {error}")
