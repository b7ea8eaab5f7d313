"""The process `agentx`, which tells an SNMP agent about the VMs: its start, its socket and its data.

The parent connects to the agent's socket, which vm.conf names, and passes the connection to the process.  If the agent
is missing or leaves, the parent tries again, each time after a longer delay.  The log says when the agent is
connected, and once that it is missing.
"""

import os
import socket
import time

from vmd.errors import PeerError, VmdError, sentence
from vmd.ipc.imsg import Envelope
from vmd.ipc.messages.agentx import (
    AgentxChanged,
    AgentxLink,
    AgentxLost,
    AgentxMaster,
    AgentxUp,
    AgentxVm,
    AgentxVms,
    AskAgentxVms,
)
from vmd.ipc.messages.children import Quit
from vmd.ipc.messages.clients import Caller
from vmd.ipc.messages.shared import brief
from vmd.ipc.routes import Proc
from vmd.log import log
from vmd.parent.children import Delay
from vmd.parent.endings import FAILED
from vmd.parent.figures import BATCH
from vmd.parent.report import PATH_BYTES_MAX
from vmd.parent.vm import State

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmd.config.model import AgentxConfig
    from vmd.ipc.channel import Channel
    from vmd.ipc.loop import Timer
    from vmd.ipc.messages.figures import VmFigures
    from vmd.parent.children import Children
    from vmd.parent.core import Core
    from vmd.parent.figures import Figures
    from vmd.parent.vm import Vm

FIRST_S, LONGEST_S = 0.5, 10.0  # between two tries to reach the agent
ANSWER_EVERY_S = 0.5  # the process is answered no more often than this
QUEUE_MAX = 8192  # messages: one for each VM there can be, and the changes meanwhile
CRASHED, MIGRATING = "crashed", "migrating"  # states for SNMP that are none of `State`


class Agentx:
    """The room of the SNMP agent.  `attach` is the parent's `Process.attach`."""

    def __init__(self, core: "Core", figures: "Figures", attach: "Callable[..., Channel]") -> None:
        self.core = core
        self.figures = figures
        self._attach = attach
        self._config: AgentxConfig | None = None  # in force
        self._children: Children | None = None
        self._open_log: Callable[[str], socket.socket]
        self._channel: Channel | None = None
        self._delay = Delay()  # before the process is started again
        self._wait_s = FIRST_S  # before the next try to reach the agent
        self._try: Timer | None = None
        self._number = 0  # of the latest connection to the agent
        self._told_missing = False
        self._answered_s = 0.0
        self._answer: Timer | None = None
        self._look: Timer | None = None
        self._known: dict[int, tuple[Vm, str]] = {}  # by id: each VM, and the state that the process was told last
        self._began_ns = self._changed_ns = time.monotonic_ns()

    def start(self, children: "Children", open_log: "Callable[[str], socket.socket]") -> None:
        """Start the process if vm.conf asks for it.  `open_log` makes the socket that a process logs to."""
        self._children, self._open_log = children, open_log
        self.core.watchers.append(self._look_soon)
        self._look_now()
        self.configure()

    def close(self) -> None:
        """The daemon ends: end the process."""
        self._config = None
        self._end_process()

    def configure(self) -> None:
        """Start or end the process as the configuration in force asks for."""
        config = self.core.config.settings.agentx
        if config == self._config or self._children is None:
            return
        self._config, self._told_missing = config, False
        self._end_process()  # else it would keep the old agent for as long as the new path has none
        self._start_process()

    # --- the process -----------------------------------------------------------------------------------------

    def _start_process(self) -> None:
        """Start the process if vm.conf asks for it.  If the start fails, try again later."""
        assert self._children is not None
        if self._config is None or self._channel is not None:
            return
        try:
            _, ours = self._children.start(Proc.AGENTX, self._open_log)
        except (VmdError, OSError) as error:
            log.error(f"agentx cannot be started: {sentence(error)}")
            self._start_later()
            return
        self._channel = self._attach(ours, Proc.AGENTX, "agentx", on_lost=self._on_lost, queue_limit=QUEUE_MAX)
        self._wait_s = FIRST_S
        self._connect()

    def _start_later(self) -> None:
        self.core.loop.call_later(self._delay.next_s(), self._start_process)

    def _end_process(self) -> None:
        """Tell the process to close its session with the agent, and to end."""
        channel = self._channel
        self._forget_process()
        if channel is not None:
            channel.send(Quit())
            channel.flush_blocking(0.1)
            channel.finish()

    def _forget_process(self) -> None:
        """Drop the channel to the process, and stop looking for an agent."""
        self._channel = None
        self._stop_trying()
        if self._answer is not None:
            self._answer.cancel()
            self._answer = None

    def _on_lost(self, _channel: "Channel", error: PeerError | None) -> None:
        """The process has ended, or broke the protocol: start another one."""
        assert self._children is not None
        self._children.kill(Proc.AGENTX)
        self._forget_process()
        if self._config is not None:
            log.error(f"{error or 'lost child: agentx'}: it is started again")
            self._start_later()

    # --- the agent -------------------------------------------------------------------------------------------

    def _stop_trying(self) -> None:
        if self._try is not None:
            self._try.cancel()
            self._try = None

    def _connect(self) -> None:
        """Connect to the agent's socket and pass it to the process.  If that fails, try again later."""
        self._stop_trying()
        config = self._config
        if config is None or self._channel is None:
            return
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            sock.connect(config.path)
        except (OSError, ValueError) as error:
            sock.close()
            if not self._told_missing:
                self._told_missing = True
                log.warn(f"agentx: no SNMP agent at {config.path}: {sentence(error)}; trying again")
            self._connect_later()
            return
        self._number += 1
        message = AgentxMaster(number=self._number, path=brief(config.path, PATH_BYTES_MAX), context=config.context)
        self._channel.send(message, fds={"master": [sock.detach()]})

    def _connect_later(self) -> None:
        self._stop_trying()
        self._try = self.core.loop.call_later(self._wait_s, self._connect)
        self._wait_s = min(2 * self._wait_s, LONGEST_S)

    def on_up(self, message: AgentxUp, _envelope: Envelope) -> None:
        """The agent has accepted the process."""
        if message.number == self._number:
            self._told_missing = False
            self._wait_s = FIRST_S

    def on_gone(self, message: AgentxLost, _envelope: Envelope) -> None:
        """The agent has left, or has not accepted the process.  The process has logged the reason."""
        if message.number == self._number:
            self._connect_later()

    # --- answers ---------------------------------------------------------------------------------------------

    def on_ask(self, _message: AskAgentxVms, _envelope: Envelope) -> None:
        """The process asks for all VMs.  Answer at most every ANSWER_EVERY_S."""
        if self._answer is None:
            left_s = self._answered_s + ANSWER_EVERY_S - time.monotonic()
            self._answer = self.core.loop.call_later(max(0.0, left_s), self._tell)

    def _tell(self) -> None:
        self._answered_s = time.monotonic()
        self._tell_of([vm for vm in self.core.vms if vm.vmid in self._known])

    def _tell_of(self, vms: "list[Vm]") -> None:
        """Send VMs in batches, so that other messages are served in between."""
        assert self._channel is not None
        switches = {switch.name: switch.interface for switch in self.core.config.switches}
        there = [vm for vm in vms[:BATCH] if self.core.vms.find(vm.vmid, "") is vm]
        root = Caller(uid=0, gid=0, pid=os.getpid())
        for vm, figures in zip(there, self.figures.of(there, root), strict=True):
            self._channel.send(described(vm, figures, switches))
        left = vms[BATCH:]
        if left:
            self._answer = self.core.loop.call_later(0, lambda: self._tell_of(left))
            return
        self._answer = None
        self._channel.send(AgentxVms(began_ns=self._began_ns, changed_ns=self._changed_ns))

    # --- changes ---------------------------------------------------------------------------------------------

    def _look_soon(self) -> None:
        """A VM has changed.  Look after this turn of the loop, when all changes of the turn have been made."""
        if self._look is None:
            self._look = self.core.loop.call_later(0, self._look_now)

    def _look_now(self) -> None:
        self._look = None
        vms = {vm.vmid: vm for vm in self.core.vms}
        for vmid, (vm, state) in list(self._known.items()):
            now = vms.get(vmid)
            if now is vm:
                continue
            self._know(vm, state)  # its last state
            if now is not None and now.name == vm.name:  # vm.conf was reloaded
                self._known[vmid] = now, state_of(now)
                continue
            self._say(vm, deleted=True)
            del self._known[vmid]
            self._changed_ns = time.monotonic_ns()
        for vmid, vm in vms.items():
            if vmid in self._known:
                self._know(vm, self._known[vmid][1])
            else:
                self._known[vmid] = vm, state_of(vm)
                self._changed_ns = time.monotonic_ns()

    def _know(self, vm: "Vm", before: str) -> None:
        """Tell the process of a VM's state if it has changed."""
        state = state_of(vm)
        if state != before:
            self._known[vm.vmid] = vm, state
            self._say(vm)

    def _say(self, vm: "Vm", *, deleted: bool = False) -> None:
        if self._channel is not None:
            self._channel.send(
                AgentxChanged(
                    vmid=vm.vmid, name=vm.name, state=state_of(vm), persistent=vm.from_config, deleted=deleted
                )
            )


def state_of(vm: "Vm") -> str:
    """Return the state of a VM as SNMP knows it."""
    if vm.state is State.STOPPED and vm.last_end is not None and vm.last_end.how == FAILED:
        return CRASHED
    way = vm.sending if vm.state is State.SENDING else vm.receiving if vm.state is State.RECEIVING else None
    return MIGRATING if way is not None and way.carried else vm.state.value


def described(vm: "Vm", figures: "VmFigures", switches: dict[str, str]) -> AgentxVm:
    """Return the description of a VM for the process.  `switches` has the interface of each switch by its name."""
    config = vm.running_config or vm.config
    return AgentxVm(
        vmid=vm.vmid,
        name=vm.name,
        state=state_of(vm),
        enabled=vm.config.enabled,
        persistent=vm.from_config,
        started_s=figures.started_s,
        memory_bytes=figures.memory_bytes,
        guest_bytes=figures.guest_bytes,
        cpu_ns=figures.cpu_ns,
        vcpus=figures.vcpus,
        disks=figures.disks,
        cdrom=figures.cdrom,
        nics=figures.nics,
        formats=tuple(disk.format for disk in config.disks),
        disc=brief(config.cdrom, PATH_BYTES_MAX),
        links=tuple(
            AgentxLink(tap=index_of(nic.tap), parent=index_of(switches.get(nic.switch, ""))) for nic in figures.nics
        ),
    )


def index_of(interface: str) -> int:
    """Return the index of an interface of the host; 0 if there is none of that name."""
    try:
        return socket.if_nametoindex(interface) if interface else 0
    except OSError:
        return 0
