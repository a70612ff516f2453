# SPDX-License-Identifier: GPL-2.0-or-later
"""One emulated machine: a stock kernel, the host's files as they are, one command, its output and its exit status.

The guest sees the host's whole root read-only under an overlay in memory, so tree, environment and programs are at their
own paths, and nothing it writes comes back, but for `/run/vm`, which is `Guest.directory`. It has no network. qemu
emulates the processor (TCG): nothing here needs KVM.
"""

import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from tests.vm import initramfs
from tests.vm.errors import VmError
from tests.vm.kernels import Kernel, find_kernel

TREE = Path(__file__).resolve().parents[2]
TIMED_OUT = 124
"""Exit status of a run that was ended by its time limit; as timeout(1)."""
DIED = 125
"""Exit status of a run whose guest ended without one: a panic, or its power was cut."""
KERNEL_VARIABLE = "BLKSNAP_VM_GUEST"
"""Set in every guest, to the series that was asked for; nowhere else."""

# No mitigations, no relocation and no self-tests: each costs seconds under emulation and shows nothing about block devices.
# The test of the timer at boot counts interrupts for a moment: on a busy host too few arrive, and the kernel panics.
APPEND = (
    "console=ttyS0 quiet panic=-1 mitigations=off nokaslr audit=0 apparmor=0 cryptomgr.notests random.trust_cpu=on"
    " no_timer_check"
)


@dataclass(frozen=True, slots=True)
class Disk:
    """An empty or a kept disk: `/dev/vda`, `/dev/vdb` … in the guest, in the order given.

    Without `path` it is empty and goes away with the guest. With one it is that file, made sparse when it is missing;
    `size_bytes` is then its size when made.
    """

    size_bytes: int = 0
    path: Path | None = None


DEFAULT_DISKS = (Disk(8 << 30), Disk(8 << 30))


@dataclass(frozen=True, slots=True)
class Machine:
    """What a guest is made of. `qemu` and `append` go to the end of qemu's and of the kernel's command line."""

    series: str
    memory_mib: int = 4096
    cpus: int = 2
    disks: tuple[Disk, ...] = DEFAULT_DISKS
    time_limit_s: float = 900
    append: str = ""
    qemu: tuple[str, ...] = ()
    init: Path | None = None
    """A shell script to be process 1 in place of running the command; what it starts runs `/run/vm/command`."""


class Guest:
    """A running machine, ended at the latest when its `with` block is.

    `output` gives the command's lines as they come; `wait` its exit status. The directory with the console log is kept
    when the run was no success, else removed.
    """

    def __init__(self, machine: Machine, command: str, environment: Mapping[str, str] | None = None) -> None:
        """`command` is run by the guest's /bin/sh in the tree, as root. Raises VmError when there is no such kernel."""
        self.machine = machine
        self.kernel: Kernel = find_kernel(machine.series)
        self.directory = Path(tempfile.mkdtemp(prefix="blksnap-vm-"))
        """`/run/vm` of the guest."""
        self._private = Path(tempfile.mkdtemp(prefix="blksnap-vm-qemu-"))
        self._command = command
        self._environment = environment or {}
        self._process: subprocess.Popen[str] | None = None
        self._timer = threading.Timer(machine.time_limit_s, self._expire)
        self._timer.daemon = True
        self._expired = False
        self._kept = True

    @property
    def console(self) -> Path:
        """What the kernel said."""
        return self.directory / "console.log"

    @property
    def _errors(self) -> Path:
        return self._private / "errors"

    def __enter__(self) -> Self:
        variables = {
            "PATH": f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "PYTHONUNBUFFERED": "1",
            KERNEL_VARIABLE: self.machine.series,
            **self._environment,
        }
        exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in variables.items())
        text = f"{exports}cd {shlex.quote(str(TREE))} || exit {DIED}\n{self._command}\n"
        (self.directory / "command").write_text(text)
        if self.machine.init is not None:
            (self.directory / "init").write_text(self.machine.init.read_text())
        try:
            with self._errors.open("w") as errors:
                self._process = subprocess.Popen(
                    self._qemu(),
                    # Never /dev/null: at the end of its input qemu tells the guest that nobody listens any more.
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                    errors="replace",
                    bufsize=1,
                )
        except BaseException as error:
            self._kept = False
            self._clean()
            if isinstance(error, FileNotFoundError):
                raise VmError(f"{error.filename} is missing; make setup installs it on Debian") from None
            raise
        self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cut_power()
        self._clean()

    @property
    def output(self) -> Iterator[str]:
        """The command's output, line by line, without line ends, until the guest ends."""
        for line in self._pipe():
            yield line.removesuffix("\n")

    def wait(self) -> int:
        """Read what is left of the output; the exit status of the command, TIMED_OUT or DIED.

        Raises VmError when qemu did not even start the machine.
        """
        assert self._process is not None
        for _ in self._pipe():
            pass
        code = self._process.wait()
        self._timer.cancel()
        if self._expired:
            return TIMED_OUT
        try:
            status = int((self.directory / "status").read_text())
        except FileNotFoundError:
            if code > 0:
                raise VmError(f"qemu ended with {code}: {self._errors.read_text().strip()}") from None
            return DIED
        self._kept = status != 0
        return status

    @property
    def running(self) -> bool:
        """Whether the machine has not ended yet; `output` may give more lines when it has."""
        return self._process is not None and self._process.poll() is None

    def cut_power(self) -> None:
        """End the machine at once. Disks keep what qemu has accepted, flushed or not; the guest's memory is gone."""
        if self._process is not None and self.running:
            self._process.kill()
            self._process.wait()

    def remove(self) -> None:
        """Remove the directory of an ended guest that was kept, when its failure was what was wanted."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def _pipe(self) -> IO[str]:
        assert self._process is not None
        assert self._process.stdout is not None
        return self._process.stdout

    def _expire(self) -> None:
        self._expired = True
        self.cut_power()

    def _clean(self) -> None:
        self._timer.cancel()
        if self._process is not None:
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
        shutil.rmtree(self._private)
        if not self._kept:
            shutil.rmtree(self.directory)

    def _qemu(self) -> list[str]:
        image = self._private / "initramfs"
        image.write_bytes(initramfs.build(self.kernel, self._settings()))
        command = [
            # No guest outlives the program that wanted it, however that ends.
            *("setpriv", "--pdeathsig", "KILL", "--"),
            *("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            # Five-level page tables make each emulated page walk longer.
            *("-machine", "q35,accel=tcg,usb=off,vmport=off", "-cpu", "max,la57=off"),
            *("-smp", str(self.machine.cpus), "-m", f"{self.machine.memory_mib}M"),
            *("-kernel", str(self.kernel.image), "-initrd", str(image)),
            *("-append", f"{APPEND} {self.machine.append}"),
            *("-serial", f"file:{self.console}"),
            *("-device", "virtio-serial-pci", "-chardev", "stdio,id=output,signal=off"),
            *("-device", "virtserialport,chardev=output"),
            *self._share("root", Path("/"), ",readonly=on"),
            *self._share("run", self.directory, ""),
        ]
        for number, disk in enumerate(self.machine.disks):
            path = disk.path or self._private / f"disk{number}"
            if not path.exists():
                with path.open("wb") as file:
                    file.truncate(disk.size_bytes)
            command += ["-drive", f"file={path},if=none,id=disk{number},format=raw,discard=unmap"]
            command += ["-device", f"virtio-blk-pci,drive=disk{number},serial=disk{number}"]
        return [*command, *self.machine.qemu]

    @staticmethod
    def _share(name: str, path: Path, options: str) -> list[str]:
        # none: what root does in the guest fails softly where the user on the host may not.
        device = f"local,id={name},path={path},security_model=none,multidevs=remap{options}"
        return ["-fsdev", device, "-device", f"virtio-9p-pci,fsdev={name},mount_tag={name}"]

    def _settings(self) -> dict[str, str]:
        needed = (TREE, Path(sys.prefix), Path(sys.base_prefix))
        return {
            "VM_RELEASE": self.kernel.release,
            "VM_MODULES": str(self.kernel.modules),
            "VM_SECOND_STAGE": str(Path(__file__).with_name("second-stage.sh")),
            # A fresh /tmp, unless that would hide what the guest runs.
            "VM_TMP": "" if any(path.is_relative_to("/tmp") for path in needed) else "1",  # noqa: S108 # not a file
        }
