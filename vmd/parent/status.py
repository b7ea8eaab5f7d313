"""The list of VMs, the list of switches, and the interfaces of one VM with the reports of its devices."""

from vmd.ipc.devmsg import COUNTER_NAMES, COUNTERS_LEAST
from vmd.ipc.messages.clients import (
    Caller,
    End,
    ListRequest,
    NicInfo,
    NicsRequest,
    SwitchesRequest,
    SwitchInfo,
    TroubleInfo,
)
from vmd.ipc.messages.priv import AskDrops, DropsReported
from vmd.ipc.messages.shared import Trouble, brief
from vmd.ipc.messages.vm import AskDevices, DevicesReported, NicCounters
from vmd.ipc.routes import Proc
from vmd.parent.clients import For
from vmd.parent.figures import host_names, slots
from vmd.parent.forpriv import open_tables
from vmd.parent.report import describe
from vmd.parent.vm import Vm

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.ipc.imsg import Envelope
    from vmd.parent.consolelogs import ConsoleLogs
    from vmd.parent.core import Core
    from vmd.parent.network import Network


COUNT_TIMEOUT_S = 5.0
BATCH = 64  # VMs in one turn of the loop
SHOWN = ("locked", "mtu", "guest4", "host4", "length4", "prefix6")  # fields of NicLink that clients see
TROUBLES_MAX = 32  # troubles of a VM's devices that are shown; further ones are dropped


class Counting:
    """The questions about a VM to its process and to priv, and the answers so far."""

    def __init__(self) -> None:
        self.asked = 0  # answers that have not come yet
        self.asks_priv = False  # one of them is priv's
        self.nics: tuple[NicCounters, ...] = ()
        self.troubles: tuple[Trouble, ...] = ()


class Status:
    """The room of status."""

    def __init__(self, core: "Core", network: "Network", console_logs: "ConsoleLogs") -> None:
        self.core = core
        self.network = network
        self.console_logs = console_logs
        self.counting: dict[int, Counting] = {}  # by vmid: VMs that were asked and have not answered

    def serve_list(self, _message: ListRequest, caller: Caller, envelope: "Envelope") -> None:
        """Describe all VMs.  All users who may open the socket see all of them (*cat. 3.3*)."""
        self._list(list(self.core.vms), caller, envelope.peerid)

    def _list(self, vms: list[Vm], caller: Caller, client: int) -> None:
        """Describe VMs in batches, so that other messages are served in between."""
        for vm in vms[:BATCH]:
            if self.core.vms.find(vm.vmid, "") is vm:
                self.core.clients.answer(client, describe(vm, self.infos(vm), caller))
        left = vms[BATCH:]
        if left:
            self.core.loop.call_later(0, lambda: self._list(left, caller, client))
        else:
            self.core.clients.answer(client, End())

    def serve_switches(self, _message: SwitchesRequest, _caller: Caller, envelope: "Envelope") -> None:
        """List all switches.  All users who may open the socket see all of them."""
        for switch in self.core.config.switches:
            self.core.clients.answer(envelope.peerid, SwitchInfo(name=switch.name, interface=switch.interface))
        self.core.clients.answer(envelope.peerid, End())

    def serve_nics(self, message: NicsRequest, _caller: Caller, envelope: "Envelope") -> None:
        """Describe the interfaces of a VM, and the troubles of its devices.

        Counters and troubles of devices are left out if the VM does not answer in time.  All users who may see the list
        of VMs may see this.

        A VM is asked one question at a time, which serves all clients that wait.  So many clients do not slow it down.
        """
        vm, client = self.core.vms.get(message.vmid, message.name), envelope.peerid
        if not vm.pid:
            self._answer(vm.vmid, client)
            return
        counting = self.counting.get(vm.vmid)
        if counting is None:
            counting = self.counting[vm.vmid] = Counting()
            counting.asked = 1
            self.core.peers.send(Proc.VMM, AskDevices(vmid=vm.vmid))
            if vm.vmid in self.network.taps and self.network.priv.up:
                counting.asked += 1
                counting.asks_priv = True
                self.network.priv.ask(AskDrops(vmid=vm.vmid), open_tables())
        wait = self.core.clients.wait(client, For.DEVICES, vm.vmid)

        def give_up() -> None:
            if self.core.clients.done(wait):
                self._answer(vm.vmid, client, counting.nics, counting.troubles)

        self.core.loop.call_later(COUNT_TIMEOUT_S, give_up)

    def on_reported(self, message: DevicesReported, _envelope: "Envelope") -> None:
        """Take the answer of the VM, which is not trusted."""
        self._take(message.vmid, message.nics, message.troubles[:TROUBLES_MAX])

    def on_drops(self, message: DropsReported, _envelope: "Envelope") -> None:
        """Take the answer of priv."""
        self.network.priv.answered()
        counting = self.counting.get(message.vmid)
        if counting is None or not counting.asks_priv:
            return
        counting.asks_priv = False
        self._take(message.vmid, (), message.troubles)

    def on_priv_lost(self) -> None:
        """priv has ended: stop waiting for its answers."""
        for vmid, counting in list(self.counting.items()):
            if counting.asks_priv:
                counting.asks_priv = False
                self._take(vmid, (), ())

    def _take(self, vmid: int, nics: tuple[NicCounters, ...], troubles: tuple[Trouble, ...]) -> None:
        """Take an answer.  With the last one, answer all clients that wait."""
        counting = self.counting.get(vmid)
        if counting is None:
            return
        counting.nics = nics or counting.nics
        counting.troubles += troubles
        counting.asked -= 1
        if not counting.asked:
            self.answer_devices(vmid)

    def answer_devices(self, vmid: int) -> None:
        """Answer all clients that wait: all answers are there, or the VM has ended."""
        counting = self.counting.pop(vmid, None) or Counting()
        for client in self.core.clients.take(For.DEVICES, vmid):
            self._answer(vmid, client, counting.nics, counting.troubles)

    def _answer(
        self, vmid: int, client: int, counted: tuple[NicCounters, ...] = (), troubles: tuple[Trouble, ...] = ()
    ) -> None:
        vm = self.core.vms.find(vmid, "")
        if vm is None:
            return
        figures = slots(vm.figures) if vm.figures is not None else {}
        names = host_names(vm.figures) if vm.figures is not None else {}
        for info in self.infos(vm):
            values = counted[info.index].values if info.index < len(counted) else ()
            found = figures.get(("vionet", info.index), {})
            values = tuple(self.network.counted(vmid, info.index, found).values()) or values
            known = COUNTERS_LEAST <= len(values) <= len(COUNTER_NAMES)
            plausible = known and all(0 <= value < 1 << 64 for value in values)
            if info.tap and plausible:
                info = info.replace(counters=values, lease_name=names.get(info.index, ""))
            self.core.clients.answer(client, info)
        for trouble in (*self.network.troubles(vmid), *self.console_logs.troubles(vmid), *troubles):
            text = TroubleInfo(device=brief(trouble.device), text=brief(trouble.text), since_s=trouble.since_s)
            self.core.clients.answer(client, text)
        self.core.clients.answer(client, End())

    def infos(self, vm: Vm) -> tuple[NicInfo, ...]:
        """Return the interfaces of a VM without counters; those of its configuration if it has no taps."""
        taps = self.network.taps.get(vm.vmid)
        infos = []
        for index, nic in enumerate(taps.nics if taps else (vm.running_config or vm.config).nics):
            info = NicInfo(
                index=index, tap="", switch=nic.switch, lladdr=nic.lladdr, up=nic.up, locked=nic.locked,
                local=nic.local, forwards=nic.forwards, vhost=nic.vhost,
            )  # fmt: skip
            if taps is not None:
                link = taps.links[index]
                shown = {name: getattr(link, name) for name in SHOWN}
                info = info.replace(tap=link.name, **shown)
            infos.append(info)
        return tuple(infos)
