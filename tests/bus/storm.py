# SPDX-License-Identifier: GPL-2.0-or-later
"""Calls at random by the XML, as a user without rights: right and wrong types, values, options, objects, descriptors.

python -m tests.bus.storm ADDRESS UID SEED COUNT, with objects on stdin, as JSON: path to interfaces. Everything is marshalled
here, and valid by the specification: a bus throws off who sends anything else. Prints how often which answer came, as JSON.
"""

from __future__ import annotations

import json
import os
import random
import struct
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.bus.hostile import DBUS, INTERACTIVE, NO_REPLY, Caller

XML = Path(__file__).parents[2] / "dbus" / "interfaces" / "org.blksnap.Blksnap1.xml"
NAME = "org.blksnap.Blksnap1"
ACCESS_DENIED = "org.freedesktop.DBus.Error.AccessDenied"
BATCH = 64
"""Fewer than a caller may have under way, so that calls are answered for what they are."""
SIZES = {"y": 1, "n": 2, "q": 2, "b": 4, "i": 4, "u": 4, "h": 4, "x": 8, "t": 8, "d": 8}
ALIGNMENTS = SIZES | {"s": 4, "o": 4, "a": 4, "g": 1, "v": 1, "(": 8, "{": 8}
BASIC = "ybnqiuxtdsogh"
OPTIONS = {
    "auth.no_user_interaction": "b", "path-fd": "h", "limit": "t", "storage": "s", "storage-fd": "h", "low-space": "t",
    "chunk-size": "u", "take": "b", "attach": "b", "description": "s", "hold": "b", "backend": "s", "block-size": "u",
    "persistent": "b", "force": "b", "view": "s", "generation-id": "s", "since": "u",
}  # fmt: skip
STRINGS = [
    "", "/", "/dev/sda", "/etc/shadow", "../../x", "live", "taken", "age", "density", "ublk", "nbd", NAME, f"{NAME}.Device",
    f"{NAME}.Tracker", "State", "%s%n", "\n" * 50, "\u202e\U0001f4a5", "a" * 5000, "0", "-1",
]  # fmt: skip


@dataclass(frozen=True)
class Target:
    """A method: its interface, name and the types it takes."""

    interface: str
    member: str
    signature: str


def targets() -> list[Target]:
    """Return every method there is, ours and the standard ones."""
    found = [
        Target(f"{DBUS}.{interface}", member, signature)
        for interface, member, signature in (
            ("Properties", "Get", "ss"),
            ("Properties", "GetAll", "s"),
            ("Properties", "Set", "ssv"),
            ("Introspectable", "Introspect", ""),
            ("Peer", "Ping", ""),
            ("Peer", "GetMachineId", ""),
            ("ObjectManager", "GetManagedObjects", ""),
        )
    ]
    for interface in ET.parse(XML).getroot().findall("interface"):  # noqa: S314 - our own file
        for method in interface.findall("method"):
            types = [str(one.get("type")) for one in method.findall("arg") if one.get("direction") == "in"]
            found.append(Target(str(interface.get("name")), str(method.get("name")), "".join(types)))
    return found


def split(signature: str) -> list[str]:
    """Cut a signature into complete types."""
    parts, start, depth = [], 0, 0
    for position, code in enumerate(signature):
        depth += (code in "({") - (code in ")}")
        if not depth and code != "a":
            parts.append(signature[start : position + 1])
            start = position + 1
    return parts


class Storm:
    """The random choices of one seed."""

    def __init__(self, seed: int, objects: Mapping[str, Sequence[str]]) -> None:
        self.random = random.Random(seed)
        self.objects = objects
        self.paths = [*objects, "/", f"/{NAME.replace('.', '/')}/devices/none", "/no/such/thing"]
        self.targets = targets()
        self.fds = 0

    def type(self, depth: int = 0) -> str:
        """Return a complete type."""
        kind = self.random.random()
        if depth > 3 or kind < 0.6:
            return self.random.choice(BASIC)
        if kind < 0.7:
            return "v"
        if kind < 0.8:
            return "a" + self.type(depth + 1)
        if kind < 0.9:
            return f"a{{{self.random.choice('ysut')}{self.type(depth + 2)}}}"
        return "(" + "".join(self.type(depth + 1) for _ in range(self.random.randint(1, 3))) + ")"

    def put(self, raw: bytearray, kind: str, depth: int = 0) -> None:
        """Append a value of a complete type."""
        code = kind[0]
        raw += bytes(-len(raw) % ALIGNMENTS[code])
        if code in SIZES:
            self._number(raw, code)
        elif code in "so":
            text = self.random.choice(self.paths if code == "o" else [*STRINGS, *self.paths]).encode()
            raw += struct.pack("<I", len(text)) + text + b"\0"
        elif code == "g":
            text = self.type().encode()
            raw += bytes([len(text)]) + text + b"\0"
        elif code == "v":
            inner = self.type(depth + 1)
            raw += bytes([len(inner)]) + inner.encode() + b"\0"
            self.put(raw, inner, depth + 1)
        elif code == "a":
            self._array(raw, kind[1:], depth)
        else:
            for part in split(kind[1:-1]):
                self.put(raw, part, depth + 1)

    def _number(self, raw: bytearray, code: str) -> None:
        bits = 8 * SIZES[code]
        if code == "b":
            value = self.random.randint(0, 1)
        elif code == "h":
            value = self.random.choice([0, 0, 1, self.fds, 2**32 - 1])
        else:
            value = self.random.choice(
                [0, 1, 2 ** (bits - 1), 2**bits - 1, 4096, self.random.getrandbits(bits)]
            )
        raw += (value % 2**bits).to_bytes(SIZES[code], "little")

    def _array(self, raw: bytearray, element: str, depth: int) -> None:
        at = len(raw)
        raw += bytes(4)
        raw += bytes(-len(raw) % ALIGNMENTS[element[0]])
        start = len(raw)
        if element == "{sv}" and depth == 0 and self.random.random() < 0.8:
            self._options(raw)
        else:
            count = self.random.choice([0, 1, 2, 5] if depth else [0, 1, 3, 300])
            for _ in range(count):
                self.put(raw, element, depth + 1)
        raw[at : at + 4] = struct.pack("<I", len(raw) - start)

    def _options(self, raw: bytearray) -> None:
        for name in self.random.sample(list(OPTIONS), self.random.choice([0, 0, 1, 2])):
            kind = OPTIONS[name] if self.random.random() < 0.8 else self.type(1)
            raw += bytes(-len(raw) % 8)
            raw += struct.pack("<I", len(name)) + name.encode() + b"\0"
            raw += bytes([len(kind)]) + kind.encode() + b"\0"
            self.put(raw, kind, 1)

    def call(self, caller: Caller) -> tuple[bytes, bool, int]:
        """Return a message, whether it wants an answer, and how many descriptors go with it."""
        chance = self.random.random
        target = self.random.choice(self.targets)
        signature = (
            target.signature
            if chance() < 0.85
            else "".join(self.type() for _ in range(self.random.randint(0, 3)))
        )
        # dbus-daemon refuses what a message has not the descriptors for.
        self.fds = self.random.choice([1, 2, 16]) if "h" in signature or chance() < 0.05 else 0
        body = bytearray()
        for kind in split(signature):
            self.put(body, kind)
        quiet = chance() < 0.02
        fitting = [path for path, interfaces in self.objects.items() if target.interface in interfaces]
        paths = fitting if fitting and chance() < 0.6 else self.paths
        message = caller.message(
            target.member if chance() < 0.97 else "Nothing",
            signature,
            bytes(body),
            path=self.random.choice(paths),
            interface=target.interface if chance() < 0.97 else f"{NAME}.Nothing",
            flags=(NO_REPLY if quiet else 0) | (INTERACTIVE if chance() < 0.5 else 0),
            fds=self.fds,
        )
        return message, not quiet, self.fds


def main(address: str, seed: int, count: int, objects: Mapping[str, Sequence[str]]) -> Counter[str]:
    """Send that many; returns how often which answer came. Fails when one says anything about the program."""
    storm, answers = Storm(seed, objects), Counter[str]()
    null = os.open("/dev/null", os.O_RDWR)
    with Caller(address, NAME, "/", NAME) as caller:
        sent = 0
        while sent < count:
            batch: list[bytes] = []
            for _ in range(min(BATCH, count - sent)):
                message, wanted, fds = storm.call(caller)
                sent += 1
                if fds or not wanted:
                    caller.send(message, [null] * fds)
                    if wanted:
                        batch.append(b"")  # it is under way
                else:
                    batch.append(message)
            answers["sent"] = sent
            for answer in caller.flood(batch, seconds=300):
                answers[answer.error_name or "ok"] += 1
                # What its policy does not let through the bus refuses itself, and names both programs.
                ours = answer.error_name and answer.error_name != ACCESS_DENIED
                said = str(answer.body) if ours else ""
                assert "Traceback" not in said, said
                assert "blksnap_service" not in said, said
                assert "internal error" not in said, said
    return answers


if __name__ == "__main__":
    given = json.load(sys.stdin)
    os.setgroups([])
    os.setresgid(65_534, 65_534, 65_534)
    os.setresuid(*[int(sys.argv[2])] * 3)
    print(json.dumps(main(sys.argv[1], int(sys.argv[3]), int(sys.argv[4]), given)))
