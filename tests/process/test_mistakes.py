"""The usual mistakes of new users are answered with one line that says what is wrong and how to mend it."""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.daemon import DEADLINE_S, ROOT, Daemon
from tests.support.guests import guest

pytestmark = [pytest.mark.root, pytest.mark.kvm]

VMD = f"{sys.executable} -m vmd -d -s $DIR/vmd.sock -f $DIR/vm.conf"


@pytest.fixture
def directory() -> Iterator[Path]:
    """Give a directory that any user may enter."""
    with tempfile.TemporaryDirectory(prefix="vmd-mistakes-") as path:
        Path(path).chmod(0o755)
        (Path(path) / "vm.conf").touch()
        yield Path(path)


def shell(script: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """Run a script in a mount namespace of its own."""
    return subprocess.run(
        ["unshare", "--mount", "sh", "-e", "-c", script],
        cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DEADLINE_S, check=False,
        env={"DIR": str(directory), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "STATE_DIRECTORY": f"{directory}/state"},
    )  # fmt: skip


def vmctl(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run vmctl."""
    return subprocess.run(
        [sys.executable, "-m", "vmctl", "-s", directory / "vmd.sock", *arguments],
        cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DEADLINE_S, check=False,
    )  # fmt: skip


def fails_with_one_line(done: subprocess.CompletedProcess[str], *words: str, status: int = 1) -> None:
    """Check that a command has failed with this status, and that its only line of errors has these words."""
    assert done.returncode == status
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    for word in words:
        assert word in done.stderr


@pytest.mark.parametrize(
    ("mistake", "status", "words"),
    [
        (
            # Imports before it changes the user, who may be unable to read this checkout.
            f"{sys.executable} -c 'import os, sys; from vmd.parent.startup import run; os.setuid(65534);"
            " sys.exit(run(sys.argv[1:]))' -d -s $DIR/vmd.sock -f $DIR/vm.conf",
            1,
            ("need root privileges", "run vmd as root"),
        ),
        (
            "mount -t tmpfs none /mnt; mknod -m 666 /mnt/null c 1 3; mknod -m 666 /mnt/urandom c 1 9;"
            f" mount --bind /mnt /dev; {VMD}",
            69,
            ("/dev/kvm", "No such file or directory", "load the module"),
        ),
        (f"mount --bind /dev/null /dev/kvm; {VMD}", 69, ("/dev/kvm", "this is not a KVM device")),
        (
            "grep -v ^_vmd /etc/passwd > $DIR/passwd; mount --bind $DIR/passwd /etc/passwd;" + VMD,
            1,
            ("unknown user _vmd", "useradd"),
        ),
        (f"echo 'vm' > $DIR/vm.conf; {VMD}", 78, ("vm.conf:1: syntax error",)),
        (f"rm $DIR/vm.conf; {VMD}", 78, ("vm.conf: No such file or directory",)),
        (f"rm $DIR/vm.conf; {VMD} -n", 1, ("vm.conf: No such file or directory",)),
        (VMD.replace("vmd.sock", "nowhere/vmd.sock"), 1, ("nowhere/vmd.sock", "No such file")),
        (f"{sys.executable} -m vmd -d -s $DIR/vmd.sock -f $DIR/vm.conf -D x", 2, ("macro definition x",)),
    ],
    ids=[
        "not root", "no kvm", "kvm is not kvm", "no user", "bad configuration", "no configuration",
        "nothing to check", "bad socket path", "bad macro",
    ],
)  # fmt: skip
def test_vmd_does_not_start(directory: Path, mistake: str, status: int, words: tuple[str, ...]) -> None:
    """The daemon gives the reason in one line, and leaves no socket."""
    fails_with_one_line(shell(mistake, directory), *words, status=status)
    assert not (directory / "vmd.sock").exists()


def test_no_daemon(directory: Path) -> None:
    """vmctl names the socket, and asks whether vmd is running."""
    fails_with_one_line(vmctl(directory, "status"), str(directory / "vmd.sock"), "is vmd running?", status=3)


def test_dead_daemon(directory: Path) -> None:
    """For the socket of a killed daemon vmctl says the same as without a socket."""
    with Daemon(directory) as vmd:
        assert vmd.process is not None
        vmd.process.kill()
        vmd.process.wait()
        fails_with_one_line(vmctl(directory, "status"), str(directory / "vmd.sock"), "is vmd running?", status=3)


def test_socket_not_permitted(directory: Path) -> None:
    """vmctl tells a user who may not open the socket which user and group may."""
    script = (
        f"{sys.executable} -c 'import grp, os, pwd, sys, vmctl.commands.status; from vmctl.__main__ import main;"
        " os.setgroups([]); os.setgid(65534); os.setuid(65534);"
        " sys.exit(main(sys.argv[1:]))' -s $DIR/vmd.sock status"
    )
    with Daemon(directory):
        fails_with_one_line(shell(script, directory), str(directory / "vmd.sock"), "for user root and group root")


def test_unknown_vm(directory: Path) -> None:
    """The message names a VM name or id that does not exist."""
    with Daemon(directory):
        for arguments in (
            ("console", "nobody"), ("pause", "nobody"), ("send", "nobody"), ("start", "nobody"), ("start", "17"),
            ("status", "nobody"), ("stop", "nobody"), ("unpause", "17"), ("wait", "17"),
        ):  # fmt: skip
            done = vmctl(directory, *arguments)
            assert done.returncode == 4
            assert "not found" in done.stderr or arguments[1] in done.stderr


def test_removed_kernel(directory: Path) -> None:
    """The message names a kernel that was removed after vm.conf was read."""
    kernel = directory / "kernel"
    kernel.write_bytes(guest("demo").read_bytes())
    with Daemon(directory, f'vm "a" {{\n disable\n memory 32M\n boot "{kernel}"\n}}\n'):
        kernel.unlink()
        fails_with_one_line(vmctl(directory, "start", "a"), str(kernel), "No such file or directory")


def test_kernel_is_no_file(directory: Path) -> None:
    """A directory in the place of a kernel is refused, with one line in the log."""
    kernel = directory / "kernel"
    kernel.touch()
    with Daemon(directory, f'vm "a" {{\n disable\n memory 32M\n boot "{kernel}"\n}}\n') as vmd:
        kernel.unlink()
        kernel.mkdir()
        fails_with_one_line(vmctl(directory, "start", "a"), str(kernel), "not a regular file")
        said = [line for line in vmd.log.splitlines() if str(kernel) in line]
        assert len(said) == 1, said
