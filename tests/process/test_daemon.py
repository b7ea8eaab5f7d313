"""The daemon as a whole: its processes, the life of a VM, consoles, the configuration, and clients."""

import array
import contextlib
import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.daemon import DEADLINE_S, ROOT, Daemon
from tests.support.guests import guest
from tests.support.waiting import pause
from vmd.config.model import VmConfig
from vmd.ipc.imsg import MAX_MESSAGE, decode, encode
from vmd.ipc.messages.clients import (
    Caller,
    ConsoleRequest,
    Failed,
    ListRequest,
    LoadRequest,
    LogRequest,
    ReloadRequest,
    Request,
    ResetRequest,
    StartRequest,
    StopRequest,
    VmInfo,
    WaitRequest,
)
from vmd.privsep.cell import VmmCell
from vmd.record import Record

pytestmark = [pytest.mark.root, pytest.mark.kvm]

PROMPT = "vmd-demo> "


def demo(name: str = "demo", *lines: str) -> str:
    """Return a vm block that boots the demonstration guest, and is started only on request."""
    options = "\n".join(f"    {line}" for line in ("disable", "memory 32M", f'boot "{guest("demo")}"', *lines))
    return f'vm "{name}" {{\n{options}\n}}\n'


@pytest.fixture
def vmd(tmp_path: Path) -> Iterator[Daemon]:
    """Give a daemon with one stopped VM, `demo`."""
    with Daemon(tmp_path, demo()) as daemon:
        yield daemon


def gone(pid: int) -> bool:
    """Return whether a process has ended.  A zombie, which its parent has not reaped yet, has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_gone(pids: list[int]) -> None:
    """Wait until all of these processes have ended."""
    deadline = time.monotonic() + DEADLINE_S
    while alive := [pid for pid in pids if not gone(pid)]:
        assert time.monotonic() < deadline, f"still running: {alive}"
        pause()


def status_lines(pid: int) -> dict[str, str]:
    """Return /proc/PID/status as a mapping."""
    pairs = (line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {key: value.strip() for key, value in pairs}


# --- processes -------------------------------------------------------------------------------------------


def test_processes_titles_and_rights(vmd: Daemon) -> None:
    """Each process has its title and its user, only the privileges that it needs, and a filter (cat. 1.3)."""
    vmd.must("start", "demo")
    processes = vmd.processes()

    assert set(processes) >= {"vmd: priv", "vmd: control", "vmd: vmm", "vmd: vm/demo"}
    for title in ("vmd: control", "vmd: vmm", "vmd: vm/demo"):
        status = status_lines(processes[title])
        assert "0" not in status["Uid"].split(), title
        assert int(status["CapBnd"], 16) == 0, title
        # The capabilities of vmm are for the user ids of VMs, and count only in the cell's user namespace.
        assert int(status["CapEff"], 16) == (VmmCell.CAPABILITIES if title == "vmd: vmm" else 0), title
        assert status["NoNewPrivs"] == "1", title
        assert status["Seccomp"] == "2", title
        assert not status["Groups"], title
        assert os.stat(f"/proc/{processes[title]}/root/").st_dev != os.stat("/").st_dev, title
        assert not Path(f"/proc/{processes[title]}/root/etc/passwd").exists(), title
        assert os.readlink(f"/proc/{processes[title]}/ns/net") != os.readlink("/proc/self/ns/net"), title
    priv = status_lines(processes["vmd: priv"])
    assert int(priv["CapEff"], 16) == int(priv["CapBnd"], 16) == 1 << 12 | 1 << 13  # NET_ADMIN, NET_RAW
    assert int(status_lines(processes["vmd: vm/demo"])["Seccomp_filters"]) > int(
        status_lines(processes["vmd: vmm"])["Seccomp_filters"]
    )


def test_a_clean_end_leaves_nothing(vmd: Daemon) -> None:
    """After SIGTERM the daemon leaves no process, no socket and no pty."""
    vmd.must("start", "demo")
    tty = Path(vmd.status("demo")["tty"])
    made_ns = tty.stat().st_ctime_ns
    pids = [vmd.pid, *vmd.processes().values()]

    assert vmd.stop() == 0

    wait_gone(pids)
    assert not vmd.socket.exists()
    with contextlib.suppress(FileNotFoundError):
        assert tty.stat().st_ctime_ns != made_ns  # another program's pty may have the same number by now
    assert "terminating" in vmd.log


def test_losing_vmm_ends_the_daemon(vmd: Daemon) -> None:
    """When vmm is killed, the daemon logs the reason and ends with status 1.  No process is left."""
    victim = "vmm"
    vmd.must("start", "demo")
    processes = vmd.processes()
    pids = list(processes.values())
    assert vmd.process is not None

    os.kill(processes[f"vmd: {victim}"], signal.SIGKILL)

    assert vmd.process.wait(DEADLINE_S) == 1
    wait_gone(pids)
    assert f"lost child: {victim}" in vmd.log
    assert not vmd.socket.exists()


def test_killing_the_parent_leaves_no_orphan(vmd: Daemon) -> None:
    """The children of a killed parent end by themselves.  The next daemon replaces the stale socket."""
    vmd.must("start", "demo")
    pids = list(vmd.processes().values())
    assert vmd.process is not None

    vmd.process.kill()
    vmd.process.wait()

    wait_gone(pids)
    vmd.start()
    assert vmd.status("demo")["state"] == "stopped"


def test_killing_a_vm_process_is_reported(vmd: Daemon) -> None:
    """Only its VM ends.  `vmctl wait` returns, the status names the signal, and the VM can be started again."""
    vmd.must("start", "demo")
    pid = vmd.status("demo")["pid"]
    waiter = subprocess.Popen(
        [sys.executable, "-m", "vmctl", "-s", vmd.socket, "wait", "demo"], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    vmd.wait_log("started demo")
    assert waiter.stderr is not None
    assert waiter.stderr.read(len("waiting")) == "waiting"  # it is connected; `status` is answered after its request
    vmd.must("status")
    os.kill(pid, signal.SIGKILL)

    assert waiter.wait(DEADLINE_S) == 0
    waiter.stderr.close()
    row = vmd.wait_state("demo", "stopped")
    assert "SIGKILL" in row["text"]
    vmd.must("start", "demo")
    assert vmd.status("demo")["pid"] != pid


def test_works_from_a_private_checkout(tmp_path: Path) -> None:
    """The unprivileged processes run, although only root can read the code."""
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    subprocess.run(["cp", "-r", ROOT / "vmd", ROOT / "vmctl", home], check=True)
    subprocess.run(["chmod", "-R", "go=", home], check=True)
    with Daemon(tmp_path, demo(), code=home) as vmd:
        vmd.must("start", "demo")
        with vmd.console("demo") as console:
            console.expect(PROMPT, DEADLINE_S)


# --- the life of a VM ------------------------------------------------------------------------------------


def test_start_reboot_power_off(vmd: Daemon) -> None:
    """After a reset a new process has the same VM id and pty.  S5 ends the VM, which stays in the list."""
    vmd.must("start", "demo")
    before = vmd.status("demo")
    with vmd.console("demo") as console:
        console.expect(PROMPT, DEADLINE_S)
        console.answer("reset", PROMPT)
        after = vmd.status("demo")
        assert (after["id"], after["tty"]) == (before["id"], before["tty"])
        assert after["pid"] != before["pid"]
        console.type("off\r")
        console.drain(DEADLINE_S)
    row = vmd.wait_state("demo", "stopped")
    assert row["text"] == "powered off by the guest"
    assert row["pid"] is None


def test_a_guest_that_reboots_in_a_loop_is_stopped(vmd: Daemon) -> None:
    """The third quick restart is refused.  The status and the log say so (cat. 4.3)."""
    vmd.must("start", "demo")
    with vmd.console("demo") as console:
        for _ in range(2):
            console.expect(PROMPT, DEADLINE_S)
            console.type("panic\r")
        console.expect(PROMPT, DEADLINE_S)
        console.type("panic\r")
        row = vmd.wait_state("demo", "stopped")
    assert row["text"] == "restarted too quickly"
    vmd.wait_log("restarted too quickly")


def test_stop_presses_the_power_button(vmd: Daemon) -> None:
    """`stop -w` returns when the guest has powered itself off."""
    vmd.must("start", "demo")
    with vmd.console("demo") as console:
        console.expect(PROMPT, DEADLINE_S)
        vmd.must("stop", "-w", "demo")
        console.drain(DEADLINE_S)
        assert "power button" in console.text()
    assert vmd.status("demo")["text"] == "powered off by the guest"


def test_stop_of_a_guest_without_a_driver_ends_it_at_once(tmp_path: Path) -> None:
    """A guest that never enabled the power button cannot be asked to power off (cat. 4.4)."""
    conf = f'vm "hello" {{\n disable\n memory 16M\n boot "{guest("hello")}"\n}}\n'
    with Daemon(tmp_path, conf) as vmd:
        vmd.must("start", "hello")
        vmd.must("stop", "-w", "hello")
        assert "no driver for the power button" in vmd.status("hello")["text"]


def test_force_stop(vmd: Daemon) -> None:
    """`stop -fw` does not ask the guest."""
    vmd.must("start", "demo")
    vmd.must("stop", "-fw", "demo")
    assert vmd.status("demo")["text"] == "stopped by force"


def test_an_ad_hoc_vm_is_forgotten_when_it_ends(vmd: Daemon) -> None:
    """`vmctl start -b` with an unknown name makes a VM that exists until it ends."""
    vmd.must("start", "-m", "32M", "-b", guest("demo"), "adhoc")
    assert vmd.status("adhoc")["state"] == "running"
    vmd.must("stop", "-fw", "adhoc")
    assert [row["name"] for row in vmd.rows()] == ["demo"]


def test_one_shot_boot_of_a_known_vm(vmd: Daemon) -> None:
    """`start -b` boots another kernel once; a reset then ends the VM instead of booting the wrong one (cat. 4.4)."""
    vmd.must("start", "-b", guest("demo"), "demo")
    with vmd.console("demo") as console:
        console.expect(PROMPT, DEADLINE_S)
        console.type("reset\r")
        why = "rebooted; not started again because only that start said what to boot"
        assert vmd.wait_state("demo", "stopped")["text"] == why


def test_an_ad_hoc_vm_reboots_from_the_file_its_client_opened(vmd: Daemon, tmp_path: Path) -> None:
    """The daemon keeps the file that the client opened, so the reboot works although the path was removed."""
    kernel = tmp_path / "kernel"
    kernel.write_bytes(guest("demo").read_bytes())
    vmd.must("start", "-m", "32M", "-b", kernel, "adhoc")
    kernel.unlink()
    with vmd.console("adhoc") as console:
        console.expect(PROMPT, DEADLINE_S)
        console.answer("reset", PROMPT)
    vmd.must("stop", "-fw", "adhoc")


def test_a_command_line_for_one_boot(vmd: Daemon) -> None:
    """`start -k` of a known VM sets its kernel command line for this boot only."""
    vmd.must("start", "-k", "quiet", "demo")
    with vmd.console("demo") as console:
        assert "small monitor" not in console.expect(PROMPT, DEADLINE_S)
    vmd.must("stop", "-fw", "demo")
    refused = vmd.vmctl("start", "-B", "cdrom", "demo")
    assert refused.returncode == 1
    assert "vm demo: boot device cdrom: the vm has no cdrom" in refused.stderr


def test_a_boot_device_for_one_boot(tmp_path: Path) -> None:
    """`start -B cdrom` is for installing, so a reset stops the VM.  Without -B a reset starts it again."""
    disc = tmp_path / "disc.iso"
    disc.write_bytes(bytes(4096))
    with Daemon(tmp_path, demo("demo", f'cdrom "{disc}"')) as vmd:
        vmd.must("start", "-B", "cdrom", "demo")
        with vmd.console("demo") as console:
            console.expect(PROMPT, DEADLINE_S)
            console.type("reset\r")
        why = "rebooted; not started again because it was booted from the CD"
        assert vmd.wait_state("demo", "stopped")["text"] == why
        vmd.must("start", "demo")
        with vmd.console("demo") as console:
            console.expect(PROMPT, DEADLINE_S)
            console.type("reset\r")
            console.expect("small monitor", DEADLINE_S)
        vmd.must("stop", "-fw", "demo")


def test_several_vcpus(tmp_path: Path) -> None:
    """Sixteen vCPUs are built, started by the guest's own INIT/SIPI, and stopped again."""
    with Daemon(tmp_path, demo("smp", "vcpus 16")) as vmd:
        vmd.must("start", "smp")
        with vmd.console("smp") as console:
            console.expect(PROMPT, DEADLINE_S)
            assert re.search(r"processors\s+16\b", console.answer("cpu", PROMPT))
        vmd.must("stop", "-w", "smp")


# --- console ---------------------------------------------------------------------------------------------


def test_output_without_a_viewer_neither_blocks_nor_grows(vmd: Daemon) -> None:
    """Case 45: a flood of output without a viewer does not block.  The next viewer gets the last 64 KiB."""
    vmd.must("start", "demo")
    with vmd.console("demo") as console:
        console.expect(PROMPT, DEADLINE_S)
        console.type("fill 100\r")
    resident = vmd.status("demo")["resident_bytes"]
    attached = subprocess.Popen(
        [sys.executable, "-m", "vmctl", "-s", vmd.socket, "console", "demo"],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert attached.stdin is not None
    attached.stdin.write(b"\recho the end is here\r")
    attached.stdin.flush()
    assert attached.stdout is not None
    seen = b""
    while b"the end is here\r\n" not in seen:
        piece = os.read(attached.stdout.fileno(), 65536)
        assert piece, seen[-500:]
        seen += piece
    second = vmd.vmctl("console", "demo")
    attached.stdin.write(b"\r~.")
    attached.stdin.close()

    assert attached.wait(DEADLINE_S) == 0
    attached.stdout.close()
    if attached.stderr is not None:
        attached.stderr.close()
    assert second.returncode == 1
    assert re.search(rf"in use by root \(pid {attached.pid}\)", second.stderr)
    assert vmd.status("demo")["resident_bytes"] < resident + (8 << 20)
    third = vmd.vmctl("console", "demo")  # the console is free again; standard input is empty, so it ends at once
    assert third.returncode == 0


# --- configuration and mistakes --------------------------------------------------------------------------


def test_a_broken_reload_changes_nothing(vmd: Daemon) -> None:
    """A file that does not parse is refused, with file name and line.  All VMs stay as they are."""
    vmd.must("start", "demo")
    good = vmd.conf.read_text()
    vmd.conf.write_text(good + "\nvm broken {\n memory lots\n}\n")

    refused = vmd.vmctl("reload")

    assert refused.returncode == 1
    assert f"{vmd.conf}:" in refused.stderr
    assert vmd.status("demo")["state"] == "running"
    vmd.conf.write_text(good + demo("second"))
    vmd.must("reload")
    assert vmd.status("demo")["state"] == "running"
    assert vmd.status("second")["state"] == "stopped"


def test_load_adds_vms(vmd: Daemon, tmp_path: Path) -> None:
    """`vmctl load` reads a further file."""
    extra = tmp_path / "extra.conf"
    extra.write_text(demo("extra"))
    vmd.must("load", extra)
    assert vmd.status("extra")["state"] == "stopped"


def test_reset_forgets_vms(vmd: Daemon) -> None:
    """`reset vms` ends and forgets all VMs.  A reload adds the configured VMs again."""
    vmd.must("start", "demo")
    vmd.must("reset", "vms")
    deadline = time.monotonic() + DEADLINE_S
    while vmd.rows():
        assert time.monotonic() < deadline
    vmd.must("reload")
    assert vmd.status("demo")["state"] == "stopped"


def test_staggered_start(tmp_path: Path) -> None:
    """With `parallel 1` one VM starts and the other one waits (cat. 2.9)."""
    conf = "staggered start parallel 1 delay 3600\n" + "".join(
        demo(name).replace("    disable\n", "") for name in ("first", "second")
    )
    with Daemon(tmp_path, conf) as vmd:
        vmd.wait_state("first", "running")
        assert vmd.status("second")["state"] == "waiting"


def test_log_level_reaches_every_process(vmd: Daemon) -> None:
    """`vmctl log verbose` also reaches processes that start later."""
    vmd.must("log", "verbose")
    vmd.must("start", "demo")
    vmd.wait_log("vm/demo: 64-bit ELF kernel")


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("sev", "encrypted memory (sev)"),
    ],
)
def test_an_unsupported_option_is_refused(tmp_path: Path, option: str, words: str) -> None:
    """A VM with an option that this version does not support is not started, and the message names the option."""
    with Daemon(tmp_path, demo("demo", option.format(conf=tmp_path / "vm.conf"))) as vmd:
        refused = vmd.vmctl("start", "demo")
        assert refused.returncode == 1
        assert f"vm demo: {words}: not supported" in refused.stderr


def run_vmd(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a vmd that ends by itself."""
    return subprocess.run(
        [sys.executable, "-m", "vmd", *arguments],
        cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DEADLINE_S, check=False,
    )  # fmt: skip


def test_a_second_daemon_on_the_socket_is_refused(vmd: Daemon) -> None:
    """The running daemon keeps its socket."""
    second = run_vmd("-d", "-s", vmd.socket, "-f", vmd.conf)
    assert second.returncode == 1
    assert f"another vmd is already serving {vmd.socket}" in second.stderr
    vmd.must("status")


def test_a_file_in_the_place_of_the_socket_is_left_alone(tmp_path: Path) -> None:
    """The daemon removes a stale socket, but no other kind of file."""
    path = tmp_path / "precious"
    path.write_text("data")
    conf = tmp_path / "vm.conf"
    conf.touch()
    refused = run_vmd("-d", "-s", path, "-f", conf)
    assert refused.returncode == 1
    assert str(path) in refused.stderr
    assert path.read_text() == "data"


def test_configuration_check(tmp_path: Path) -> None:
    """`-n` prints OK, or all errors with file name and line."""
    good, bad = tmp_path / "good.conf", tmp_path / "bad.conf"
    good.write_text(demo())
    bad.write_text('vm "x" {\n memory 1K\n}\nswitch "s" {\n up\n}\n')
    assert run_vmd("-n", "-f", good).stderr == "configuration OK\n"
    refused = run_vmd("-n", "-f", bad)
    assert refused.returncode == 1
    assert f"{bad}:2: " in refused.stderr
    assert "is missing interface name" in refused.stderr


def test_usage() -> None:
    """After an unknown option the usage is shown."""
    refused = run_vmd("-Z")
    assert refused.returncode == 2
    assert "usage: vmd [-dhnVv]" in refused.stderr


def test_malformed_packets_do_not_disturb_others(vmd: Daemon) -> None:
    """Case 56: a client that sends a malformed packet is disconnected.  The next client is served."""
    for packet in (b"", b"x", b"\0" * 16, os.urandom(4096), b"\xff" * 16384):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
            client.connect(str(vmd.socket))
            client.send(packet)
            client.settimeout(DEADLINE_S)
            assert client.recv(100) == b""
    assert vmd.status("demo")["state"] == "stopped"


LONG = (
    StartRequest(name="x" * 16000),
    StopRequest(name="y" * 16300),
    WaitRequest(name="\u2603" * 5000),
    LoadRequest(path="/" + "z" * 16300),
    StartRequest(name="demo", vmid=1 << 63),
    StartRequest(name="big", config=VmConfig(name="n" * 16000)),
)


def test_requests_as_long_as_a_packet_are_answered(vmd: Daemon) -> None:
    """Case 56: an answer has only the first part of a name that fills its packet.  The daemon goes on."""
    for request in LONG:
        packet = encode(request)[0]
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
            client.connect(str(vmd.socket))
            client.settimeout(DEADLINE_S)
            client.send(packet)
            answer = decode(client.recv(MAX_MESSAGE), [], "vmd").message
        assert isinstance(answer, Failed), packet[:100]
        assert len(answer.text) < 8000
        assert vmd.status("demo")["state"] == "stopped"


def test_rows_are_those_of_vmctl(vmd: Daemon) -> None:
    """`Daemon.rows` asks the daemon itself, without starting vmctl, and returns the same."""
    assert vmd.rows() == json.loads(vmd.must("status", "--json"))["vms"]


def ask_as_nobody(path: Path, request: Request) -> list[Record]:
    """Send a request over a connection that user nobody has made; return all answers."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
            client.connect(str(path))
            theirs.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [client.fileno()]))])
        os._exit(0)
    _, fds, _, _ = socket.recv_fds(ours, 1, 1)
    os.waitpid(pid, 0)
    ours.close()
    theirs.close()
    answers: list[Record] = []
    with socket.socket(fileno=fds[0]) as client:
        client.settimeout(DEADLINE_S)
        client.send(encode(request)[0])
        while not answers or isinstance(answers[-1], VmInfo):
            answers.append(decode(client.recv(MAX_MESSAGE), [], "vmd").message)
    return answers


FORBIDDEN = (
    StartRequest(name="demo"),
    StopRequest(name="demo"),
    WaitRequest(name="demo"),
    ConsoleRequest(name="demo"),
    StartRequest(name="new", config=VmConfig(name="new")),
    ReloadRequest(),
    LoadRequest(path="/etc/passwd"),
    ResetRequest(vms=True, switches=True),
    LogRequest(verbosity=0),
    StartRequest(name="demo", caller=Caller(uid=0, gid=0, pid=1)),  # this claim about the caller is ignored
)


def test_a_user_may_list_vms_and_not_change_them(vmd: Daemon) -> None:
    """A user who may open the socket can list all VMs, but do nothing to VMs of other users (cat. 4.8)."""
    with tempfile.TemporaryDirectory() as open_to_all:
        path = Path(open_to_all) / "vmd.sock"
        path.parent.chmod(0o755)
        path.hardlink_to(vmd.socket)
        path.chmod(0o666)
        vmd.must("start", "demo")

        listed = ask_as_nobody(path, ListRequest())
        answers = [ask_as_nobody(path, request) for request in FORBIDDEN]

    assert isinstance(listed[0], VmInfo)
    assert listed[0].name == "demo"
    for request, (refusal,) in zip(FORBIDDEN, answers, strict=True):
        assert isinstance(refusal, Failed), request
        assert refusal.code == errno.EPERM, request
    assert vmd.status("demo")["state"] == "running"
    assert len(vmd.rows()) == 1


def test_started_without_descriptors(tmp_path: Path) -> None:
    """Descriptors 0, 1 and 2 of the daemon's processes are the null device.

    The exception is 2, which is the socket to the process "log" in the processes that have one.
    """
    without = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"]
    with Daemon(tmp_path, demo(), prefix=without) as vmd:
        vmd.must("start", "demo")

        held = {
            (title, number): os.readlink(f"/proc/{pid}/fd/{number}")
            for title, pid in {"vmd": vmd.pid, **vmd.processes()}.items()
            for number in range(3)
        }

    others = {place: what for place, what in held.items() if what != "/dev/null"}
    assert {number for _, number in others} == {2}
    assert {title for title, _ in others}.isdisjoint({"vmd", "vmd: log"})
    assert all(what.startswith("socket:") for what in others.values())
    assert len(held) >= 3 * len(("vmd", "priv", "control", "vmm", "vm/demo", "vm/demo/vioscsi0"))
