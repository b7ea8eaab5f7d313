"""Sending and receiving VMs (*cat. 4.7*): what the parent has to decide and to open meanwhile.

The stream itself is written and read by the VM's own process; not a byte of it is looked at here.  A VM that is
received goes through these steps, each a message of its process:

    ReceiveRequest    its name is free, or that of a configured VM that does not run; a process starts to read
    ReceivedHeader    the stream's description is checked as a client's would be
    ReceivedMachine   all was read: disks are opened, as soon as the sender has let them go
    VmRunning         it goes on, or stands still if that was asked for
"""

import errno
import os
import time

from vmd.config.model import Owner, VmConfig
from vmd.errors import InUse, OperatorError, VmdError, sentence
from vmd.ipc.imsg import Envelope
from vmd.ipc.messages import (
    Caller,
    CancelTransfer,
    Proc,
    ReceivedHeader,
    ReceivedMachine,
    ReceiveMemory,
    ReceiveRequest,
    ReceiveVm,
    ResumeReceived,
    SendDone,
    SendRequest,
    SendVm,
    StopMode,
    TransferProgress,
    VmPaused,
    VmReceived,
    VmSent,
    brief,
)
from vmd.log import log
from vmd.parent import endings
from vmd.parent.access import require_root
from vmd.parent.clients import For
from vmd.parent.limits import require_files
from vmd.parent.media import Media, holder
from vmd.parent.requests import check_paths, checked_request
from vmd.parent.vmtable import Receiving, State, Vm

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.parent.main import Parent

LOCK_PATIENCE_S = 10.0  # for the sender to let go of the disks
LOCK_RETRY_S = 0.1
# What opening files may raise that a stream has named: a path with a NUL is a ValueError.
FAILURES = (VmdError, OSError, ValueError)


# --- sending -------------------------------------------------------------------------------------------------


def serve_send(parent: "Parent", message: SendRequest, caller: Caller, envelope: Envelope) -> None:
    """Have a VM write itself to the client's descriptor."""
    require_root(caller, "send a vm")
    vm = parent.vms.get(message.vmid, message.name)
    vm.begin_send(keep=message.keep)
    stream = envelope.take_fd("stream")
    assert stream is not None
    parent.clients.wait(envelope.peerid, For.TRANSFER, vm.vmid)
    parent.core.peers.send(
        Proc.VMM,
        SendVm(vmid=vm.vmid, keep=message.keep, one_shot=bool(vm.once_because)),
        fds={"stream": [stream]},
    )
    log.info(f"{vm.name}: sending vm {vm.vmid}")


def on_progress(parent: "Parent", message: TransferProgress, envelope: Envelope, _channel: object) -> None:
    """Let the client see how far it is."""
    vm = parent.vms.find(envelope.peerid, "")
    if vm is not None and (vm.sending or vm.receiving):
        for wait in parent.clients.waiting(For.TRANSFER, vm.vmid):
            parent.clients.answer(wait.client, message)


def on_send_done(parent: "Parent", message: SendDone, _envelope: Envelope, _channel: object) -> None:
    """A stream is complete, or has failed; in the one case the VM ends now, unless it is to be kept."""
    vm = parent.vms.alive(message.vmid)
    sending = vm.sending
    if sending is None:
        return
    text = brief(message.text)
    if text:
        vm.stay()
        log.error(f"vm {vm.name}: not sent: {text}")
        text = f"vm {vm.name} was not sent, and is as before: {text}"
        parent.clients.fail_all(For.TRANSFER, vm.vmid, errno.EIO, text)
        return
    log.info(f"{vm.name}: sent vm {vm.vmid}, {message.sent_bytes} bytes")
    sent = VmSent(vmid=vm.vmid, name=vm.name, sent_bytes=message.sent_bytes)
    if sending.keep:
        vm.stay()
        parent.clients.answer_all(For.TRANSFER, vm.vmid, sent)
    else:
        vm.leave(sent)  # the client hears of it when the VM has let go of everything


# --- receiving -----------------------------------------------------------------------------------------------


def serve_receive(parent: "Parent", message: ReceiveRequest, caller: Caller, envelope: Envelope) -> None:
    """Start a process that reads the client's stream."""
    require_root(caller, "receive a vm")
    if parent.core.ending:
        raise OperatorError(errno.ESHUTDOWN, "vmd is stopping")
    require_files()
    stream = envelope.take_fd("stream")
    assert stream is not None
    vm = parent.vms.find(0, message.name)
    try:
        if vm is None:
            # As small as a VM can be, until its stream says more.
            vm = parent.vms.add(checked_request(VmConfig(name=message.name), bootable=True), from_config=False)
        elif vm.alive or not vm.from_config:
            raise OperatorError(errno.EEXIST, f"vm {vm.name} exists, and is {vm.state.value}")
        try:
            vm.begin_receive(Receiving(paused=message.paused))
            # Of a VM that vm.conf describes it is known whose it is; all others are root's, who asked for it.
            vm.uid = vm.config.owner.uid if vm.from_config else caller.uid
            vm.open_console()
            assert vm.pty is not None
            vm.pty.give_to(vm.uid, vm.config.owner.gid)
            console = vm.console_fds()
        except VmdError as error:
            vm.drop_pty()
            vm.drop_transfer()
            vm.ended(brief(str(error)))
            if not vm.from_config:
                parent.vms.remove(vm)
            raise
    except BaseException:
        os.close(stream)
        raise
    parent.clients.wait(envelope.peerid, For.TRANSFER, vm.vmid)
    start = ReceiveVm(vmid=vm.vmid, name=vm.name, verbosity=parent.core.verbosity)
    parent.core.peers.send(Proc.VMM, start, fds={"stream": [stream], **console})
    log.info(f"{vm.name}: receiving vm {vm.vmid}")


def on_received_header(parent: "Parent", message: ReceivedHeader, _envelope: Envelope, _channel: object) -> None:
    """Judge what a stream wants to be; the name is ours, and so is the owner."""
    vm = parent.vms.alive(message.vmid)
    receiving = vm.receiving
    if receiving is None:
        return
    config = message.config.replace(name=vm.name, owner=vm.config.owner if vm.from_config else Owner(), allow=None)
    try:
        check_paths(config)  # what it boots from is opened only when its guest resets itself
        receiving.config = checked_request(config, bootable=True)
        parent.check_startable(vm, receiving.config)
        parent.network.require_switches(receiving.config)
        parent.network.check(vm, receiving.config)
        require_disks(parent, receiving.config)
    except FAILURES as error:
        give_up(parent, vm, code_of(error), sentence(error))
        return
    vm.running_config = receiving.config
    once = endings.ONLY_THAT_START if message.one_shot else ""
    vm.once_because = endings.ONCE.get(receiving.config.boot_device, once)
    parent.core.peers.send(Proc.VMM, ReceiveMemory(vmid=vm.vmid))


def require_disks(parent: "Parent", config: VmConfig) -> None:
    """Raise one of FAILURES if disks could not be opened even when nobody uses them: its sender still has the VM."""
    try:
        Media.open(config, parent.prober).close()
    except OperatorError as error:
        if error.code != errno.EBUSY:
            raise


def on_received_machine(parent: "Parent", message: ReceivedMachine, _envelope: Envelope, _channel: object) -> None:
    """All was read: open the disks, or wait for them."""
    vm = parent.vms.alive(message.vmid)
    if vm.receiving is not None:
        vm.receiving.complete = True
        vm.receiving.deadline_s = time.monotonic() + LOCK_PATIENCE_S
        resume(parent, vm, vm.receiving)


def resume(parent: "Parent", vm: Vm, receiving: Receiving) -> None:
    """Open the disks and have the machine go on; where they are in use come back, or give up for now."""
    if vm.receiving is not receiving or receiving.config is None:  # it has ended, and may be receiving once more
        return
    if vm.state is State.STOPPING:  # how it ends is the answer
        return
    try:
        media = Media.open(receiving.config, parent.prober)
    except FAILURES as error:
        if code_of(error) == errno.EBUSY and time.monotonic() < receiving.deadline_s:
            parent.core.loop.call_later(LOCK_RETRY_S, lambda: resume(parent, vm, receiving))
            return
        why = holder(error, vm, parent.vms) if isinstance(error, InUse) else error
        stay_paused(parent, vm, code_of(error), sentence(why))
        return
    parent.note(vm, receiving.config, media.notes)
    vm.files = media.files()
    try:
        message = ResumeReceived(
            vmid=vm.vmid, config=receiving.config, paused=receiving.paused, disks=media.describe()
        )
        fds = {"disks": media.take_disks(), "cdrom": media.take_cdrom()}
        parent.network.launch(vm, message, fds, lambda code, text: stay_paused(parent, vm, code, text))
    except FAILURES as error:
        stay_paused(parent, vm, code_of(error), sentence(error))
    finally:
        media.close()


def stay_paused(parent: "Parent", vm: Vm, code: int, why: str) -> None:
    """Have a VM wait for its operator: it cannot go on yet, and may be the only copy of what its sender had."""
    if not vm.wait_for_disks(brief(why)):
        return
    log.error(f"vm {vm.name}: received, but stays paused: {why}")
    text = f"vm {vm.name} was received and stays paused: {why}; `vmctl unpause {vm.name}` tries again"
    for what in (For.TRANSFER, For.PAUSE):
        parent.clients.fail_all(what, vm.vmid, code, text)


def unpause(parent: "Parent", vm: Vm) -> bool:
    """Try again for the disks of a VM that waits for them; False if it is not such a one."""
    if vm.receiving is None:
        return False
    vm.try_again(vm.receiving)
    resume(parent, vm, vm.receiving)
    return True


def on_received_running(parent: "Parent", vm: Vm, pid: int, *, paused: bool) -> None:
    """The machine goes on here, or stands still as was asked for."""
    config = vm.end_receive(pid, paused=paused)
    assert vm.pty is not None
    if config is not None:
        parent.vms.adopt(vm, config, parent.core.config.settings.local_prefix)
    log.info(f"received {vm.name} (vm {vm.vmid}) successfully, tty {vm.pty.path}")
    received = VmReceived(vmid=vm.vmid, name=vm.name, pid=pid, tty=vm.pty.path, paused=paused)
    parent.clients.answer_all(For.TRANSFER, vm.vmid, received)
    parent.clients.answer_all(For.PAUSE, vm.vmid, VmPaused(vmid=vm.vmid, name=vm.name, paused=paused))


def give_up(parent: "Parent", vm: Vm, code: int, text: str) -> None:
    """End a VM that cannot be received; its end is what the client is told of."""
    assert vm.receiving is not None
    vm.receiving.failure, vm.code = brief(text), code
    parent.stop_process(vm, StopMode.KILL)


def code_of(error: Exception) -> int:
    """Return what a client is told of one of FAILURES besides its sentence."""
    return getattr(error, "code", 0) or getattr(error, "errno", 0) or errno.EINVAL


def on_client_gone(parent: "Parent", vm: Vm) -> None:
    """Whoever wanted this VM sent or received has left: a half stream is of no use to anybody.

    But a whole one may be all that is left of the VM.
    """
    if vm.sending is not None:
        parent.core.peers.send(Proc.VMM, CancelTransfer(vmid=vm.vmid))
    if vm.receiving is not None and not vm.receiving.complete:
        give_up(parent, vm, errno.ECANCELED, "receiving was interrupted")
