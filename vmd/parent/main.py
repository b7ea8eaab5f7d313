"""parent ("vmd"): the root process; knows every VM, and decides who may do what.

Runs as  root; opens no file that a user has named
Peers    control (requests of vmctl), vmm (VM processes), priv (network), log (log lines of all processes), openers
         (files of VMs), and others; the parent starts all of them
Holds    the configuration, the VM table, the file of identities, consoles; copies of boot files that clients have
         opened; the files of guests' memory, which it neither maps nor reads, to see how much memory is in use
Parses   vm.conf, its own file of identities, and checked messages; no data that a guest or an image has written

This module creates the rooms and brings each message to its room.  The way of a `vmctl start`:

    vmd/control/main.py       passes on the StartRequest of vmctl, with the number of the connection
    main.py                   `on_request` finds the caller; each error from here on is the client's answer
    life.py                   `serve_start` finds the VM and checks the caller's rights; `start` has its files opened
    opening.py                gives the job to an opener
    vmd/opener/main.py        opens and locks the files; its answer leads to `_opened` in life.py
    network.py                `launch` asks priv for the interfaces; `on_made` sends StartVm to vmm
    vmd/vmm/main.py           `on_start_vm` starts the VM's process
    vmd/vm/main.py            fetches its files, builds the machine and runs it; `on_running` in life.py answers
"""

import errno
import socket
from collections.abc import Callable, Mapping

from vmd import signals as signal
from vmd.config.check import ConfigErrors
from vmd.config.model import NAME_MAX, Config
from vmd.errors import HostError, OperatorError, PeerError, VmdError, number, sentence
from vmd.ipc.channel import Channel
from vmd.ipc.fence import OUR_FAULT
from vmd.ipc.imsg import Envelope
from vmd.ipc.messages.agentx import AgentxLost, AgentxUp, AskAgentxVms
from vmd.ipc.messages.children import Pong, Quit, Ready
from vmd.ipc.messages.clients import (
    REQUESTS,
    Caller,
    ConsoleBreak,
    ConsoleLogRequest,
    ConsoleRequest,
    ConsoleWatch,
    DiscRequest,
    EventsRequest,
    Failed,
    FiguresRequest,
    GenerationsRequest,
    ListRequest,
    LoadRequest,
    LogRequest,
    MigrateInRequest,
    MigrateRequest,
    MigrationStep,
    NicsRequest,
    PauseRequest,
    ReceiveRequest,
    ReloadRequest,
    Request,
    ResetRequest,
    ResizeRequest,
    SendRequest,
    SnapshotRequest,
    StartRequest,
    StopRequest,
    SwitchesRequest,
    UpgradeRequest,
    VmRequest,
    WaitRequest,
)
from vmd.ipc.messages.consolelog import ConsoleKept
from vmd.ipc.messages.control import ClientGone
from vmd.ipc.messages.imgwriter import SnapshotsChanged, SnapshotsFailed, SnapshotsReady, SnapshotWord
from vmd.ipc.messages.metrics import AskFigures
from vmd.ipc.messages.opener import FilesOpened, NotOpened, OpenerAt
from vmd.ipc.messages.priv import (
    DropsReported,
    ForwardsSet,
    FramesDropped,
    NetworkConfigured,
    NetworkTrouble,
    NicsFailed,
    NicsMade,
    NicsRemoved,
)
from vmd.ipc.messages.shared import SnapshotInfo, TransferProgress
from vmd.ipc.messages.vm import (
    AskResolvers,
    ConsoleSnapshotEnd,
    DeviceEvent,
    DevicesReported,
    DiscChanged,
    DiskResized,
    DisksBack,
    DisksLent,
    DisksLetGo,
    HeaderSent,
    PauseDone,
    ReceivedHeader,
    ReceivedMachine,
    SendDone,
    SendUndone,
    VmFailed,
    VmHalted,
    VmRunning,
)
from vmd.ipc.messages.vmm import VmExited, VmHeld, VmLog, VmsHeld, VmSlotOver
from vmd.ipc.process import Process, handles, handles_each
from vmd.ipc.routes import Proc
from vmd.log import log
from vmd.parent.access import require_allowed
from vmd.parent.adoption import Adoption
from vmd.parent.agentx import Agentx
from vmd.parent.askpriv import ANSWER_S, remove_all
from vmd.parent.changes import Changes
from vmd.parent.children import Children, Delay
from vmd.parent.clients import For
from vmd.parent.configuration import Configuration
from vmd.parent.connections import Connections
from vmd.parent.consolelogs import ConsoleLogs
from vmd.parent.consoles import Consoles
from vmd.parent.core import Core
from vmd.parent.events import Events
from vmd.parent.figures import Figures
from vmd.parent.generations import Generations
from vmd.parent.identity import StateFile
from vmd.parent.lasting import Lasting
from vmd.parent.life import Life
from vmd.parent.logs import Logs
from vmd.parent.metrics import Metrics
from vmd.parent.migrations import Migrations
from vmd.parent.network import Network
from vmd.parent.opening import Openings
from vmd.parent.options import Options
from vmd.parent.report import brief_errors, log_errors
from vmd.parent.snapshots import Snapshots
from vmd.parent.status import Status
from vmd.parent.store import Store
from vmd.parent.throttles import Throttles
from vmd.parent.transfers import Transfers
from vmd.parent.truth import Truth
from vmd.parent.upgrade import Upgrade
from vmd.parent.vmms import Vmms
from vmd.record import Record, RecordType
from vmd.version import VERSION

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, TypeVar

    from vmd.ipc.fence import Source
    from vmd.ipc.process import Handlers
    from vmd.parent.clients import Wait
    from vmd.parent.configuration import Load

    R = TypeVar("R")
    M = TypeVar("M", bound=Record)


def on(
    room: "type[R]", handler: "Callable[[R, M, Envelope], None]"
) -> "Callable[[Parent, M, Envelope, Channel], None]":
    """Return a handler that passes a message on to a room of the parent."""

    def handle(parent: "Parent", message: "M", envelope: Envelope, _channel: Channel) -> None:
        handler(parent.rooms[room], message, envelope)

    return handle


def heard(
    room: "type[R]", handler: "Callable[[R, M, Channel], None]"
) -> "Callable[[Parent, M, Envelope, Channel], None]":
    """Return a handler that passes a message on to a room of the parent, together with its channel."""

    def handle(parent: "Parent", message: "M", _envelope: Envelope, channel: Channel) -> None:
        handler(parent.rooms[room], message, channel)

    return handle


Served = tuple[type, Callable[..., None]]  # a room of the parent and its method; `serves` lets mypy check their types


def serves(
    request: "type[M]", room: "type[R]", method: "Callable[[R, M, Caller, Envelope], None]"
) -> dict[RecordType, Served]:
    """Return a row of SERVES: the room and the method that serve this request of clients."""
    return {request: (room, method)}


class Parent(Process):
    """The rooms, the processes, and the dispatch of messages."""

    def __init__(
        self,
        options: Options,
        config: Config,
        load: "Load",
        state: StateFile | None = None,
        store: Store | None = None,
        truth: Truth | None = None,
    ) -> None:
        """`state` is the file of identities, if there is one; owns it.

        `store` keeps what outlives this parent.  `truth` is the state of the earlier parent, if there was one.
        """
        super().__init__(Proc.PARENT)
        self.core = core = Core(self.loop, config, verbosity=truth.verbosity if truth else options.verbosity)
        self.truth = truth
        self.lasting = Lasting(core, store or Store(), state)
        known = []
        if truth is not None:
            core.adopts = True
            known = self.lasting.take(truth)
        self.consoles = Consoles(core)
        self.console_logs = ConsoleLogs(core, self.attach)
        self.consoles.on_change = self.console_logs.look
        self.network = Network(core, self.consoles.repeat_snapshots)
        core.events.address = self.network.guest_address
        self.status = status = Status(core, self.network, self.console_logs)
        self.network.priv.on_silent = self.on_priv_silent
        self.generations = Generations()
        core.peers.channels[Proc.VMM] = self.generations
        self.delays = {Proc.PRIV: Delay()}
        self.openings = Openings(core, self.attach)
        self.life = Life(core, self.consoles, self.openings, self.network, status)
        self.transfers = Transfers(core, self.life, self.openings, self.network)
        self.snapshots = Snapshots(core, self.openings, self.attach)
        self.snapshots.life, self.snapshots.transfers = self.life, self.transfers
        self.life.on_gone, self.life.on_received = self.snapshots.on_gone, self.snapshots.on_received
        self.configuration = Configuration(core, self.life, self.network, load, options.socket_path)
        self.logs = Logs(core, self.attach)
        self.connections = Connections(self.loop, self.attach, self.forget_client, self.on_child_lost)
        core.peers.channels[Proc.CONTROL] = self.connections
        self.changes = Changes(core, self.openings)
        migrations = self.transfers.migrations
        self.life.on_settled = self.generations.settle
        self.adoption = Adoption(core, self.generations, self.life, self.transfers, self.network, self.logs)
        self.adoption.known = {each.vmid: each for each in known}
        self.lasting.untold = lambda: self.adoption.known
        self.adoption.on_process = lambda _generation, child: self.children.adopt(child)
        self.adoption.on_settled = self.on_settled
        self.adoption.on_taken = self.console_logs.look
        self.vmms = Vmms(
            core, self.generations, self.lasting.store, self.adoption, self.life, self.network, self.logs, self.attach
        )
        self.vmms.on_failure, self.vmms.on_silent = self.fail, self.stop_waiting
        self.upgrade = Upgrade(core, self.generations, self.lasting, self.life)
        figures = Figures(core, self.network)
        self.throttles = Throttles(core)
        self.life.bounds.on_limits = self.throttles.begin
        self.agentx = Agentx(core, figures, self.attach)
        self.metrics = Metrics(core, figures, self.attach)
        self.configuration.on_effect = self.on_effect
        rooms = (
            core.events, self.agentx, figures, self.logs, self.consoles, self.network, status, self.life,
            self.transfers, self.snapshots, self.changes, self.configuration, self.openings, self.vmms,
            self.console_logs, self.metrics,
        )  # fmt: skip
        self.rooms: dict[type, Any] = {type(room): room for room in (*rooms, migrations, self.upgrade)}
        self.warned: set[str] = set()
        self.listener: socket.socket | None = None  # the control socket, until clients are served
        self.on_ready: Callable[[], None] = lambda: None
        self.handed_over = False

    # --- start-up and end --------------------------------------------------------------------------------

    def start(self, children: Children, listener: socket.socket, kvm_fd: int) -> None:
        """Start priv, a vmm, root's control and the other processes, with the descriptors that only root can open.

        Every vmm of an earlier daemon is adopted.  A new vmm is started if none of them has this version.
        """
        self.logs.start(children.cell)
        self.core.slots.ids = children.ids
        self.children = children
        children.begin(self.loop)
        self.lasting.keep(self.generations, self.network)
        self.start_process(Proc.PRIV)
        self.vmms.start(children, kvm_fd, self.truth)
        self.connections.start(children, self.logs.open)
        self.openings.start(children, self.logs.open)
        self.snapshots.start(children, self.logs.open)
        self.agentx.start(children, self.logs.open)
        self.console_logs.start(children, self.logs.open)
        self.metrics.start(children, self.logs.open)
        self.listener = listener
        self.lasting.keep_listener(listener)
        for signum in (signal.SIGTERM, signal.SIGINT):
            self.loop.on_signal(signum, self.life.stop_all)
        self.loop.on_signal(signal.SIGHUP, self.configuration.on_hangup)
        self.loop.on_signal(signal.SIGUSR2, self.hand_over)
        for signum in (signal.SIGPIPE, signal.SIGUSR1):
            self.loop.on_signal(signum, lambda: None)

    def start_process(self, proc: Proc) -> None:
        """Start priv.  Raises HostError or VmdError."""
        _, ours = self.children.start(proc, self.logs.open)
        self.core.peers.channels[proc] = self.attach(ours, proc, proc.name.lower(), on_lost=self.on_child_lost)

    def start_again(self, proc: Proc) -> None:
        """Start a process again that has ended: at once, or after a delay if it has ended before."""
        delay_s = self.delays[proc].next_s()

        def start() -> None:
            try:
                self.start_process(proc)
            except (VmdError, OSError) as error:
                log.error(f"{proc.name.lower()} cannot be started again: {sentence(error)}")
                self.start_again(proc)

        self.loop.call_later(delay_s, start)

    def on_process_ready(self, message: Ready, _envelope: Envelope, channel: Channel) -> None:
        """A child is confined.  When all are, or when a new priv is, priv is told about the network."""
        for warning in set(message.warnings) - self.warned:
            self.warned.add(warning)  # each warning is logged once, not for each process
            log.warn(warning)
        if channel.peer is Proc.CONTROL:
            if not self.connections.on_ready(channel) or self.core.serving:
                return
        elif channel.peer in self.core.ready:
            raise PeerError(channel.label, "is ready twice")
        self.core.ready.add(channel.peer)
        if self.all_ready() and (channel.peer is Proc.PRIV or not self.core.serving):
            self.network.begin()

    def all_ready(self) -> bool:
        """Return whether every process is confined, and every vmm of an earlier daemon has reported its VMs."""
        return len(self.core.ready) == len(self.core.peers.channels) and not self.adoption.waiting

    def on_settled(self) -> None:
        """All VMs of an earlier daemon are known, or no longer waited for."""
        if self.core.serving:
            self.adoption.when_serving()  # a vmm has answered after its deadline
        elif self.all_ready():
            self.network.begin()

    def on_network_configured(self, message: NetworkConfigured, envelope: Envelope, _channel: Channel) -> None:
        """Pass on which switches failed.  After priv's first answer the daemon serves clients."""
        self.network.on_configured(message, envelope)
        if self.listener is not None and self.all_ready():
            self.serve(self.listener)

    def serve(self, listener: socket.socket) -> None:
        """Begin to serve clients and to start VMs: every process is prepared for that."""
        self.listener = None
        self.core.serving = True
        self.connections.listen(listener)
        log.info("startup")
        others = self.adoption.adopted
        text = f"adopted {others} VM{'' if others == 1 else 's'} of an earlier vmd" if self.truth else "startup"
        self.core.events.add("daemon", text=text, value=VERSION)
        self.on_ready()
        self.metrics.configure(self.core.config.settings)
        self.adoption.when_serving()
        self.throttles.begin()
        self.life.start_batch()
        if self.truth is None:
            return
        if self.truth.planned:  # not after a crash: the operator may be editing vm.conf
            self.configuration.on_hangup()
        else:
            log.info("the configuration is that of the vmd before this one; vmctl reload reads vm.conf")

    def on_child_lost(self, channel: Channel, error: PeerError | None) -> None:
        """Control or priv has ended, or has broken the protocol.

        Without control the daemon ends (*cat. 9.2*).  If it has adopted VMs, these run on.  Unlike vmd, priv is started
        again, because guests need it only when they start and end.  Before clients are served the daemon ends instead.
        """
        self.core.peers.channels.pop(channel.peer, None)
        self.core.ready.discard(channel.peer)
        self.children.kill(channel.peer)  # it may still live, if it has broken the protocol
        if channel.peer is Proc.PRIV:
            self.network.on_priv_lost(for_good=not self.core.serving)
            self.status.on_priv_lost()
            if self.core.serving:
                log.error(f"{error or 'lost child: priv'}: it is started again")
                self.start_again(Proc.PRIV)
                return
        if not self.core.ending:
            log.crit(str(error) if error else f"lost child: {channel.label}")
            self.fail()
            if self.core.adopts:
                self.abandon()
            else:
                self.life.stop_all()

    def fail(self) -> None:
        """Let the daemon end with the exit status of a failure, whenever it ends."""
        self.exit_status = 1

    def abandon(self) -> None:
        """End, and leave the adopted VMs to the next daemon: an error of this daemon must not end them."""
        log.crit(f"this vmd cannot continue; {sum(vm.alive for vm in self.core.vms)} VMs run on")
        self.handed_over = True
        self.loop.stop()

    def on_priv_silent(self) -> None:
        """priv does not answer: replace it."""
        channel = self.core.peers.channels.get(Proc.PRIV)
        if isinstance(channel, Channel):
            channel.close()
            self.on_child_lost(channel, PeerError("priv", f"does not answer for {ANSWER_S:.0f} s"))

    def hand_over(self) -> None:
        """End, and leave everything to the next daemon, which takes the place of this one."""
        log.info(f"handing over to the next daemon; {sum(vm.alive for vm in self.core.vms)} VMs run on")
        self.handed_over = True
        self.lasting.plan(planned=True)
        self.loop.stop()

    def finish(self) -> None:
        """Tell the children to end.  Those that do not are killed when the parent ends, except vmm."""
        self.core.ending = True
        self.lasting.forget()
        if self.listener is not None:
            self.listener.close()
        self.connections.close()
        self.openings.close()
        self.snapshots.close()
        self.agentx.close()
        self.console_logs.close()
        self.metrics.close()
        for channel in self.core.peers.channels.values():
            channel.send(Quit())
            channel.flush_blocking(1.0)
        self.consoles.close()
        self.network.close()
        self.lasting.close()

    def clean_up(self) -> None:
        """If priv could not remove its interfaces and rules, let another one do it.

        Called when all children have ended.
        """
        if not self.core.serving or (self.network.priv.up and self.children.ended_well(Proc.PRIV)):
            return
        log.warn("priv could not remove its interfaces and rules: another one does")
        try:
            _, ours = self.children.start(Proc.PRIV, self.logs.open)
            with ours:
                remove_all(ours)
        except (VmdError, OSError) as error:
            log.error(f"interfaces and rules are left: {sentence(error)}; the next start removes them")

    # --- messages ----------------------------------------------------------------------------------------

    def dispatch(self, channel: Channel, envelope: Envelope) -> None:
        """Handle a message, unless a vmm has sent it to the earlier parent."""
        if channel.peer is not Proc.VMM or not self.adoption.is_stale(envelope.message, channel):
            super().dispatch(channel, envelope)

    def on_held(self, message: VmHeld, envelope: Envelope, channel: Channel) -> None:
        """A vmm reports a VM that an earlier daemon has started."""
        self.adoption.on_held(message, envelope, channel)

    def on_all_held(self, message: VmsHeld, envelope: Envelope, channel: Channel) -> None:
        """A vmm has listed its VMs."""
        self.adoption.on_all_held(message, envelope, channel)

    def on_request(self, message: Request, envelope: Envelope, channel: Channel) -> None:
        """Bring a request of a client to its room.  Each error is answered with its sentence."""
        client, clients = envelope.peerid, self.core.clients
        caller = self.connections.asker(client, channel)
        try:
            if client in clients.cut_off:
                raise OperatorError(errno.EIO, OUR_FAULT)
            if isinstance(message, VmRequest) and len(message.name) > NAME_MAX:
                raise OperatorError(errno.EINVAL, f"vm name too long: {message.name[:NAME_MAX]}...")
            require_allowed(message, caller)
            if type(message) not in SERVES:
                raise OperatorError(errno.ENOSYS, f"this vmd does not serve {type(message).__name__}")
            room, serve = SERVES[type(message)]
            serve(self.rooms[room], message, caller, envelope)
        except ConfigErrors as errors:
            log_errors(errors)
            clients.answer(client, Failed(code=errno.EINVAL, text=brief_errors(errors)))
        except (OperatorError, HostError, ValueError, OverflowError, OSError) as error:
            # ValueError: a path with a NUL, or an id beyond 32 bits.  Only root can send these.
            if isinstance(error, OSError):  # the host is short of some resource
                log.error(f"{type(message).__name__}: {sentence(error)}")
            clients.fail(client, number(error), sentence(error))

    def on_client_gone(self, _message: ClientGone, envelope: Envelope, channel: Channel) -> None:
        """A client has disconnected."""
        self.connections.on_client_gone(envelope.peerid, channel)

    def on_control_pong(self, _message: Pong, _envelope: Envelope, channel: Channel) -> None:
        """A control has answered a Ping."""
        self.connections.on_pong(channel)

    def on_effect(self) -> None:
        """The configuration has changed."""
        self.agentx.configure()
        self.metrics.configure(self.core.config.settings)

    def forget_client(self, client: int) -> None:
        """A client has disconnected: release its console, and cancel what only this client waits for."""
        self.consoles.on_client_gone(client)
        self.stop_waiting(self.core.clients.gone(client))

    def stop_waiting(self, waits: "list[Wait]") -> None:
        """Clients wait no longer: cancel what only they wanted."""
        for wait in waits:
            if wait.what in (For.TRANSFER, For.CARRYING):
                self.transfers.on_client_gone(wait.vmid)
            elif wait.what is For.IMAGES:
                self.snapshots.on_client_gone(wait.vmid)

    # --- unexpected exceptions in handlers ---------------------------------------------------------------

    def source_of(self, envelope: Envelope, channel: Channel) -> "Source | None":
        """Return the client or VM that a message concerns: a client if it is from control, else a VM, if any."""
        if channel.peer is Proc.CONTROL:
            return Proc.CLIENT, envelope.peerid
        if channel.peer is Proc.OPENER:
            vmid = self.openings.vm_of(channel)
        elif channel.peer is Proc.IMGWRITER:
            vmid = self.snapshots.vm_of(channel)
        else:
            vmid = getattr(envelope.message, "vmid", envelope.peerid if channel.peer is Proc.VMM else 0)
        return (Proc.VM, vmid) if vmid else None

    def give_up(self, envelope: Envelope, channel: Channel) -> None:
        """The handler of a message has failed: answer the client, or those that wait for the VM."""
        source = self.source_of(envelope, channel)
        if channel.peer is Proc.CONTROL:
            self.core.clients.fail(envelope.peerid, errno.EIO, OUR_FAULT)
        elif source is not None:
            self.life.give_up(source[1], envelope.message)

    def cut_off(self, source: "Source") -> None:
        """Too many handlers have failed for a client or a VM: refuse the client's requests, or kill the VM."""
        kind, number = source
        if kind is Proc.CLIENT:
            self.core.clients.cut_off.add(number)
            return
        vm = self.core.vms.find(number, "")
        if vm is not None and vm.alive:
            self.life.kill(vm)

    HANDLERS: "Handlers" = {
        **handles(Proc.CONTROL, Ready, on_process_ready),
        **handles(Proc.VMM, Ready, on_process_ready),
        **handles(Proc.PRIV, Ready, on_process_ready),
        **handles(Proc.VMM, VmRunning, on(Life, Life.on_running)),
        **handles(Proc.VMM, VmFailed, on(Life, Life.on_failed)),
        **handles(Proc.VMM, VmSlotOver, heard(Vmms, Vmms.on_slot_over)),
        **handles(Proc.VMM, VmHeld, on_held),
        **handles(Proc.VMM, VmsHeld, on_all_held),
        **handles(Proc.VMM, VmExited, on(Life, Life.on_exited)),
        **handles(Proc.VMM, PauseDone, on(Transfers, Transfers.on_pause_done)),
        **handles(Proc.VMM, VmHalted, on(Transfers, Transfers.on_vm_halted)),
        **handles(Proc.VMM, SendDone, on(Transfers, Transfers.on_send_done)),
        **handles(Proc.VMM, HeaderSent, on(Migrations, Migrations.on_header_sent)),
        **handles(Proc.VMM, DisksLetGo, on(Migrations, Migrations.on_disks_let_go)),
        **handles(Proc.VMM, SendUndone, on(Migrations, Migrations.on_undone)),
        **handles(Proc.VMM, TransferProgress, on(Transfers, Transfers.on_progress)),
        **handles(Proc.VMM, ReceivedHeader, on(Transfers, Transfers.on_received_header)),
        **handles(Proc.VMM, ReceivedMachine, on(Transfers, Transfers.on_received_machine)),
        **handles(Proc.VMM, DisksLent, on(Snapshots, Snapshots.on_lent)),
        **handles(Proc.VMM, DisksBack, on(Snapshots, Snapshots.on_back)),
        **handles(Proc.VMM, DiskResized, on(Changes, Changes.on_disk_resized)),
        **handles(Proc.VMM, DiscChanged, on(Changes, Changes.on_disc_changed)),
        **handles(Proc.VMM, DeviceEvent, on(Events, Events.on_device)),
        **handles(Proc.VMM, DevicesReported, on(Status, Status.on_reported)),
        **handles(Proc.VMM, AskResolvers, on(Network, Network.on_ask_resolvers)),
        **handles(Proc.VMM, VmLog, on(Logs, Logs.on_vm_log)),
        **handles(Proc.LOG, Pong, on(Logs, Logs.on_pong)),
        **handles(Proc.CONSOLELOG, Pong, on(ConsoleLogs, ConsoleLogs.on_pong)),
        **handles(Proc.CONSOLELOG, ConsoleKept, on(ConsoleLogs, ConsoleLogs.on_kept)),
        **handles(Proc.VMM, ConsoleSnapshotEnd, on(Consoles, Consoles.on_snapshot_end)),
        **handles(Proc.PRIV, NetworkConfigured, on_network_configured),
        **handles(Proc.PRIV, DropsReported, on(Status, Status.on_drops)),
        **handles(Proc.PRIV, FramesDropped, on(Network, Network.on_dropped)),
        **handles(Proc.PRIV, NetworkTrouble, on(Network, Network.on_trouble)),
        **handles(Proc.PRIV, NicsMade, on(Network, Network.on_made)),
        **handles(Proc.PRIV, NicsFailed, on(Network, Network.on_failed)),
        **handles(Proc.PRIV, NicsRemoved, on(Network, Network.on_removed)),
        **handles(Proc.PRIV, ForwardsSet, on(Network, Network.on_forwards_set)),
        **handles(Proc.OPENER, OpenerAt, heard(Openings, Openings.on_at)),
        **handles(Proc.OPENER, FilesOpened, heard(Openings, Openings.on_opened)),
        **handles(Proc.OPENER, NotOpened, heard(Openings, Openings.on_not_opened)),
        **handles_each(
            Proc.IMGWRITER,
            (SnapshotWord, SnapshotInfo, SnapshotsReady, SnapshotsChanged, SnapshotsFailed),
            heard(Snapshots, Snapshots.on_message),
        ),
        **handles(Proc.AGENTX, AgentxUp, on(Agentx, Agentx.on_up)),
        **handles(Proc.AGENTX, AgentxLost, on(Agentx, Agentx.on_gone)),
        **handles(Proc.AGENTX, AskAgentxVms, on(Agentx, Agentx.on_ask)),
        **handles(Proc.CONTROL, ClientGone, on_client_gone),
        **handles(Proc.CONTROL, Pong, on_control_pong),
        **handles(Proc.VMM, Pong, heard(Vmms, Vmms.on_pong)),
        **handles(Proc.METRICS, AskFigures, heard(Metrics, Metrics.on_asked)),
        **handles_each(Proc.CONTROL, REQUESTS, on_request),
    }


SERVES: Mapping[RecordType, Served] = {
    **serves(StartRequest, Life, Life.serve_start),
    **serves(StopRequest, Life, Life.serve_stop),
    **serves(WaitRequest, Life, Life.serve_wait),
    **serves(PauseRequest, Transfers, Transfers.serve_pause),
    **serves(SendRequest, Transfers, Transfers.serve_send),
    **serves(ReceiveRequest, Transfers, Transfers.serve_receive),
    **serves(SnapshotRequest, Snapshots, Snapshots.serve),
    **serves(MigrateRequest, Migrations, Migrations.serve_migrate),
    **serves(MigrateInRequest, Migrations, Migrations.serve_migrate_in),
    **serves(MigrationStep, Migrations, Migrations.serve_step),
    **serves(ResizeRequest, Changes, Changes.serve_resize),
    **serves(DiscRequest, Changes, Changes.serve_disc),
    **serves(ListRequest, Status, Status.serve_list),
    **serves(SwitchesRequest, Status, Status.serve_switches),
    **serves(NicsRequest, Status, Status.serve_nics),
    **serves(EventsRequest, Events, Events.serve),
    **serves(FiguresRequest, Figures, Figures.serve),
    **serves(LoadRequest, Configuration, Configuration.serve_load),
    **serves(ReloadRequest, Configuration, Configuration.serve_reload),
    **serves(ResetRequest, Configuration, Configuration.serve_reset),
    **serves(LogRequest, Configuration, Configuration.serve_log),
    **serves(UpgradeRequest, Upgrade, Upgrade.serve),
    **serves(GenerationsRequest, Upgrade, Upgrade.serve_generations),
    **serves(ConsoleRequest, Consoles, Consoles.serve),
    **serves(ConsoleWatch, Consoles, Consoles.serve_watch),
    **serves(ConsoleBreak, Consoles, Consoles.serve_break),
    **serves(ConsoleLogRequest, ConsoleLogs, ConsoleLogs.serve),
}
