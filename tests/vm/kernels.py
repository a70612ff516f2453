# SPDX-License-Identifier: GPL-2.0-or-later
"""Stock Debian kernels, fetched once by apt and kept unpacked outside the tree.

apt runs with a state, a cache and a source list of its own, so the machine's package management is neither changed nor
asked; only the mirror (and with it proxy, certificates and credentials) is the one the machine uses. Signatures are
checked by apt against debian-archive-keyring. Nothing is installed, no package script runs.
"""

import fcntl
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.vm.errors import VmError

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
MIRROR_VARIABLE = "BLKSNAP_VM_MIRROR"
SUITES = {
    "6.12": ("bookworm-backports", "trixie"),
    "7": ("trixie-backports",),
}
"""What may be asked for, and where it is looked for, first match wins. 6.12 is the oldest kernel supported."""

OWN = "own"
OWN_VARIABLE = "BLKSNAP_TEST_KERNEL"
"""Names a bzImage, e.g. of a kernel with the blksnap filter; its modules are beside it in `lib/modules`, or all built in."""

# The image moved from linux-image to linux-binary in 7.0, the modules to linux-modules and modules.builtin to linux-base in
# 7.2; before, linux-image has it all. Later releases keep the older names for packages without files.
PACKAGES = ("linux-image", "linux-binary", "linux-modules", "linux-base")

APT_CONF = """\
Dir::State "{root}/state";
Dir::State::status "/dev/null";
Dir::Cache "{root}/cache";
Dir::Etc::sourcelist "{root}/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
APT::Architecture "amd64";
APT::Architectures {{ "amd64"; }};
Acquire::Languages "none";
# The user _apt cannot reach a directory below somebody's home.
APT::Sandbox::User "";
# Hooks of the machine clean up after the machine's own runs.
#clear APT::Update;
#clear DPkg;
"""


@dataclass(frozen=True, slots=True)
class Kernel:
    """One unpacked kernel: `directory` holds `vmlinuz` and `lib/modules/<release>`, with modules.dep made."""

    series: str
    release: str
    directory: Path
    own_image: Path | None = None

    @property
    def image(self) -> Path:
        """The bzImage."""
        return self.own_image or self.directory / "vmlinuz"

    @property
    def modules(self) -> Path:
        """What /lib/modules/`uname -r` is in the guest."""
        return self.directory / "lib/modules" / self.release


def cache_directory() -> Path:
    """Where kernels are kept: below $XDG_CACHE_HOME, as its specification says."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "blksnap/vm"


def find_kernel(series: str) -> Kernel:
    """The newest kernel of `series` in the cache; the newest there is, fetched, when there is none. `OWN`: that of the user.

    Raises VmError when the series is unknown or no kernel can be had.
    """
    if series == OWN:
        return _own_kernel()
    if series not in SUITES:
        raise VmError(f"no kernel {series}: there are {', '.join(SUITES)}")
    cache = cache_directory()
    if (kernel := _cached(cache, series)) is None:
        cache.mkdir(parents=True, exist_ok=True)
        # Two runs may want the same kernel at the same time; the second finds what the first has fetched.
        with (cache / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if (kernel := _cached(cache, series)) is None:
                kernel = _fetch(cache, series)
    return kernel


def _own_kernel() -> Kernel:
    image = Path(os.environ.get(OWN_VARIABLE, ""))
    try:
        with image.open("rb") as file:
            header = file.read(1 << 16)
    except OSError as error:
        raise VmError(f"{OWN_VARIABLE} names no kernel: {error}") from None
    if header[0x202:0x206] != b"HdrS":
        raise VmError(f"{image} is no bzImage")
    # kernel_version (Documentation/arch/x86/boot.rst): where the release begins, less 512.
    at = int.from_bytes(header[0x20E:0x210], "little") + 0x200
    release = header[at:].split(b" ", 1)[0].split(b"\0", 1)[0].decode("ascii", "replace")
    directory = image.resolve().parent
    if not (directory / "lib/modules" / release).is_dir():
        # Nothing to load. The guest wants a directory to mount all the same.
        directory = cache_directory() / OWN
        (directory / "lib/modules" / release).mkdir(parents=True, exist_ok=True)
    return Kernel(OWN, release, directory, image.resolve())


def _cached(cache: Path, series: str) -> Kernel | None:
    found = [
        Kernel(series, entry.name, entry)
        for entry in cache.glob(f"{series}.*")
        if (entry / "vmlinuz").exists()
    ]
    return max(found, key=lambda kernel: _numbers(kernel.release), default=None)


def _numbers(release: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", release)]


def _fetch(cache: Path, series: str) -> Kernel:
    if not KEYRING.exists():
        raise VmError(f"{KEYRING} is missing: install debian-archive-keyring")
    said = []
    for mirror in _mirrors():
        for suite in SUITES[series]:
            try:
                with _apt(mirror, suite) as apt:
                    return _unpack(apt, cache, series)
            except VmError as error:
                said.append(f"{suite}: {error}")
    raise VmError(f"could not fetch a kernel {series}:\n" + "\n".join(said))


def _mirrors() -> list[str]:
    """Debian's own archive as this machine reaches it; the security archive has no backports."""
    if mirror := os.environ.get(MIRROR_VARIABLE):
        return [mirror]
    # Without a fetched Release file the origin is empty, and then the name of the suite decides.
    lines = _run(
        "apt-get",
        "indextargets",
        "--format",
        "$(REPO_URI) $(RELEASE) $(COMPONENT) $(ORIGIN)",
        "Created-By: Packages",
    )
    mirrors = []
    for line in lines.splitlines():
        uri, suite, component, *origin = line.split(" ")
        if component == "main" and "-security" not in suite and origin in ([], [""], ["Debian"]):
            mirrors.append(uri)
    if not mirrors:
        raise VmError(f"apt knows no Debian mirror on this machine; set {MIRROR_VARIABLE} to one")
    return list(dict.fromkeys(mirrors))


@dataclass(frozen=True, slots=True)
class _Apt:
    """One private apt with fetched lists; `root` goes away with it."""

    root: Path

    def run(self, program: str, *arguments: str, cwd: Path | None = None) -> str:
        return _run(program, "-qq", "-c", str(self.root / "apt.conf"), *arguments, cwd=cwd)


@contextmanager
def _apt(mirror: str, suite: str) -> Iterator[_Apt]:
    with tempfile.TemporaryDirectory(prefix="blksnap-apt-") as directory:
        root = Path(directory)
        for part in ("state/lists/partial", "cache/archives/partial"):
            (root / part).mkdir(parents=True)
        (root / "apt.conf").write_text(APT_CONF.format(root=root))
        (root / "sources.list").write_text(f"deb [signed-by={KEYRING}] {mirror} {suite} main\n")
        apt = _Apt(root)
        apt.run("apt-get", "update", "--error-on=any")
        yield apt


def _unpack(apt: _Apt, cache: Path, series: str) -> Kernel:
    pattern = rf"^linux-(image|binary)-{re.escape(series)}\.[0-9.]+[+]deb[0-9.]+-amd64$"
    names = [
        line.split(" ", 1)[0] for line in apt.run("apt-cache", "search", "--names-only", pattern).splitlines()
    ]
    releases = {name.split("-", 2)[2] for name in names}
    if not releases:
        raise VmError("no such kernel")
    release = max(releases, key=_numbers)
    anchored = f"^({'|'.join(PACKAGES)})-{re.escape(release)}$"
    packages = [
        line.split(" ", 1)[0]
        for line in apt.run("apt-cache", "search", "--names-only", anchored).splitlines()
    ]
    print(f"vm: fetching {' '.join(packages)}", flush=True)
    apt.run("apt-get", "download", *packages, cwd=apt.root)
    # In the cache's own file system, so that the last step is one rename and no half a kernel is ever found.
    with tempfile.TemporaryDirectory(prefix=".unpacking-", dir=cache) as directory:
        tree, entry = Path(directory) / "tree", Path(directory) / "entry"
        for package in apt.root.glob("*.deb"):
            _run("dpkg-deb", "--extract", str(package), str(tree))
        (entry / "lib/modules").mkdir(parents=True)
        modules = entry / "lib/modules" / release
        for place in ("lib/modules", "usr/lib/modules"):
            if (tree / place / release).exists():
                shutil.move(tree / place / release, modules)
        image = modules / "vmlinuz"
        shutil.move(image if image.exists() else tree / "boot" / f"vmlinuz-{release}", entry / "vmlinuz")
        _run("depmod", "-b", str(entry), release)
        entry.rename(cache / release)
    return Kernel(series, release, cache / release)


def _run(*command: str, cwd: Path | None = None) -> str:
    try:
        return subprocess.run(
            command,
            cwd=cwd,
            check=True,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            env=_environment(),
        ).stdout
    except FileNotFoundError:
        raise VmError(f"{command[0]} is missing; make setup installs it on Debian") from None
    except subprocess.CalledProcessError as error:
        raise VmError(f"{command[0]} failed: {error.stderr.strip() or error.stdout.strip()}") from None


def _environment() -> dict[str, str]:
    """depmod and its like are in sbin, which a user's PATH leaves out."""
    return os.environ | {"LC_ALL": "C.UTF-8", "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin"}
