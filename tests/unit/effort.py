# SPDX-License-Identifier: GPL-2.0-or-later
"""How much the interpreter has to do, in its own instructions: the same on every machine, however busy."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any


@contextlib.contextmanager
def instructions_at_most(most: int) -> Iterator[None]:
    """Fail as soon as functions called in the block have executed more.

    A loop in Python over as many things as there are is found this way; what compiled code does in one call is not.
    """
    count = 0

    def step(frame: FrameType, event: str, _argument: Any) -> Any:
        nonlocal count
        frame.f_trace_opcodes = True
        count += event == "opcode"
        assert count <= most, f"more than {most} instructions"
        return step

    before = sys.gettrace()
    sys.settrace(step)
    try:
        yield
    finally:
        sys.settrace(before)
