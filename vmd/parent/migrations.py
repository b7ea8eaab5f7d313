"""Migration of VMs from one host to another, step by step (`vmctl migrate`, arch. 15).

The two daemons do not talk to each other.  A client connects to both; it requests each step, and passes on the answers:

    source: MigrateRequest      target: MigrateInRequest
    the header is written       the header is checked: this host can run the VM
    GO_ON                       GO_ON
    the memory and the rest of the machine are written; the guest is paused, and its disks are settled
                                everything is read
    COMMIT
    the disks are released
                                COMMIT
                                the disks are opened, and the guest runs
    DONE
    the VM ends

The VM never runs on both hosts.  Before COMMIT the target does not run it, and gives up if its client disconnects.  The
source keeps its guest paused until the client says DONE (the VM runs on the target) or BACK (it never ran there).  If
the client is lost, or does not know either, after the source has released the disks, then the VM is in doubt.  A VM in
doubt continues on the source in two cases: by `vmctl unpause -f`; or by itself, if the target has seen the source's
locks.  In both cases all its disks must be free, and unchanged since they were released.
"""

import errno
import time

from vmd.errors import VMD_IN_DOUBT, OperatorError
from vmd.ipc.messages.clients import (
    Failed,
    MigrateInRequest,
    MigrateRequest,
    MigrationAt,
    MigrationStep,
    Step,
    VmPaused,
    VmSent,
)
from vmd.ipc.messages.shared import brief
from vmd.ipc.messages.vm import (
    CancelTransfer,
    DisksLetGo,
    EndSend,
    HeaderSent,
    LetDisksGo,
    ReceiveMemory,
    SendOn,
    SendUndone,
    TakenBack,
)
from vmd.ipc.routes import Proc
from vmd.log import log
from vmd.parent.clients import For
from vmd.parent.vm import SEE, At, Receiving, Sending, State, Vm

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from vmd.ipc.imsg import Envelope
    from vmd.ipc.messages.clients import Caller
    from vmd.ipc.messages.shared import Live
    from vmd.ipc.messages.vm import SendDone
    from vmd.parent.core import Core
    from vmd.parent.opening import Opened

    class Transfers(Protocol):
        """The part of the room of transfers that is used here."""

        def begin_send(
            self, vm: Vm, client: int, *, keep: bool = False, carried: bool = False, live: Live | None = None
        ) -> None:
            """Let a VM write itself to a client's stream."""

        def begin_receive(self, name: str, receiving: Receiving, caller: Caller, client: int) -> Vm:
            """Start a process that reads a client's stream."""

        def begin_resume(self, vm: Vm, receiving: Receiving) -> None:
            """Run a machine that was read completely."""

        def give_up(self, vm: Vm, code: int, text: str) -> None:
            """End a VM that cannot be received."""

# Between two attempts to take back the disks of a VM in doubt.  The time doubles up to the maximum.
RETRY_S, RETRY_MAX_S = 5.0, 60.0
GONE = "the client that migrated it has left"


class Migrations:
    """The room of VMs that migrate from one host to another."""

    def __init__(self, core: "Core", transfers: "Transfers") -> None:
        self.core = core
        self.vms = core.vms
        self.clients = core.clients
        self.transfers = transfers

    # --- requests ----------------------------------------------------------------------------------------

    def serve_migrate(self, message: MigrateRequest, _caller: "Caller", envelope: "Envelope") -> None:
        """Begin to migrate a VM: it writes its header."""
        vm = self.vms.get(message.vmid, message.name)
        self.transfers.begin_send(vm, envelope.peerid, carried=True, live=message.live)
        self.clients.wait(envelope.peerid, For.CARRYING, vm.vmid)
        log.info(f"{vm.name}: migrating vm {vm.vmid}")

    def serve_migrate_in(self, message: MigrateInRequest, caller: "Caller", envelope: "Envelope") -> None:
        """Begin to receive a VM that migrates: start a process that reads the client's stream."""
        receiving = Receiving(paused=False, carried=True, trusted=message.force)
        vm = self.transfers.begin_receive(message.name, receiving, caller, envelope.peerid)
        self.clients.wait(envelope.peerid, For.CARRYING, vm.vmid)

    def serve_step(self, message: MigrationStep, _caller: "Caller", envelope: "Envelope") -> None:
        """Take the step that the client requests, if it is the next one."""
        vm = self.vms.get(message.vmid, message.name)
        if not self.clients.waits(envelope.peerid, For.CARRYING, vm.vmid):
            raise OperatorError(errno.EINVAL, f"vm {vm.name} is not being migrated by this client")
        if vm.state is State.SENDING and vm.sending is not None:
            step = self._source_step(vm, vm.sending, message)
        elif vm.state is State.RECEIVING and vm.receiving is not None:
            step = self._target_step(vm, vm.receiving, message)
        else:
            raise OperatorError(errno.EBUSY, f"vm {vm.name} is {vm.state.value}")
        if not step:
            what = message.step.name.lower().replace("_", " ")
            raise OperatorError(errno.EINVAL, f"vm {vm.name}: `{what}` is not the next step")
        self.clients.wait(envelope.peerid, For.TRANSFER, vm.vmid)
        step()

    def on_client_gone(self, vm: Vm) -> None:
        """The client that migrates a VM has disconnected."""
        if vm.sending is not None and vm.state is State.SENDING:
            self._go_back(vm, vm.sending, GONE, in_doubt=True)
        elif vm.receiving is not None and vm.receiving.at.value < At.COMMITTING.value:
            self.transfers.give_up(vm, errno.ECANCELED, "migrating was interrupted")

    def abandon(self, vm: Vm, at: At) -> None:
        """An earlier parent has ended during a migration, at this step.  The client has lost its connection with it."""
        assert vm.sending is not None
        vm.sending.at, vm.sending.abandoned = at, GONE
        self._go_back(vm, vm.sending, GONE, in_doubt=True)

    def _answer(self, vm: Vm, message: "MigrationAt | VmSent | Failed") -> None:
        self.clients.answer_all(For.TRANSFER, vm.vmid, message)

    # --- the source --------------------------------------------------------------------------------------

    def _source_step(self, vm: Vm, sending: Sending, message: MigrationStep) -> "Callable[[], None] | None":
        """Return a function that takes the step; None if it is not the next one."""
        match message.step, sending.at:
            case Step.GO_ON, At.ASKED:
                sending.locks_travel = message.locks_travel
                return lambda: self._tell(vm, At.MEMORY, SendOn(vmid=vm.vmid))
            case Step.COMMIT, At.COMPLETE:
                return lambda: self._tell(vm, At.COMMITTING, LetDisksGo(vmid=vm.vmid))
            case Step.DONE, At.COMMITTED:
                return lambda: self._done(vm, sending)
            case Step.BACK, at if at is not At.UNDOING:
                return lambda: self._go_back(vm, sending, brief(message.text), in_doubt=message.in_doubt)
        return None

    def _tell(self, vm: Vm, at: At, message: "SendOn | LetDisksGo | EndSend") -> None:
        """Let a VM's process take a step."""
        assert vm.sending is not None
        vm.sending.at = at
        vm.changed()
        self.core.peers.send(Proc.VMM, message)

    def on_header_sent(self, message: HeaderSent, _envelope: "Envelope") -> None:
        """The header is written: the client may give it to the target."""
        vm = self.vms.living(message.vmid)
        if vm.sending is not None and vm.sending.at is At.BEGINNING:
            vm.sending.at = At.ASKED
            self._answer(vm, MigrationAt(vmid=vm.vmid, name=vm.name))

    def on_written(self, vm: Vm, sending: Sending, message: "SendDone") -> None:
        """Everything is written.  The guest is paused and still has its disks."""
        sending.at = At.COMPLETE
        sending.sent_bytes, sending.stopped_ns = message.sent_bytes, message.stopped_ns
        sending.rounds = message.rounds
        if sending.abandoned:
            self._go_back(vm, sending, sending.abandoned)
        else:
            self._answer(vm, MigrationAt(vmid=vm.vmid, name=vm.name))

    def on_disks_let_go(self, message: DisksLetGo, _envelope: "Envelope") -> None:
        """The disks are released.  From here on only the client knows whether the target uses them."""
        vm = self.vms.living(message.vmid)
        sending = vm.sending
        if sending is None or sending.at is not At.COMMITTING:
            return
        if message.text or sending.abandoned:
            sending.at = At.COMPLETE
            self._go_back(vm, sending, brief(message.text) or sending.abandoned)
            return
        sending.at = At.COMMITTED
        paused = sending.state is State.PAUSED
        self._answer(vm, MigrationAt(vmid=vm.vmid, name=vm.name, paused=paused))

    def _done(self, vm: Vm, sending: Sending) -> None:
        """The VM runs on the target: end it here."""
        stood_ns = time.monotonic_ns() - sending.stopped_ns if sending.stopped_ns else 0
        log.info(f"{vm.name}: migrated vm {vm.vmid}, {sending.sent_bytes} bytes, downtime {stood_ns // 10**6} ms")
        sent = VmSent(
            vmid=vm.vmid,
            name=vm.name,
            sent_bytes=sending.sent_bytes,
            rounds=sending.rounds,
            downtime_ms=stood_ns // 10**6,
        )
        vm.leave(sent)
        self.core.peers.send(Proc.VMM, EndSend(vmid=vm.vmid, sent=True))

    def _go_back(self, vm: Vm, sending: Sending, why: str, *, in_doubt: bool = False) -> None:
        """Cancel a migration, as its step allows.

        `in_doubt`: the client does not know whether the VM runs on the target.  It matters once the disks are released.
        """
        match sending.at:
            case At.BEGINNING | At.ASKED | At.MEMORY:
                sending.abandoned = why
                self.core.peers.send(Proc.VMM, CancelTransfer(vmid=vm.vmid))
            case At.COMMITTING:
                sending.abandoned = why
            case At.COMMITTED if in_doubt:
                self._doubt(vm, sending, why)
            case At.COMPLETE | At.COMMITTED:
                sending.abandoned = why
                self._tell(vm, At.UNDOING, EndSend(vmid=vm.vmid, sent=False))

    def _doubt(self, vm: Vm, sending: Sending, why: str) -> None:
        """Keep a VM paused until it is known whether it runs on the target."""
        why = f"it may run elsewhere: {why}"
        vm.doubt(why)
        then = "it continues when its disks are free" if sending.locks_travel else f"{SEE} continues it here"
        log.error(f"vm {vm.name}: in doubt, and paused: {why}; {then}")
        text = f"vm {vm.name} is in doubt, and paused: {why}; {then}"
        self._answer(vm, Failed(code=VMD_IN_DOUBT, text=brief(text)))
        if sending.locks_travel:
            self._try_later(vm, sending)

    def _try_later(self, vm: Vm, sending: Sending) -> None:
        """Set the timer for the next attempt to take back the disks of a VM in doubt."""
        if sending.retry is not None:
            sending.retry.cancel()
        delay_s = min(RETRY_S * 2 ** min(sending.tries, 10), RETRY_MAX_S)
        sending.tries += 1
        sending.retry = self.core.loop.call_later(delay_s, lambda: self._take_back(vm, sending))

    def _take_back(self, vm: Vm, sending: Sending) -> None:
        """Try to take back the disks of a VM in doubt."""
        if vm.sending is sending and vm.state is State.IN_DOUBT and sending.at is At.COMMITTED:
            self._tell(vm, At.UNDOING, EndSend(vmid=vm.vmid, sent=False))

    def unpause(self, vm: Vm, client: int, *, force: bool) -> None:
        """Continue a VM in doubt here, if its disks can be taken back.  Raises OperatorError."""
        sending = vm.sending
        assert sending is not None
        if not force and not sending.locks_travel:
            raise OperatorError(errno.EBUSY, f"vm {vm.name} is in doubt: {vm.text}; if it does not run there: {SEE}")
        self.clients.wait(client, For.PAUSE, vm.vmid)
        self._take_back(vm, sending)

    def on_undone(self, message: SendUndone, _envelope: "Envelope") -> None:
        """The VM continues here; or its disks could not be taken back."""
        vm = self.vms.living(message.vmid)
        sending = vm.sending
        if sending is None or sending.at is not At.UNDOING:
            return
        why = brief(message.text)
        if message.outcome is TakenBack.DONE:
            self._is_back(vm, sending)
            return
        sending.at = At.COMMITTED
        if vm.state is not State.IN_DOUBT:
            self._doubt(vm, sending, f"{sending.abandoned}; {why}")
        elif why != sending.refused:  # each reason is logged once
            log.warn(f"vm {vm.name}: stays in doubt: {why}")
        sending.refused = why
        self.clients.fail_all(For.PAUSE, vm.vmid, errno.EBUSY, f"vm {vm.name} stays in doubt: {why}")
        if message.outcome is TakenBack.CHANGED:
            vm.doubt(f"it has run elsewhere: {why}")
        elif sending.locks_travel and vm.state is State.IN_DOUBT:
            self._try_later(vm, sending)

    def _is_back(self, vm: Vm, sending: Sending) -> None:
        doubted = vm.state is State.IN_DOUBT
        vm.stay()
        text = f"vm {vm.name} was not migrated, and continues here: {sending.abandoned}"
        if doubted:
            log.warn(f"vm {vm.name}: continues here: it has its disks again, and they are unchanged")
        else:
            log.error(f"vm {vm.name}: not migrated: {sending.abandoned}")
        self.clients.take(For.CARRYING, vm.vmid)
        self._answer(vm, Failed(code=errno.EIO, text=brief(text)))
        paused = VmPaused(vmid=vm.vmid, name=vm.name, paused=vm.state is State.PAUSED)
        self.clients.answer_all(For.PAUSE, vm.vmid, paused)

    # --- the target --------------------------------------------------------------------------------------

    def _target_step(self, vm: Vm, receiving: Receiving, message: MigrationStep) -> "Callable[[], None] | None":
        """Return a function that takes the step; None if it is not the next one."""
        match message.step, receiving.at:
            case Step.GO_ON, At.ASKED:
                return lambda: self._read(vm, receiving)
            case Step.COMMIT, At.COMPLETE:
                receiving.paused = message.paused
                return lambda: self._commit(vm, receiving)
            case Step.BACK, at if at.value < At.COMMITTING.value:
                return lambda: self.transfers.give_up(vm, errno.ECANCELED, brief(message.text))
        return None

    def on_judged(self, vm: Vm, receiving: Receiving, opened: "Opened") -> None:
        """The header is accepted.  Check the addresses and the disks, which are still the sender's.

        The addresses must be free here.  The disks must be in use, as `opened` says, but not by a VM of this host.
        Raises OperatorError.
        """
        config = vm.running_config
        assert config is not None
        others = [other for other in self.vms if other is not vm and other.alive and other.sending is None]
        for other in others:
            for each in opened.in_use:
                if each.file.key in other.files.values():
                    raise OperatorError(errno.EBUSY, f"{each.what}: is in use by vm {other.name}")
            taken = {nic.lladdr for nic in (other.running_config or other.config).nics}
            for index, nic in enumerate(config.nics):
                if nic.lladdr in taken:
                    what = f"interface {index} has the Ethernet address {nic.lladdr.hex(':')}"
                    raise OperatorError(errno.EADDRINUSE, f"{what}, which vm {other.name} has here")
        if opened.unused and not receiving.trusted:
            what = f"disk {opened.unused[0]}: it is not in use, so it is not the sender's"
            raise OperatorError(errno.EINVAL, f"{what}; if it is, on storage that does not carry locks, use -f")
        receiving.at = At.ASKED
        travel = 0 < len(opened.in_use) == len(config.disks)
        self._answer(vm, MigrationAt(vmid=vm.vmid, name=vm.name, locks_travel=travel))

    def _read(self, vm: Vm, receiving: Receiving) -> None:
        receiving.at = At.MEMORY
        self.core.peers.send(Proc.VMM, ReceiveMemory(vmid=vm.vmid))

    def on_complete(self, vm: Vm, receiving: Receiving) -> None:
        """Everything is read."""
        receiving.at = At.COMPLETE
        self._answer(vm, MigrationAt(vmid=vm.vmid, name=vm.name))

    def _commit(self, vm: Vm, receiving: Receiving) -> None:
        """Open the disks and run the guest.  From here on a client that disconnects does not stop that."""
        receiving.at = At.COMMITTING
        self.transfers.begin_resume(vm, receiving)
