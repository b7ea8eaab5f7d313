"""Compromised VM processes, and how vmm limits what they send, keep open and leave in queues.

The daemon here is a changed copy of this program.  A VM process does what its guest's command line says, with its real
filter and limits.  Another guest must not be affected (`Bystander`).
"""

import errno
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.bystander import NAME, PROMPT, Bystander, vm_block
from tests.support.clients import connect
from tests.support.daemon import DEADLINE_S, Daemon
from tests.support.fusefile import HELD, READ, FuseFile
from tests.support.guests import guest
from tests.support.program import changed_program
from vmd.ipc.imsg import MAX_MESSAGE, decode, encode
from vmd.ipc.messages.clients import Failed, StartRequest, StopRequest, VmTerminated
from vmd.privsep.confine import RUNNING_FILES
from vmd.privsep.ids import TASKS_MAX

pytestmark = [pytest.mark.root, pytest.mark.kvm]

INTRUDER = '''
"""What somebody who has taken over a VM process does."""
import array, os, select, socket
from vmd.ipc.imsg import MAX_MESSAGE, Form, encode
from vmd.ipc.messages.shared import Trouble, TransferProgress
from vmd.ipc.messages.vm import AskResolvers, DevicesReported, VmEnding
KEPT = []
def say(text):
    os.write(2, f"intruder: {text}\\n".encode())
def flood(process, message):
    """Send the same again and again, as fast as it goes."""
    packet = encode(message, form=Form.NAMED)[0]
    sock = process.vmm._sock
    sock.setblocking(True)
    sent = 0
    try:
        while True:
            sock.send(packet)
            sent += 1
    except OSError as error:
        say(f"flood of {sent} ended: {error}")
def flood_ending(process):
    flood(process, VmEnding(text="bye"))
def flood_progress(process):
    flood(process, TransferProgress(done_bytes=1, total_bytes=2))
def flood_resolvers(process):
    flood(process, AskResolvers(vmid=1))
def park(process):
    """Send ourselves as many descriptors as the kernel lets us, and never receive them."""
    parked = 0
    fds = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [2] * 253))]
    try:
        while True:
            KEPT.append(socket.socketpair())
            for _ in range(8):
                KEPT[-1][0].sendmsg([b"x"], fds)
                parked += 253
    except OSError as error:
        say(f"parked {parked}: {error}")
def long_answer(process):
    """Answer with a packet that has no room for a longer number of the VM."""
    def answer(message, envelope, channel):
        def packet(text):
            trouble = Trouble(device="disk0", text=text, since_s=1)
            return encode(DevicesReported(vmid=1, nics=(), troubles=(trouble,)), form=Form.NAMED)[0]
        text = "x" * 16000
        text += "x" * (MAX_MESSAGE - len(packet(text)))
        assert len(packet(text)) == MAX_MESSAGE
        channel._sock.send(packet(text))
    from vmd.ipc.messages.vm import AskDevices
    from vmd.ipc.routes import Proc
    type(process).HANDLERS[(Proc.VMM, AskDevices)] = lambda _self, *arguments: answer(*arguments)
def leave_child(process):
    """Fork a process that keeps the channel and talks when we are gone, for as long as somebody listens."""
    pid = os.fork()
    if pid:
        say(f"child is {pid}")
        return
    packet = encode(VmEnding(text="from the grave"), form=Form.NAMED)[0]
    mother = os.getppid()
    room = select.poll()
    room.register(process.vmm._sock, select.POLLOUT)
    while True:
        try:
            if os.getppid() == mother:
                select.poll().poll(1)
            elif room.poll():
                process.vmm._sock.send(packet)
        except BlockingIOError:
            continue
        except OSError:
            os._exit(0)
def build_more(process):
    """Ask for what a machine is built with."""
    import fcntl
    fcntl.ioctl(0, 0xAE41, 0)  # KVM_CREATE_VCPU
def many_threads(_process):
    """Start threads until there are no more."""
    import _thread
    _thread.stack_size(1 << 18)
    count = 0
    try:
        for count in range(4000):
            _thread.start_new_thread(select.poll().poll, ())
    except RuntimeError:
        pass
    say(f"threads: {count}")
EARLY = {"leave_child"}
'''
HOOK = '''
from vmd.vm import intruder
_begin, _on_start_vm = VmProcess.begin, VmProcess.on_start_vm
def _early(self, message, envelope, channel):
    if message.config.cmdline in intruder.EARLY:  # while it may start processes
        getattr(intruder, message.config.cmdline)(self)
    _on_start_vm(self, message, envelope, channel)
def _late(self, source, config, slots, **named):
    _begin(self, source, config, slots, **named)
    if hasattr(intruder, config.cmdline) and config.cmdline not in intruder.EARLY:
        getattr(intruder, config.cmdline)(self)
VmProcess.begin = _late
VmProcess.HANDLERS[(Proc.VMM, StartVm)] = _early
'''
FLOODS = ("flood_ending", "flood_progress", "flood_resolvers")
DEEP = [pytest.param(flood, marks=pytest.mark.deep) for flood in FLOODS[1:]]
MANY = 128  # VM ids from here on take one more byte


@pytest.fixture(scope="module")
def bystander(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bystander]:
    """Yield a VM that must not be affected, in a daemon with compromised VM processes."""
    directory = tmp_path_factory.mktemp("relays")
    code = changed_program(directory / "code", {"vmd/vm/intruder.py": INTRUDER, "vmd/vm/main.py": HOOK})
    attacks = (*FLOODS, "park", "leave_child", "build_more", "many_threads")
    conf = vm_block(NAME) + vm_block("plain") + "".join(vm_block(name, f'cmdline "{name}"') for name in attacks)
    conf += "".join(vm_block(f"filler{number}") for number in range(MANY))
    conf += vm_block("long_answer", 'cmdline "long_answer"')
    with Daemon(directory, conf, code=code) as daemon, Bystander(daemon) as made:
        yield made


@pytest.fixture
def vmd(bystander: Bystander) -> Iterator[Daemon]:
    """Yield that daemon; check afterwards that the VM is unaffected."""
    yield bystander.vmd
    bystander.check()


@pytest.mark.parametrize("flood", [FLOODS[0], *DEEP])
def test_a_vm_that_sends_without_end_is_cut_off(vmd: Daemon, flood: str) -> None:
    """The VM is ended with a message, long before others must wait for vmm."""
    vmd.must("start", flood)

    row = vmd.wait_state(flood, "stopped")

    assert "broke the protocol" in row["text"]


@pytest.mark.deep
def test_descriptors_on_their_way_count_against_who_sent_them(vmd: Daemon) -> None:
    """All descriptors that one VM can have in flight do not prevent others from passing kernels, disks and consoles."""
    vmd.must("start", "park")
    vmd.wait_log("intruder: parked")
    parked = int(vmd.log.rpartition("intruder: parked ")[2].partition(":")[0])
    assert parked > RUNNING_FILES
    assert os.strerror(errno.ETOOMANYREFS) in vmd.log

    vmd.must("start", "-b", guest("demo"), "plain")  # vmctl passes the kernel's descriptor
    with vmd.attached("plain") as console:
        console.expect(PROMPT, DEADLINE_S)
    vmd.must("stop", "-fw", "plain")
    assert vmd.status("park")["state"] == "running"
    vmd.must("stop", "-fw", "park")


def test_a_packet_that_grows_in_the_relay(vmd: Daemon) -> None:
    """A packet fits until vmm writes the VM's real id into it.  That is an error of the VM."""
    vmd.must("start", "long_answer")
    assert vmd.status("long_answer")["id"] >= MANY

    vmd.vmctl("status", "-v", "long_answer")

    row = vmd.wait_state("long_answer", "stopped")
    assert "exceeds" in row["text"]


def test_a_vm_that_runs_builds_nothing_more(vmd: Daemon) -> None:
    """Requests to KVM that build a machine are refused once it runs."""
    vmd.must("start", "build_more")

    row = vmd.wait_state("build_more", "stopped")

    assert "SIGSYS" in row["text"]


def test_threads_without_end(vmd: Daemon) -> None:
    """A VM and its devices share a limited number of threads."""
    vmd.must("start", "many_threads")
    vmd.wait_log("intruder: threads: ")
    assert int(vmd.log.rpartition("intruder: threads: ")[2].partition("\n")[0]) < TASKS_MAX
    vmd.must("start", "plain")
    vmd.must("stop", "-fw", "plain")
    vmd.must("stop", "-fw", "many_threads")


def test_a_child_that_keeps_the_channel_of_its_vm(vmd: Daemon) -> None:
    """vmm does not wait for the child's end of the channel, even if the child goes on sending."""
    vmd.must("start", "leave_child")
    vmd.wait_log("intruder: child is")
    vmd.must("stop", "-fw", "leave_child")

    vmd.must("start", "plain")
    vmd.must("stop", "-fw", "plain")


@pytest.mark.deep
def test_a_vm_process_that_cannot_be_killed(vmd: Daemon) -> None:
    """The process hangs in a read(2) from storage.  Its VM still ends, and can be started again."""
    with FuseFile(guest("demo").read_bytes(), for_all=True) as file:
        file.rule(READ, HELD)
        with connect(vmd.socket) as client:
            packet, order = encode(StartRequest(name="plain"), fds={"kernel": [file.fd]})
            socket.send_fds(client, [packet], order)
            file.wait_held(1)
            with connect(vmd.socket) as stopping:
                stopping.send(encode(StopRequest(name="plain", force=True, wait=True))[0])
                answer = decode(stopping.recv(MAX_MESSAGE), [], "vmd").message
        assert isinstance(answer, VmTerminated)
        assert "waits for storage" in answer.text
        vmd.must("start", "plain")
        vmd.must("stop", "-fw", "plain")
        file.release()


@pytest.mark.deep
def test_a_vm_that_is_not_built_in_time(tmp_path: Path) -> None:
    """The storage does not answer in time, so the start fails with a reason.  The limit is 120 s, and here 3 s."""
    code = changed_program(tmp_path / "code", {"vmd/vmm/main.py": "\nSTART_S = 3.0\n"})
    with (
        FuseFile(guest("demo").read_bytes(), for_all=True) as file,
        Daemon(tmp_path, vm_block("plain") + vm_block(NAME), code=code) as vmd,
        Bystander(vmd),
    ):
        file.rule(READ, HELD)
        with connect(vmd.socket) as client:
            packet, order = encode(StartRequest(name="plain"), fds={"kernel": [file.fd]})
            socket.send_fds(client, [packet], order)
            answer = decode(client.recv(MAX_MESSAGE), [], "vmd").message
        assert isinstance(answer, Failed)
        assert "did not start within 3 s" in answer.text
        file.release()


@pytest.mark.deep
def test_the_daemon_ends_though_a_vm_process_does_not(tmp_path: Path) -> None:
    """The VM process is killed, and the daemon does not wait longer for it than for others."""
    with FuseFile(guest("demo").read_bytes(), for_all=True) as file, Daemon(tmp_path, vm_block("plain")) as vmd:
        file.rule(READ, HELD)
        with connect(vmd.socket) as client:
            packet, order = encode(StartRequest(name="plain"), fds={"kernel": [file.fd]})
            socket.send_fds(client, [packet], order)
            file.wait_held(1)
        os.kill(vmd.pid, signal.SIGTERM)
        vmd.wait_log("stopping 1 VMs")

        assert vmd.stop() == 0  # asks again to stop

        assert "waits for storage" in vmd.log
        file.release()
