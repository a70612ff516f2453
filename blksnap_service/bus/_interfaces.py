# SPDX-License-Identifier: GPL-2.0-or-later
"""Interfaces as the XML describes them: what calls are checked against and introspection returns.

What it is: the shipped file dbus/interfaces/org.blksnap.Blksnap1.xml and the standard interfaces, parsed. What it is
not: any implementation.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Final

from blksnap_service.errors import NotAvailable

FILE_NAME: Final = "org.blksnap.Blksnap1.xml"
_EMITS: Final = "org.freedesktop.DBus.Property.EmitsChangedSignal"

PROPERTIES: Final = "org.freedesktop.DBus.Properties"
INTROSPECTABLE: Final = "org.freedesktop.DBus.Introspectable"
PEER: Final = "org.freedesktop.DBus.Peer"
OBJECT_MANAGER: Final = "org.freedesktop.DBus.ObjectManager"


@dataclass(frozen=True, slots=True)
class Method:
    """Signatures of a method: of all arguments in, of all out, and the types out one by one."""

    name: str
    signature_in: str
    signature_out: str
    results: int
    takes_options: bool


@dataclass(frozen=True, slots=True)
class Property:
    """A property, always readable and never writable. `emits`: true, invalidates, const or false."""

    name: str
    signature: str
    emits: str


@dataclass(frozen=True, slots=True)
class Interface:
    """An interface; `signals` maps names to signatures."""

    name: str
    methods: Mapping[str, Method]
    properties: Mapping[str, Property]
    signals: Mapping[str, str]
    element: ET.Element


def load_interfaces() -> dict[str, Interface]:
    """Return the interfaces of this service by name, from the installed file or else the source tree.

    Raised when the file is in neither: NotAvailable.
    """
    installed = resources.files("blksnap_service") / "interfaces" / FILE_NAME
    source = Path(__file__).parents[2] / "dbus" / "interfaces" / FILE_NAME
    for place in (installed, source):
        if place.is_file():
            return parse_interfaces(place.read_text(encoding="utf-8"))
    raise NotAvailable(f"the installation is incomplete: {FILE_NAME} is missing")


def parse_interfaces(text: str) -> dict[str, Interface]:
    """Return the interfaces in an introspection document. Raised when it is not one: ET.ParseError or KeyError."""
    root = ET.fromstring(text)  # noqa: S314 - our own file
    return {element.attrib["name"]: _parse(element) for element in root.findall("interface")}


def _parse(element: ET.Element) -> Interface:
    methods = {}
    for method in element.findall("method"):
        arguments = method.findall("arg")
        into = [one for one in arguments if one.get("direction", "in") == "in"]
        out = [one.attrib["type"] for one in arguments if one.get("direction", "in") == "out"]
        name = method.attrib["name"]
        methods[name] = Method(
            name=name,
            signature_in="".join(one.attrib["type"] for one in into),
            signature_out="".join(out),
            results=len(out),
            takes_options=bool(into) and (into[-1].get("name"), into[-1].get("type")) == ("options", "a{sv}"),
        )
    properties = {}
    for one in element.findall("property"):
        if one.get("access") != "read":
            raise KeyError(f"property {one.get('name')} is not read-only: this service has no writable ones")
        name = one.attrib["name"]
        emits = [note.attrib["value"] for note in one.findall("annotation") if note.get("name") == _EMITS]
        properties[name] = Property(name, one.attrib["type"], emits[0] if emits else "true")
    signals = {
        signal.attrib["name"]: "".join(one.attrib["type"] for one in signal.findall("arg"))
        for signal in element.findall("signal")
    }
    return Interface(element.attrib["name"], methods, properties, signals, element)


STANDARD: Final = parse_interfaces("""
<node>
  <interface name="org.freedesktop.DBus.Properties">
    <method name="Get">
      <arg name="interface_name" type="s" direction="in"/>
      <arg name="property_name" type="s" direction="in"/>
      <arg name="value" type="v" direction="out"/>
    </method>
    <method name="GetAll">
      <arg name="interface_name" type="s" direction="in"/>
      <arg name="properties" type="a{sv}" direction="out"/>
    </method>
    <method name="Set">
      <arg name="interface_name" type="s" direction="in"/>
      <arg name="property_name" type="s" direction="in"/>
      <arg name="value" type="v" direction="in"/>
    </method>
    <signal name="PropertiesChanged">
      <arg name="interface_name" type="s"/>
      <arg name="changed_properties" type="a{sv}"/>
      <arg name="invalidated_properties" type="as"/>
    </signal>
  </interface>
  <interface name="org.freedesktop.DBus.Introspectable">
    <method name="Introspect">
      <arg name="xml_data" type="s" direction="out"/>
    </method>
  </interface>
  <interface name="org.freedesktop.DBus.Peer">
    <method name="Ping"/>
    <method name="GetMachineId">
      <arg name="machine_uuid" type="s" direction="out"/>
    </method>
  </interface>
  <interface name="org.freedesktop.DBus.ObjectManager">
    <method name="GetManagedObjects">
      <arg name="objects" type="a{oa{sa{sv}}}" direction="out"/>
    </method>
    <signal name="InterfacesAdded">
      <arg name="object_path" type="o"/>
      <arg name="interfaces_and_properties" type="a{sa{sv}}"/>
    </signal>
    <signal name="InterfacesRemoved">
      <arg name="object_path" type="o"/>
      <arg name="interfaces" type="as"/>
    </signal>
  </interface>
</node>
""")
