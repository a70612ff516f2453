# SPDX-License-Identifier: GPL-2.0-or-later
"""The object table, the interfaces it is checked against, and the options of methods."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from blksnap_service.bus import _interfaces, options, wire
from blksnap_service.bus._objects import ObjectTable
from blksnap_service.errors import InvalidArgument, NotAvailable, OptionNotPermitted

XML = """<node><interface name="a.B1">
  <method name="Do"><arg name="x" type="u" direction="in"/><arg name="y" type="s" direction="out"/></method>
  <property name="P" type="u" access="read"/>
</interface><interface name="a.C1"/></node>"""


class Good:
    """What the XML says."""

    def properties(self) -> dict[str, Any]:
        """All of them."""
        return {"P": 1}

    async def Do(self, call: wire.Call, x: int) -> str:  # noqa: N802 - as on the bus
        """Do nothing."""
        return str(x)


class Synchronous(Good):
    """A method that is no coroutine."""

    def Do(self, call: wire.Call, x: int) -> str:  # type: ignore[override]  # noqa: N802 - what is wrong with it
        """Do nothing, at once."""
        return str(x)


class Wordless:
    """No method."""

    def properties(self) -> dict[str, Any]:
        """All of them."""
        return {"P": 1}


class Secretive(Good):
    """A property too few."""

    def properties(self) -> dict[str, Any]:
        """None of them."""
        return {}


class Talkative(Good):
    """A property too many."""

    def properties(self) -> dict[str, Any]:
        """All of them and another."""
        return {"P": 1, "Q": 2}


@pytest.fixture
def table() -> ObjectTable:
    """An empty table."""
    return ObjectTable("/r", wire.parse_interfaces(XML))


@pytest.mark.parametrize(
    "kind, name", [(Synchronous, "Do"), (Wordless, "Do"), (Secretive, "P"), (Talkative, "Q")]
)
def test_an_implementation_that_is_not_the_xml_s_is_refused(table: ObjectTable, kind: Any, name: str) -> None:
    """When it is exported, and not when the first caller finds out."""
    with pytest.raises(ValueError, match=rf"{kind.__name__} is no a\.B1: wrong or missing are \['{name}'\]"):
        table.add("/r/x", {"a.B1": kind()})
    assert table.paths() == []


def test_an_interface_is_added_once(table: ObjectTable) -> None:
    """A second, or one that is not in the XML, is refused, together with what would be added beside it."""
    table.add("/r/x", {"a.B1": Good()})
    blank: Any = type("Blank", (), {"properties": lambda _: {}})()
    for wrong in ({"a.C1": blank, "a.B1": Good()}, {"a.C1": blank, "a.D1": blank}):
        with pytest.raises(ValueError, match=r"has a\.B1 already|a\.D1 is not in the XML"):
            table.add("/r/x", wrong)
    assert list(table.get("/r/x") or ()) == ["a.B1"]


def test_an_object_ends_with_its_last_interface(table: ObjectTable) -> None:
    """Removing says what was there."""
    blank: Any = type("Blank", (), {"properties": lambda _: {}})()
    table.add("/r/x", {"a.B1": Good(), "a.C1": blank})
    assert table.remove("/r/x", ["a.B1", "a.D1"]) == ["a.B1"]
    assert table.exists("/r/x")
    assert table.remove("/r/x", ["a.B1", "a.C1"]) == ["a.C1"]
    assert not table.exists("/r/x")
    assert table.exists("/r")
    assert table.remove("/r/x", ["a.C1"]) == []


def test_introspection_follows_the_objects(table: ObjectTable) -> None:
    """What was read once is not remembered longer than it is true."""
    assert "<node name" not in table.introspect("/r")
    table.add("/r/x/y", {"a.B1": Good()})
    assert '<node name="x" />' in table.introspect("/r")
    assert '<node name="y" />' in table.introspect("/r/x")
    assert 'name="a.B1"' in table.introspect("/r/x/y")
    table.remove("/r/x/y", ["a.B1"])
    assert "<node name" not in table.introspect("/r")


def test_a_writable_property_is_refused() -> None:
    """There are none, so there is no code for them."""
    with pytest.raises(KeyError, match="not read-only"):
        wire.parse_interfaces(XML.replace('access="read"', 'access="readwrite"'))


def test_the_interfaces_are_found_in_the_source_tree_without_an_installation(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A checkout without the package's own copy; and a text when there is neither."""
    monkeypatch.setattr(resources, "files", lambda _: tmp_path)
    assert "org.blksnap.Blksnap1.Job" in wire.load_interfaces()
    monkeypatch.setattr(_interfaces, "__file__", str(tmp_path / "a" / "b" / "c.py"))
    with pytest.raises(NotAvailable, match=r"org\.blksnap\.Blksnap1\.xml is missing"):
        wire.load_interfaces()


def test_the_interfaces_are_found_in_the_package() -> None:
    """As an installation has them: all six."""
    names = {name.removeprefix("org.blksnap.Blksnap1.") for name in wire.load_interfaces()}
    assert names == {"Manager", "Device", "Tracker", "Snapshot", "Image", "Job"}


def test_known_options_of_the_right_type_are_taken() -> None:
    """As plain values; the standard option is accepted and left out."""
    given = {"limit": wire.Value("t", 5), "auth.no_user_interaction": wire.Value("b", True)}
    assert options.take(given, {"limit": "t", "storage": "s"}) == {"limit": 5}
    assert options.take({}, {"limit": "t"}) == {}


def test_an_unknown_option_is_refused_by_name() -> None:
    """With those there are."""
    with pytest.raises(
        OptionNotPermitted, match=r"there is no option 'limt' here; there are: auth.*, limit, storage"
    ):
        options.take({"limt": wire.Value("t", 5)}, {"limit": "t", "storage": "s"})


@pytest.mark.parametrize("signature", ["u", "i", "s", "v", "at", "(t)"])
def test_an_option_of_a_wrong_type_is_refused(signature: str) -> None:
    """Exactly the type: a number is not converted."""
    with pytest.raises(
        InvalidArgument, match=r"option 'limit' must have type t \(unsigned 64-bit number\), not "
    ):
        options.take({"limit": wire.Value(signature, 5)}, {"limit": "t"})
