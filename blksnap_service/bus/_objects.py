# SPDX-License-Identifier: GPL-2.0-or-later
"""What is on the bus: objects by path, their interfaces, their properties, their introspection.

What it is: the table dispatch looks things up in. What it is not: sending; `_publisher` tells the bus what changes.
"""

from __future__ import annotations

import inspect
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Mapping
from typing import Any, Final, Protocol

from blksnap_service.bus._interfaces import (
    INTROSPECTABLE,
    OBJECT_MANAGER,
    PEER,
    PROPERTIES,
    STANDARD,
    Interface,
)
from blksnap_service.bus._values import Value

_DOCTYPE: Final = (
    '<!DOCTYPE node PUBLIC "-//freedesktop//DTD D-BUS Object Introspection 1.0//EN"\n'
    ' "http://www.freedesktop.org/standards/dbus/1.0/introspect.dtd">\n'
)


class Implementation(Protocol):
    """What is behind one interface of one object.

    Besides `properties` it has, for every method in the XML, `async def <Name>(self, call, *arguments)`, which returns
    nothing, the value, or a tuple of values, as the XML says.
    """

    def properties(self) -> Mapping[str, Any]:
        """Return the present plain values of all properties of the interface, by name. Quick: no I/O."""


class ObjectTable:
    """Objects by path; the root has the ObjectManager and need not be an object itself."""

    def __init__(self, root: str, interfaces: Mapping[str, Interface]) -> None:
        """Know the interfaces objects may have."""
        self.root = root
        self.interfaces = interfaces
        self._objects: dict[str, dict[str, Implementation]] = {}
        self._introspection: dict[str, str] = {}

    def paths(self) -> list[str]:
        """Return the paths of all objects."""
        return list(self._objects)

    def get(self, path: str) -> Mapping[str, Implementation] | None:
        """Return the interfaces of an object, or None."""
        return self._objects.get(path)

    def add(self, path: str, implementations: Mapping[str, Implementation]) -> None:
        """Add interfaces to an object, which begins to exist if need be.

        Raised when an interface is there already, is unknown, or lacks a method or property: ValueError, and nothing
        is added.
        """
        present = self._objects.get(path, {})
        for name, implementation in implementations.items():
            if name in present:
                raise ValueError(f"{path} has {name} already")
            self._check(name, implementation)
        self._objects.setdefault(path, {}).update(implementations)
        self._introspection.clear()

    def remove(self, path: str, names: Iterable[str]) -> list[str]:
        """Remove interfaces of an object, with the last one the object; returns those that were there."""
        present = self._objects.get(path, {})
        removed = [name for name in names if present.pop(name, None) is not None]
        if not present:
            self._objects.pop(path, None)
        self._introspection.clear()
        return removed

    def _check(self, name: str, implementation: Implementation) -> None:
        interface = self.interfaces.get(name)
        if interface is None:
            raise ValueError(f"the interface {name} is not in the XML")
        methods = [
            method
            for method in interface.methods
            if not inspect.iscoroutinefunction(getattr(implementation, method, None))
        ]
        properties = set(interface.properties) ^ set(implementation.properties())
        if methods or properties:
            kind = type(implementation).__name__
            raise ValueError(f"{kind} is no {name}: wrong or missing are {[*methods, *sorted(properties)]}")

    def values(self, path: str, name: str) -> dict[str, Value]:
        """Return all properties of an interface of an object, with their types. Raised when there is none: KeyError."""
        plain = self._objects[path][name].properties()
        described = self.interfaces[name].properties
        return {one.name: Value(one.signature, plain[one.name]) for one in described.values()}

    def managed(self) -> dict[str, dict[str, dict[str, Value]]]:
        """Return what GetManagedObjects does."""
        return {
            path: {name: self.values(path, name) for name in implementations}
            for path, implementations in self._objects.items()
        }

    def exists(self, path: str) -> bool:
        """Tell whether `path` is an object, the root, or above one of them."""
        return (
            path in self._introspection
            or path in self._objects
            or path == self.root
            or bool(self._below(path))
        )

    def _below(self, path: str) -> set[str]:
        prefix = "" if path == "/" else path
        return {
            one[len(prefix) + 1 :].split("/")[0]
            for one in [*self._objects, self.root]
            if one.startswith(f"{prefix}/") and one != path
        }

    def introspect(self, path: str) -> str:
        """Return the introspection document of an object, the root, or a path above one of them."""
        known = self._introspection.get(path)
        if known is not None:
            return known
        implementations = self._objects.get(path)
        node = ET.Element("node")
        node.extend(self.interfaces[name].element for name in implementations or ())
        standard = [INTROSPECTABLE, PEER]
        if implementations is not None:
            standard.insert(0, PROPERTIES)
        if path == self.root:
            standard.append(OBJECT_MANAGER)
        node.extend(STANDARD[name].element for name in standard)
        for name in sorted(self._below(path)):
            ET.SubElement(node, "node", name=name)
        document = _DOCTYPE + ET.tostring(node, encoding="unicode")
        self._introspection[path] = document
        return document
