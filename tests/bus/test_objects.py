# SPDX-License-Identifier: GPL-2.0-or-later
"""The object tree as third-party programs see it: introspection, ObjectManager, property changes."""

from __future__ import annotations

import json
import os
import subprocess
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.bus import publisher
from tests.bus.conftest import NAME, REPOSITORY, Service
from tests.bus.hostile import (
    DBUS,
    INTROSPECTABLE,
    NO_OPTIONS,
    OBJECT_MANAGER,
    PROPERTIES,
    Caller,
    options,
    text,
)

SHIPPED = REPOSITORY / "dbus" / "interfaces" / "org.blksnap.Blksnap1.xml"
ANNOTATION = "org.freedesktop.DBus.Property.EmitsChangedSignal"


def canonical(element: ET.Element) -> str:
    """Return an element without comments and without white space between elements."""
    return ET.canonicalize(ET.tostring(element, encoding="unicode"), strip_text=True)


def introspect(caller: Caller, path: str) -> ET.Element:
    """Return the introspection document of an object."""
    return ET.fromstring(caller.call("Introspect", path=path, interface=INTROSPECTABLE).body[0])  # noqa: S314


def busctl(service: Service, *arguments: str, user: str = "") -> Any:
    """Run busctl; return what it prints as JSON."""
    as_user = ["setpriv", f"--reuid={user}", "--regid=nogroup", "--clear-groups"] if user else []
    command = [*as_user, "busctl", f"--address={service.bus.address}", "--json=short", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) if done.stdout else None


@contextmanager
def gdbus_monitor(service: Service, directory: Path) -> Iterator[Path]:
    """Run gdbus monitor for the service; gives the file with what it prints."""
    output = directory / "monitor"
    with output.open("w", encoding="utf-8") as stream:
        process = subprocess.Popen(
            ["gdbus", "monitor", "--address", service.bus.address, "--dest", NAME],
            stdout=stream,
            env=os.environ | {"LC_ALL": "C.UTF-8"},
        )
    try:
        yield output
    finally:
        process.terminate()
        process.wait(5)


def test_introspection_is_the_shipped_xml(caller: Caller) -> None:
    """Every interface, with its annotations and argument names, as in the file."""
    shipped = {one.get("name"): canonical(one) for one in ET.parse(SHIPPED).getroot().findall("interface")}  # noqa: S314
    assert len(shipped) == 6
    answered = {
        one.get("name"): canonical(one) for one in introspect(caller, publisher.SHIPPED).findall("interface")
    }
    assert {name: answered.get(name) for name in shipped} == shipped
    standard = {INTROSPECTABLE, PROPERTIES, f"{DBUS}.Peer"}
    assert answered.keys() - shipped.keys() == standard


def test_the_shipped_xml_keeps_its_promises() -> None:
    """Options end every method, nothing is writable, each property says whether its changes are told."""
    root = ET.parse(SHIPPED).getroot()  # noqa: S314
    for method in root.iter("method"):
        last = [one for one in method.findall("arg") if one.get("direction") == "in"][-1]
        assert (last.get("name"), last.get("type")) == ("options", "a{sv}"), method.get("name")
    for one in root.iter("property"):
        notes = {note.get("name"): note.get("value") for note in one.findall("annotation")}
        assert (one.get("access"), notes[ANNOTATION] in {"true", "const"}) == ("read", True), one.get("name")


def test_the_tree_leads_to_every_object(caller: Caller) -> None:
    """Paths above objects introspect to the names below; only the root has the ObjectManager."""
    path, seen = "/", []
    for name in ("org", "example", "Hostile"):
        node = introspect(caller, path)
        assert [one.get("name") for one in node.findall("node")] == [name]
        seen.append([one.get("name") for one in node.findall("interface")])
        path = f"{path.rstrip('/')}/{name}"
    assert all(OBJECT_MANAGER not in names for names in seen)
    root = introspect(caller, path)
    assert {one.get("name") for one in root.findall("node")} == {"thing", "shipped"}
    assert OBJECT_MANAGER in {one.get("name") for one in root.findall("interface")}


def test_managed_objects_have_all_properties(caller: Caller) -> None:
    """Of every interface, with types as in the XML."""
    answer = caller.call("GetManagedObjects", path=publisher.ROOT, interface=OBJECT_MANAGER).body[0]
    assert answer.keys() == {publisher.THING, publisher.SHIPPED}
    root = ET.parse(SHIPPED).getroot()  # noqa: S314
    for interface in root.findall("interface"):
        types = {one.get("name"): one.get("type") for one in interface.findall("property")}
        values = answer[publisher.SHIPPED][interface.get("name")]
        assert {name: value.signature for name, value in values.items()} == types


def test_added_and_removed_objects_are_signalled_whole(service: Service) -> None:
    """One signal for all interfaces, from the ObjectManager's path, where clients listen."""
    with service.caller() as listener, service.caller() as actor:
        listener.listen(f"type='signal',sender='{NAME}'")
        actor.call("AddChild", "sa{sv}", options(text("one")))
        assert introspect(actor, f"{publisher.ROOT}/one").findall("interface")
        actor.call("RemoveChild", "sa{sv}", options(text("one")))
        actor.call("RemoveChild", "sa{sv}", options(text("one")))
        added, removed = listener.signals()
    assert (added.path, added.interface, added.member) == (publisher.ROOT, OBJECT_MANAGER, "InterfacesAdded")
    assert added.body[0] == f"{publisher.ROOT}/one"
    assert added.body[1]["org.example.Child1"]["Name"].value == "one"
    assert (removed.path, removed.member) == (publisher.ROOT, "InterfacesRemoved")
    assert removed.body == [f"{publisher.ROOT}/one", ["org.example.Child1"]]


def test_adding_an_object_twice_is_a_defect_and_changes_nothing(service: Service, caller: Caller) -> None:
    """The second export fails; the first stays and no signal is sent."""
    caller.call("AddChild", "sa{sv}", options(text("one")))
    with service.caller() as listener:
        listener.listen(f"type='signal',sender='{NAME}'")
        assert caller.call("AddChild", "sa{sv}", options(text("one"))).error.endswith(".Failed")
        assert listener.signals() == []
    assert caller.call("GetAll", "s", text(""), path=f"{publisher.ROOT}/one", interface=PROPERTIES).body


def test_property_changes_are_told_as_the_xml_says(service: Service) -> None:
    """With the value, as invalidated, or not at all."""
    with service.caller() as listener, service.caller() as actor:
        listener.listen(f"type='signal',sender='{NAME}'")
        actor.call("Change", "a{sv}", NO_OPTIONS)
        first, second = listener.signals()
    assert (first.path, first.interface, first.member) == (publisher.THING, PROPERTIES, "PropertiesChanged")
    assert first.body[0] == publisher.INTERFACE
    assert {name: value.value for name, value in first.body[1].items()} == {"Number": 1}
    assert first.body[2] == ["Label"]
    assert {name: (value.signature, value.value) for name, value in second.body[1].items()} == {
        "Number": ("u", 101)
    }


def test_busctl_reads_the_service(service: Service) -> None:
    """Calls, properties and the tree, as an administrator would."""
    echo = busctl(service, "call", NAME, publisher.THING, publisher.INTERFACE, "Echo", "sa{sv}", "hi", "0")
    assert echo["data"] == ["hi"]
    number = busctl(service, "get-property", NAME, publisher.THING, publisher.INTERFACE, "Number")
    assert number == {"type": "u", "data": 0}
    done = subprocess.run(
        ["busctl", f"--address={service.bus.address}", "--list", "tree", NAME],
        capture_output=True, text=True, timeout=20, check=True,
    )  # fmt: skip
    assert {publisher.ROOT, publisher.THING, publisher.SHIPPED} <= set(done.stdout.split())
    done = subprocess.run(
        ["busctl", f"--address={service.bus.address}", "introspect", NAME, publisher.SHIPPED],
        capture_output=True, text=True, timeout=20, check=True,
    )  # fmt: skip
    assert set(done.stdout.split()) >= {".CreateSnapshot", ".OpenMap", ".Completed", ".NbdUri"}


def test_busctl_asks_interactively_and_shows_our_text(service: Service) -> None:
    """It sets ALLOW_INTERACTIVE_AUTHORIZATION by itself, and replaces the text of AccessDenied, but not ours."""
    call = ("call", NAME, publisher.THING, publisher.INTERFACE)
    assert busctl(service, *call, "WhoAmI", "a{sv}", "0")["data"][2] is True
    done = subprocess.run(
        ["busctl", f"--address={service.bus.address}", *call, "Fail", "sa{sv}", "NotAuthorized", "0"],
        capture_output=True, text=True, timeout=20, check=False,
    )  # fmt: skip
    assert "NotAuthorized happened to /dev/sda" in done.stderr


@pytest.mark.skipif(os.getuid() != 0, reason="only root can call as another user")
def test_an_unprivileged_caller_is_known_by_its_uid(service: Service) -> None:
    """The uid is the bus's word."""
    answer = busctl(
        service, "call", NAME, publisher.THING, publisher.INTERFACE, "WhoAmI", "a{sv}", "0", user="nobody"
    )
    assert answer["data"][1] == 65534


def test_gdbus_sees_objects_and_changes(service: Service, directory: Path) -> None:
    """GLib's view of the same signals."""
    with gdbus_monitor(service, directory) as output, service.caller() as caller:
        for _ in range(100):
            caller.call("AddChild", "sa{sv}", options(text("one")))
            caller.call("Change", "a{sv}", NO_OPTIONS)
            caller.call("RemoveChild", "sa{sv}", options(text("one")))
            printed = output.read_text(encoding="utf-8")
            if all(word in printed for word in ("InterfacesAdded", "PropertiesChanged", "InterfacesRemoved")):
                break
            time.sleep(0.1)
        else:
            pytest.fail(printed)
    root = publisher.ROOT
    assert f"{root}: {OBJECT_MANAGER}.InterfacesAdded (objectpath '{root}/one'" in printed
    assert f"{root}: {OBJECT_MANAGER}.InterfacesRemoved (objectpath '{root}/one'" in printed
