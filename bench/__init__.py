# SPDX-License-Identifier: GPL-2.0-or-later
"""Benchmarks: the bars of the project, measured side by side. What each figure means: docs/performance.md."""
