"""Our own guest driver (`guests/net`) with network interfaces of the whole daemon, on this host's KVM.

This tests the whole path: registers, notifications and interrupts in the VM process and KVM, rings and frames in the
device process, a tap that priv has made, and a peer on the host that checks every byte.
"""

import contextlib
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.daemon import DEADLINE_S, Terminal
from tests.support.guests import guest
from tests.support.hostnet import NetDaemon, switched_off
from tests.support.netpeer import Peer
from tests.support.network import Interface, Network

pytestmark = [pytest.mark.root, pytest.mark.kvm, pytest.mark.timeout(300)]

CHECKS_OF_ONE_INTERFACE = 1000  # at least; two have twice as many
LLADDR = "fe:e1:ba:00:00:09"
MIXED_S = 600


def conf(*lines: str, name: str = "net", cmdline: str = "", interface: str = "") -> str:
    """Return a vm block with an interface."""
    boot = f'boot "{guest("net")}" cmdline "{cmdline}"'
    nic = f"interface {interface} {{ lladdr {LLADDR} }}"
    return f'vm "{name}" {{\n' + "\n".join(("disable", "memory 64M", boot, nic, *lines)) + "\n}\n"


class Guest:
    """The running guest and its peer."""

    def __init__(self, vmd: NetDaemon, name: str, console: Terminal, tap: Interface, peer: Peer) -> None:
        self.vmd = vmd
        self.name = name
        self.console = console
        self.tap = tap
        self.peer = peer
        console.expect("ready", DEADLINE_S)

    def tell(self, line: str, deadline_s: float = DEADLINE_S) -> str:
        """Give the guest a command; return its output until it is done."""
        return self.console.answer(line, "ready", deadline_s).replace("\r", "")

    def switch_off(self) -> None:
        """Switch the guest off."""
        self.console.type("off\r")
        self.console.drain(DEADLINE_S)
        assert self.vmd.wait_state(self.name, "stopped")["text"] == "powered off by the guest"


@contextlib.contextmanager
def daemon(directory: Path, text: str) -> Iterator[NetDaemon]:
    """Run a daemon in a network namespace of its own."""
    with Network() as network:
        for scope in ("all", "default"):
            network.write(f"/proc/sys/net/ipv6/conf/{scope}/disable_ipv6", "1")
        with NetDaemon(directory, network, text) as vmd:
            vmd.must("log", "verbose")
            yield vmd


@contextlib.contextmanager
def started(vmd: NetDaemon, name: str, *, number: int = 0) -> Iterator[Guest]:
    """Start a VM, with the peer on the tap of one of its interfaces."""
    vmd.must("start", name)
    tap = Interface(vmd.network, vmd.interfaces(name)[number]["tap"])
    with Peer(tap) as peer, vmd.console(name) as console:
        yield Guest(vmd, name, console, tap, peer)


@contextlib.contextmanager
def running(directory: Path, text: str, *, number: int = 0) -> Iterator[Guest]:
    """Run the only VM of a configuration."""
    with daemon(directory, text) as vmd, started(vmd, "net", number=number) as net:
        yield net


def check(report: str, *interfaces: str) -> None:
    """Raise AssertionError unless all checks of these interfaces were made and passed."""
    assert f"interfaces: {' '.join(interfaces)}\n" in report
    assert not re.findall(r"^FAIL .*", report, re.MULTILINE)
    assert not re.findall(r"^skip .*", report, re.MULTILINE)
    good = re.findall(r"^ok (\S+)", report, re.MULTILINE)
    assert f"net: {len(good)} ok, 0 failed" in report
    assert {name.split(".")[0] for name in good} == set(interfaces)
    assert len(good) > CHECKS_OF_ONE_INTERFACE * len(interfaces)
    assert f"address {LLADDR}\n" in report


@pytest.mark.deep
@pytest.mark.timeout(2 * MIXED_S)
def test_frames(tmp_path: Path) -> None:
    """Every byte both ways: all registers, interrupts, buffers and offloads, chains and tables, flags and events."""
    with running(tmp_path, conf("vcpus 2")) as net:
        check(net.tell("test", MIXED_S), "modern", "legacy")
        net.switch_off()


@pytest.mark.parametrize(("kind", "interface", "cmdline"), [
    ("legacy", "legacy", ""), ("modern", "modern", ""), ("memory", "modern", ""), ("transitional", "modern", "mapped"),
])  # fmt: skip
def test_frames_of_one_kind(tmp_path: Path, kind: str, interface: str, cmdline: str) -> None:
    """With `virtio legacy`, `modern` and `memory`, frames pass with the only registers that exist or are used.

    Each of the two queues is notified at an address of its own with `virtio memory`, else at the same one.
    """
    with running(tmp_path, conf(f"virtio {kind}", cmdline=cmdline)) as net:
        said = net.tell("frames count=1000")
        assert f"interfaces: {interface}\n" in said
        assert "frames are through" in said
        net.switch_off()


@pytest.mark.deep
@pytest.mark.timeout(2 * MIXED_S)
def test_ten_minutes_of_mixed_traffic(tmp_path: Path) -> None:
    """Two guests at a time, one of each kind, exchange frames of all kinds.  No byte is lost."""
    kinds = ("legacy", "modern")
    text = "".join(conf(f"virtio {kind}", name=kind) for kind in kinds)
    with daemon(tmp_path, text) as vmd, contextlib.ExitStack() as stack:
        guests = [stack.enter_context(started(vmd, kind)) for kind in kinds]
        rounds, began = 0, time.monotonic()
        while time.monotonic() - began < MIXED_S:
            for line in ("test", "frames count=20000"):
                for net in guests:
                    net.console.type(f"{line}\r")
                for net in guests:
                    said = net.console.expect("ready", MIXED_S).replace("\r", "")
                    if line == "test":
                        check(said, net.name)
                    else:
                        assert "frames are through" in said
            rounds += 1
        print(f"{rounds} rounds")
        status = vmd.must("status", "-v")
        print(status)
        assert "dropped" not in status
        for net in guests:
            net.switch_off()


@pytest.mark.parametrize("how", ["", "intx", "legacy", "legacy intx"])
def test_the_link_goes_and_comes_back(tmp_path: Path, how: str) -> None:
    """The guest has a configuration interrupt for each change of the host's interface, and frames pass again."""
    with running(tmp_path, conf()) as net:
        net.console.answer(f"link {how}", "link up, and works", DEADLINE_S)
        for _ in range(2):
            with switched_off(net.vmd, net.tap):
                net.console.expect("link down", DEADLINE_S)
            net.console.expect("link up, and works", DEADLINE_S)
        net.console.expect("ready", DEADLINE_S)
        net.switch_off()


def test_the_second_interface_is_another(tmp_path: Path) -> None:
    """A guest that works on its second interface has that one's address, and that one's frames."""
    slot = 3  # after the slots of the random numbers and the first interface
    text = conf("interface lladdr fe:e1:ba:00:00:0a", cmdline=f"slot={slot}", interface="tap5")
    with running(tmp_path, text, number=1) as net:
        assert net.tap.name == "tap0"
        assert "frames are through" in net.tell("frames count=100")
        assert net.peer.guest == bytes.fromhex("fee1ba00000a")
        net.switch_off()


def exits_of_frames(directory: Path, count: int) -> int:
    """Return the vCPU's exits to the VM process while its guest sends and receives `count` frames, with sleeps."""
    directory.mkdir()
    with running(directory, conf()) as net:
        assert "frames are through" in net.tell(f"frames count={count:05}")
        net.switch_off()
        found = re.search(r"vm/net: vcpu 0: (\d+) exits", net.vmd.log)
        assert found is not None
        return int(found[1])


def test_frames_do_not_enter_the_vm_process(tmp_path: Path) -> None:
    """Notifications and MSI-X interrupts are between the guest, KVM and the device process (arch. 5).

    Only the number of frames differs, so the guest would exit more often if frames caused exits.
    """
    few, many = exits_of_frames(tmp_path / "few", 500), exits_of_frames(tmp_path / "many", 4500)

    assert many == few
