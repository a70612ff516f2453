# SPDX-License-Identifier: GPL-2.0-or-later
"""Whole screens and dialogs. They show values and return answers; none of them calls the service."""
