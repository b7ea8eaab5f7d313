"""Files are opened by processes that may be lost: whatever storage does, only the VM whose file it is notices.

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
FILES = {"first": "vioblk0", "second": "vioblk1", "disc.iso": "vioscsi0"}  # of VM `several`, and who serves each


@pytest.fixture(scope="module")
def file() -> Iterator[FuseFile]:
    """Give a file whose storage does what a test says."""
    with FuseFile(bytes(MIB), for_all=True) as made:
        yield made


@pytest.fixture(scope="module")
def bystander(file: FuseFile) -> Iterator[Bystander]:
    """Give a VM that must not notice anything; `slow` and `probed` are on that storage."""
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
    """Give that daemon; afterwards its guest has not noticed anything."""
    yield bystander.vmd
    file.release()
    bystander.check()


def wait_for(what: Callable[[], object], vmd: Daemon) -> None:
    """Wait until something is so."""
    deadline_s = time.monotonic() + DEADLINE_S
    while not what():
        assert time.monotonic() < deadline_s, vmd.log
        pause()


def begin(vmd: Daemon, *command: str) -> "subprocess.Popen[str]":
    """Run vmctl, and do not wait for it."""
    arguments = [*vmd.client, "-s", str(vmd.socket), *command]
    return subprocess.Popen(arguments, cwd=vmd.code, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_disk_that_does_not_open_is_stopped(vmd: Daemon, file: FuseFile) -> None:
    """Its start waits; root is served meanwhile, and `stop` ends it at once, whether its opener ends or not."""
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
    """Root's starts wait for nobody's storage."""
    file.rule(OPEN, HELD)
    starting = begin(vmd, "start", "slow")
    file.wait_held(1)

    vmd.must("start", "other")

    assert vmd.status("slow")["state"] == "starting"
    vmd.must("stop", "-fw", "slow")
    vmd.must("stop", "-fw", "other")
    starting.communicate(timeout=DEADLINE_S)


def test_each_device_has_its_file_and_nobody_else_has(vmd: Daemon) -> None:
    """Those who opened them have ended, and what a VM has booted nobody has any more."""
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
    """Its guest, its console, and channels: no file, and no way to make another VM."""
    pid = bystander.pid
    held = {re.sub(r"[0-9]+", "N", name) for name in open_files(pid).values()}
    memory = {f"/memfd:{name} (deleted)" for name in ("guest-memory", "console", "interrupts", "figures")}
    events = {f"anon_inode:[{kind}]" for kind in ("eventfd", "eventpoll", "pidfd", "timerfd")}
    machine = {"anon_inode:kvm-vm", "anon_inode:kvm-vcpu:N"}
    assert held <= {"/dev/null", "/dev/ptmx", "/dev/pts/N", "socket:[N]"} | memory | events | machine
    assert held >= machine


def test_a_vm_process_in_reserve_has_an_empty_machine(vmd: Daemon) -> None:
    """KVM takes its time to make one, and no start waits for that: the next VM has this one."""

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
    """As many disks as the last VM had, and what a VM does not need ends."""
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
    """After a while its start is given up."""
    file.rule(OPEN, HELD)

    done = vmd.vmctl("start", "slow")

    assert done.returncode == 1
    assert "disk " in done.stderr
    assert ": does not answer" in done.stderr
    assert vmd.status("slow")["state"] == "stopped"


@pytest.mark.deep
def test_a_disk_that_cannot_be_read_is_named(vmd: Daemon, file: FuseFile) -> None:
    """Its format is to be found out."""
    file.rule(READ, HELD)

    done = vmd.vmctl("start", "probed")

    assert done.returncode == 1
    assert "cannot be examined within 8 seconds" in done.stderr


@pytest.mark.deep
def test_a_user_whose_openers_do_not_end_is_told_so(vmd: Daemon, file: FuseFile) -> None:
    """At once, instead of one more that would hang as well; root's VMs start."""
    file.rule(OPEN, HELD)
    vmd.socket.chmod(0o666)
    with connect_as(vmd.socket, EVE, EVE) as eve:

        def start() -> str:
            """Try to start the VM, which root stops; return why it is not started."""
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
    """SIGTERM waits for no storage."""
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
    """It is root, for it does not know yet whom it will open files for; and it can do little else."""
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
