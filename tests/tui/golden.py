# SPDX-License-Identifier: GPL-2.0-or-later
"""
Screens compared with kept ones, as text (to read in a diff) and as SVG (to look at).

A screen that differs leaves `NAME.actual.txt` and `.svg` beside the kept ones. With BLKSNAP_UPDATE_GOLDEN=1 the kept
ones are written anew; look at them before they are committed. They belong to the exact Textual pyproject.toml names.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from textual.app import App


def screen_text(app: App[Any]) -> str:
    """Give the characters on the screen, line by line. Textual's compositor is private: only here it is asked."""
    lines = ("".join(segment.text for segment in strip) for strip in app.screen._compositor.render_strips())
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _without_ids(svg: str) -> str:
    """Take out what differs in every export."""
    return re.sub(r"terminal-[0-9a-f]+", "terminal", svg)


class Golden:
    """The kept screens of one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def check(self, app: App[Any], name: str) -> None:
        """Compare what is on the screen with the kept screen of that name."""
        shown = {"txt": screen_text(app), "svg": _without_ids(app.export_screenshot(title=name))}
        differs = []
        for kind, now in shown.items():
            kept, actual = self._folder / f"{name}.{kind}", self._folder / f"{name}.actual.{kind}"
            actual.unlink(missing_ok=True)
            if os.environ.get("BLKSNAP_UPDATE_GOLDEN") == "1":
                self._folder.mkdir(exist_ok=True)
                kept.write_text(now, encoding="utf8")
            elif not kept.exists() or kept.read_text(encoding="utf8") != now:
                actual.write_text(now, encoding="utf8")
                differs.append(kind)
        assert not differs, (
            f"{name} looks different ({', '.join(differs)}): see {self._folder}/{name}.actual.*"
        )
