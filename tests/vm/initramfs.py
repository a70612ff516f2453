# SPDX-License-Identifier: GPL-2.0-or-later
"""The initramfs of a guest: busybox, the modules that reach the host's files, and `first-stage.sh`. Nothing else.

Written here, byte by byte, because the format is eight lines and an initramfs-tools run takes longer than the boot.
"""

import lzma
import os
import shlex
import shutil
import stat
import subprocess
from collections.abc import Mapping
from pathlib import Path

from tests.vm.errors import VmError
from tests.vm.kernels import Kernel

FIRST_STAGE = Path(__file__).with_name("first-stage.sh")
MODULES = ("virtio_pci", "9pnet_virtio", "9p", "overlay")
APPLETS = ("sh", "mount", "mkdir", "insmod", "ifconfig", "switch_root")
# A user's PATH leaves out where modprobe and its like are.
PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
DIRECTORIES = ("bin", "dev", "proc", "sys", "lower", "upper", "new")


def build(kernel: Kernel, settings: Mapping[str, str]) -> bytes:
    """An uncompressed archive for `kernel`; `settings` are shell variables of the first stage.

    Raises VmError when busybox is missing.
    """
    archive = _Archive()
    for directory in DIRECTORIES:
        archive.add(directory, stat.S_IFDIR | 0o755)
    busybox, *libraries = _busybox()
    archive.add("bin/busybox", stat.S_IFREG | 0o755, busybox.read_bytes())
    for library in libraries:
        for parent in reversed(library.parents[:-1]):
            archive.add(str(parent)[1:], stat.S_IFDIR | 0o755)
        archive.add(str(library)[1:], stat.S_IFREG | 0o755, library.read_bytes())
    for applet in APPLETS:
        archive.add(f"bin/{applet}", stat.S_IFLNK | 0o777, b"busybox")
    names = []
    for module in _module_files(kernel):
        name = module.name.removesuffix(".xz")
        data = module.read_bytes()
        archive.add(name, stat.S_IFREG | 0o644, lzma.decompress(data) if module.suffix == ".xz" else data)
        names.append(f"/{name}\n")
    archive.add("modules", stat.S_IFREG | 0o644, "".join(names).encode())
    lines = [f"{name}={shlex.quote(value)}\n" for name, value in settings.items()]
    archive.add("settings", stat.S_IFREG | 0o644, "".join(lines).encode())
    archive.add("init", stat.S_IFREG | 0o755, FIRST_STAGE.read_bytes())
    return archive.finish()


def _busybox() -> list[Path]:
    """The program, then the libraries it needs: Debian's `busybox` is dynamic, `busybox-static` is not."""
    path = shutil.which("busybox", path=PATH)
    if path is None:
        raise VmError("busybox is missing; make setup installs it on Debian")
    told = subprocess.run(["ldd", path], check=False, capture_output=True, text=True).stdout
    return [Path(path), *(Path(word) for word in told.split() if word.startswith("/"))]


def _module_files(kernel: Kernel) -> list[Path]:
    """The modules and what they need, in the order of loading; what is built in is left out."""
    files: dict[Path, None] = {}
    if not (kernel.modules / "modules.dep").exists():
        return []
    for module in MODULES:
        told = subprocess.run(
            ["modprobe", "-d", str(kernel.directory), "-S", kernel.release, "--show-depends", module],
            check=True,
            capture_output=True,
            text=True,
            env=os.environ | {"PATH": PATH},
        ).stdout
        for line in told.splitlines():
            action, _, path = line.partition(" ")
            if action == "insmod":
                files[Path(path.strip())] = None
    return list(files)


class _Archive:
    """A cpio archive in the `newc` format (kernel: Documentation/driver-api/early-userspace/buffer-format.rst)."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._count = 0

    def add(self, name: str, mode: int, data: bytes = b"") -> None:
        self._count += 1
        path = name.encode() + b"\0"
        # ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
        fields = (self._count, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(path), 0)
        header = b"070701" + b"".join(b"%08x" % field for field in fields)
        self._parts += [_padded(header + path), _padded(data)]

    def finish(self) -> bytes:
        self.add("TRAILER!!!", 0)
        return b"".join(self._parts)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
