"""Expendable processes open files, so failing storage affects only the VM of the file.

The storage is a real FUSE file system that does not answer.
"""

import re
import select
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.bystander import NAME, Bystander, vm_block
from tests.support.clients import connect_as, receive
from tests.support.daemon import DEADLINE_S, Daemon
from tests.support.descriptors import open_files
from tests.support.fusefile import HELD, OPEN, READ, FuseFile
from tests.support.guests import guest
from tests.support.images import MIB
from tests.support.users import public_folder
from tests.support.waiting import pause
from vmd.ipc.imsg import encode
from vmd.ipc.messages.clients import Failed, StartRequest
from vmd.parent.opening import STUCK_MAX
from vmd.privsep.confine import OPENER

pytestmark = [pytest.mark.root, pytest.mark.kvm]

EVE = 65534  # nobody
FILES = {"first": "vioblk0", "second": "vioblk1", "disc.iso": "vioscsi0"}  # VM `several`: file and device


@pytest.fixture(scope="module")
def file() -> Iterator[FuseFile]:
    """Yield a file whose storage the test controls."""
    with FuseFile(bytes(MIB), for_all=True) as made:
        yield made


@pytest.fixture(scope="module")
def bystander(file: FuseFile) -> Iterator[Bystander]:
    """Yield a VM that must not be affected; VMs `slow` and `probed` are on that storage."""
    with public_folder() as directory:
        folder = directory / "mnt"
        folder.mkdir()
        path = file.attach(folder)
        try:
            conf = vm_block(NAME) + vm_block("other")
            for name in FILES:
                (directory / name).write_bytes(bytes(MIB))
            disks = (f'{"cdrom" if "disc" in name else "disk"} "{directory / name}"' for name in FILES)
            conf += vm_block("several", *disks)
            conf += vm_block("slow", f'disk "{path}" format raw') + vm_block("probed", f'disk "{path}"')
            conf += vm_block("hers", f'disk "{path}" format raw', "owner nobody")
            with Daemon(directory, conf) as daemon, Bystander(daemon) as made:
                yield made
        finally:
            subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture
def vmd(bystander: Bystander, file: FuseFile) -> Iterator[Daemon]:
    """Yield that daemon; check afterwards that the VM's guest is unaffected."""
    yield bystander.vmd
    file.release()
    bystander.check()


def wait_for(what: Callable[[], object], vmd: Daemon) -> None:
    """Wait until a condition holds."""
    deadline_s = time.monotonic() + DEADLINE_S
    while not what():
        assert time.monotonic() < deadline_s, vmd.log
        pause()


def begin(vmd: Daemon, *command: str) -> "subprocess.Popen[str]":
    """Start vmctl without waiting for it."""
    arguments = [*vmd.client, "-s", str(vmd.socket), *command]
    return subprocess.Popen(arguments, cwd=vmd.code, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_disk_that_does_not_open_is_stopped(vmd: Daemon, file: FuseFile) -> None:
    """The start waits, while root is served.  `stop` ends it at once, even if its opener does not end."""
    file.rule(OPEN, HELD)
    starting = begin(vmd, "start", "slow")
    file.wait_held(1)
    assert vmd.status("slow")["state"] == "starting"
    limits = Path(f"/proc/{vmd.processes()['vmd: opener/slow']}/limits").read_text().splitlines()
    assert [line.split()[3:5] for line in limits if line.startswith("Max file size")] == [["0", "0"]]

    vmd.must("stop", "-fw", "slow")

    _, said = starting.communicate(timeout=DEADLINE_S)
    assert "stopped before its guest began" in said
    assert vmd.status("slow")["state"] == "stopped"


def test_others_start_meanwhile(vmd: Daemon, file: FuseFile) -> None:
    """Root's starts do not wait for the storage of others."""
    file.rule(OPEN, HELD)
    starting = begin(vmd, "start", "slow")
    file.wait_held(1)

    vmd.must("start", "other")

    assert vmd.status("slow")["state"] == "starting"
    vmd.must("stop", "-fw", "slow")
    vmd.must("stop", "-fw", "other")
    starting.communicate(timeout=DEADLINE_S)


def test_each_device_has_its_file_and_nobody_else_has(vmd: Daemon) -> None:
    """Only the devices have the files: the openers have ended, and no process keeps a boot image."""
    vmd.must("start", "several")
    wait_for(lambda: "vmd: vm" in (found := vmd.processes()) and "vmd: opener/several" not in found, vmd)
    held = {
        title: {*open_files(pid).values()}
        for title, pid in {**vmd.processes(), "parent": vmd.pid}.items()
    }
    assert {"parent", "vmd: control", "vmd: vmm", "vmd: priv", "vmd: log", "vmd: vm"} <= held.keys()
    files = {str(vmd.directory / name): device for name, device in FILES.items()}
    its = {title: names & {*files, str(guest("demo"))} for title, names in held.items()}
    assert {title: names for title, names in its.items() if names} == {
        f"vmd: vm/several/{device}": {path} for path, device in files.items()
    }
    vmd.must("stop", "-fw", "several")


def test_what_a_vm_process_has(bystander: Bystander) -> None:
    """A VM process has its guest, its console and channels, but no file and no way to make another VM."""
    pid = bystander.pid
    held = {re.sub(r"[0-9]+", "N", name) for name in open_files(pid).values()}
    memory = {f"/memfd:{name} (deleted)" for name in ("guest-memory", "console", "interrupts", "figures")}
    events = {f"anon_inode:[{kind}]" for kind in ("eventfd", "eventpoll", "pidfd", "timerfd")}
    machine = {"anon_inode:kvm-vm", "anon_inode:kvm-vcpu:N"}
    assert held <= {"/dev/null", "/dev/ptmx", "/dev/pts/N", "socket:[N]"} | memory | events | machine
    assert held >= machine


def test_a_vm_process_in_reserve_has_an_empty_machine(vmd: Daemon) -> None:
    """KVM is slow to make a machine, so one is made in advance, and the next VM uses it."""

    def machines(title: str) -> list[str]:
        names = open_files(vmd.processes()[title]).values()
        return [name for name in names if name in ("anon_inode:kvm-vm", "/dev/kvm")]

    wait_for(lambda: "vmd: vm" in vmd.processes() and len(machines("vmd: vm")) == 2, vmd)
    pid = vmd.processes()["vmd: vm"]

    vmd.must("start", "other")

    assert vmd.processes()["vmd: vm/other"] == pid
    assert machines("vmd: vm/other") == ["anon_inode:kvm-vm"]
    vmd.must("stop", "-fw", "other")


def test_processes_of_devices_are_in_reserve(vmd: Daemon) -> None:
    """The reserve has as many as the last VM had.  Processes that a VM does not need end."""
    devices = "vmd: vm/several/vioblk0", "vmd: vm/several/vioblk1"

    def children(title: str) -> set[int] | None:
        pid = vmd.processes().get(title)
        return {int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()} if pid else None

    def spares(count: int) -> bool:
        return len(children("vmd: vm") or ()) == count

    vmd.must("start", "several")
    wait_for(lambda: spares(2), vmd)
    before = children("vmd: vm")
    vmd.must("stop", "-fw", "several")
    vmd.must("start", "several")
    assert {vmd.processes()[title] for title in devices} == before
    wait_for(lambda: spares(2), vmd)
    vmd.must("start", "other")
    wait_for(lambda: children("vmd: vm/other") == set(), vmd)
    wait_for(lambda: children("vmd: vm") == set(), vmd)
    for name in ("several", "other"):
        vmd.must("stop", "-fw", name)


@pytest.mark.deep
def test_a_disk_that_does_not_open_is_named(vmd: Daemon, file: FuseFile) -> None:
    """After a time limit the start fails, and names the disk."""
    file.rule(OPEN, HELD)

    done = vmd.vmctl("start", "slow")

    assert done.returncode == 1
    assert "disk " in done.stderr
    assert ": does not answer" in done.stderr
    assert vmd.status("slow")["state"] == "stopped"


@pytest.mark.deep
def test_a_disk_that_cannot_be_read_is_named(vmd: Daemon, file: FuseFile) -> None:
    """The start fails when the format of the disk cannot be detected, and names the disk."""
    file.rule(READ, HELD)

    done = vmd.vmctl("start", "probed")

    assert done.returncode == 1
    assert "cannot be examined within 8 seconds" in done.stderr


@pytest.mark.deep
def test_a_user_whose_openers_do_not_end_is_told_so(vmd: Daemon, file: FuseFile) -> None:
    """A further start fails at once, because its opener would hang too.  Root's VMs start."""
    file.rule(OPEN, HELD)
    vmd.socket.chmod(0o666)
    with connect_as(vmd.socket, EVE, EVE) as eve:

        def start() -> str:
            """Try to start the VM, then stop it as root; return the error of the start."""
            eve.send(encode(StartRequest(name="hers"))[0])
            wait_for(lambda: select.select([eve], [], [], 0)[0] or vmd.status("hers")["state"] == "starting", vmd)
            vmd.vmctl("stop", "-fw", "hers")
            answer = receive(eve)
            assert isinstance(answer, Failed)
            return answer.text

        answers = [start() for _ in range(STUCK_MAX)]
        assert set(answers) == {"vm hers: stopped before its guest began"}
        wait_for(lambda: start().endswith("their storage does not answer"), vmd)
    vmd.must("start", "other")
    vmd.must("stop", "-fw", "other")


@pytest.mark.deep
def test_the_daemon_ends_though_a_disk_does_not_open(tmp_path: Path) -> None:
    """The daemon ends after SIGTERM without waiting for storage."""
    with public_folder() as folder, FuseFile(bytes(MIB)) as file:
        path = file.attach(folder)
        try:
            file.rule(OPEN, HELD)
            with Daemon(tmp_path, vm_block("slow", f'disk "{path}" format raw')) as vmd:
                starting = begin(vmd, "start", "slow")
                file.wait_held(1)
                assert vmd.stop() == 0
                starting.communicate(timeout=DEADLINE_S)
        finally:
            subprocess.run(["umount", "--lazy", folder], check=True)


def test_an_opener_in_reserve_has_only_its_channel(vmd: Daemon) -> None:
    """It runs as root, because the user whose files it will open is not known yet, but it can do little else."""
    wait_for(lambda: "vmd: opener" in vmd.processes(), vmd)
    pid = vmd.processes()["vmd: opener"]

    def status() -> dict[str, str]:
        text = Path(f"/proc/{pid}/status").read_text()
        return dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)

    wait_for(lambda: status()["Seccomp"] == "2", vmd)
    found = status()
    assert found["Uid"].split() == ["0"] * 4
    assert [int(found[name], 16) for name in ("CapEff", "CapPrm", "CapBnd")] == [OPENER.capabilities] * 3
    held = open_files(pid)
    assert {number for number, name in held.items() if name.startswith("/") and name != "/dev/null"} == set()
    assert held[3].startswith("socket:")
