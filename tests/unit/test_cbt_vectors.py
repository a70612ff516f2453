# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

VECTORS = Path(__file__).parents[1] / "vectors"


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    """The script that writes the vectors."""
    spec = importlib.util.spec_from_file_location("make_cbt", VECTORS / "make_cbt.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_vectors_are_what_the_rules_give(maker: ModuleType) -> None:
    """The checked-in file, which the engine's tests replay, is up to date: else run tests/vectors/make_cbt.py."""
    assert (VECTORS / "cbt.json").read_text(encoding="utf-8") == maker.text()


def test_the_vectors_reach_the_rare_cases() -> None:
    """Slides, refusals, resets and continued maps all occur; 600 takes and more follow each other."""
    vectors = json.loads((VECTORS / "cbt.json").read_text(encoding="utf-8"))
    steps = [step for sequence in vectors["sequences"] for step in sequence["steps"]]
    assert sum(step["op"] == "take" for step in vectors["sequences"][0]["steps"]) >= 600
    assert {"write", "mark", "mark-all", "take", "reset", "restore"} == {step["op"] for step in steps}
    assert sum(step.get("slides", False) for step in steps) >= 5
    assert any(step["op"] == "mark" and step["blocks"] is None for step in steps)
    asked = [question for step in steps for question in step.get("asked", [])]
    assert {view for view, _, _ in asked} == {"live", "taken"}
    assert any(ranges is None for _, _, ranges in asked)
    assert any(ranges for _, _, ranges in asked)
