"""What there is: the list of VMs, and that of switches."""

from vmd.ipc.messages import Caller, End, ListRequest, SwitchesRequest, SwitchInfo
from vmd.parent.report import describe

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.ipc.imsg import Envelope
    from vmd.parent.core import Core
    from vmd.parent.network import Network


class Status:
    """The room of those who look."""

    def __init__(self, core: "Core", network: "Network") -> None:
        self.core = core
        self.network = network

    def serve_list(self, _message: ListRequest, caller: Caller, envelope: "Envelope") -> None:
        """Describe every VM; whoever may open the socket sees them all (*cat. 3.3*)."""
        for vm in self.core.vms:
            self.core.clients.answer(envelope.peerid, describe(vm, self.network.infos(vm), caller))
        self.core.clients.answer(envelope.peerid, End())

    def serve_switches(self, _message: SwitchesRequest, _caller: Caller, envelope: "Envelope") -> None:
        """Name every switch; whoever may open the socket sees them all."""
        for switch in self.core.config.switches:
            self.core.clients.answer(envelope.peerid, SwitchInfo(name=switch.name, interface=switch.interface))
        self.core.clients.answer(envelope.peerid, End())
