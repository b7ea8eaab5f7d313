"""The emulated machine ("L1"): KVM as with hardware, on a host that has no KVM, or one that cannot run stock guests.

QEMU's TCG emulates a processor with SVM, so Debian's stock kernel loads its real kvm_amd.  The root file system is this
host's own, under an overlay, so the checkout, its virtual environment and every program have their usual paths.  Writes
inside the machine are lost, except in `/l1`, which is a folder of the host.

    python -m tests.l1.machine COMMAND [ARGUMENT ...]      runs a command in the machine; exits with its status
"""

import contextlib
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from tools import initramfs
from tools.debian_kernel import Kernel, KernelError, cache_dir, fetch

HERE = Path(__file__).parent
MODULES = ("kvm-amd", "virtio_pci", "9pnet_virtio", "9p", "overlay", "tun")
NICE = 5  # the host's other tests run one after the other, and would end last without this
MEMORY_MIB = 8192  # for a guest of 5 GiB, which has memory above the PCI hole, and for the overlay
# With two processors guests sometimes break, and so does this machine's kernel: it was seen to continue with the
# registers of a guest.  With one processor that was not seen, and guests are as fast.
VCPUS = 1
# Only TCG emulates SVM.  The other options were the fastest in measurements: a translation cache of 512 MiB, nested
# paging, and a kernel without mitigations.
QEMU = (
    "qemu-system-x86_64", "-M", "q35", "-accel", "tcg,thread=multi,tb-size=512", "-cpu", "EPYC,+svm",
    "-display", "none", "-vga", "none", "-nic", "none", "-no-reboot", "-nodefaults", "-no-user-config",
)  # fmt: skip
# The emulator sometimes loses an interrupt.  If it is a timer's, the machine sleeps for ever, unless another interrupt
# makes the emulator check again (see `_wake`).  If it is one between two processors, the machine's own kernel notices
# the loss and ends the machine.  The times are long enough for a busy host.
WATCHDOGS = "softlockup_panic=1 watchdog_thresh=30 rcupdate.rcu_cpu_stall_timeout=60 sysctl.kernel.panic_on_rcu_stall=1"
# tsc=unstable: a kernel with one processor trusts the emulated TSC and measures it twice.  If the second result is the
# higher one, KVM gives guests no timer (`virtual_tsc_khz` stays 0).  no_timer_check: on a busy host ticks come too late
# for a kernel that counts them at its start, and it would end with "IO-APIC + timer doesn't work".
APPEND = f"console=ttyS0 quiet panic=-1 mitigations=off nokaslr tsc=unstable no_timer_check {WATCHDOGS}"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PASSED_ON = ("HOME", "XDG_CACHE_HOME", "CI", "LANG", "TERM")
HEARTBEAT = "heartbeat"  # in the shared folder; touched regularly while the machine works
WAKE_S = 30.0  # without a touch: the machine may have lost a timer interrupt
STUCK_S = 180.0  # without a touch: nothing can wake the machine
TAIL_LINES = 60


class L1Error(Exception):
    """The machine did not run its command to the end.  The text says why."""


class Emulated:
    """A machine that boots a kernel with some devices.  The folder `out` is its share `out`."""

    def __init__(
        self, out: Path, kernel: Kernel, initrd: Path, devices: Sequence[str], limit_s: int,
        memory_mib: int = MEMORY_MIB, nice: int = NICE,
    ) -> None:  # fmt: skip
        self.priority = ("nice", "-n", str(nice))
        self.out = out
        self.limit_s = limit_s
        self.memory_mib = memory_mib
        out.mkdir(parents=True, exist_ok=True)
        Path(out, HEARTBEAT).touch()
        self.wakes = 0
        self.qemu = self._start(kernel, initrd, devices)
        threading.Thread(target=self._wake, daemon=True).start()

    def _start(self, kernel: Kernel, initrd: Path, devices: Sequence[str]) -> subprocess.Popen[bytes]:
        with open(self.out / "qemu-errors", "wb") as errors, open(self.out / "output", "wb") as output:
            return subprocess.Popen(
                [
                    *self.priority, "timeout", "--kill-after=5", str(self.limit_s), *QEMU,
                    "-smp", str(VCPUS), "-m", str(self.memory_mib),
                    "-kernel", str(kernel.image), "-initrd", str(initrd), "-append", APPEND,
                    "-serial", f"file:{self.out}/console", "-serial", "stdio",
                    "-virtfs", share("modules", kernel.root / "lib/modules", "readonly=on"),
                    "-virtfs", share("out", self.out, "multidevs=remap"),
                    *devices,
                ],
                stdin=subprocess.PIPE, stdout=output, stderr=errors,
            )  # fmt: skip

    def _wake(self) -> None:
        """Send a silent machine an interrupt, by a character to its second serial port, until the machine ends."""
        assert self.qemu.stdin is not None
        with contextlib.suppress(BrokenPipeError), self.qemu.stdin as line:
            while not self.ended(WAKE_S / 4):
                if self.silent_s() > WAKE_S:
                    line.write(b"\0")
                    line.flush()
                    self.wakes += 1

    def ended(self, timeout_s: float) -> bool:
        """Wait at most `timeout_s`.  Return whether the machine is off."""
        try:
            self.qemu.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def silent_s(self) -> float:
        """Return the seconds since the last heartbeat of the machine."""
        return time.time() - Path(self.out, HEARTBEAT).stat().st_mtime

    def stuck(self) -> bool:
        """Return whether the machine, which must be running, has had no heartbeat for too long."""
        return self.silent_s() > STUCK_S

    def tail(self) -> str:
        """Return the last lines of each output of the machine."""
        parts = []
        for name in ("qemu-errors", "console", "output"):
            path = self.out / name
            said = path.read_bytes().decode(errors="replace") if path.exists() else ""
            lines = [line for line in said.splitlines() if "TCG doesn't support" not in line]
            parts.append("\n".join([f"--- {name}", *lines[-TAIL_LINES:]]))
        return "\n".join(parts)

    def stop(self) -> None:
        """End the machine if it is still running."""
        if self.qemu.poll() is None:
            self.qemu.terminate()  # timeout(1) forwards the signal to QEMU
        self.qemu.wait()


class Machine(Emulated):
    """A machine that runs one command on this host's root file system."""

    def __init__(self, out: Path, command: Sequence[str], limit_s: int, nice: int = NICE) -> None:
        kernel, initrd = prepare()
        out.mkdir(parents=True, exist_ok=True)
        for name in ("status", "console", "output"):
            Path(out, name).unlink(missing_ok=True)
        Path(out, "command").write_text(_script(command))
        root = ("-virtfs", share("host", Path("/"), "readonly=on,multidevs=remap"))
        super().__init__(out, kernel, initrd, root, limit_s, nice=nice)

    def status(self) -> int:
        """Return the exit status of the command, after the machine is off.  Raises L1Error if there is none."""
        written = self.out / "status"
        if written.exists():
            return int(written.read_text())
        if self.qemu.returncode in (124, 137):
            raise L1Error(f"the emulated machine had not finished after {self.limit_s} s\n{self.tail()}")
        raise L1Error(f"the emulated machine ended before its command did\n{self.tail()}")

    def died(self) -> bool:
        """Return whether the machine, which is off, has reset itself during its command, for which no test is to blame.

        Its kernel was stuck or found corrupt memory, or had a triple fault.
        """
        return self.qemu.returncode == 0 and not Path(self.out, "status").exists()


def prepare() -> tuple[Kernel, Path]:
    """Return kernel and initramfs of the machine.  Fetch and build them if necessary.  Raises L1Error."""
    try:
        kernel = fetch("amd64", cache_dir())
        return kernel, initramfs.cached("l1", HERE / "init", MODULES, kernel)
    except (KernelError, OSError) as error:
        raise L1Error(str(error)) from error


def _script(command: Sequence[str]) -> str:
    environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ} | {"PATH": PATH}
    exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in environment.items())
    return f"{exports}cd {shlex.quote(os.getcwd())} && exec {shlex.join(command)}\n"


def share(tag: str, folder: Path, options: str) -> str:
    """Return QEMU's option that shares a folder with the machine."""
    return f"local,mount_tag={tag},path={folder},security_model=none,{options}"


def main(arguments: list[str]) -> int:
    """Run one command and show its output."""
    if not arguments:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        machine = Machine(Path("build/l1").resolve(), arguments, limit_s=1800)
    except L1Error as error:
        print(f"l1: {error}", file=sys.stderr)
        return 125
    try:
        with open(machine.out / "output", "ab+") as output:
            while not machine.ended(0.2):
                sys.stdout.write(output.read().decode(errors="replace"))
                sys.stdout.flush()
            sys.stdout.write(output.read().decode(errors="replace"))
        return machine.status()
    except L1Error as error:
        print(f"l1: {error}", file=sys.stderr)
        return 125
    finally:
        machine.stop()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
