"""A vmm in this process.  Its VM processes are children that only wait to end; the test sends their messages."""

import os
import signal
import socket
from collections.abc import Mapping, Sequence

import pytest

from tests.support.inprocess import End, InProcess
from vmd.config.model import VmConfig
from vmd.ipc.messages.vm import KVM_FD, StartVm
from vmd.ipc.messages.vmm import KvmFd, VmSlot
from vmd.ipc.routes import Proc
from vmd.log import log
from vmd.privsep.spawn import Child
from vmd.record import Record
from vmd.vmm import children
from vmd.vmm import main as module
from vmd.vmm.main import GROUP_FD, Vmm


def is_reaped(pid: int) -> bool:
    """Return whether a child of ours was reaped."""
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return True
    return False


class VmProcess:
    """A VM process.  The test has its end of channel and log."""

    def __init__(self, end: End, log_fd: int, arguments: Sequence[str], uid: int, *, in_group: bool) -> None:
        self.end = end
        self.log_fd = log_fd
        self.arguments = [*arguments]
        self.uid = uid
        self.in_group = in_group
        reading, self.writing = os.pipe()
        begun, begins = os.pipe()
        # A separate program inherits no descriptors, so a channel ends when the test closes its end.
        program = ["sh", "-c", "echo && read -r status && exit $status"]
        actions = [(os.POSIX_SPAWN_DUP2, reading, 0), (os.POSIX_SPAWN_DUP2, begins, 1)]
        self.pid = os.posix_spawn("/bin/sh", program, {}, file_actions=actions)
        os.close(reading)
        os.close(begins)
        os.read(begun, 1)  # posix_spawn returns a moment before the kernel closes the inherited descriptors
        os.close(begun)

    def exit(self, status: int) -> None:
        """Make it end with a status and wait for its end, without reaping it."""
        os.write(self.writing, b"%d\n" % status)
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)

    def is_reaped(self) -> bool:
        """Return whether it was reaped."""
        return is_reaped(self.pid)

    def close(self) -> None:
        """Kill and reap the process if needed, and close its descriptors."""
        os.close(self.writing)
        os.close(self.log_fd)
        if not self.is_reaped():
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)


class VmmRig(InProcess[Vmm]):
    """A vmm, its parent, and its VM processes in the order of their start."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(monkeypatch, Vmm, Proc.VMM)
        self.vms: list[VmProcess] = []
        self.cannot_start: Exception | None = None
        monkeypatch.setattr(module, "spawn", self.spawn)
        monkeypatch.setattr(children, "wait_any", self.wait_any)
        monkeypatch.setattr(log, "verbosity", 0)

    def spawn(
        self, title: str, arguments: Sequence[str], *, channel: socket.socket, fds: Mapping[int, int], log_fd: int,
        uid: int, group: int,
    ) -> Child:  # fmt: skip
        """Replaces `spawn`."""
        if self.cannot_start is not None:
            raise self.cannot_start
        assert KVM_FD in fds
        assert (GROUP_FD in fds) == (group == GROUP_FD)
        end = self.peer(socket.socket(fileno=os.dup(channel.fileno())), Proc.VM, Proc.VMM)
        vm = VmProcess(end, os.dup(log_fd), arguments, uid, in_group=group == GROUP_FD)
        self.vms.append(vm)
        return Child(title, vm.pid)

    def wait_any(self) -> "os.waitid_result | None":
        """Replaces `wait_any`, for our VM processes only, because tests may have other children."""
        for vm in self.vms:
            if not vm.is_reaped():
                ended = os.waitid(os.P_PID, vm.pid, os.WEXITED | os.WNOHANG)
                if ended is not None:
                    return ended
        return None

    def slot(self, uid: int = 0, group: int = 0) -> None:
        """Give vmm a slot."""
        self.parent.send(VmSlot(uid=uid, group=group), fds={"group": [null()]} if group else {})

    def begin(self, *groups: int) -> None:
        """Give vmm /dev/kvm, and slots with these groups; the reserve uses the first slot."""
        for group in groups:
            self.slot(uid=1000 + group, group=group)
        self.parent.send(KvmFd(), fds={"kvm": [null()]})
        self.settle()

    def start(self, vmid: int, config: VmConfig, fds: Mapping[str, Sequence[int]] | None = None) -> VmProcess:
        """Have vmm start a VM; return its process, which has not sent a message yet."""
        self.parent.send(start_of(vmid, config), fds=fds or start_fds())
        self.settle()
        return self.vms[self.pids().index(self.process.running[vmid].pid)]

    def pids(self) -> list[int]:
        """Return the pids of all VM processes."""
        return [vm.pid for vm in self.vms]

    def told(self) -> list[Record]:
        """Return the messages to the parent since the last call."""
        self.settle()
        return self.parent.take()

    def ended(self, vm: VmProcess) -> None:
        """Turn the loop until an ended VM process is reaped."""
        self.until(vm.is_reaped)
        self.settle()

    def close(self) -> None:
        """Close everything."""
        self.process.retired = True  # so that it starts no more processes
        for vm in self.vms:
            vm.close()
        known = {*self.process.by_channel.values(), *self.process.children(), *self.process.over.values()}
        for child in known:
            child.drop()
            child.channel.close()
            if not child.gone:
                os.close(child.pidfd)
            if child.log is not None:
                child.log.close()
        for slot in self.process.slots:
            slot.close()
        super().close()
        os.close(self.process.kvm_fd) if self.process.kvm_fd >= 0 else None
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def null() -> int:
    """Return a descriptor."""
    return os.open(os.devnull, os.O_RDWR)


def start_of(vmid: int, config: VmConfig) -> StartVm:
    """Return the message that starts a VM."""
    return StartVm(vmid=vmid, config=config, boot_name="", verbosity=0)


def start_fds() -> dict[str, list[int]]:
    """Return the descriptors of that message."""
    return {name: [null()] for name in ("memory", "tty", "tty_slave", "shown")}
