# SPDX-License-Identifier: GPL-2.0-or-later
"""Puts objects on the bus and tells what happens to them.

What it is: the object tree as the service uses it, and the signals that follow from its changes: InterfacesAdded,
InterfacesRemoved (from the root, where clients listen), PropertiesChanged. What it is not: dispatch, which it starts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from blksnap_service.bus import _frame
from blksnap_service.bus._connection import Connection
from blksnap_service.bus._dispatch import Dispatcher
from blksnap_service.bus._frame import Header
from blksnap_service.bus._interfaces import OBJECT_MANAGER, PROPERTIES, STANDARD, Interface
from blksnap_service.bus._objects import Implementation, ObjectTable
from blksnap_service.bus._values import Value


class Publisher:
    """The objects of a service on one connection, with their ObjectManager at `root_path`."""

    def __init__(self, connection: Connection, root_path: str, interfaces: Mapping[str, Interface]) -> None:
        """Begin to answer calls. `interfaces` are those of `load_interfaces`."""
        self._connection = connection
        self._interfaces = interfaces
        self._objects = ObjectTable(root_path, interfaces)
        self._dispatcher = Dispatcher(connection, self._objects)
        connection.set_call_handler(self._dispatcher)

    def export(self, path: str, implementations: Mapping[str, Implementation]) -> None:
        """Add an object, or interfaces to one: one InterfacesAdded for all.

        Raised when an interface is there already, or the implementation lacks what the XML says: ValueError.
        """
        self._objects.add(path, implementations)
        added = {name: self._objects.values(path, name) for name in implementations}
        self._signal(self._objects.root, OBJECT_MANAGER, "InterfacesAdded", path, added)

    def unexport(self, path: str) -> None:
        """Remove an object with all its interfaces. Nothing happens if there is none."""
        self._remove(path, list(self._objects.get(path) or ()))

    def add_interface(self, path: str, interface: str, implementation: Implementation) -> None:
        """Add one interface to an object; as `export`."""
        self.export(path, {interface: implementation})

    def remove_interface(self, path: str, interface: str) -> None:
        """Remove one interface of an object, with the last one the object. Nothing happens if there is none."""
        self._remove(path, [interface])

    def exported(self, path: str, interface: str = "") -> bool:
        """Tell whether there is such an object, or such an interface on it."""
        present = self._objects.get(path)
        return present is not None and (not interface or interface in present)

    def changed(self, path: str, interface: str, what: Mapping[str, Any] | Iterable[str]) -> None:
        """Tell that properties changed: to these values, or, by name, to what the implementation now says.

        Properties the XML marks const or false are left out. Nothing happens if the interface is gone meanwhile.
        Raised when a property is not in the XML: KeyError.
        """
        if not self.exported(path, interface):
            return
        described = self._interfaces[interface].properties
        if isinstance(what, Mapping):
            values = {name: Value(described[name].signature, value) for name, value in what.items()}
        else:
            present = self._objects.values(path, interface)
            values = {name: present[name] for name in what}
        told = {name: value for name, value in values.items() if described[name].emits == "true"}
        invalidated = [name for name in values if described[name].emits == "invalidates"]
        if told or invalidated:
            self._signal(path, PROPERTIES, "PropertiesChanged", interface, told, invalidated)

    def signal(self, path: str, interface: str, name: str, *arguments: Any) -> None:
        """Send a signal of an object to all who listen.

        Raised when it is not in the XML: KeyError; when an argument has a wrong type: TypeError or ValueError.
        """
        self._signal(path, interface, name, *arguments)

    async def stop(self) -> None:
        """Refuse calls, cancel those that run, and send what is left to send. The connection stays open."""
        await self._dispatcher.stop()
        await self._connection.drain()

    def _remove(self, path: str, names: Iterable[str]) -> None:
        removed = self._objects.remove(path, names)
        if removed:
            self._signal(self._objects.root, OBJECT_MANAGER, "InterfacesRemoved", path, removed)

    def _signal(self, path: str, interface: str, name: str, *arguments: Any) -> None:
        described = STANDARD.get(interface) or self._interfaces[interface]
        header = Header(_frame.SIGNAL, _frame.NO_REPLY_EXPECTED, path=path, interface=interface, member=name)
        self._connection.send(header, described.signals[name], arguments)
