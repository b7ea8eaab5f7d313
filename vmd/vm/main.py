"""vm/<name>: one virtual machine, from its first instruction to its last.

Runs as  _vmd, in vmm's cell; narrowed to KVM requests and its open descriptors before the guest runs
Peers    vmm; its device processes, which it starts
Holds    /dev/kvm until the VM is made; KVM's VM and vCPU fds, guest memory, both sides of the console's pty;
         disks and the disc only until their processes have them
Threads  main: the event thread; vcpu-<n>: one for each vCPU

It is started before there is a VM for it, imports what a VM needs, and waits (vmm keeps one in reserve).
"""

import gc
import os
import sys

from vmd.errors import VmdError
from vmd.ipc.channel import Channel
from vmd.ipc.imsg import Envelope
from vmd.ipc.messages import (
    ConsoleOutput,
    ConsoleSnapshot,
    ConsoleSnapshotEnd,
    Outcome,
    PauseDone,
    PauseVm,
    Proc,
    Quit,
    SendBreak,
    SetVerbosity,
    StartVm,
    StopMode,
    StopVm,
    VmEnding,
    VmFailed,
    VmRunning,
)
from vmd.ipc.process import Process
from vmd.kvmapi import abi
from vmd.kvmapi.vcpu import install_kick_handler
from vmd.log import log
from vmd.privsep.confine import VM, confine
from vmd.privsep.title import set_title
from vmd.vm.boot import loader
from vmd.vm.console import Console
from vmd.vm.devproc import DeviceProcesses
from vmd.vm.machine import BootImages, Machine
from vmd.vm.pause import Pause
from vmd.vm.slots import plan

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.ipc.process import Handlers


CONFINEMENT = VM.replace(
    ioctls=(
        abi.KVM_RUN,
        abi.KVM_IRQ_LINE,  # chips raise and lower their lines
        abi.KVM_IOEVENTFD, abi.KVM_IRQFD,  # notifications and interrupts of devices, where the guest wants them now
        abi.KVM_SET_GSI_ROUTING,  # messages of MSI-X
        abi.KVM_GET_MSRS, abi.KVM_SET_MSRS, abi.KVM_GET_CLOCK, abi.KVM_SET_CLOCK,  # clocks stop while it is paused
        abi.KVM_GET_PIT2, abi.KVM_SET_PIT2,
        abi.KVM_GET_REGS, abi.KVM_GET_SREGS, abi.KVM_TRANSLATE,  # what a vCPU that KVM gave up on looked like
        *VM.ioctls,
    )
)  # fmt: skip

KVM_FD = 4  # where vmm leaves /dev/kvm
SNAPSHOT_PIECE = 8192  # bytes of backlog in one message
SWITCH_INTERVAL_S = 0.0005  # a busy event thread must not keep a vCPU waiting for the interpreter
ACK_TIMEOUT_S = 3.0  # for the guest to notice the power button (*cat. 4.4*)
SHUTDOWN_TIMEOUT_S = 120.0  # for it to be done
LAST_WORDS_TIMEOUT_S = 1.0


class VmProcess(Process):
    """The event thread's state."""

    def __init__(self) -> None:
        super().__init__(Proc.VM)
        self.vmm = self.attach_parent(Proc.VMM)
        self.vmid = 0
        self.machine: Machine | None = None
        self.pause: Pause | None = None
        self.devices = DeviceProcesses()
        self.console: Console | None = None
        self.ending = False
        self.stopping = False

    def on_start_vm(self, message: StartVm, envelope: Envelope, channel: Channel) -> None:
        """Build the VM, give up what only building needs, and let the guest execute."""
        self.vmid = message.vmid
        log.setup(f"vm/{message.config.name}", log.form, message.verbosity)
        set_title(log.title)
        master, slave = envelope.take_fd("tty"), envelope.take_fd("tty_slave")
        boot, initrd = envelope.take_fd("boot"), envelope.take_fd("initrd")
        assert master is not None
        assert slave is not None
        assert boot is not None
        images = BootImages(boot, message.boot_name, initrd, message.config.initrd or "initrd")
        slots = plan(message.config, message.disks, envelope.take_fds("disks"), envelope.take_fd("cdrom"))
        try:
            self.console = Console(master, slave, self.loop)
            firmware_bytes = loader.firmware_bytes(boot, message.boot_name)
            self.machine = Machine(
                message.config,
                KVM_FD,
                firmware_bytes,
                slots,
                self.devices,
                self.console,
                self.loop,
                self.end_from_thread,
            )
            self.machine.boot(images)
            images.close()
            for fd in (fd for slot in slots for fd in slot.fds):
                os.close(fd)
            confine(CONFINEMENT)  # what this kernel lacks was said by vmm, at the start of the daemon
            self.pause = Pause(self.machine, self.loop)
            self.machine.start()
        except (VmdError, OSError) as error:
            code = getattr(error, "errno", None) or getattr(error, "code", None) or 0
            channel.send(VmFailed(vmid=message.vmid, code=code, text=str(error)))
            self.end(Outcome.FAILED, str(error))
            return
        channel.send(VmRunning(vmid=message.vmid, pid=os.getpid()))

    def on_stop_vm(self, message: StopVm, _envelope: Envelope, _channel: Channel) -> None:
        """Press the power button; a guest without a driver for it is ended at once (*cat. 4.4*)."""
        if message.mode is StopMode.KILL:
            self.end(Outcome.POWER_OFF, "stopped by force")
        if self.machine is None or self.stopping or self.ending:
            return
        self.stopping = True
        self.go_on()  # only a guest that runs can shut down
        if not self.machine.pm.power_button_enabled:
            self.end(Outcome.POWER_OFF, "stopped; the guest has no driver for the power button")
            return
        deadline = self.loop.call_later(
            ACK_TIMEOUT_S,
            lambda: self.end(Outcome.POWER_OFF, f"did not notice the power button in {ACK_TIMEOUT_S:.0f} s"),
        )

        def acknowledged() -> None:
            deadline.cancel()
            self.loop.call_later(
                SHUTDOWN_TIMEOUT_S,
                lambda: self.end(Outcome.POWER_OFF, f"did not shut down in {SHUTDOWN_TIMEOUT_S:.0f} s"),
            )

        self.machine.pm.on_button_acknowledged = lambda: self.loop.call_from_thread(acknowledged)
        self.machine.pm.power_button()

    def on_pause_vm(self, message: PauseVm, _envelope: Envelope, channel: Channel) -> None:
        """Stand still, or go on; stopping takes until the slowest device has finished what is in flight."""
        pause = self.pause
        if pause is None or self.ending:
            return  # how the VM ends is the answer

        def done(text: str) -> None:
            channel.send(PauseDone(vmid=self.vmid, paused=pause.paused, text=text))

        if message.paused:
            pause.pause(done)
        else:
            done(self.go_on())

    def go_on(self) -> str:
        """Let a paused machine go on; one that cannot is at its end.  Returns why not, or nothing."""
        assert self.pause is not None
        try:
            self.pause.unpause()
        except (VmdError, OSError) as error:
            self.end(Outcome.FAILED, str(error))
            return str(error)
        return ""

    def on_console_snapshot(self, _message: ConsoleSnapshot, envelope: Envelope, channel: Channel) -> None:
        """Send the backlog."""
        backlog = self.console.snapshot() if self.console else b""
        for start in range(0, len(backlog), SNAPSHOT_PIECE):
            channel.send(ConsoleOutput(data=backlog[start : start + SNAPSHOT_PIECE]), peerid=envelope.peerid)
        channel.send(ConsoleSnapshotEnd(), peerid=envelope.peerid)

    def on_send_break(self, _message: SendBreak, _envelope: Envelope, _channel: Channel) -> None:
        """Let the guest see a BREAK."""
        if self.machine is not None:
            self.machine.uart.send_break()

    def on_set_verbosity(self, message: SetVerbosity, _envelope: Envelope, _channel: Channel) -> None:
        """Log more or less."""
        log.verbosity = message.verbosity
        self.devices.set_verbosity(message.verbosity)

    def on_quit(self, _message: Quit, _envelope: Envelope, _channel: Channel) -> None:
        """End without a word."""
        self.end(Outcome.POWER_OFF, "")

    def end_from_thread(self, outcome: Outcome, text: str) -> None:
        """End; a vCPU thread or a chip has found a reason."""
        self.loop.call_from_thread(lambda: self.end(outcome, text))

    def end(self, outcome: Outcome, text: str) -> None:
        """Stop the guest and leave the loop; the first reason wins."""
        if self.ending:
            return
        self.ending = True
        self.exit_status = outcome
        if self.machine is not None and not self.machine.stop():
            log.error("a vcpu does not come back from the kernel; ending without it")
        self.devices.end()
        if self.console is not None:
            self.console.drain()
        self.vmm.send(VmEnding(text=text))
        self.vmm.flush_blocking(LAST_WORDS_TIMEOUT_S)
        self.loop.stop()

    HANDLERS: "Handlers" = {
        (Proc.VMM, StartVm): on_start_vm,
        (Proc.VMM, StopVm): on_stop_vm,
        (Proc.VMM, PauseVm): on_pause_vm,
        (Proc.VMM, ConsoleSnapshot): on_console_snapshot,
        (Proc.VMM, SendBreak): on_send_break,
        (Proc.VMM, SetVerbosity): on_set_verbosity,
        (Proc.VMM, Quit): on_quit,
    }


def main() -> int:
    """Run process vm."""
    process = VmProcess()
    process.ignore_terminal_signals()
    install_kick_handler()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    process.devices.fill_reserve()
    gc.collect()
    gc.freeze()
    process.loop.run()
    process.devices.end()
    return process.exit_status
