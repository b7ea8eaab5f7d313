"""agentx: a subagent of the host's SNMP agent (RFC 2741), for VM-MIB (RFC 7666).

Runs as  an id of its own, in the cell, without files
Peers    parent (figures of VMs, and events); an SNMP agent, on a stream that the parent has connected
Holds    that stream

Its answers are at most one second old: then it asks the parent again.  Unlike in vmd, this process does not connect by
itself, so it needs neither a path nor a group.
"""

import socket
import time
from collections import deque

from vmd.agentx import mib
from vmd.agentx.notifications import Notifications
from vmd.agentx.session import Session
from vmd.ipc.channel import Channel
from vmd.ipc.imsg import Envelope
from vmd.ipc.messages.agentx import (
    AgentxChanged,
    AgentxLost,
    AgentxMaster,
    AgentxUp,
    AgentxVm,
    AgentxVms,
    AskAgentxVms,
)
from vmd.ipc.messages.children import Quit
from vmd.ipc.process import Process, handles
from vmd.ipc.routes import Proc
from vmd.log import log
from vmd.privsep.confine import AGENTX, confine, limit_memory
from vmd.privsep.title import set_title

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmd.errors import PeerError
    from vmd.ipc.process import Handlers

MEMORY_BYTES = 512 << 20  # a bound against a hostile agent
FRESH_S = 1.0  # so long the figures of the parent are used


class Agentx(Process):
    """Answers the agent."""

    def __init__(self) -> None:
        super().__init__(Proc.AGENTX)
        self.parent = self.attach_parent(Proc.PARENT)
        self.session: Session | None = None
        self.switches = {mib.PER_VM: True, mib.BULK: False}
        self.notifications = Notifications(self.loop, self.switches)
        self.vms: list[AgentxVm] = []  # that the parent has listed so far
        self.told: tuple[list[AgentxVm], AgentxVms] | None = None
        self.told_s = 0.0
        self.view: mib.View | None = None  # made from the last figures
        self.asks = False
        self.said = ""  # why the last agent was lost that did not accept us
        self.waiting: deque[Callable[[mib.View], None]] = deque()

    # --- the agent -------------------------------------------------------------------------------------------

    def on_master(self, message: AgentxMaster, envelope: Envelope, _channel: Channel) -> None:
        """Open a session with an agent."""
        fd = envelope.take_fd("master")
        assert fd is not None
        self.leave()

        def up() -> None:
            where = f" as context {message.context}" if message.context else ""
            log.info(f"the SNMP agent at {message.path} serves VM-MIB{where}")
            self.said = ""
            self.parent.send(AgentxUp(number=message.number))
            self.notifications.begin(session)

        def lost(why: str) -> None:
            if why != self.said:  # an agent that refuses us is logged once, not with each attempt
                log.warn(f"the SNMP agent at {message.path} {why}")
            self.said = why
            self.session = None
            self.notifications.end()
            self.parent.send(AgentxLost(number=message.number))

        self.session = session = Session(
            self.loop,
            socket.socket(fileno=fd),
            message.context,
            ask=self.ask,
            switches=self.switches,
            on_up=up,
            on_lost=lost,
            on_set=self.forget_view,
        )

    def leave(self) -> None:
        """Close the session with the agent."""
        if self.session is not None:
            self.session.close()
        self.session = None
        self.notifications.end()
        self.waiting.clear()

    # --- objects ---------------------------------------------------------------------------------------------

    def ask(self, done: "Callable[[mib.View], None]") -> None:
        """Call `done` with all variables: at once if they are fresh, else when the parent has answered."""
        if self.told is None or time.monotonic() >= self.told_s + FRESH_S:
            self.waiting.append(done)
            if not self.asks:
                self.asks = True
                self.vms = []
                self.parent.send(AskAgentxVms())
            return
        done(self.current_view())

    def current_view(self) -> mib.View:
        """Return all variables."""
        assert self.told is not None
        if self.view is None:
            vms, about = self.told
            self.view = mib.View(vms, about, per_vm=self.switches[mib.PER_VM], bulk=self.switches[mib.BULK])
        return self.view

    def forget_view(self) -> None:
        """Forget the variables, because one of them was set."""
        self.view = None

    def on_vm(self, message: AgentxVm, _envelope: Envelope, _channel: Channel) -> None:
        """The parent lists one VM."""
        self.vms.append(message)

    def on_vms(self, message: AgentxVms, _envelope: Envelope, _channel: Channel) -> None:
        """The list of VMs is complete: answer the requests that wait."""
        self.told, self.told_s, self.vms = (self.vms, message), time.monotonic(), []
        self.asks, self.view = False, None
        while self.waiting:
            self.waiting.popleft()(self.current_view())

    def on_changed(self, message: AgentxChanged, _envelope: Envelope, _channel: Channel) -> None:
        """Something has happened: notify the agent, and forget the old figures."""
        self.told = None
        self.notifications.add(message)

    # --- the end ---------------------------------------------------------------------------------------------

    def on_quit(self, _message: Quit, _envelope: Envelope, _channel: Channel) -> None:
        """Close the session, and end."""
        self.leave()
        self.loop.stop()

    def on_parent_lost(self, channel: Channel, error: "PeerError | None") -> None:
        """The parent is gone: close the session, and end."""
        self.leave()
        super().on_parent_lost(channel, error)

    HANDLERS: "Handlers" = {
        **handles(Proc.PARENT, AgentxMaster, on_master),
        **handles(Proc.PARENT, AgentxVm, on_vm),
        **handles(Proc.PARENT, AgentxVms, on_vms),
        **handles(Proc.PARENT, AgentxChanged, on_changed),
        **handles(Proc.PARENT, Quit, on_quit),
    }


def main() -> int:
    """Run process agentx."""
    process = Agentx()
    process.ignore_terminal_signals()
    set_title("agentx")
    limit_memory(MEMORY_BYTES)
    confine(AGENTX)  # the parent has logged what this kernel lacks
    process.loop.run()
    return process.exit_status
