"""System calls refused by containers, settings of units or old kernels: vmd does without them, or names them."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.daemon import DEADLINE_S, ROOT, Daemon
from tests.support.guests import guest
from tests.support.images import MIB
from tests.support.refusing import refusing
from vmd.errors import HostError, number
from vmd.privsep import linux
from vmd.privsep.spawn import DEBUG

pytestmark = [pytest.mark.root, pytest.mark.kvm]

FIRST_RECENT = 424  # Linux 5.1: some filters know no calls from this number on
PIDFD_SEND_SIGNAL, PIDFD_OPEN = 424, 434
NEEDED = (PIDFD_SEND_SIGNAL, PIDFD_OPEN)  # only these report the end of a process without a race
MOUNT, PIVOT_ROOT, UNSHARE, SETNS, SECCOMP, MEMFD_CREATE = 165, 155, 272, 308, 317, 319
FILTER_ERRORS = (errno.ENOSYS, errno.EPERM)  # filters use one or the other


def conf(disk: Path) -> str:
    """Return the configuration of a VM with a disk."""
    return f'vm "demo" {{\n disable\n memory 32M\n boot "{guest("demo")}"\n disk "{disk}" format raw\n}}\n'


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """Give the file of a disk."""
    path = tmp_path / "disk"
    with path.open("wb") as file:
        file.truncate(MIB)
    return path


@pytest.mark.parametrize("number", FILTER_ERRORS, ids=["ENOSYS", "EPERM"])
def test_recent_calls_have_a_substitute(tmp_path: Path, disk: Path, number: int) -> None:
    """A VM with a disk runs and ends without openat2, clone3, close_range, landlock and all newer calls."""
    prefix = refusing(number, FIRST_RECENT, known=NEEDED)
    with Daemon(tmp_path, conf(disk), prefix=prefix) as vmd:
        vmd.must("start", "demo")
        vmd.must("stop", "-w", "demo")
        said = vmd.status("demo")["text"]
        log = vmd.log

    assert said == "powered off by the guest"
    assert log.count("no landlock: ") == 1


@pytest.mark.parametrize("number", FILTER_ERRORS, ids=["ENOSYS", "EPERM"])
@pytest.mark.parametrize(
    ("call", "words"),
    [
        (PIDFD_OPEN, "pidfd_open(2)"),
        (MOUNT, "build the cell: mount "),
        (UNSHARE, "build the cell: make namespaces"),
        (PIVOT_ROOT, "build the cell: pivot_root"),
        (SETNS, "enter a namespace"),
        (SECCOMP, "install the system call filter"),
        (MEMFD_CREATE, "have a memory file for the state"),  # without it no VM would start
    ],
)
def test_needed_calls_are_named(tmp_path: Path, call: int, words: str, number: int) -> None:
    """The daemon ends with a sentence about the refused call and, where that is certain, who refused it."""
    conf = tmp_path / "vm.conf"
    conf.touch()
    done = subprocess.run(
        [*refusing(number, call, call), sys.executable, "-m", "vmd", "-d", "-s", tmp_path / "sock", "-f", conf],
        cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DEADLINE_S, check=False,
    )  # fmt: skip

    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert ("the container or unit that vmd runs in" in done.stderr) == (number == errno.ENOSYS)


# --- the substitutes ---------------------------------------------------------------------------------------------


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse all calls that are made by number."""

    def refuse(tried: str, *_: object) -> int:
        raise HostError(tried, errno.ENOSYS)

    monkeypatch.setattr(linux, "syscall", refuse)


@pytest.mark.usefixtures("refused")
def test_open_place_finds_a_file(tmp_path: Path) -> None:
    """It finds the same file by its name, by a link, and by a path with `..`."""
    file = tmp_path / "file"
    file.touch()
    (tmp_path / "link").symlink_to("file")
    for name in ("file", "link", "../" + tmp_path.name + "/./link"):
        place = linux.open_place(os.fsencode(tmp_path / name))
        assert os.path.samestat(os.fstat(place), file.stat())
        os.close(place)


@pytest.mark.parametrize("with_openat2", [True, False])
@pytest.mark.parametrize("name", ["file", "link to it"])
def test_a_removed_file_cannot_be_opened_through_a_descriptor(
    tmp_path: Path, request: pytest.FixtureRequest, name: str, with_openat2: bool
) -> None:
    """The name of the descriptor, and a link to it, are refused."""
    if not with_openat2:
        request.getfixturevalue("refused")
    path = tmp_path / "file"
    with path.open("w") as file:
        path.unlink()
        descriptor = f"/proc/self/fd/{file.fileno()}"
        (tmp_path / "link to it").symlink_to(descriptor)
        wanted = descriptor if name == "file" else tmp_path / name

        with pytest.raises((OSError, HostError)) as raised:
            linux.open_place(os.fsencode(wanted))

    assert number(raised.value) == errno.ELOOP


@pytest.mark.usefixtures("refused")
@pytest.mark.parametrize("listed", [True, False], ids=["with proc", "without"])
def test_descriptors_are_closed_on_exec(monkeypatch: pytest.MonkeyPatch, listed: bool) -> None:
    """Only the descriptors of the range are closed, also without a list of them in /proc."""
    if not listed:
        monkeypatch.setattr(linux, "DESCRIPTORS", "/nowhere")
    fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(3)]
    for fd in fds:
        os.set_inheritable(fd, True)

    linux.close_on_exec_from(fds[1], fds[1])
    middle = [os.get_inheritable(fd) for fd in fds]
    linux.close_on_exec_from(fds[0])
    after = [os.get_inheritable(fd) for fd in fds]
    for fd in fds:
        os.close(fd)

    assert middle == [True, False, True]
    assert after == [False, False, False]


def test_a_vm_under_the_developers_switch(tmp_path: Path, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With VMD_DEBUG_SECCOMP every process works as usual, and none makes a refused call."""
    monkeypatch.setenv(DEBUG, "1")
    with Daemon(tmp_path, conf(disk)) as vmd:
        vmd.must("start", "demo")
        vmd.must("stop", "-w", "demo")
        said = vmd.status("demo")["text"]
        log = vmd.log

    assert said == "powered off by the guest"
    assert f"{DEBUG}: refused system calls are named" in log
    assert "is refused by the filter" not in log
