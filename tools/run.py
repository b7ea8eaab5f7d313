"""Starts the daemon of this checkout with one virtual machine, and opens a shell in it (`make run`).

If KVM uses hardware, the guest is a Debian made from packages.  cloud-init configures it from a seed, and the shell
is by ssh.  If that image cannot be made, the guest is a stock kernel with busybox, and the shell is at its console.  A
software KVM cannot boot a stock kernel, so there the guest is our demonstration program.
Everything is stopped and removed when the user leaves the shell or the console (`~.`), or the guest powers off.
"""

import contextlib
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from tools import debian_image, initramfs
from tools.debian_image import ImageError
from tools.debian_kernel import KernelError, cache_dir, fetch, installed

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "run"
LOG = FOLDER / "vmd.log"
DEMO = ROOT / "build" / "guests" / "demo.elf"
SOFTWARE_KVM = Path("/sys/module/kvm_pvm")
VMD = ROOT / ".venv/bin/vmd"
VMCTL = ROOT / ".venv/bin/vmctl"
NAME = "demo"
USER = "debian"
DISK_SIZE = "10G"
Vmctl = list[str]
START_S = 30
STOP_S = 130  # the daemon gives a guest 120 s to power off


class RunError(Exception):
    """The daemon did not start."""


class Guest(NamedTuple):
    """A virtual machine: the lines of its `vm` block, and a function that runs a shell in it and returns its status."""

    lines: tuple[str, ...]
    enter: Callable[[Vmctl], int]

    @property
    def conf(self) -> str:
        """The text of vm.conf."""
        return f'vm "{NAME}" {{\n' + "".join(f"\t{line}\n" for line in ("disable", *self.lines)) + "}\n"


def chosen() -> Guest:
    """Return the best guest that this host can run.  Raises KernelError or RunError."""
    if SOFTWARE_KVM.exists():
        if not DEMO.exists():
            raise RunError(f"{DEMO} is missing: build it with: make -C guests OUT={DEMO.parent}")
        return Guest(("memory 64M", f'boot "{DEMO}"'), console)
    try:
        return debian()
    except ImageError as error:
        print(f"run: {error}\nrun: running a small guest instead", file=sys.stderr, flush=True)
        return small()


def small() -> Guest:
    """Return a stock kernel with busybox.  Raises KernelError."""
    kernel = installed() or fetch("cloud-amd64", cache_dir())
    cmdline = "console=ttyS0 quiet vmdtest=info,shell"
    boot = f'boot "{kernel.image}" initrd "{initramfs.guest(kernel)}" cmdline "{cmdline}"'
    return Guest(("memory 256M", "vcpus 2", boot), console)


def debian() -> Guest:
    """Return a Debian with a new disk.  Only a key made for this run can log in.  Raises ImageError."""
    image = debian_image.cached()
    disk, key = FOLDER / "disk.qcow2", FOLDER / "key"
    for path in (disk, key, FOLDER / "key.pub"):
        path.unlink(missing_ok=True)
    shown([str(VMCTL), "create", "-i", str(image), "-s", DISK_SIZE, str(disk)])
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "make run", "-f", key], check=True)
    boot = f'{debian_image.BOOT} cmdline "{debian_image.CMDLINE} quiet"'
    seed = f'seed {{ user {USER}, ssh-key "{key}.pub" }}'
    return Guest(("memory 512M", "vcpus 2", boot, f'disk "{disk}"', "local interface", seed), ssh)


def shown(command: list[str], *, check: bool = True) -> int:
    """Print a command, and run it.  Return its exit status.  Raises CalledProcessError."""
    print(f"run: {' '.join(command)}", flush=True)
    return subprocess.run(command, check=check).returncode


def console(vmctl: Vmctl) -> int:
    """Attach to the console of the guest.  Return the exit status."""
    print("run: the console of the guest; leave it with ~. at the beginning of a line", flush=True)
    return subprocess.run([*vmctl, "console", NAME], check=False).returncode


def ssh(vmctl: Vmctl) -> int:
    """Open a shell in the guest by ssh, or its console if that fails.  Return the exit status."""
    known = f"UserKnownHostsFile={FOLDER}/known_hosts"
    command = [*vmctl, "ssh", "-i", str(FOLDER / "key"), "-o", "IdentitiesOnly=yes", "-o", known, NAME]
    print(f"run: cloud-init configures the guest; to watch it: {' '.join([*vmctl, 'console', NAME])}", flush=True)
    if shown([*command, "--", "true"], check=False):
        return console(vmctl)
    return shown(command, check=False)


@contextlib.contextmanager
def daemon(conf: Path) -> Iterator[list[str]]:
    """Run a daemon.  Yield the vmctl command for it, and stop it at the end.

    Raises RunError if the daemon does not start.
    """
    with contextlib.ExitStack() as stack:
        # Not below the checkout, because the path of a socket has at most 107 bytes.
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="vmd-run-"))
        control = f"{folder}/vmd.sock"
        notices = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        notices.bind(f"{folder}/notify")
        log = stack.enter_context(open(LOG, "wb"))
        vmd = subprocess.Popen(
            [VMD, "-d", "-f", conf, "-s", control],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            env={**os.environ, "NOTIFY_SOCKET": f"{folder}/notify", "STATE_DIRECTORY": f"{folder}/state"},
            start_new_session=True,  # ^C at the terminal is only for this process, which then stops the daemon
        )  # fmt: skip
        try:
            await_ready(vmd, notices)
            yield [str(VMCTL), "-s", control]
        finally:
            vmd.terminate()
            try:
                vmd.wait(STOP_S)
            except (subprocess.TimeoutExpired, KeyboardInterrupt):
                vmd.kill()
                vmd.wait()


def await_ready(vmd: subprocess.Popen[bytes], notices: socket.socket) -> None:
    """Wait for the daemon's READY=1 (sd_notify(3)).  Raises RunError if it exits first or takes too long."""
    exited = os.pidfd_open(vmd.pid)
    try:
        while True:
            ready, _, _ = select.select([notices.fileno(), exited], [], [], START_S)
            if notices.fileno() in ready and b"READY=1" in notices.recv(4096).split(b"\n"):
                return
            if exited in ready:
                raise RunError(f"vmd exited with status {vmd.wait()}")
            if not ready:
                raise RunError(f"vmd was not ready after {START_S} s")
    finally:
        os.close(exited)


def interrupted(_signal: int, _frame: object) -> None:
    """Exit with clean-up on a signal that would otherwise leave the daemon running."""
    raise KeyboardInterrupt


def main() -> int:
    """Run the guest.  The exit status is that of the shell or console."""
    if os.geteuid() != 0:
        print("run: vmd needs root: running it through sudo", file=sys.stderr, flush=True)
        os.execvp("sudo", ["sudo", sys.executable, "-m", "tools.run"])
    signal.signal(signal.SIGTERM, interrupted)
    signal.signal(signal.SIGHUP, interrupted)
    FOLDER.mkdir(parents=True, exist_ok=True)
    conf = FOLDER / "vm.conf"
    try:
        guest = chosen()
        conf.write_text(guest.conf)
        with daemon(conf) as vmctl:
            shown([*vmctl, "start", NAME])
            status = guest.enter(vmctl)
            print("run: stopping the guest and the daemon", flush=True)
    except (RunError, KernelError, OSError, subprocess.CalledProcessError) as error:
        print(f"run: {error}", file=sys.stderr)
        if LOG.exists():
            print(f"run: the end of {LOG}:", file=sys.stderr)
            print("\n".join(LOG.read_text(errors="replace").splitlines()[-20:]), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        owner = int(os.environ.get("SUDO_UID", "0"))
        for path in (FOLDER.parent, FOLDER, conf, LOG):
            if owner and path.exists():
                os.chown(path, owner, -1)  # the user who called sudo can remove the files that remain
    shutil.rmtree(FOLDER)
    return status


if __name__ == "__main__":
    sys.exit(main())
