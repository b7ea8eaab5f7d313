"""The requests of the parent to priv, and the messages to VMs that follow, without any process."""

import errno
import ipaddress
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from vmd.config.model import (
    BootDevice,
    Config,
    Forward,
    Globals,
    NicConfig,
    Owner,
    Prefix,
    SeedConfig,
    SwitchConfig,
    VmConfig,
)
from vmd.errors import HostError, OperatorError, PeerError
from vmd.ipc.devmsg import COUNTER_NAMES, COUNTERS_LEAST
from vmd.ipc.imsg import MAX_MESSAGE, Envelope, encode
from vmd.ipc.messages.clients import Caller, NicInfo, NicsRequest, TroubleInfo
from vmd.ipc.messages.priv import (
    AdoptNics,
    AskDrops,
    ConfigureNetwork,
    DropsReported,
    ForwardsSet,
    FramesDropped,
    MakeNics,
    NetworkConfigured,
    NetworkTrouble,
    NicMade,
    NicsFailed,
    NicsMade,
    NicsRemoved,
    RemoveNics,
    SetForwards,
)
from vmd.ipc.messages.shared import Trouble
from vmd.ipc.messages.vm import (
    AskDevices,
    AskResolvers,
    DevicesReported,
    LimitVm,
    NicCounters,
    Resolvers,
    ResumeReceived,
    StartVm,
)
from vmd.ipc.routes import Proc
from vmd.parent import vhost
from vmd.parent.consolelogs import ConsoleLogs
from vmd.parent.core import Core
from vmd.parent.forpriv import open_tuns
from vmd.parent.hostroutes import HostRoute
from vmd.parent.network import Network, alias
from vmd.parent.requests import checked_request, require_permitted_settings, with_permitted_vhost
from vmd.parent.status import TROUBLES_MAX, Status
from vmd.parent.vm import Receiving, Vm
from vmd.record import Record

SWITCHES = (
    SwitchConfig(name="off", interface="br0", enabled=False),
    SwitchConfig(name="lan", interface="br1", group="lab", locked=True, rdomain=3),
    SwitchConfig(name="lan", interface="br9"),
    SwitchConfig(name="plain", interface="br2", up=False),
)
UNUSED = cast("Envelope", None)
MAC = b"\2\0\0\0\0\1"


class Peer:
    """A channel that records messages, and closes their descriptors."""

    def __init__(self) -> None:
        self.sent: list[Record] = []
        self.fds: list[dict[str, int]] = []
        self.answers: list[tuple[int, Record]] = []

    def send(self, message: Record, *, peerid: int = 0, fds: dict[str, list[int]] | None = None) -> None:
        """Record a message."""
        self.sent.append(message)
        self.answers.append((peerid, message))
        self.fds.append({name: len(each) for name, each in (fds or {}).items()})
        for each in (fds or {}).values():
            for fd in each:
                os.close(fd)


class Timer:
    """A timer that the test fires."""

    def __init__(self, callback: Any) -> None:  # noqa: ANN401 - a callable
        self.callback = callback

    def cancel(self) -> None:
        """Cancel the timer."""
        self.callback = lambda: None


class Loop:
    """A loop that keeps timers."""

    def __init__(self) -> None:
        self.timers: list[Timer] = []

    def call_later(self, _delay_s: float, callback: Any) -> Timer:  # noqa: ANN401 - a callable
        """Start a timer."""
        self.timers.append(Timer(callback))
        return self.timers[-1]


class FakeParent:
    """The part of the parent that its network needs."""

    def __init__(self) -> None:
        self.loop = Loop()
        self.core = Core(cast("Any", self.loop), Config(switches=SWITCHES))
        control = Peer()
        self.peers = {Proc.PRIV: Peer(), Proc.VMM: Peer()}
        self.core.peers.channels = cast("Any", {**self.peers, Proc.CONTROL: control})
        self.answers = control.answers
        self.sent: list[str] = []  # names of VMs that were sent to vmm
        self.network = Network(self.core, lambda vm: self.sent.append(vm.name))
        self.network.priv.up = True
        self.status = Status(self.core, self.network, ConsoleLogs(self.core, cast("Any", None)))


@pytest.fixture
def parent() -> Iterator[FakeParent]:
    """Yield a parent."""
    parent = FakeParent()
    yield parent
    parent.network.close()


def launch(parent: FakeParent, config: VmConfig) -> tuple[Vm, list[tuple[int, str]]]:
    """Begin to start a VM.  Return it, and the list that gets its failure."""
    vm = parent.core.vms.find(0, config.name) or parent.core.vms.add(config, from_config=True)
    identity = parent.core.vms.identities.of(vm.key)
    identity.number = identity.number or vm.vmid  # so that the number is known
    failures: list[tuple[int, str]] = []
    message = StartVm(vmid=vm.vmid, config=vm.config, boot_name="bsd", verbosity=0)
    fds = {"boot": [os.open("/dev/null", os.O_RDONLY)]}
    parent.network.launch(vm, message, fds, lambda code, text: failures.append((code, text)))
    return vm, failures


def made(parent: FakeParent, *, mtu: int = 1500, without: str = "") -> None:
    """Answer the last request as priv would.  `without` is the reason why filters are not possible."""
    request = parent.peers[Proc.PRIV].sent[-1]
    assert isinstance(request, MakeNics)
    nics = tuple(
        NicMade(
            name=nic.name or f"tap{index}", lladdr=MAC, link_local=b"", mtu=mtu, index=70 + index,
            vhost=nic.vhost and not without, without=without if nic.vhost else "",
        )
        for index, nic in enumerate(request.nics)
    )  # fmt: skip
    message = NicsMade(vmid=request.vmid, ticket=request.ticket, nics=nics)
    fds = [os.open("/dev/null", os.O_RDONLY) for _ in nics]
    parent.network.on_made(message, Envelope(message, 0, 0, {"taps": fds}))


def started(parent: FakeParent) -> StartVm:
    """Return the last message to vmm."""
    message = parent.peers[Proc.VMM].sent[-1]
    assert isinstance(message, StartVm)
    return message


def test_more_switches_than_a_message_has_room_for(parent: FakeParent) -> None:
    """All of them arrive, even with long names.  Only the last message says that it is the last."""
    switches = tuple(SwitchConfig(name=f"{'x' * 60}{n:03}", interface=f"bridge{n:09}") for n in range(200))
    parent.network.configure(Config(switches=switches))

    messages = parent.peers[Proc.PRIV].sent
    assert [message.more for message in messages if isinstance(message, ConfigureNetwork)] == [True] * 4 + [False]
    told = [each for message in messages if isinstance(message, ConfigureNetwork) for each in message.switches]
    assert [each.interface for each in told] == [switch.interface for switch in switches]
    assert all(len(encode(message)[0]) <= MAX_MESSAGE for message in messages)


def test_switches_are_told_once_each(parent: FakeParent) -> None:
    """Disabled switches, and further switches of the same name, are left out."""
    parent.network.configure(parent.core.config)

    (message,) = parent.peers[Proc.PRIV].sent
    assert isinstance(message, ConfigureNetwork)
    assert [(each.interface, each.alias, each.rdomain, each.up) for each in message.switches] == [
        ("br1", "switch1-lan", 3, True),
        ("br2", "switch2-plain", None, False),
    ]


def test_a_vm_without_interfaces_starts_at_once(parent: FakeParent) -> None:
    """priv gets no request."""
    launch(parent, VmConfig(name="a"))

    assert started(parent).nics == ()
    assert parent.peers[Proc.PRIV].sent == []


def test_the_request_to_priv(parent: FakeParent) -> None:
    """It has names, addresses, and groups of interface and switch.  Names that other VMs want are reserved."""
    other = parent.core.vms.add(
        VmConfig(name="other", nics=(NicConfig(tap="tap3"), NicConfig(tap="tap"))), from_config=True
    )
    other.running_config = VmConfig(name="other", nics=(NicConfig(tap="tap5"),))  # that of a received VM
    nics = (
        NicConfig(tap="tap", switch="lan", group="mine"),
        NicConfig(tap="tap7", local=True, rdomain=4, up=False),
        NicConfig(switch="lan", group="lab"),
    )
    launch(parent, VmConfig(name="a", nics=nics))

    (message,) = parent.peers[Proc.PRIV].sent
    assert isinstance(message, MakeNics)
    one, two, three = message.nics
    assert message.reserved == ("tap3", "tap5", "tap7")
    assert (one.name, one.alias, one.bridge, one.groups) == ("", "vm2-if0-a", "br1", ("mine", "lab"))
    assert (two.name, two.bridge, two.groups, two.rdomain, two.up) == ("tap7", "", (), 4, False)
    assert (two.host4, two.prefix6) == (bytes((100, 64, 2, 4)), b"")
    assert (one.host4, three.groups) == (b"", ("lab",))
    assert parent.peers[Proc.VMM].sent == []


def test_the_message_to_a_vm_about_its_interfaces(parent: FakeParent, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has all that its devices need.  The configuration says where the addresses come from."""
    dns4, dns6 = (bytes((192, 0, 2, 1)),), (bytes(15) + b"\7",)
    monkeypatch.setattr("vmd.parent.nameservers.resolvers", lambda _paths: (dns4, dns6))
    parent.core.config = parent.core.config.replace(settings=Globals(local_inet6=True))
    nics = (NicConfig(switch="lan"), NicConfig(local=True), NicConfig(locked=True))
    launch(parent, VmConfig(name="a", nics=nics, boot_device=BootDevice.NET))
    made(parent, mtu=9000)

    message = started(parent)
    on_switch, local, locked = message.nics
    prefix6 = parent.core.vms.identities.ula
    assert prefix6 is not None
    assert [link.lladdr for link in message.nics] == [nic.lladdr for nic in message.config.nics]
    assert (on_switch.locked, on_switch.local, on_switch.pxe, on_switch.mtu) == (True, False, True, 9000)
    assert (locked.locked, locked.pxe) == (True, False)
    assert (local.host4, local.guest4) == (bytes((100, 64, 1, 4)), bytes((100, 64, 1, 5)))
    assert local.prefix6[:6] == prefix6.address[:6]
    assert local.prefix6[6:] == b"\0\5" + bytes(8)
    assert (local.dns4, local.dns6, local.host_mac) == (dns4, dns6, MAC)
    assert (on_switch.host4, on_switch.dns4) == (b"", ())
    assert (message.config.plan_id, message.config.plan_prefix6) == (1, prefix6)
    assert parent.peers[Proc.VMM].fds[-1] == {"boot": 1, "taps": 3}


class KernelOfHost:
    """A host with vhost-net, or without it.  /dev/null stands in for what is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, path: str = "/dev/null") -> None:
        self.asked: list[tuple[str, int, bool]] = []
        monkeypatch.setattr(vhost, "VHOST_NET", path)
        monkeypatch.setattr(vhost, "packet_socket", self.packet_socket)

    def packet_socket(self, tap: str, index: int, *, local: bool) -> int:
        """Record the tap."""
        self.asked.append((tap, index, local))
        return os.open("/dev/null", os.O_RDONLY)


VHOST_NICS = (NicConfig(vhost=True, locked=True), NicConfig(local=True), NicConfig(local=True, vhost=True))


def test_an_interface_with_vhost(parent: FakeParent, monkeypatch: pytest.MonkeyPatch) -> None:
    """priv gets what filters need.  Each start of the guest gets two descriptors for such an interface."""
    host = KernelOfHost(monkeypatch)
    vm, _ = launch(parent, VmConfig(name="a", nics=VHOST_NICS))
    request = parent.peers[Proc.PRIV].sent[-1]
    assert isinstance(request, MakeNics)
    assert [(nic.vhost, nic.locked) for nic in request.nics] == [(True, True), (False, False), (True, False)]
    made(parent)

    assert [nic.vhost for nic in started(parent).nics] == [True, False, True]
    assert parent.peers[Proc.VMM].fds[-1] == {"boot": 1, "taps": 3, "vhosts": 4}
    launch(parent, vm.config)
    assert parent.peers[Proc.VMM].fds[-1] == {"boot": 1, "taps": 3, "vhosts": 4}
    assert host.asked == [("tap0", 70, False), ("tap2", 72, True)] * 2
    assert not any("vhost" in note for note in vm.notes)


@pytest.mark.parametrize(("path", "without"), [("/nowhere", ""), ("/dev/null", "there can be no filters on tap0: no")])
def test_a_process_moves_the_frames_where_the_kernel_cannot(
    parent: FakeParent, monkeypatch: pytest.MonkeyPatch, path: str, without: str
) -> None:
    """The start has a note with the reason for each interface.  No descriptor is opened, and no filter is made."""
    host = KernelOfHost(monkeypatch, path)
    vm, _ = launch(parent, VmConfig(name="a", nics=VHOST_NICS))
    made(parent, without=without)

    why = without or "/nowhere: No such file or directory: load the kernel module vhost_net"
    notes = [note for note in vm.notes if "vhost" in note]
    assert notes == [f"interface {n}: vhost: a process moves its frames, not the kernel: {why}" for n in (0, 2)]
    assert not any(nic.vhost for nic in started(parent).nics)
    assert parent.peers[Proc.VMM].fds[-1] == {"boot": 1, "taps": 3}
    assert host.asked == []


def test_a_guest_that_resets_itself_continues_without_vhost_net(
    parent: FakeParent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process moves its frames from then on."""
    KernelOfHost(monkeypatch)
    vm, _ = launch(parent, VmConfig(name="a", nics=VHOST_NICS))
    made(parent)
    monkeypatch.setattr(vhost, "VHOST_NET", "/nowhere")
    launch(parent, vm.config)

    assert not any(nic.vhost for nic in started(parent).nics)
    assert parent.peers[Proc.VMM].fds[-1] == {"boot": 1, "taps": 3}


def test_figures_of_frames_that_the_kernel_moves(parent: FakeParent, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are the tap's figures and the drops of its filters.  Its process has counted the others."""
    KernelOfHost(monkeypatch)
    vm, _ = launch(parent, VmConfig(name="a", nics=VHOST_NICS))
    made(parent)
    monkeypatch.setattr(parent.network.tap_stats, "of", lambda index: {"rx_packets": index, "tx_bytes": 5})
    parent.network.on_dropped(FramesDropped(vmid=vm.vmid, index=0, spoofed=3, unwanted=4), UNUSED)
    for vmid, index in ((99, 0), (vm.vmid, 3), (vm.vmid, -1)):  # there are no such interfaces
        parent.network.on_dropped(FramesDropped(vmid=vmid, index=index, spoofed=3, unwanted=4), UNUSED)
    assert parent.network.taps[vm.vmid].dropped == {0: (3, 4)}
    counted = dict.fromkeys(COUNTER_NAMES, 1)

    first, second, third = (parent.network.counted(vm.vmid, index, counted) for index in range(3))
    assert first == counted | {"rx_packets": 70, "tx_bytes": 5, "tx_spoofed": 4, "rx_filtered": 5}
    assert second == counted
    assert third == counted | {"rx_packets": 72, "tx_bytes": 5}
    assert parent.network.counted(vm.vmid, 0, {"index": 0}) == {"index": 0}  # its process has no counters


def test_name_servers_of_ipv6_are_for_ipv6(parent: FakeParent, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest without an IPv6 address could not reach them."""
    monkeypatch.setattr("vmd.parent.nameservers.resolvers", lambda _paths: ((), (bytes(15) + b"\7",)))
    launch(parent, VmConfig(name="a", nics=(NicConfig(local=True),)))
    made(parent)

    assert started(parent).nics[0].dns6 == ()


def test_name_servers_are_looked_up_when_a_guest_asks(parent: FakeParent, monkeypatch: pytest.MonkeyPatch) -> None:
    """The present vm.conf counts, and otherwise the present servers of the host."""
    found: list[tuple[tuple[bytes, ...], tuple[bytes, ...]]] = [((b"aaaa",), ()), ((b"bbbb",), (bytes(16),))]
    monkeypatch.setattr("vmd.parent.nameservers.resolvers", lambda _paths: found.pop(0))

    def asked() -> Record:
        parent.network.on_ask_resolvers(AskResolvers(vmid=7), UNUSED)
        return parent.peers[Proc.VMM].sent[-1]

    assert asked() == Resolvers(vmid=7, dns4=(b"aaaa",))
    assert asked() == Resolvers(vmid=7, dns4=(b"bbbb",), dns6=(bytes(16),))
    settings = Globals(local_dns=(bytes((9, 9, 9, 9)), bytes(15) + b"\5"))
    parent.core.config = parent.core.config.replace(settings=settings)
    assert asked() == Resolvers(vmid=7, dns4=(bytes((9, 9, 9, 9)),), dns6=(bytes(15) + b"\5",))


def test_a_host_without_name_servers_for_guests(
    parent: FakeParent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The start has a note, and the status a trouble while this lasts.  Servers in vm.conf end it."""
    monkeypatch.setattr("vmd.parent.nameservers.resolvers", lambda _paths: ((), ()))
    monkeypatch.setattr("vmd.parent.nameservers.host_answers", lambda _host4: False)
    monkeypatch.setattr("vmd.parent.network.time.time", lambda: 1000.5)
    vm, _ = launch(parent, VmConfig(name="a", nics=(NicConfig(), NicConfig(local=True), NicConfig(local=True))))
    made(parent)
    assert len(vm.notes) == 2
    assert vm.notes[0].endswith("address 100.64.1.4: write `local dns ADDRESS` in vm.conf")

    serve(parent, vm, 1)
    assert [(trouble.device, trouble.text) for trouble in wrong(parent, 1)] == [
        ("interface1", vm.notes[0]), ("interface2", vm.notes[1]),
    ]  # fmt: skip
    assert {trouble.since_s for trouble in wrong(parent, 1)} == {1000}
    parent.core.config = parent.core.config.replace(settings=Globals(local_dns=(bytes((9, 9, 9, 9)),)))
    serve(parent, vm, 2)
    assert wrong(parent, 2) == []
    assert trouble_events(parent) == [
        ("trouble", "a", "interface1", vm.notes[0]), ("trouble", "a", "interface2", vm.notes[1]),
        ("mended", "a", "interface1", ""), ("mended", "a", "interface2", ""),
    ]  # fmt: skip
    parent.core.config = parent.core.config.replace(settings=Globals())
    for _ in range(2):
        parent.network.on_ask_resolvers(AskResolvers(vmid=vm.vmid), UNUSED)
    assert [what for what, *_ in trouble_events(parent)[4:]] == ["trouble"] * 2


def trouble_events(parent: FakeParent) -> list[tuple[str, str, str, str]]:
    """Return the events of troubles: word, VM, device and text."""
    past = parent.core.events._past
    return [(event.what, event.name, event.device, event.text) for event in past if event.what in ("trouble", "mended")]


def test_troubles_that_priv_finds_are_events(parent: FakeParent) -> None:
    """They are about a running VM, or about none.  Reports about other VMs are ignored."""
    vm = running(parent)
    for message in (
        NetworkTrouble(vmid=vm.vmid, device="interface0", text="dropped"), NetworkTrouble(text="flushed"),
        NetworkTrouble(vmid=99, device="interface0", text="dropped"), NetworkTrouble(vmid=vm.vmid, device="interface0"),
    ):  # fmt: skip
        parent.network.on_trouble(message, UNUSED)
    assert trouble_events(parent) == [
        ("trouble", vm.name, "interface0", "dropped"), ("trouble", "", "", "flushed"),
        ("mended", vm.name, "interface0", ""),
    ]  # fmt: skip


def test_existing_taps_are_for_vm_conf_and_root(parent: FakeParent) -> None:
    """A VM gets those that vm.conf names for it, or that root names.  A user or a stream cannot name one."""

    def asked(vm: Vm, tap: str) -> bool:
        message = StartVm(
            vmid=vm.vmid, config=vm.config.replace(nics=(NicConfig(tap=tap),)), boot_name="bsd", verbosity=0
        )
        parent.network.launch(vm, message, {}, lambda _code, _text: None)
        sent = parent.peers[Proc.PRIV].sent[-1]
        assert isinstance(sent, MakeNics)
        parent.network.give_up(vm)
        return sent.nics[0].existing

    configured = parent.core.vms.add(VmConfig(name="a", nics=(NicConfig(tap="tap5"),)), from_config=True)
    roots = parent.core.vms.add(VmConfig(name="b"), from_config=False)
    users = parent.core.vms.add(VmConfig(name="c", owner=Owner(uid=1000)), from_config=False)
    received = parent.core.vms.add(VmConfig(name="d"), from_config=False)
    received.uid = 1000

    assert [asked(configured, tap) for tap in ("tap5", "tap6", "", "tap")] == [True, False, False, False]
    assert [asked(vm, "tap5") for vm in (roots, users, received)] == [True, False, False]


def test_a_second_start_has_the_same_taps(parent: FakeParent) -> None:
    """When the guest reboots, priv gets no request."""
    vm, _ = launch(parent, VmConfig(name="a", nics=(NicConfig(), NicConfig(local=True))))
    made(parent)
    before = started(parent)
    launch(parent, vm.config)

    assert len(parent.peers[Proc.PRIV].sent) == 1
    assert started(parent) == before
    assert parent.peers[Proc.VMM].fds[-1] == {"boot": 1, "taps": 2}


def test_a_tap_belongs_to_one_vm(parent: FakeParent) -> None:
    """Its own VM may use it again.  Another VM may use other taps."""
    vm, _ = launch(parent, VmConfig(name="a", nics=(NicConfig(tap="tap0"),)))
    made(parent)
    other = parent.core.vms.add(VmConfig(name="b", nics=(NicConfig(tap="tap0"),)), from_config=True)

    parent.network.plans.check(vm, vm.config)
    parent.network.plans.check(other, other.config.replace(nics=(NicConfig(tap="tap1"),)))
    with pytest.raises(OperatorError) as refused:
        parent.network.plans.check(other, other.config)

    assert str(refused.value) == "vm b: interface tap0 is in use by vm a"


def test_a_second_start_with_other_interfaces_has_other_taps(parent: FakeParent) -> None:
    """The old taps are removed first."""
    vm, _ = launch(parent, VmConfig(name="a", nics=(NicConfig(),)))
    made(parent)
    vm.config = vm.config.replace(nics=(*vm.config.nics, NicConfig(lladdr=MAC)))
    launch(parent, vm.config)

    assert [type(message) for message in parent.peers[Proc.PRIV].sent] == [MakeNics, RemoveNics, MakeNics]


def test_a_failure_of_priv_is_reported(parent: FakeParent) -> None:
    """Nothing is left of the start."""
    vm, failures = launch(parent, VmConfig(name="a", nics=(NicConfig(),)))
    parent.network.on_failed(NicsFailed(vmid=vm.vmid, ticket=1, code=5, text="no"), UNUSED)

    assert failures == [(5, "no")]
    assert not parent.network.launches
    assert parent.peers[Proc.VMM].sent == []


def test_a_vm_whose_message_to_vmm_is_too_long_releases_its_taps(
    parent: FakeParent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The start fails with that reason, and nothing of it is left."""
    vm, failures = launch(parent, VmConfig(name="a", nics=(NicConfig(),)))

    def too_long(message: Record, *, peerid: int, fds: dict[str, list[int]]) -> None:
        for fd in (fd for each in fds.values() for fd in each):
            os.close(fd)
        if isinstance(message, StartVm):
            raise ValueError(f"it has 70000 bytes, for {peerid}")

    monkeypatch.setattr(parent.peers[Proc.VMM], "send", too_long)
    before = len(os.listdir("/proc/self/fd"))  # one of them is the boot file, which the start owns
    made(parent)

    assert failures == [(errno.E2BIG, "vm a: configuration too long: it has 70000 bytes, for 0")]
    assert parent.network.taps == {}
    assert parent.peers[Proc.PRIV].sent[-1] == RemoveNics(vmid=vm.vmid)
    assert len(os.listdir("/proc/self/fd")) == before - 1


def test_a_vm_that_was_stopped_meanwhile_releases_its_taps(parent: FakeParent) -> None:
    """Answers of priv come too late, and change nothing."""
    vm, failures = launch(parent, VmConfig(name="a", nics=(NicConfig(),)))
    request = parent.peers[Proc.PRIV].sent[-1]
    assert parent.network.give_up(vm)
    assert not parent.network.give_up(vm)
    parent.peers[Proc.PRIV].sent.append(request)
    made(parent)
    parent.network.on_failed(NicsFailed(vmid=vm.vmid, ticket=1, code=5, text="no"), UNUSED)

    assert any(isinstance(message, RemoveNics) for message in parent.peers[Proc.PRIV].sent)
    assert (failures, parent.peers[Proc.VMM].sent, parent.network.taps) == ([], [], {})


def test_the_final_end_of_priv_ends_all_waits(parent: FakeParent) -> None:
    """A start that waits fails."""
    _, failures = launch(parent, VmConfig(name="a", nics=(NicConfig(),)))
    parent.network.on_priv_lost(for_good=True)

    assert "lost child: priv" in failures[0][1]


def test_a_new_priv_is_told_the_present_state(parent: FakeParent) -> None:
    """First come interfaces of running guests, then the configuration, then requests without an answer."""
    parent.core.serving = True
    running, _ = launch(parent, VmConfig(name="a", nics=(NicConfig(),)))
    asked = parent.peers[Proc.PRIV].sent[-1]
    assert isinstance(asked, MakeNics)
    made(parent)
    _, failures = launch(parent, VmConfig(name="b", nics=(NicConfig(),)))
    waiting = parent.peers[Proc.PRIV].sent[-1]
    parent.network.on_priv_lost(for_good=False)
    parent.peers[Proc.PRIV].sent.clear()
    parent.network.configure(parent.core.config)
    launch(parent, VmConfig(name="c", nics=(NicConfig(),)))
    assert parent.peers[Proc.PRIV].sent == []  # it would remove the interfaces of guests as leftovers

    parent.network.begin()

    adopt, configure, again, last = parent.peers[Proc.PRIV].sent
    assert isinstance(adopt, AdoptNics)
    assert (adopt.vmid, adopt.nics, adopt.made[0].name) == (running.vmid, asked.nics, "tap0")
    assert isinstance(configure, ConfigureNetwork)
    assert configure.again
    assert again == waiting
    assert isinstance(last, MakeNics)
    assert failures == []


def test_a_request_that_ends_priv_is_not_repeated_for_ever(parent: FakeParent) -> None:
    """Its VM fails, and other VMs continue."""
    _, failures = launch(parent, VmConfig(name="a", nics=(NicConfig(),)))
    for _ in range(3):
        assert failures == []
        parent.network.on_priv_lost(for_good=False)
        parent.network.begin()

    assert failures == [(errno.EPIPE, "its interfaces cannot be made: priv has ended 3 times while it made them")]


def test_a_start_waits_for_priv_no_longer_than_its_deadline(parent: FakeParent) -> None:
    """Its client gets an error.  A late answer changes nothing."""
    vm, failures = launch(parent, VmConfig(name="a", nics=(NicConfig(),)))
    asked = parent.peers[Proc.PRIV].sent[-1]
    for timer in list(parent.loop.timers):
        timer.callback()

    assert failures == [(errno.ETIMEDOUT, "its interfaces cannot be made: priv does not answer")]
    assert parent.peers[Proc.PRIV].sent[-1] == RemoveNics(vmid=vm.vmid)
    parent.peers[Proc.PRIV].sent.append(asked)
    made(parent)
    assert (parent.peers[Proc.VMM].sent, parent.network.taps) == ([], {})


def test_many_that_start_at_a_time_wait_for_one_another(parent: FakeParent) -> None:
    """No start is given up while priv still answers others, because hundreds take a while."""
    vms = [launch(parent, VmConfig(name=f"n{number}", nics=(NicConfig(),))) for number in range(3)]
    deadlines = [launch.deadline for launch in parent.network.launches.values()]
    made(parent)  # those of the last VM
    for deadline in deadlines:
        assert deadline is not None
        cast("Any", deadline).callback()
    assert [failures for _, failures in vms] == [[], [], []]

    for launched in list(parent.network.launches.values()):
        assert launched.deadline is not None
        cast("Any", launched.deadline).callback()
    silent = (errno.ETIMEDOUT, "its interfaces cannot be made: priv does not answer")
    assert [failures for _, failures in vms] == [[silent], [silent], []]


def test_priv_is_silent_when_it_owes_an_answer_for_too_long(parent: FakeParent) -> None:
    """Each answer restarts the time.  Without an outstanding answer no time runs."""
    silent: list[bool] = []
    priv: Any = parent.network.priv
    priv.on_silent = lambda: silent.append(True)
    for name in ("a", "b"):
        launch(parent, VmConfig(name=name, nics=(NicConfig(),)))
    first = priv.timer
    parent.network.on_failed(NicsFailed(vmid=1, ticket=1, code=5, text="no"), UNUSED)
    assert priv.timer not in (None, first)
    parent.network.on_failed(NicsFailed(vmid=2, ticket=2, code=5, text="no"), UNUSED)
    assert not priv.timer
    first.callback()
    assert silent == []

    launch(parent, VmConfig(name="c", nics=(NicConfig(),)))
    priv.timer.callback()
    assert silent == [True]


@pytest.mark.parametrize(
    ("nic", "words"),
    [
        (NicConfig(switch="nope"), 'switch "nope" not found: the interface is connected to nothing'),
        (NicConfig(switch="off"), 'switch "off" is disabled: the interface is connected to nothing'),
    ],
)
def test_switches_that_do_not_exist(parent: FakeParent, nic: NicConfig, words: str) -> None:
    """As upstream, the VM starts with an interface in no bridge.  The status shows it while this lasts."""
    config = VmConfig(name="a", nics=(NicConfig(), nic))
    vm, failures = launch(parent, config)
    request = parent.peers[Proc.PRIV].sent[-1]
    made(parent)
    vm.begin_run(0)
    serve(parent, vm, 7)

    assert failures == []
    assert isinstance(request, MakeNics)
    assert [each.bridge for each in request.nics] == ["", ""]
    assert [link.name for link in started(parent).nics] == ["tap0", "tap1"]
    assert parent.network.notes(config) == [f"interface 1: {words}"]
    troubles = [message for _, message in parent.answers if isinstance(message, TroubleInfo)]
    assert [(each.device, each.text) for each in troubles] == [("interface1", words)]


def test_a_switch_that_was_added(parent: FakeParent) -> None:
    """A guest that boots again is connected to it.  A switch that was removed does not cause a new request."""
    config = VmConfig(name="a", nics=(NicConfig(switch="new"), NicConfig(switch="lan")))
    launch(parent, config)
    made(parent)
    asked = len(parent.peers[Proc.PRIV].sent)

    parent.core.config = Config()
    launch(parent, config)
    assert len(parent.peers[Proc.PRIV].sent) == asked

    parent.core.config = Config(switches=(SwitchConfig(name="new", interface="br5"),))
    launch(parent, config)
    request = parent.peers[Proc.PRIV].sent[-1]
    assert isinstance(request, MakeNics)
    assert [each.bridge for each in request.nics] == ["br5", ""]


def test_a_switch_that_a_received_vm_needs(parent: FakeParent) -> None:
    """It is required, because the VM is still connected at the sender."""
    parent.network.require_switches(VmConfig(name="a", nics=(NicConfig(switch="lan"), NicConfig())))
    with pytest.raises(OperatorError, match='vm a: interface 0: switch "nope" not found'):
        parent.network.require_switches(VmConfig(name="a", nics=(NicConfig(switch="nope"),)))


SSH = Forward(port=8022, to=22)


def web(name: str = "web", **fields: object) -> VmConfig:
    """Return a VM that has a local interface with these fields."""
    return VmConfig(name=name, nics=(NicConfig(local=True, **fields),))  # type: ignore[arg-type]


def test_the_settings_of_a_local_interface(parent: FakeParent) -> None:
    """priv gets address and forwards; the VM gets address and name servers."""
    address = Prefix(address=bytes((10, 9, 0, 77)), length=24)
    launch(parent, web(address=address, forwards=(SSH,), dns=(bytes((9, 9, 9, 9)), bytes(15) + b"\7")))
    (message,) = parent.peers[Proc.PRIV].sent
    assert isinstance(message, MakeNics)
    (nic,) = message.nics
    assert (nic.host4, nic.guest4, nic.length4) == (bytes((10, 9, 0, 1)), address.address, 24)
    assert nic.forwards == (SSH,)
    made(parent)

    (link,) = started(parent).nics
    assert (link.host4, link.guest4, link.length4) == (nic.host4, nic.guest4, 24)
    assert (link.dns4, link.dns6, link.asks) == ((bytes((9, 9, 9, 9)),), (), False)
    assert parent.network.name_server_problems(parent.network.taps[1]) == {}


def test_a_chosen_address_in_the_network_of_another_vm(parent: FakeParent) -> None:
    """It is refused with both names, no matter which of the two VMs has the chosen address."""
    launch(parent, web("one"))
    made(parent)
    inside = Prefix(address=bytes((100, 64, 1, 77)), length=24)
    with pytest.raises(OperatorError, match=r"vm two: .* addresses that vm one has here, such as 100\.64\.1\.2"):
        launch(parent, web("two", address=inside))


def test_computed_addresses_avoid_those_in_vm_conf(parent: FakeParent) -> None:
    """This includes addresses of VMs that do not run."""
    inside = Prefix(address=bytes((100, 64, 0, 77)), length=10 + 8)
    parent.core.vms.add(web("fixed", address=inside), from_config=True)
    vm = parent.core.vms.add(web("other"), from_config=True)
    prefix4 = Globals(local_prefix=Prefix(address=bytes((100, 64, 0, 0)), length=16))
    parent.core.config = parent.core.config.replace(settings=prefix4)

    for _ in range(20):
        parent.core.vms.identities.of(vm.key).number = 0
        number = parent.network.plans.plan_of(vm, vm.config).number
        assert number >= 64  # the /18 contains the addresses of the first 64 numbers


def test_a_vm_keeps_its_addresses_while_they_are_free(parent: FakeParent, capfd: pytest.CaptureFixture[str]) -> None:
    """If they are not, its owner is told why it has others."""
    vm = parent.core.vms.add(web("other"), from_config=True)
    identity = parent.core.vms.identities.of(vm.key)
    identity.number = 5
    said = "vm other: its local interfaces get other addresses, because the earlier ones are in use\n"

    assert parent.network.plans.plan_of(vm, vm.config).number == 5
    assert said not in capfd.readouterr().err
    fixed = web("fixed", address=Prefix(address=bytes((100, 64, 5, 77)), length=24))
    parent.core.vms.add(fixed, from_config=True)
    number = parent.network.plans.plan_of(vm, vm.config).number
    assert number not in (0, 5)
    assert identity.number == number
    assert said in capfd.readouterr().err


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (Forward(port=8000, to=80, count=99), "interface 0: forward tcp port 8000:8098 to port 80: vm one has tcp"),
        (Forward(port=8022, to=22, udp=True), ""),
        (Forward(port=8023, to=22), ""),
    ],
)
def test_a_port_of_another_vm(parent: FakeParent, wanted: Forward, words: str) -> None:
    """It is refused while that VM runs."""
    first, _ = launch(parent, web("one", forwards=(SSH,)))
    made(parent)
    if words:
        with pytest.raises(OperatorError, match=words):
            launch(parent, web("two", forwards=(wanted,)))
        parent.network.release(first.vmid)
    launch(parent, web("two", forwards=(wanted,)))


def test_no_forwards_without_nat(parent: FakeParent) -> None:
    """In that case the operator makes the rules."""
    parent.core.config = parent.core.config.replace(settings=Globals(local_nat=False))
    with pytest.raises(OperatorError, match=r"vm web: interface 0: forward .* not without NAT \(local nat disable\)"):
        launch(parent, web(forwards=(SSH,)))


def test_changed_forwards_of_a_running_vm(parent: FakeParent) -> None:
    """priv, a restarted priv, and the VM are told.  A port that is taken changes nothing."""
    seed = SeedConfig(hostname="www")
    vm, _ = launch(parent, web(forwards=(SSH,)).replace(seed=seed))
    made(parent)
    launch(parent, web("two", forwards=(Forward(port=99, to=99),)))
    made(parent)
    new = Forward(port=7022, to=22)

    assert parent.network.change_forwards(vm, web(forwards=(SSH,))) == []
    assert parent.network.change_forwards(vm, web(forwards=(SSH, new))) == [
        "vm web: its new forwards count from now on"
    ]
    assert parent.peers[Proc.PRIV].sent[-1] == SetForwards(vmid=vm.vmid, forwards=((SSH, new),))
    limit = parent.peers[Proc.VMM].sent[-1]
    assert isinstance(limit, LimitVm)
    assert [nic.forwards for nic in limit.config.nics] == [nic.forwards for nic in vm.config.nics] == [(SSH, new)]
    assert vm.config.seed == seed
    (note,) = parent.network.change_forwards(vm, web(forwards=(Forward(port=99, to=1),)))
    assert note.endswith("vm two has tcp port 99 to port 99: its new forwards are not made; vmctl reload tries again")
    assert vm.config.nics[0].forwards == (SSH, new)

    parent.network.on_priv_lost(for_good=False)
    parent.network.begin()
    adopted = next(each for each in parent.peers[Proc.PRIV].sent if isinstance(each, AdoptNics))
    assert adopted.nics[0].forwards == (SSH, new)
    asked = len(parent.peers[Proc.PRIV].sent)
    launch(parent, vm.config)  # its guest resets itself, and keeps its interfaces
    assert len(parent.peers[Proc.PRIV].sent) == asked


def test_a_port_that_moves_from_one_vm_to_another(parent: FakeParent) -> None:
    """First all VMs lose the forwards that they are not to keep.  The other forwards are not interrupted."""
    stays = Forward(port=99, to=99)
    first, _ = launch(parent, web("first", forwards=(stays,)))
    made(parent)
    second, _ = launch(parent, web("second", forwards=(SSH,)))
    made(parent)
    after = {first: web("first", forwards=(SSH, stays)), second: web("second")}

    notes = [note for vm, wanted in after.items() for note in parent.network.drop_forwards(vm, wanted)]
    assert [vm.config.nics[0].forwards for vm in after] == [(stays,), ()]
    notes += [note for vm, wanted in after.items() for note in parent.network.change_forwards(vm, wanted)]
    assert [vm.config.nics[0].forwards for vm in after] == [(SSH, stays), ()]
    assert notes == [
        "vm second: the forwards that were removed from vm.conf have ended",
        "vm first: its new forwards count from now on"
    ]  # fmt: skip


def test_a_guest_that_resets_itself_keeps_its_ports(
    parent: FakeParent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reset succeeds even if a program listens on the port meanwhile.  A new start is refused."""
    vm, _ = launch(parent, web(forwards=(SSH,)))
    made(parent)
    monkeypatch.setattr("vmd.parent.hostports.in_the_way", lambda _forward: "a program has it")
    launch(parent, vm.config)
    assert len(parent.peers[Proc.PRIV].sent) == 1

    parent.network.release(vm.vmid)
    with pytest.raises(OperatorError, match="vm web: interface 0: forward tcp port 8022 to port 22: a program has it"):
        launch(parent, vm.config)


def test_forwards_of_a_vm_that_waits_for_its_interfaces(parent: FakeParent) -> None:
    """They take effect at its next start, like all other changes."""
    vm, _ = launch(parent, web())
    assert parent.network.change_forwards(vm, web(forwards=(SSH,))) == []
    assert vm.config.nics[0].forwards == ()


@pytest.mark.parametrize(
    ("uid", "known", "refused"),
    [(0, False, False), (1000, True, False), (1000, False, True)],
)
def test_settings_that_only_vm_conf_gives_a_received_vm(
    parent: FakeParent, uid: int, known: bool, refused: bool
) -> None:
    """Ports of this host belong to root, who may give them to a VM of a user."""
    there = web(forwards=(SSH,))
    vm = parent.core.vms.add(there if known else VmConfig(name="web"), from_config=known)
    vm.uid = uid
    if refused:
        with pytest.raises(OperatorError, match="interface 0: forward tcp port 8022 to port 22: only vm"):
            require_permitted_settings(vm, there)
        with pytest.raises(OperatorError, match="interface 0: a fixed address: only"):
            require_permitted_settings(vm, web(address=Prefix(address=bytes((10, 0, 0, 2)), length=31)))
    else:
        require_permitted_settings(vm, there)
    require_permitted_settings(vm, web())
    kernel = with_permitted_vhost(vm, web(vhost=True))
    assert [nic.vhost for nic in kernel.nics] == [not refused]


def received(plan_id: int, **fields: object) -> VmConfig:
    """Return a VM that is received from another host."""
    return VmConfig(
        name="guest",
        nics=(NicConfig(local=True, lladdr=MAC),),
        plan_id=plan_id,
        plan_prefix4=Prefix(address=bytes((100, 64, 0, 0)), length=10),
        **fields,  # type: ignore[arg-type]
    )


def test_a_received_vm_keeps_its_addresses(parent: FakeParent) -> None:
    """They may be outside of this daemon's ranges."""
    settings = Globals(local_prefix=Prefix(address=bytes((10, 0, 0, 0)), length=8), local_inet6=True)
    parent.core.config = parent.core.config.replace(settings=settings)
    launch(parent, received(77))
    made(parent)

    (link,) = started(parent).nics
    assert (link.host4, link.prefix6) == (bytes((100, 64, 77, 2)), b"")
    assert started(parent).config.plan_id == 77


def test_a_received_vm_with_the_addresses_of_a_running_vm(parent: FakeParent) -> None:
    """It is refused."""
    launch(parent, VmConfig(name="resident", nics=(NicConfig(local=True),)))
    made(parent)
    with pytest.raises(OperatorError, match=r"vm guest: .* addresses that vm resident has here, such as 100\.64\.1\.2"):
        launch(parent, received(1))


def test_a_vm_whose_addresses_a_received_vm_has(parent: FakeParent) -> None:
    """It gets others and keeps them, because while it does not run nobody knows the old ones."""
    resident = VmConfig(name="resident", nics=(NicConfig(local=True),))
    launch(parent, received(2))
    made(parent)
    vm, _ = launch(parent, resident)
    made(parent)

    number = started(parent).config.plan_id
    assert (vm.vmid, number in (0, 2), parent.core.vms.identities.of(vm.key).number) == (2, False, number)
    start = int.from_bytes(bytes((100, 64, 0, 2)), "big")
    assert started(parent).nics[0].host4 == (start + number * 256).to_bytes(4, "big")


def test_a_received_vm_whose_addresses_the_host_reaches(
    parent: FakeParent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused while its sender still has it.  A VM that already has its addresses keeps them when it resets."""
    vm, _ = launch(parent, received(5))
    made(parent)
    vpn = HostRoute(network=ipaddress.ip_network("100.64.0.0/16"), interface="vpn0")
    monkeypatch.setattr("vmd.parent.plans.host_routes", lambda: [vpn])

    words = r"vm guest: .* out of 100\.64\.0\.0/16, which this host reaches by vpn0, such as 100\.64\.7\.2/31"
    with pytest.raises(OperatorError, match=words):
        parent.network.plans.check(parent.core.vms.add(VmConfig(name="other"), from_config=True), received(7))
    launch(parent, vm.config)
    assert started(parent).config.plan_id == 5

    local, _ = launch(parent, VmConfig(name="local", nics=(NicConfig(local=True),)))
    made(parent)
    assert parent.core.vms.identities.of(local.key).number >= 256

    inside = Prefix(address=bytes((100, 64, 0, 0)), length=16)
    parent.core.config = parent.core.config.replace(settings=Globals(local_prefix=inside))
    with pytest.raises(OperatorError, match=r"vm whole: all addresses of `local prefix` are in 100\.64\.0\.0/16"):
        launch(parent, VmConfig(name="whole", nics=(NicConfig(local=True),)))
    launch(parent, VmConfig(name="apart", nics=(NicConfig(local=True, rdomain=9),)))  # its routing table is another one


def test_no_addresses_are_left(parent: FakeParent) -> None:
    """A /60 has room for three VMs.  A VM that was removed releases its number."""
    prefix6 = Prefix(address=b"\xfd" + bytes(15), length=60)
    parent.core.config = parent.core.config.replace(settings=Globals(local_inet6=True, local_inet6_prefix=prefix6))
    for name in ("a", "b", "c"):
        launch(parent, VmConfig(name=name, nics=(NicConfig(local=True),)))
        made(parent)
    fourth = VmConfig(name="d", nics=(NicConfig(local=True),))
    with pytest.raises(OperatorError, match="vm d: no addresses are left for its local interfaces; see `local prefix`"):
        launch(parent, fourth)

    vm = parent.core.vms.get(0, "b")
    parent.network.release(vm.vmid)
    parent.core.vms.remove(vm)
    launch(parent, fourth)
    made(parent)
    assert started(parent).config.plan_id == 2


@pytest.mark.parametrize(
    "fields",
    [
        {"plan_id": -1},
        {"plan_id": 1 << 31},
        {"plan_prefix4": Prefix(address=bytes(4), length=24)},
        {"plan_prefix4": Prefix(address=bytes(16), length=10)},
        {"plan_prefix4": Prefix(address=bytes((100, 64, 1, 0)), length=10)},
        {"plan_prefix6": Prefix(address=bytes(4), length=48)},
        {"plan_prefix6": Prefix(address=bytes(16), length=64)},
        {"plan_prefix6": Prefix(address=b"\xfd" + bytes(14) + b"\1", length=48)},
        {"nics": tuple(NicConfig() for _ in range(5))},
        {"nics": (NicConfig(tap="eth0"),)},
        {"nics": (NicConfig(lladdr=b"\1\0\0\0\0\0"),)},
        {"nics": (NicConfig(lladdr=bytes(6)),)},
        {"nics": (NicConfig(lladdr=b"\2"),)},
        {"nics": (NicConfig(group="a b"),)},
        {"nics": (NicConfig(switch="s" * 64),)},
        {"nics": (NicConfig(rdomain=256),)},
        {"nics": (NicConfig(forwards=(SSH,)),)},
        {"nics": (NicConfig(local=True, forwards=(SSH, SSH)),)},
        {"nics": (NicConfig(local=True, forwards=(Forward(port=1, to=70000),)),)},
        {"nics": (NicConfig(local=True, forwards=(SSH,)), NicConfig(local=True, forwards=(SSH,)))},
        {"nics": (NicConfig(local=True, address=Prefix(address=bytes(4), length=31)),)},
        {"nics": (NicConfig(local=True, address=Prefix(address=b"\1\0\0\1", length=0)),)},
        {"nics": (NicConfig(local=True, dns=(b"",)),)},
        {"nics": (NicConfig(local=True, dns=tuple(bytes((9, 9, 9, n)) for n in range(4))),)},
        {"nics": (NicConfig(local=True, host_name="a\nb"),)},
    ],
    ids=repr,
)
def test_invalid_descriptions_of_clients_and_streams(fields: dict[str, object]) -> None:
    """They are checked as the grammar of vm.conf would check them."""
    config = received(1)
    assert checked_request(config, bootable=True) == config
    with pytest.raises(OperatorError, match="vm guest: "):
        checked_request(config.replace(**fields), bootable=True)


def test_descriptions_are_printable_and_short() -> None:
    """They contain names that any user may have chosen, and `ip link` prints them."""
    assert alias("switch1-b\u00fcro\x1b") == "switch1-b?ro?"
    assert len(alias("x" * 999)) == 255


# --- counters ------------------------------------------------------------------------------------------------


def running(parent: FakeParent) -> Vm:
    """Return a running VM with one interface."""
    vm, _ = launch(parent, VmConfig(name="a", nics=(NicConfig(),)))
    made(parent)
    vm.begin_start(0)
    vm.begin_run(4711)
    return vm


def serve(parent: FakeParent, vm: Vm, client: int) -> None:
    """Send a client's request for the interfaces of a VM."""
    message = NicsRequest(vmid=vm.vmid)
    parent.status.serve_nics(message, Caller(uid=0, gid=0, pid=1), Envelope(message, client, 0, {}))


def infos(parent: FakeParent, client: int) -> list[NicInfo]:
    """Return the rows that a client got."""
    return [message for to, message in parent.answers if to == client and isinstance(message, NicInfo)]


def questions(parent: FakeParent) -> int:
    """Return how often the VM was asked for its counters."""
    return sum(isinstance(message, AskDevices) for message in parent.peers[Proc.VMM].sent)


VALUES = tuple(range(len(COUNTER_NAMES)))


def report(parent: FakeParent, message: DevicesReported, *drops: Trouble) -> None:
    """Have the VM answer, and priv if it was asked."""
    parent.status.on_reported(message, UNUSED)
    if message.vmid in parent.status.counting:
        parent.status.on_drops(DropsReported(vmid=message.vmid, troubles=drops), UNUSED)


def test_counters_come_from_the_vm(parent: FakeParent) -> None:
    """It is asked once for all clients that wait."""
    vm = running(parent)
    for client in range(1, 4):
        serve(parent, vm, client)
    assert parent.answers == []
    assert questions(parent) == 1
    report(parent, DevicesReported(vmid=vm.vmid, nics=(NicCounters(values=VALUES),)))

    for client in range(1, 4):
        assert [info.counters for info in infos(parent, client)] == [VALUES]
    serve(parent, vm, 1)
    assert questions(parent) == 2


@pytest.mark.parametrize(
    "values", [(), VALUES[: COUNTERS_LEAST - 1], (*VALUES, 1), (-1, *VALUES[1:]), (1 << 64, *VALUES[1:])]
)
def test_invalid_counters_are_ignored(parent: FakeParent, values: tuple[int, ...]) -> None:
    """A VM process may send any values."""
    vm = running(parent)
    serve(parent, vm, 1)
    report(parent, DevicesReported(vmid=vm.vmid, nics=(NicCounters(values=values),) * 9))

    assert [info.counters for info in infos(parent, 1)] == [()]


def wrong(parent: FakeParent, client: int) -> list[TroubleInfo]:
    """Return the troubles that a client was told."""
    return [message for to, message in parent.answers if to == client and isinstance(message, TroubleInfo)]


def test_troubles_come_from_the_vm(parent: FakeParent) -> None:
    """This holds without interfaces, too.  Their number is limited."""
    vm = running(parent)
    vm.running_config = vm.config.replace(nics=())
    parent.network.release(vm.vmid)
    for client, count in ((1, 1), (2, 0), (3, 1000)):
        serve(parent, vm, client)
        troubles = (Trouble(device="disk0", text="flush fails: No space left on device", since_s=5),) * count
        report(parent, DevicesReported(vmid=vm.vmid, nics=(), troubles=troubles))

    assert wrong(parent, 1) == [TroubleInfo(device="disk0", text="flush fails: No space left on device", since_s=5)]
    assert wrong(parent, 2) == []
    assert len(wrong(parent, 3)) == TROUBLES_MAX


def test_the_drops_of_firewalls_come_from_priv(parent: FakeParent) -> None:
    """It is asked once, about a VM with interfaces.  The client waits for the answers of both, in any order."""
    vm = running(parent)
    drop = Trouble(device="interface0", text="another firewall has dropped 3 of 3", since_s=7)
    devices = DevicesReported(vmid=vm.vmid, nics=(NicCounters(values=VALUES),))
    for client in (1, 2):
        serve(parent, vm, client)
    assert [message for message in parent.peers[Proc.PRIV].sent if isinstance(message, AskDrops)] == [
        AskDrops(vmid=vm.vmid)
    ]
    parent.status.on_drops(DropsReported(vmid=vm.vmid, troubles=(drop,)), UNUSED)
    assert parent.answers == []
    parent.status.on_reported(devices, UNUSED)
    for client in (1, 2):
        assert wrong(parent, client) == [TroubleInfo(device="interface0", text=drop.text, since_s=7)]
        assert [info.counters for info in infos(parent, client)] == [VALUES]

    serve(parent, vm, 3)
    parent.status.on_reported(devices, UNUSED)
    assert wrong(parent, 3) == []
    parent.loop.timers[-1].callback()  # priv does not answer: the answer of the VM is sent
    assert [info.counters for info in infos(parent, 3)] == [VALUES]


def test_a_vm_that_does_not_answer_in_time(parent: FakeParent) -> None:
    """The client gets what is known.  The late answer goes to clients that came meanwhile."""
    vm = running(parent)
    serve(parent, vm, 1)
    parent.loop.timers[-1].callback()
    serve(parent, vm, 2)
    assert questions(parent) == 1
    report(parent, DevicesReported(vmid=vm.vmid, nics=(NicCounters(values=VALUES),)))

    assert [info.counters for info in infos(parent, 1)] == [()]
    assert [info.counters for info in infos(parent, 2)] == [VALUES]
    assert not parent.status.counting


def test_a_vm_that_ends_before_it_answers(parent: FakeParent) -> None:
    """All clients that still wait get what is known."""
    vm = running(parent)
    serve(parent, vm, 1)
    serve(parent, vm, 2)
    parent.core.clients.gone(2)
    parent.status.answer_devices(vm.vmid)

    assert len(infos(parent, 1)) == 1
    assert infos(parent, 2) == []
    assert not parent.status.counting


def test_a_vm_that_does_not_run_is_not_asked(parent: FakeParent) -> None:
    """Its interfaces are described as far as they are known."""
    vm = parent.core.vms.add(VmConfig(name="a", nics=(NicConfig(switch="lan"),)), from_config=True)
    serve(parent, vm, 1)

    (info,) = infos(parent, 1)
    assert (info.tap, info.switch, info.lladdr) == ("", "lan", vm.config.nics[0].lladdr)
    assert parent.peers[Proc.VMM].sent == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"nics": ()},
        {"nics": (NicMade(name="tap0", lladdr=MAC, link_local=b"", mtu=1500),) * 2},
        {"nics": (NicMade(name="tap0", lladdr=MAC[:5], link_local=b"", mtu=1500),)},
        {"nics": (NicMade(name="tap0", lladdr=MAC, link_local=b"\xfe", mtu=1500),)},
        {"nics": (NicMade(name="tap0", lladdr=MAC, link_local=bytes(15), mtu=1500),)},
        {"nics": (NicMade(name="tap0", lladdr=MAC, link_local=bytes(17), mtu=1500),)},
        {"nics": (NicMade(name="", lladdr=MAC, link_local=b"", mtu=1500),)},
        {"nics": (NicMade(name="tap0", lladdr=MAC, link_local=b"", mtu=1 << 16),)},
        {"vmid": 9},
    ],
    ids=str,
)
def test_an_invalid_answer_of_priv(parent: FakeParent, wrong: dict[str, object]) -> None:
    """priv is ended because of it, and not the daemon.  The start that waits fails."""
    vm, failures = launch(parent, VmConfig(name="a", nics=(NicConfig(),)))
    asked = parent.peers[Proc.PRIV].sent[-1]
    assert isinstance(asked, MakeNics)
    right = NicsMade(
        vmid=vm.vmid, ticket=asked.ticket, nics=(NicMade(name="tap0", lladdr=MAC, link_local=b"", mtu=1500),)
    )
    tap = os.open("/dev/null", os.O_RDONLY)
    message = right.replace(**wrong)
    envelope = Envelope(message, 0, 0, {"taps": [tap]})

    with pytest.raises(PeerError, match="made other interfaces than vm a has"):
        parent.network.on_made(message, envelope)

    assert envelope.untaken() == [tap]
    os.close(tap)
    parent.network.on_priv_lost(for_good=True)
    assert [code for code, _ in failures] == [errno.EPIPE]


def test_an_answer_of_priv_without_its_tap(parent: FakeParent) -> None:
    """It is refused here, because the device process could not say why it has no tap."""
    vm, _ = launch(parent, VmConfig(name="a", nics=(NicConfig(),)))
    asked = parent.peers[Proc.PRIV].sent[-1]
    assert isinstance(asked, MakeNics)
    made_ = (NicMade(name="tap0", lladdr=MAC, link_local=b"", mtu=1500),)
    message = NicsMade(vmid=vm.vmid, ticket=asked.ticket, nics=made_)

    with pytest.raises(PeerError):
        parent.network.on_made(message, Envelope(message, 0, 0, {}))


def is_open(fd: int) -> bool:
    """Return whether a descriptor is open."""
    return os.path.exists(f"/proc/self/fd/{fd}")


def fail(what: str, number: int) -> None:
    """Fail as a call that the kernel refuses."""
    raise HostError(what, number)


def test_taps_are_removed_if_they_cannot_be_copied(parent: FakeParent, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the start stays open.  A new priv is told of the taps until they are gone."""
    vm, failures = launch(parent, VmConfig(name="a", nics=(NicConfig(),)))
    ((_, waiting),) = parent.network.launches.items()
    (boot,) = waiting.fds["boot"]
    monkeypatch.setattr("vmd.parent.network.copy_all", lambda _fds, what: fail(what, errno.EMFILE))
    asked = parent.peers[Proc.PRIV].sent[-1]
    assert isinstance(asked, MakeNics)
    tap = os.open("/dev/null", os.O_RDONLY)
    nics = (NicMade(name="tap0", lladdr=MAC, link_local=b"", mtu=1500),)
    message = NicsMade(vmid=vm.vmid, ticket=asked.ticket, nics=nics)
    parent.network.on_made(message, Envelope(message, 0, 0, {"taps": [tap]}))

    assert [code for code, _ in failures] == [errno.EMFILE]
    assert not is_open(tap)
    assert not is_open(boot)
    assert parent.peers[Proc.PRIV].sent[-1] == RemoveNics(vmid=vm.vmid)
    assert [*parent.network.taps, *parent.network.launches] == []
    assert [*parent.network.left] == [vm.vmid]
    removed = NicsRemoved(vmid=vm.vmid)
    parent.network.on_removed(removed, Envelope(removed, 0, 0, {}))
    assert [*parent.network.left] == []


def test_a_new_priv_is_told_of_interfaces_that_are_not_removed_yet(parent: FakeParent) -> None:
    """Otherwise they would stay for ever, if the earlier priv has ended before it removed them."""
    vm, _ = launch(parent, VmConfig(name="a", nics=(NicConfig(),)))
    made(parent)
    parent.network.on_priv_lost(for_good=False)
    parent.network.release(vm.vmid)
    asked = len(parent.peers[Proc.PRIV].sent)
    parent.network.begin()

    told = parent.peers[Proc.PRIV].sent[asked:]
    (known,) = [message for message in told if isinstance(message, AdoptNics)]
    assert known.vmid == vm.vmid
    assert told[-1] == RemoveNics(vmid=vm.vmid)
    assert parent.network.priv.outstanding == 2  # ConfigureNetwork and RemoveNics


def test_the_wait_of_a_vm_ends_if_tun_disappears(parent: FakeParent, monkeypatch: pytest.MonkeyPatch) -> None:
    """When priv is started again there is no descriptor for it.  The files of the VM are closed."""
    parent.network.on_priv_lost(for_good=False)
    vm, failures = launch(parent, VmConfig(name="a", nics=(NicConfig(),)))
    ((_, waiting),) = parent.network.launches.items()
    (boot,) = waiting.fds["boot"]
    monkeypatch.setattr("vmd.parent.forpriv.TUN", "/nowhere/tun")
    parent.network.begin()

    assert [(code, "load the kernel module tun" in text) for code, text in failures] == [(errno.ENOENT, True)]
    assert not is_open(boot)
    assert not any(isinstance(message, MakeNics) for message in parent.peers[Proc.PRIV].sent)
    assert parent.peers[Proc.PRIV].sent[-1] == RemoveNics(vmid=vm.vmid)


def test_priv_is_not_asked_about_a_vm_without_interfaces(parent: FakeParent) -> None:
    """Its devices are asked, and the client does not wait for priv."""
    vm = running(parent)
    vm.running_config = vm.config.replace(nics=())
    parent.network.release(vm.vmid)
    serve(parent, vm, 1)
    parent.status.on_reported(DevicesReported(vmid=vm.vmid), UNUSED)

    assert not any(isinstance(message, AskDrops) for message in parent.peers[Proc.PRIV].sent)
    assert questions(parent) == 1
    assert not parent.status.counting
    assert infos(parent, 1) == []


def test_forwards_that_priv_could_not_change_are_logged(parent: FakeParent, capfd: pytest.CaptureFixture[str]) -> None:
    """The message has the VM's name.  Answers about VMs that have ended are ignored."""
    vm = running(parent)
    parent.network.priv.outstanding = 3
    for message in (
        ForwardsSet(vmid=vm.vmid), ForwardsSet(vmid=99, text="no"), ForwardsSet(vmid=vm.vmid, text="nft: no room"),
    ):  # fmt: skip
        parent.network.on_forwards_set(message, UNUSED)

    assert capfd.readouterr().err == f"vmd: vm {vm.name}: its forwards were not changed: nft: no room\n"
    assert parent.network.priv.outstanding == 0


def test_the_address_of_a_guest(parent: FakeParent) -> None:
    """Only `local` interfaces have one, while the VM has its interfaces."""
    nics = (NicConfig(switch="lan"), NicConfig(local=True))
    vm, _ = launch(parent, VmConfig(name="a", nics=nics))
    made(parent)
    (guest4,) = [link.guest4 for link in started(parent).nics if link.local]

    assert parent.network.guest_address(vm.vmid, "interface1") == str(ipaddress.ip_address(guest4))
    others = ("interface0", "interface2", "disk1")
    assert {parent.network.guest_address(vm.vmid, device) for device in others} == {""}
    parent.network.release(vm.vmid)
    assert parent.network.guest_address(vm.vmid, "interface1") == ""


def test_a_host_without_tun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The message names the kernel module to load."""
    monkeypatch.setattr("vmd.parent.forpriv.TUN", str(tmp_path / "tun"))

    with pytest.raises(OperatorError, match=r"tun: No such file or directory: load the kernel module tun$"):
        open_tuns(2)


def test_a_host_without_tun_starts_nothing(
    parent: FakeParent, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The request fails at once, before priv is asked.  A VM without interfaces starts."""
    monkeypatch.setattr("vmd.parent.forpriv.TUN", str(tmp_path / "tun"))
    before = len(os.listdir("/proc/self/fd"))

    with pytest.raises(OperatorError, match="load the kernel module tun"):
        launch(parent, VmConfig(name="a", nics=(NicConfig(),)))

    assert (parent.network.launches, parent.peers[Proc.PRIV].sent) == ({}, [])
    assert len(os.listdir("/proc/self/fd")) == before
    launch(parent, VmConfig(name="b"))
    assert started(parent).config.name == "b"


def test_the_end_of_the_daemon_leaves_nothing(parent: FakeParent) -> None:
    """All descriptors are closed.  A later end of priv is reported to nobody."""
    before = len(os.listdir("/proc/self/fd"))
    launch(parent, VmConfig(name="a", nics=(NicConfig(),)))
    made(parent)
    _, failures = launch(parent, VmConfig(name="b", nics=(NicConfig(),)))

    parent.network.close()
    parent.network.on_priv_lost(for_good=True)

    assert (parent.network.launches, parent.network.taps, failures) == ({}, {}, [])
    assert len(os.listdir("/proc/self/fd")) <= before


# --- what others rely on -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "valid"),
    [
        ({"mtu": 0}, True), ({"mtu": 0xFFFF}, True), ({"mtu": 0x10000}, False), ({"mtu": -1}, False),
        ({"link_local": bytes(16)}, True), ({"link_local": b""}, True), ({"link_local": bytes(15)}, False),
        ({"name": "t"}, True), ({"name": "t" * 15}, True), ({"name": "t" * 16}, False), ({"name": "t\u00e4"}, False),
        ({"lladdr": bytes(7)}, False),
    ],
    ids=str,
)  # fmt: skip
def test_the_ends_of_what_priv_may_answer(parent: FakeParent, fields: dict[str, Any], valid: bool) -> None:
    """The VM's process gets these values, and does not check them again."""
    vm, _ = launch(parent, VmConfig(name="a", nics=(NicConfig(),)))
    nic = NicMade(name="tap0", lladdr=MAC, link_local=b"", mtu=1500).replace(**fields)
    message = NicsMade(vmid=vm.vmid, ticket=1, nics=(nic,))
    envelope = Envelope(message, 0, 0, {"taps": [os.open("/dev/null", os.O_RDONLY)]})
    if valid:
        parent.network.on_made(message, envelope)
        assert started(parent).nics[0].name == nic.name
    else:
        with pytest.raises(PeerError):
            parent.network.on_made(message, envelope)
        os.close(envelope.untaken()[0])


def test_switches_that_priv_could_not_make_are_logged(parent: FakeParent, capfd: pytest.CaptureFixture[str]) -> None:
    """The operator learns it although no VM uses them yet.  This is also an answer of priv."""
    parent.network.configure(parent.core.config)
    parent.network.on_configured(NetworkConfigured(problems=("lan: br1: No such device", "plain: no")), UNUSED)
    assert capfd.readouterr().err == "vmd: switch: lan: br1: No such device\nvmd: switch: plain: no\n"
    assert (parent.network.priv.outstanding, parent.network.priv.answers) == (0, 1)


def test_prefixes_that_collide_with_routes(
    parent: FakeParent, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The log warns at the start of the daemon and at each reload, and not when only priv starts again."""
    monkeypatch.setattr("vmd.parent.network.prefix_warnings", lambda _config, _routes: ["local prefix overlaps"])
    parent.network.begin()
    assert capfd.readouterr().err == "vmd: local prefix overlaps\n"
    parent.core.serving = True
    parent.network.begin()
    assert capfd.readouterr().err == ""
    assert parent.network.configure(parent.core.config) == ["local prefix overlaps"]
    assert capfd.readouterr().err == "vmd: local prefix overlaps\n"
    told = [each for each in parent.peers[Proc.PRIV].sent if isinstance(each, ConfigureNetwork)]
    assert [(each.nat, each.again) for each in told] == [(True, False), (True, True), (True, True)]


def test_an_adopting_daemon_keeps_the_networks(parent: FakeParent) -> None:
    """priv must not remove the interfaces of the guests that go on."""
    parent.core.adopts = True
    parent.core.config = parent.core.config.replace(settings=Globals(local_nat=False))
    parent.network.begin()
    (told,) = parent.peers[Proc.PRIV].sent
    assert isinstance(told, ConfigureNetwork)
    assert (told.again, told.nat) == (True, False)


def test_the_next_parent_learns_of_each_change_of_the_taps(parent: FakeParent) -> None:
    """It would otherwise not know taps that exist, or keep asking for the removal of some that are gone."""
    touched = parent.core.touched
    vm, _ = launch(parent, VmConfig(name="a", nics=(NicConfig(),)))
    touched.clear()
    made(parent)
    assert touched == {vm.vmid}
    touched.clear()
    parent.network.release(vm.vmid)
    assert touched == {vm.vmid}
    touched.clear()
    parent.network.on_removed(NicsRemoved(vmid=vm.vmid), UNUSED)
    assert touched == {vm.vmid}
    touched.clear()
    parent.network.release(vm.vmid)
    parent.network.on_removed(NicsRemoved(vmid=vm.vmid), UNUSED)
    assert touched == set()


@pytest.mark.parametrize("with_nic", [False, True])
@pytest.mark.parametrize("received", [False, True])
def test_the_order_in_which_vmm_gets_a_vm(parent: FakeParent, with_nic: bool, received: bool) -> None:
    """The next parent knows every VM that vmm has.  A VM that starts needs a slot first; a received one has its own."""
    order: list[str] = []
    send = parent.peers[Proc.VMM].send
    cast("Any", parent.core.slots).give = lambda: order.append("slot")
    parent.core.write = lambda: order.append("write")

    def note(*given: Any, **more: Any) -> None:  # noqa: ANN401 - a message
        order.append("send")
        send(*given, **more)

    cast("Any", parent.peers[Proc.VMM]).send = note
    config = VmConfig(name="a", nics=(NicConfig(),) if with_nic else ())
    vm = parent.core.vms.add(config, from_config=True)
    if received:
        vm.receiving = Receiving(paused=False)
        message = ResumeReceived(vmid=vm.vmid, config=vm.config, paused=False)
        parent.network.launch(vm, message, {}, lambda _code, _text: None)
    else:
        launch(parent, config)
    if with_nic:
        assert (order, parent.sent) == ([], [])
        made(parent)
    assert order == ([] if received else ["slot"]) + ["write", "send"]
    assert parent.sent == ["a"]
    assert vm.receiving is None or vm.receiving.resumed


def test_an_interface_without_its_switch_is_an_event(parent: FakeParent) -> None:
    """It is reported when the interfaces exist, with the number of the interface."""
    launch(parent, VmConfig(name="a", nics=(NicConfig(), NicConfig(switch="nope"))))
    assert trouble_events(parent) == []
    made(parent)
    assert trouble_events(parent) == [
        ("trouble", "a", "interface1", 'switch "nope" not found: the interface is connected to nothing')
    ]


def test_reports_about_long_names_of_interfaces(parent: FakeParent) -> None:
    """priv is not trusted with the length of what is kept."""
    parent.network.on_trouble(NetworkTrouble(device="d" * 99, text="flushed"), UNUSED)
    assert trouble_events(parent) == [("trouble", "", "d" * 15, "flushed")]


def test_forwards_that_change_while_priv_starts_again(parent: FakeParent) -> None:
    """The next priv learns them with the interfaces.  It is not asked twice."""
    vm, _ = launch(parent, web())
    made(parent)
    parent.network.on_priv_lost(for_good=False)
    asked = len(parent.peers[Proc.PRIV].sent)
    assert parent.network.change_forwards(vm, web(forwards=(SSH,))) != []
    parent.network.release(vm.vmid)
    assert len(parent.peers[Proc.PRIV].sent) == asked
    parent.network.begin()
    adopt = parent.peers[Proc.PRIV].sent[asked]
    assert isinstance(adopt, AdoptNics)
    assert adopt.nics[0].forwards == (SSH,)


def test_changed_forwards_of_a_received_vm(parent: FakeParent) -> None:
    """They are added to the machine that runs, which differs from vm.conf.  Later both have them."""
    vm, _ = launch(parent, web())
    made(parent)
    vm.running_config = vm.config.replace(vcpus=3)
    parent.network.change_forwards(vm, web(forwards=(SSH,)))
    limit = parent.peers[Proc.VMM].sent[-1]
    assert isinstance(limit, LimitVm)
    assert (limit.config, limit.config.vcpus, limit.config.nics[0].forwards) == (vm.running_config, 3, (SSH,))
    assert vm.config.nics[0].forwards == (SSH,)


@pytest.mark.parametrize("answer", ["configured", "made", "made too late", "failed", "removed", "forwards set"])
def test_each_answer_of_priv_counts(parent: FakeParent, answer: str) -> None:
    """A priv that owes one for too long is replaced, so none may be missed."""
    vm, _ = launch(parent, VmConfig(name="a", nics=(NicConfig(),)))
    asked = parent.peers[Proc.PRIV].sent[-1]
    if answer == "made too late":
        parent.network.give_up(vm)
        parent.peers[Proc.PRIV].sent.append(asked)
    before = parent.network.priv.answers
    if answer == "configured":
        parent.network.on_configured(NetworkConfigured(), UNUSED)
    elif answer == "failed":
        parent.network.on_failed(NicsFailed(vmid=vm.vmid, ticket=1, code=5, text="no"), UNUSED)
    elif answer == "removed":
        parent.network.on_removed(NicsRemoved(vmid=vm.vmid), UNUSED)
    elif answer == "forwards set":
        parent.network.on_forwards_set(ForwardsSet(vmid=vm.vmid), UNUSED)
    else:
        made(parent)
    assert parent.network.priv.answers == before + 1
