# SPDX-License-Identifier: GPL-2.0-or-later
"""The program's own themes; the heat map's ramp is chosen apart from them."""

from __future__ import annotations

from typing import Final

from textual.theme import Theme

DARK: Final = Theme(
    name="blksnap-dark",
    dark=True,
    primary="#3fa08f",
    secondary="#5b7fa6",
    accent="#e6c229",
    foreground="#d6d9dc",
    background="#121315",
    surface="#17191c",
    panel="#22262a",
    success="#6cc36c",
    warning="#e0a93b",
    error="#e06767",
    variables={
        "border": "#3a4046",
        "border-blurred": "#2c3035",
        "footer-key-foreground": "#e6c229",
        "block-cursor-background": "#2f6f66",
        "block-cursor-foreground": "#ffffff",
        "block-cursor-blurred-background": "#26302f",
        "block-cursor-blurred-foreground": "#d6d9dc",
        "block-cursor-text-style": "none",
    },
)

LIGHT: Final = Theme(
    name="blksnap-light",
    dark=False,
    primary="#1f7a6d",
    secondary="#3d5f86",
    accent="#8a5a00",
    foreground="#22262a",
    background="#fafafa",
    surface="#f1f2f3",
    panel="#e2e5e8",
    success="#2b7d2b",
    warning="#9a6700",
    error="#b3261e",
    variables={
        "border": "#b9bfc5",
        "border-blurred": "#d3d7db",
        "footer-key-foreground": "#8a5a00",
        "block-cursor-background": "#1f7a6d",
        "block-cursor-foreground": "#ffffff",
        "block-cursor-blurred-background": "#d8e6e4",
        "block-cursor-blurred-foreground": "#22262a",
        "block-cursor-text-style": "none",
    },
)
