# SPDX-License-Identifier: GPL-2.0-or-later
"""
Make docs/tui.png: the demo in a terminal of its own, as it looks after some increments. `python tools/screenshot.py`.

The terminal is tmux, its screen is read by pyte and drawn cell by cell with Pillow, so the picture shows exactly what a
terminal was told. Half blocks are drawn as rectangles: fonts leave seams between them.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyte
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
FONT = Path("/usr/share/fonts/truetype/dejavu/DejaVuSansMono.ttf")
CELL_WIDTH, CELL_HEIGHT, FONT_SIZE = 8, 16, 13
FOREGROUND, BACKGROUND = "d0d0d0", "101010"
TIMEOUT_S = 300.0
# The sixteen colours by pyte's names.
NAMED = {
    "black": "000000", "red": "cd0000", "green": "00cd00", "brown": "cdcd00",
    "blue": "0000ee", "magenta": "cd00cd", "cyan": "00cdcd", "white": "e5e5e5",
    "brightblack": "7f7f7f", "brightred": "ff0000", "brightgreen": "00ff00", "brightbrown": "ffff00",
    "brightblue": "5c5cff", "brightmagenta": "ff00ff", "brightcyan": "00ffff", "brightwhite": "ffffff",
}  # fmt: skip
# What part of its cell a block character fills: left, top, right, bottom in cells.
BLOCKS = {
    "█": (0.0, 0.0, 1.0, 1.0),
    "▀": (0.0, 0.0, 1.0, 0.5),
    "▄": (0.0, 0.5, 1.0, 1.0),
    "▌": (0.0, 0.0, 0.5, 1.0),
}


def colour(name: str, default: str) -> tuple[int, int, int]:
    """Turn a colour of pyte (a name, `default`, or six hexadecimal digits) into red, green and blue."""
    red, green, blue = bytes.fromhex(NAMED.get(name, default if name == "default" else name))
    return red, green, blue


def draw(text: str, columns: int, lines: int) -> Image.Image:
    """Draw what a terminal shows after being sent `text`."""
    screen = pyte.Screen(columns, lines)
    pyte.Stream(screen).feed(text.rstrip("\n").replace("\n", "\r\n"))
    font = ImageFont.truetype(str(FONT), FONT_SIZE)
    image = Image.new("RGB", (columns * CELL_WIDTH, lines * CELL_HEIGHT))
    canvas = ImageDraw.Draw(image)
    for line in range(lines):
        for column in range(columns):
            cell = screen.buffer[line][column]
            front, back = colour(cell.fg, FOREGROUND), colour(cell.bg, BACKGROUND)
            if cell.reverse:
                front, back = back, front
            x, y = column * CELL_WIDTH, line * CELL_HEIGHT
            canvas.rectangle((x, y, x + CELL_WIDTH - 1, y + CELL_HEIGHT - 1), fill=back)
            if cell.data in BLOCKS:
                left, top, right, bottom = BLOCKS[cell.data]
                corner = (x + right * CELL_WIDTH - 1, y + bottom * CELL_HEIGHT - 1)
                canvas.rectangle((x + left * CELL_WIDTH, y + top * CELL_HEIGHT, *corner), fill=front)
            elif cell.data.strip():
                canvas.text((x, y), cell.data, font=font, fill=front)
    return image


def demo_screen(columns: int, lines: int, after: str) -> str:
    """Run the demo in a terminal of that size until `after` has been printed; gives the screen then."""
    with tempfile.TemporaryDirectory(prefix="blksnap-screenshot-") as directory:
        tmux = ["tmux", "-S", f"{directory}/tmux", "-f", "/dev/null"]
        env = {**os.environ, "TMUX": "", "COLORTERM": "truecolor"}
        command = shlex.join(["env", "-C", str(ROOT), sys.executable, "-m", "demo", "--close-when-done"])
        size = ["-x", str(columns), "-y", str(lines)]
        subprocess.run([*tmux, "new-session", "-d", *size, command], check=True, env=env)
        try:
            deadline = time.monotonic() + TIMEOUT_S
            while time.monotonic() < deadline:
                plain = subprocess.run(
                    [*tmux, "capture-pane", "-p"], check=True, capture_output=True, text=True
                )
                if after in plain.stdout:
                    time.sleep(0.7)  # the heat map follows within half a second
                    shown = subprocess.run(
                        [*tmux, "capture-pane", "-ep"], check=True, capture_output=True, text=True
                    )
                    return shown.stdout
                time.sleep(0.1)
            sys.exit(f"the demo did not print {after!r} within {TIMEOUT_S:.0f} s")
        finally:
            subprocess.run([*tmux, "kill-server"], check=False)


def main() -> None:
    """Make the picture."""
    parser = argparse.ArgumentParser(description="make a picture of the demo")
    parser.add_argument("target", type=Path, nargs="?", default=ROOT / "docs" / "tui.png")
    parser.add_argument("--columns", type=int, default=140)
    parser.add_argument("--lines", type=int, default=44)
    parser.add_argument("--after", default="increment 6", help="what the demo must have printed")
    arguments = parser.parse_args()
    text = demo_screen(arguments.columns, arguments.lines, arguments.after)
    image = draw(text, arguments.columns, arguments.lines)
    image.quantize(64).save(arguments.target, optimize=True)
    print(arguments.target)


if __name__ == "__main__":
    main()
