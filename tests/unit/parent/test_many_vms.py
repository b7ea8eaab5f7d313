"""The cost of a request for one VM does not depend on the number of VMs.  Instructions are counted, not time."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from tests.support.counting import instructions
from vmd.config.model import Config, Globals, NicConfig, VmConfig
from vmd.ipc.imsg import Envelope
from vmd.ipc.messages.clients import (
    Caller,
    FiguresRequest,
    ListRequest,
    ReloadRequest,
    StartRequest,
    StopRequest,
)
from vmd.ipc.messages.metrics import AskFigures
from vmd.ipc.messages.priv import AdoptNics, NicMade, NicsMade, NicsRemoved
from vmd.ipc.messages.vm import Outcome, VmRunning
from vmd.ipc.messages.vmm import VmExited
from vmd.ipc.routes import Proc
from vmd.parent.generations import Generation
from vmd.parent.main import Parent
from vmd.parent.network import describe
from vmd.parent.opening import Opened
from vmd.parent.options import Options
from vmd.parent.plans import Taps
from vmd.parent.statemem import StateMemory
from vmd.parent.truth import Writer, read, vm_of, vms_of
from vmd.parent.vm import Vm
from vmd.record import Record

FEW, MANY = 40, 240
MORE = 1.05  # times the cost with few VMs is allowed
EACH = 90  # instructions of a start for each running VM, because their limits are added up
NO_PROCESS = 1 << 22  # above every pid
ROOT, CLIENT = Caller(uid=0, gid=0, pid=1), 7
MAC = b"\2\0\0\0\0\1"


class Peer:
    """A channel that records messages, and closes their descriptors."""

    def __init__(self, proc: Proc) -> None:
        self.peer = proc
        self.label = proc.name.lower()
        self.told: list[Record] = []
        self.bytes = 0

    def send(self, message: Record, *, peerid: int = 0, fds: dict[str, list[int]] | None = None) -> None:
        """Record a message."""
        assert peerid >= 0
        self.told.append(message)
        for each in (fds or {}).values():
            for fd in each:
                os.close(fd)

    def hold(self, *, held: bool) -> None:
        """Do nothing."""

    def asker(self, number: int, _channel: object) -> Caller:
        """Return root as the user of the client."""
        assert number == CLIENT
        return ROOT


class Host:
    """A parent with one interface for each VM, all of which run but one.  Its processes only record messages."""

    def __init__(self, directory: Path, count: int) -> None:
        vms = tuple(
            VmConfig(name=f"n{number}", nics=(NicConfig(local=True),), kernel="/k", memory_bytes=1 << 20)
            for number in range(count + 1)
        )
        self.config = Config(vms=vms, settings=Globals(limit_vms=2 * MANY, limit_vcpus=2 * MANY))
        options = Options(socket_path=str(directory / "vmd.sock"))
        self.parent = parent = Parent(options, self.config, lambda _path, _known, _warn: self.config)
        self.peers = {proc: Peer(proc) for proc in (Proc.PRIV, Proc.CONTROL, Proc.VMM, Proc.METRICS)}
        channels: Any = parent.core.peers.channels
        channels[Proc.PRIV], channels[Proc.CONTROL] = self.peers[Proc.PRIV], self.peers[Proc.CONTROL]
        parent.connections = cast("Any", self.peers[Proc.CONTROL])
        line: Any = self.peers[Proc.VMM]
        line.channel = line
        generation = Generation(1, "", line, None, None)
        generation.told = True
        parent.generations.add(generation)
        parent.core.serving = parent.network.priv.up = True
        self.memory = StateMemory.create()
        parent.lasting._writer = Writer(self.memory, parent.core)
        parent.lasting.network, parent.lasting.generations = parent.network, parent.generations
        parent.core.on_change, parent.core.write = parent.lasting.write_soon, parent.lasting.write
        parent.generations.on_change = parent.core.changed
        openings: Any = parent.openings
        openings.require_answers, openings.open = lambda _user: None, self._open
        self.opened: list[Callable[[], None]] = []
        *self.others, self.vm = parent.core.vms
        self.vm.leave_queue()
        for vm in self.others:
            self._run(vm, generation)
        self.settle()

    def _run(self, vm: Vm, generation: Generation) -> None:
        """Set a VM to running, without descriptors."""
        vm.begin_start(0)
        vm.begin_run(NO_PROCESS + vm.vmid)
        network = self.parent.network
        plan = network.plans.plan_of(vm, vm.config)
        made = (NicMade(name=f"tap{vm.vmid}", lladdr=MAC, link_local=b"", mtu=1500),)
        links = describe(vm.config, plan, made, [None], ((), ()))
        network.taps[vm.vmid] = Taps(vm.config.nics, plan, {}, links, [], AdoptNics(vmid=vm.vmid, nics=(), made=made))
        self.parent.generations.of[vm.vmid] = generation

    def _open(
        self, _vm: Vm, _config: VmConfig, _uid: int, on_opened: Callable[[Opened], None], *_: object, **__: object
    ) -> None:
        self.opened.append(lambda: on_opened(Opened()))

    def close(self) -> None:
        """Release all resources."""
        self.parent.consoles.close()
        self.parent.network.close()
        self.memory.close()
        self.parent.loop.close()

    def settle(self) -> None:
        """Run all timers that are due before the next message."""
        loop = self.parent.loop
        while loop._timers and loop._timeout_s() <= 0:
            loop._run_timers()
        self.told = [message for peer in self.peers.values() for message in peer.told]
        for peer in self.peers.values():
            peer.told.clear()

    def ask(self, request: Record) -> None:
        """Serve a request of root, and everything that follows at once."""
        envelope = Envelope(request, CLIENT, 0, {})
        self.parent.on_request(cast("Any", request), envelope, cast("Any", self.peers[Proc.CONTROL]))
        self.settle()

    def hear(self, proc: Proc, message: Record, fds: dict[str, list[int]] | None = None) -> None:
        """Serve a message of a process, and everything that follows at once."""
        handler = Parent.HANDLERS[proc, type(message)]
        handler(self.parent, message, Envelope(message, 0, 0, fds or {}), cast("Any", self.peers[proc]))
        self.settle()

    def start(self) -> None:
        """Start the only VM that does not run."""
        vm = self.vm
        self.ask(StartRequest(name=vm.name))
        assert self.opened, self.told
        self.opened.pop()()
        ticket = self.parent.network.tickets
        made = NicMade(name="tap77777", lladdr=MAC, link_local=b"", mtu=1500)
        self.hear(Proc.PRIV, NicsMade(vmid=vm.vmid, ticket=ticket, nics=(made,)), {"taps": [os.open("/", os.O_RDONLY)]})
        self.hear(Proc.VMM, VmRunning(vmid=vm.vmid))

    def end(self) -> None:
        """Stop that VM."""
        vm = self.vm
        self.ask(StopRequest(name=vm.name))
        self.hear(Proc.VMM, VmExited(vmid=vm.vmid, pid=1, outcome=Outcome.POWER_OFF, text=""))
        self.hear(Proc.PRIV, NicsRemoved(vmid=vm.vmid))

    def stop_all(self) -> None:
        """Stop all other VMs, and report their ends."""
        for vm in self.others:
            self.ask(StopRequest(name=vm.name))
        for vm in self.others:
            self.hear(Proc.VMM, VmExited(vmid=vm.vmid, pid=1, outcome=Outcome.POWER_OFF, text=""))


def costs(directory: Path, count: int) -> dict[str, float]:
    """Return the number of instructions of each request with `count` running VMs; per VM, if it is about all."""
    directory.mkdir()
    host = Host(directory, count)
    host.start()
    host.end()
    metrics: Any = host.peers[Proc.METRICS]

    def scrape() -> None:
        host.parent.metrics.on_asked(AskFigures(), metrics)
        host.settle()

    found = {
        "start": instructions(host.start) - EACH * count,
        "end": instructions(host.end),
        "list": instructions(lambda: host.ask(ListRequest())) / count,
        "figures": instructions(lambda: host.ask(FiguresRequest())) / count,
        "metrics": instructions(scrape) / count,
        "reload": instructions(lambda: host.ask(ReloadRequest())) / count,
        "restart": instructions(lambda: [vm_of(known) for known in vms_of(read(host.memory))]) / count,
        "stop all": instructions(host.stop_all) / count,
    }
    host.close()
    return found


def test_the_cost_does_not_depend_on_the_number_of_vms(tmp_path: Path) -> None:
    """A request for one VM costs the same.  A request for all costs the same for each VM."""
    few, many = costs(tmp_path / "few", FEW), costs(tmp_path / "many", MANY)
    assert {what: round(many[what] / few[what], 2) for what in few if many[what] > MORE * few[what]} == {}
