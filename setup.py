# SPDX-License-Identifier: GPL-2.0-or-later
"""
The one thing pyproject.toml cannot say: the wheel holds a program and no extension module.

Any Python 3 of its platform can use it (`py3-none-linux_x86_64`), not only the version that built it.
"""

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel


class ProgramWheel(bdist_wheel):
    """A wheel of one platform and no particular Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """Give the tags of python, ABI and platform."""
        _, _, platform = super().get_tag()
        return "py3", "none", platform


setup(cmdclass={"bdist_wheel": ProgramWheel})
