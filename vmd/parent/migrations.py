"""VMs that go from one host to another while whoever carries them knows of both ends (`vmctl migrate`, arch. 15).

Two daemons never speak with each other.  A client of each takes the steps, and passes on what the other one says:

    here: MigrateRequest        there: MigrateInRequest
    the header is written       it is judged: such a VM can go on there
    GO_ON                       GO_ON
    memory and all the rest is written; the guest stands still, and its disks are settled
                                all was read
    COMMIT
    the disks are let go
                                COMMIT
                                the disks are taken, and the guest runs
    DONE
    the VM ends

Never two.  Before the target's COMMIT nothing runs there, and without its client it gives up.  The source's guest
stands still from then on, until DONE says that it runs there, or BACK that it never did.  If the source's client is
gone, or knows no better, after it was told that the disks are let go, then nobody here can know: the VM is in doubt.
It goes on when all its disks could be taken back and are as they were left, where the target has seen that locks reach
it; or by the word of its operator.  A VM whose disks somebody has, or has written to, never goes on here.
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
from vmd.parent.vmtable import SEE, At, Receiving, Sending, State, Vm

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
        """What of the room of transfers is used here."""

        def begin_send(
            self, vm: Vm, client: int, *, keep: bool = False, carried: bool = False, live: Live | None = None
        ) -> None:
            """Have a VM write to a client's stream."""

        def begin_receive(self, name: str, receiving: Receiving, caller: Caller, client: int) -> Vm:
            """Start a process that reads a client's stream."""

        def begin_resume(self, vm: Vm, receiving: Receiving) -> None:
            """Have a machine go on that was read completely."""

        def give_up(self, vm: Vm, code: int, text: str) -> None:
            """End a VM that cannot be received."""

# Between two attempts to take back the disks of a VM in doubt; twice as long each time.
RETRY_S, RETRY_MAX_S = 5.0, 60.0
GONE = "whoever migrated it has left"


class Migrations:
    """The room of VMs that are carried from one host to another."""

    def __init__(self, core: "Core", transfers: "Transfers") -> None:
        self.core = core
        self.vms = core.vms
        self.clients = core.clients
        self.transfers = transfers

    # --- requests ----------------------------------------------------------------------------------------

    def serve_migrate(self, message: MigrateRequest, _caller: "Caller", envelope: "Envelope") -> None:
        """Have a VM write its header."""
        vm = self.vms.get(message.vmid, message.name)
        self.transfers.begin_send(vm, envelope.peerid, carried=True, live=message.live)
        self.clients.wait(envelope.peerid, For.CARRYING, vm.vmid)
        log.info(f"{vm.name}: migrating vm {vm.vmid}")

    def serve_migrate_in(self, message: MigrateInRequest, caller: "Caller", envelope: "Envelope") -> None:
        """Start a process that reads the client's stream."""
        receiving = Receiving(paused=False, carried=True, trusted=message.force)
        vm = self.transfers.begin_receive(message.name, receiving, caller, envelope.peerid)
        self.clients.wait(envelope.peerid, For.CARRYING, vm.vmid)

    def serve_step(self, message: MigrationStep, _caller: "Caller", envelope: "Envelope") -> None:
        """Take the next step."""
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
            raise OperatorError(errno.EINVAL, f"vm {vm.name}: `{what}` is not what comes next")
        self.clients.wait(envelope.peerid, For.TRANSFER, vm.vmid)
        step()

    def on_client_gone(self, vm: Vm) -> None:
        """Whoever carries a VM has left."""
        if vm.sending is not None and vm.state is State.SENDING:
            self._go_back(vm, vm.sending, GONE, in_doubt=True)
        elif vm.receiving is not None and vm.receiving.at.value < At.COMMITTING.value:
            self.transfers.give_up(vm, errno.ECANCELED, "migrating was interrupted")

    def abandon(self, vm: Vm, at: At) -> None:
        """The daemon that was at this step with a VM has ended, and whoever carries the VM has lost it with that."""
        assert vm.sending is not None
        vm.sending.at, vm.sending.abandoned = at, GONE
        self._go_back(vm, vm.sending, GONE, in_doubt=True)

    def _answer(self, vm: Vm, message: "MigrationAt | VmSent | Failed") -> None:
        self.clients.answer_all(For.TRANSFER, vm.vmid, message)

    # --- the source --------------------------------------------------------------------------------------

    def _source_step(self, vm: Vm, sending: Sending, message: MigrationStep) -> "Callable[[], None] | None":
        """Return what a step does; None if it is not to be taken now."""
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
        """Have a VM's process take a step."""
        assert vm.sending is not None
        vm.sending.at = at
        vm.changed()
        self.core.peers.send(Proc.VMM, message)

    def on_header_sent(self, message: HeaderSent, _envelope: "Envelope") -> None:
        """The receiver can judge it."""
        vm = self.vms.living(message.vmid)
        if vm.sending is not None and vm.sending.at is At.BEGINNING:
            vm.sending.at = At.ASKED
            self._answer(vm, MigrationAt(vmid=vm.vmid, name=vm.name))

    def on_written(self, vm: Vm, sending: Sending, message: "SendDone") -> None:
        """All is written; the guest stands still and has its disks."""
        sending.at = At.COMPLETE
        sending.sent_bytes, sending.stopped_ns = message.sent_bytes, message.stopped_ns
        sending.rounds = message.rounds
        if sending.abandoned:
            self._go_back(vm, sending, sending.abandoned)
        else:
            self._answer(vm, MigrationAt(vmid=vm.vmid, name=vm.name))

    def on_disks_let_go(self, message: DisksLetGo, _envelope: "Envelope") -> None:
        """The receiver may have the disks: from here on nobody but the client knows whether it does."""
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
        """It runs elsewhere: it is gone here."""
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
        """It does not go elsewhere; or, once the disks were let go, nobody knows whether it has."""
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
        """Have a VM stand still until somebody knows."""
        why = f"it may run elsewhere: {why}"
        vm.doubt(why)
        then = "it goes on when its disks are free" if sending.locks_travel else f"{SEE} has it go on here"
        log.error(f"vm {vm.name}: in doubt, and stands still: {why}; {then}")
        text = f"vm {vm.name} is in doubt, and stands still: {why}; {then}"
        self._answer(vm, Failed(code=VMD_IN_DOUBT, text=brief(text)))
        if sending.locks_travel:
            self._try_later(vm, sending)

    def _try_later(self, vm: Vm, sending: Sending) -> None:
        """Try again, after some time, to have the disks of a VM in doubt."""
        if sending.retry is not None:
            sending.retry.cancel()
        delay_s = min(RETRY_S * 2 ** min(sending.tries, 10), RETRY_MAX_S)
        sending.tries += 1
        sending.retry = self.core.loop.call_later(delay_s, lambda: self._take_back(vm, sending))

    def _take_back(self, vm: Vm, sending: Sending) -> None:
        """Try to have the disks of a VM in doubt."""
        if vm.sending is sending and vm.state is State.IN_DOUBT and sending.at is At.COMMITTED:
            self._tell(vm, At.UNDOING, EndSend(vmid=vm.vmid, sent=False))

    def unpause(self, vm: Vm, client: int, *, force: bool) -> None:
        """Have a VM in doubt go on here, if its disks can be had.  Raises OperatorError."""
        sending = vm.sending
        assert sending is not None
        if not force and not sending.locks_travel:
            raise OperatorError(errno.EBUSY, f"vm {vm.name} is in doubt: {vm.text}; if it does not run there: {SEE}")
        self.clients.wait(client, For.PAUSE, vm.vmid)
        self._take_back(vm, sending)

    def on_undone(self, message: SendUndone, _envelope: "Envelope") -> None:
        """It goes on here; or its disks could not be had."""
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
        elif why != sending.refused:  # else it has been said
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
        text = f"vm {vm.name} was not migrated, and goes on here: {sending.abandoned}"
        if doubted:
            log.warn(f"vm {vm.name}: goes on here: it has its disks again, as they were let go")
        else:
            log.error(f"vm {vm.name}: not migrated: {sending.abandoned}")
        self.clients.take(For.CARRYING, vm.vmid)
        self._answer(vm, Failed(code=errno.EIO, text=brief(text)))
        paused = VmPaused(vmid=vm.vmid, name=vm.name, paused=vm.state is State.PAUSED)
        self.clients.answer_all(For.PAUSE, vm.vmid, paused)

    # --- the target --------------------------------------------------------------------------------------

    def _target_step(self, vm: Vm, receiving: Receiving, message: MigrationStep) -> "Callable[[], None] | None":
        """Return what a step does; None if it is not to be taken now."""
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
        """Such a VM can go on here, but for its disks, which the sender is to have.  Raises OperatorError."""
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
            what = f"disk {opened.unused[0]}: nobody has it in use here, so it is not the sender's"
            raise OperatorError(errno.EINVAL, f"{what}; if it is, on storage that does not carry locks, say -f")
        receiving.at = At.ASKED
        travel = 0 < len(opened.in_use) == len(config.disks)
        self._answer(vm, MigrationAt(vmid=vm.vmid, name=vm.name, locks_travel=travel))

    def _read(self, vm: Vm, receiving: Receiving) -> None:
        receiving.at = At.MEMORY
        self.core.peers.send(Proc.VMM, ReceiveMemory(vmid=vm.vmid))

    def on_complete(self, vm: Vm, receiving: Receiving) -> None:
        """All was read."""
        receiving.at = At.COMPLETE
        self._answer(vm, MigrationAt(vmid=vm.vmid, name=vm.name))

    def _commit(self, vm: Vm, receiving: Receiving) -> None:
        """Take the disks, and have the guest go on; whoever leaves now does not change that."""
        receiving.at = At.COMMITTING
        self.transfers.begin_resume(vm, receiving)
