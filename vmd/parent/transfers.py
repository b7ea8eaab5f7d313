"""Pausing, sending and receiving VMs (*cat. 4.7*).

The VM's own process writes and reads the stream.  The parent does not look at it.  A VM is received in these steps,
the first by a message of the client, the others by messages of the VM's process:

    ReceiveRequest    the name is free, or is that of a configured VM that does not run; a process starts to read
    ReceivedHeader    the configuration in the stream is checked like one from a client
    ReceivedMachine   everything is read: the disks are opened as soon as the sender has released their locks
    VmRunning         the guest runs, or stays paused if the client wants that (`life`)
"""

import errno
import time

from vmd.closing import close
from vmd.config.model import Owner, VmConfig
from vmd.errors import HostError, OperatorError, VmdError, number, sentence
from vmd.ipc.imsg import Envelope
from vmd.ipc.messages.clients import Caller, PauseRequest, ReceiveRequest, SendRequest, VmPaused, VmSent
from vmd.ipc.messages.shared import Live, TransferProgress, brief
from vmd.ipc.messages.vm import (
    CancelTransfer,
    PauseDone,
    PauseVm,
    ReceivedHeader,
    ReceivedMachine,
    ReceiveMemory,
    ReceiveVm,
    ResumeReceived,
    SendDone,
    SendVm,
    StopMode,
    VmHalted,
)
from vmd.ipc.routes import Proc
from vmd.log import log
from vmd.parent import endings
from vmd.parent.clients import For
from vmd.parent.limits import require_files
from vmd.parent.migrations import Migrations
from vmd.parent.report import brief_notes
from vmd.parent.requests import check_paths, checked_request, require_permitted_settings, with_permitted_vhost
from vmd.parent.vm import Receiving, State, Vm

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.parent.core import Core
    from vmd.parent.life import Life
    from vmd.parent.network import Network
    from vmd.parent.opening import Opened, Openings

STILL_MS_MAX, ROUNDS_MAX = 3_600_000, 1000  # limits of the parameters of a live send
LOCK_PATIENCE_S = 10.0  # for the sender to release the locks of the disks
FAILURES = (VmdError, OSError, ValueError)  # raised by checks of a configuration from a stream


def require_possible(live: Live) -> None:
    """Raise OperatorError if a parameter of a live send is out of range."""
    if not 0 < live.still_ms <= STILL_MS_MAX:
        raise OperatorError(errno.EINVAL, f"stand-still of {live.still_ms} ms (limit is {STILL_MS_MAX})")
    if not 0 < live.rounds <= ROUNDS_MAX:
        raise OperatorError(errno.EINVAL, f"{live.rounds} rounds (limit is {ROUNDS_MAX})")


class Transfers:
    """The room of VMs that pause, leave and arrive."""

    def __init__(self, core: "Core", life: "Life", openings: "Openings", network: "Network") -> None:
        self.core = core
        self.vms = core.vms
        self.clients = core.clients
        self.life = life
        self.openings = openings
        self.network = network
        self.migrations = Migrations(core, self)

    # --- standing still --------------------------------------------------------------------------------

    def serve_pause(self, message: PauseRequest, caller: Caller, envelope: Envelope) -> None:
        """Pause or unpause a VM.  To unpause a received VM without its disks means to try again to open them."""
        vm = self.vms.get(message.vmid, message.name)
        vm.require_control(caller, "pause" if message.paused else "unpause")
        if vm.state is State.IN_DOUBT and not message.paused:
            self.migrations.unpause(vm, envelope.peerid, force=message.force)
            return
        vm.require_pausable()
        if message.paused and vm.receiving is not None:  # its guest has not run here yet
            self.clients.answer(envelope.peerid, VmPaused(vmid=vm.vmid, name=vm.name, paused=True))
            return
        self.clients.wait(envelope.peerid, For.PAUSE, vm.vmid)
        if vm.receiving is not None:
            vm.try_again(vm.receiving)
            self.resume(vm, vm.receiving)
        else:
            self.core.peers.send(Proc.VMM, PauseVm(vmid=vm.vmid, paused=message.paused, force=message.force))

    def on_pause_done(self, message: PauseDone, _envelope: Envelope) -> None:
        """A VM was paused or unpaused, or the attempt has failed."""
        vm = self.vms.living(message.vmid)
        vm.pause_changed(paused=message.paused)
        client = self.clients.take_first(For.PAUSE, vm.vmid)
        if message.text:
            log.error(f"vm {vm.name}: {message.text}")
            self.clients.fail(client, errno.EIO, f"vm {vm.name}: {message.text}")
            return
        log.info(f"{vm.name}: {'paused' if message.paused else 'unpaused'} vm {vm.vmid} successfully")
        notes = brief_notes(list(message.notes))
        for note in notes:
            log.warn(f"vm {vm.name}: {note}")
        self.clients.answer(client, VmPaused(vmid=vm.vmid, name=vm.name, paused=message.paused, notes=notes))

    def on_vm_halted(self, message: VmHalted, _envelope: Envelope) -> None:
        """A VM has paused itself, because of an error that the operator must fix."""
        vm = self.vms.living(message.vmid)
        if vm.halted(brief(message.text)):
            log.error(f"vm {vm.name}: paused: {vm.text}; `vmctl unpause {vm.name}` continues it once that is mended")

    # --- sending ---------------------------------------------------------------------------------------

    def serve_send(self, message: SendRequest, _caller: Caller, envelope: Envelope) -> None:
        """Let a VM write itself to the client's descriptor."""
        vm = self.vms.get(message.vmid, message.name)
        self.begin_send(vm, envelope.peerid, keep=message.keep, live=message.live)
        log.info(f"{vm.name}: sending vm {vm.vmid}")

    def begin_send(
        self, vm: Vm, client: int, *, keep: bool = False, carried: bool = False, live: Live | None = None
    ) -> None:
        """Let a VM write itself to a client's stream.  Raises OperatorError, HostError.

        `carried`: it migrates, and the client requests each step.  `live`: its guest runs meanwhile.
        """
        if live is not None:
            require_possible(live)
        vm.begin_send(keep=keep, carried=carried)
        try:
            stream = self.clients.courier(client)
        except HostError:
            vm.stay()
            raise
        self.clients.wait(client, For.TRANSFER, vm.vmid)
        send = SendVm(
            vmid=vm.vmid,
            keep=keep,
            one_shot=bool(vm.once_because),
            two_way=carried,
            live=live,
        )
        self.core.peers.send(Proc.VMM, send, fds={"courier": [stream]})

    def on_progress(self, message: TransferProgress, envelope: Envelope) -> None:
        """Tell the waiting clients how much was sent or received."""
        vm = self.vms.find(envelope.peerid, "")
        if vm is not None and (vm.sending or vm.receiving):
            for what in (For.TRANSFER, For.IMAGES):
                for wait in self.clients.waiting(what, vm.vmid):
                    self.clients.answer(wait.client, message)

    def on_send_done(self, message: SendDone, _envelope: Envelope) -> None:
        """A stream is complete, or has failed.  After a complete stream the VM ends, unless the client keeps it."""
        vm = self.vms.living(message.vmid)
        sending = vm.sending
        if sending is None:
            return
        text = brief(sending.abandoned or message.text) if message.text else ""
        if sending.carried and not text:
            self.migrations.on_written(vm, sending, message)
            return
        if text:
            vm.stay()
            self.clients.take(For.CARRYING, vm.vmid)
            verb = "migrated" if sending.carried else "sent"
            log.error(f"vm {vm.name}: not {verb}: {text}")
            text = f"vm {vm.name} was not {verb}, and is as before: {text}"
            self.clients.fail_all(For.TRANSFER, vm.vmid, errno.EIO, text)
            return
        still = f", {message.rounds} rounds, stood still for {message.still_ms} ms" if message.rounds else ""
        log.info(f"{vm.name}: sent vm {vm.vmid}, {message.sent_bytes} bytes{still}")
        sent = VmSent(
            vmid=vm.vmid,
            name=vm.name,
            sent_bytes=message.sent_bytes,
            rounds=message.rounds,
            still_ms=message.still_ms,
        )
        if sending.keep:
            vm.stay()
            self.clients.answer_all(For.TRANSFER, vm.vmid, sent)
        else:
            vm.leave(sent)  # the client is answered when the VM has ended

    # --- receiving -------------------------------------------------------------------------------------

    def serve_receive(self, message: ReceiveRequest, caller: Caller, envelope: Envelope) -> None:
        """Start a process that reads the client's stream."""
        self.begin_receive(message.name, Receiving(paused=message.paused), caller, envelope.peerid)

    def begin_receive(self, name: str, receiving: Receiving, caller: Caller, client: int) -> Vm:
        """Start a process that reads a client's stream.  Raises OperatorError, HostError."""
        if self.core.ending:
            raise OperatorError(errno.ESHUTDOWN, "vmd is stopping")
        require_files()
        vm = self.vms.find(0, name)
        if vm is None:
            # A minimal configuration, until that of the stream is known.
            vm = self.vms.add(checked_request(VmConfig(name=name), bootable=True), from_config=False)
        elif vm.alive or not vm.from_config:
            raise OperatorError(errno.EEXIST, f"vm {vm.name} exists, and is {vm.state.value}")
        stream = self.clients.courier(client)
        try:
            self.core.slots.give()
            vm.begin_receive(receiving)
            # A VM of vm.conf runs for its owner.  Any other VM runs for the caller, who is root.
            vm.uid = vm.config.owner.uid if vm.from_config else caller.uid
            vm.open_console()
            assert vm.pty is not None
            vm.pty.give_to(vm.uid, vm.config.owner.gid)
            vm.new_seed()
            fds = vm.process_fds(arrives=True)
        except VmdError as error:
            close(stream)
            vm.drop_pty()
            vm.drop_transfer()
            vm.ended(brief(str(error)))
            if not vm.from_config:
                self.vms.remove(vm)
            raise
        self.clients.wait(client, For.TRANSFER, vm.vmid)
        start = ReceiveVm(vmid=vm.vmid, name=vm.name, verbosity=self.core.verbosity)
        self.core.peers.send(Proc.VMM, start, fds={"courier": [stream], **fds})
        log.info(f"{vm.name}: receiving vm {vm.vmid}")
        return vm

    def begin_revival(self, vm: Vm, stream: int, *, paused: bool) -> None:
        """Continue a VM whose process has ended with the machine in a stream: it goes back to a snapshot.

        `stream` is a courier; owns the descriptor.  The VM keeps its configuration, its owner and its console.
        Raises VmdError; the caller must end the VM then.
        """
        config, uid = vm.running_config or vm.config, vm.uid
        vm.begin_reboot()
        vm.drop_transfer()
        try:
            if self.core.ending:
                raise OperatorError(errno.ESHUTDOWN, "vmd is stopping")
            self.core.slots.give()
            vm.begin_receive(Receiving(paused=paused, config=config), again=True)
            vm.uid = uid
            vm.new_seed()
            fds = vm.process_fds(arrives=True)
        except BaseException:
            close(stream)
            raise
        start = ReceiveVm(vmid=vm.vmid, name=vm.name, verbosity=self.core.verbosity)
        self.core.peers.send(Proc.VMM, start, fds={"courier": [stream], **fds})
        log.info(f"{vm.name}: going back to a snapshot (vm {vm.vmid})")

    def on_received_header(self, message: ReceivedHeader, _envelope: Envelope) -> None:
        """Check the configuration in a stream.  The name and the owner come from this host, not from the stream."""
        vm = self.vms.living(message.vmid)
        receiving = vm.receiving
        if receiving is None:
            return
        config = message.config.replace(name=vm.name, owner=vm.config.owner if vm.from_config else Owner(), allow=None)
        try:
            if receiving.config is not None:
                require_same(receiving.config, config)
                config = receiving.config
            check_paths(config)  # now, because the boot files are not opened before the guest resets itself
            config = checked_request(config, bootable=True)
            if receiving.config is None:
                require_permitted_settings(vm, config)
                config = with_permitted_vhost(vm, config)
            self.life.require_room(vm, config)
            self.network.require_switches(config)
            self.network.plans.check(vm, config)
        except FAILURES as error:
            self.give_up(vm, number(error), sentence(error))
            return
        if config.seed is None:
            vm.drop_seed()
        once = endings.ONLY_THAT_START if message.one_shot else ""
        vm.once_because = endings.ONCE.get(config.boot_device, once)

        def judged(error: VmdError | None) -> None:
            if error is not None and number(error) != errno.EBUSY:  # EBUSY: the sender still has the disks
                self.give_up(vm, number(error), sentence(error))
                return
            vm.running_config = config
            self.core.peers.send(Proc.VMM, ReceiveMemory(vmid=vm.vmid))

        def found(opened: "Opened") -> None:
            opened.close()
            if not receiving.carried:
                judged(None)
                return
            vm.running_config = config
            try:
                self.migrations.on_judged(vm, receiving, opened)
            except OperatorError as error:
                self.give_up(vm, error.number, error.what)

        def refused(error: VmdError) -> None:
            if receiving.carried:
                self.give_up(vm, number(error), sentence(error))
            else:
                judged(error)

        # If its disks are not on this host, receiving must fail while the sender still has the VM.
        carried = receiving.carried
        self.openings.open(
            vm, config, vm.uid, found, refused, boots=False, names_holder=carried, others_have=carried
        )

    def on_received_machine(self, message: ReceivedMachine, _envelope: Envelope) -> None:
        """Everything is read: open the disks; a VM that migrates waits for its client first."""
        vm = self.vms.living(message.vmid)
        if vm.receiving is None:
            return
        if vm.receiving.carried:
            self.migrations.on_complete(vm, vm.receiving)
        else:
            self.begin_resume(vm, vm.receiving)

    def begin_resume(self, vm: Vm, receiving: Receiving) -> None:
        """Run a machine that was read completely; the sender has LOCK_PATIENCE_S to release the disks."""
        receiving.complete = True
        receiving.deadline_s = time.monotonic() + LOCK_PATIENCE_S
        self.resume(vm, receiving)

    def resume(self, vm: Vm, receiving: Receiving) -> None:
        """Open the disks and run the machine.  If they stay in use until the deadline, the VM stays paused."""
        config = vm.running_config
        if vm.receiving is not receiving or config is None:  # the VM has ended, and may be received anew
            return
        if vm.state is State.STOPPING:  # the client is answered when it has ended
            return
        self.openings.open(
            vm,
            config,
            vm.uid,
            lambda opened: self._opened(vm, config, receiving, opened),
            lambda error: self.stay_paused(vm, number(error), sentence(error)),
            boots=False,
            patience_s=max(0.0, receiving.deadline_s - time.monotonic()),
        )

    def _opened(self, vm: Vm, config: VmConfig, receiving: Receiving, opened: "Opened") -> None:
        """The disks are open: run the machine, with its interfaces."""
        self.life.note(vm, config, list(opened.notes))
        vm.files, vm.disks = opened.files, opened.disks
        message = ResumeReceived(vmid=vm.vmid, config=config, paused=receiving.paused, disks=opened.disks)
        try:
            fds = {"couriers": opened.take_couriers()}
            self.network.launch(vm, message, fds, lambda code, text: self.stay_paused(vm, code, text))
        except VmdError as error:
            self.stay_paused(vm, number(error), sentence(error))

    def stay_paused(self, vm: Vm, code: int, why: str) -> None:
        """A received VM cannot run yet.  It waits for its operator, because it may be the only copy of the VM.

        A VM that migrates is given up instead: the sender still has it.
        """
        if vm.receiving is not None and vm.receiving.carried:
            self.give_up(vm, code, why)
            return
        if not vm.wait_for_disks(brief(why)):
            return
        log.error(f"vm {vm.name}: received, but stays paused: {why}")
        self.life.on_gone(vm)
        text = f"vm {vm.name} was received and stays paused: {why}; `vmctl unpause {vm.name}` tries again"
        for what in (For.TRANSFER, For.PAUSE):
            self.clients.fail_all(what, vm.vmid, code, text)

    def give_up(self, vm: Vm, code: int, text: str) -> None:
        """End a VM that cannot be received.  The client is answered when it has ended."""
        assert vm.receiving is not None
        vm.receiving.failure, vm.code = brief(text), code
        self.life.stop_process(vm, StopMode.KILL)

    def on_client_gone(self, vmid: int) -> None:
        """The client that had this VM sent or received has disconnected: cancel the transfer.

        A VM that is received completely is kept, because it may be the only copy of the VM.
        """
        vm = self.vms.find(vmid, "")
        if vm is None:
            return
        transfer = vm.sending or vm.receiving
        if transfer is not None and transfer.carried:
            self.migrations.on_client_gone(vm)
            return
        if vm.sending is not None:
            self.core.peers.send(Proc.VMM, CancelTransfer(vmid=vm.vmid))
        if vm.receiving is not None and not vm.receiving.complete:
            self.give_up(vm, errno.ECANCELED, "receiving was interrupted")


def require_same(ours: VmConfig, theirs: VmConfig) -> None:
    """Raise OperatorError if the machine in a snapshot does not fit this VM.  The snapshot is not trusted."""
    for what, now, then in (
        ("virtual CPUs", ours.vcpus, theirs.vcpus),
        ("bytes of memory", ours.memory_bytes, theirs.memory_bytes),
        ("disks", len(ours.disks), len(theirs.disks)),
        ("network interfaces", len(ours.nics), len(theirs.nics)),
        ("seeds", int(ours.seed is not None), int(theirs.seed is not None)),
        ("CD drives", int(bool(ours.cdrom or ours.drive)), int(bool(theirs.cdrom or theirs.drive))),
    ):
        if now != then:
            text = f"the snapshot is of a machine with {then} {what}, and this one has {now}"
            raise OperatorError(errno.EINVAL, text)
