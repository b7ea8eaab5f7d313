"""A driver of ours against our network interfaces, on this host's KVM under the whole daemon (`guests/net`).

What it drives is the whole path: registers, notifications and interrupts in the VM process and KVM, rings and
frames in the device process, a tap that priv has made, and a peer on the host that looks at every byte.
"""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.daemon import DEADLINE_S, Terminal
from tests.support.guests import guest
from tests.support.hostnet import NetDaemon
from tests.support.netpeer import Peer
from tests.support.network import Interface, Network

pytestmark = [pytest.mark.root, pytest.mark.kvm, pytest.mark.timeout(300)]

CHECKS_OF_ONE_INTERFACE = 1000  # at least; two have twice as many
LLADDR = "fe:e1:ba:00:00:09"


def conf(*lines: str, cmdline: str = "", interface: str = "") -> str:
    """Return a vm block with an interface."""
    boot = f'boot "{guest("net")}" cmdline "{cmdline}"'
    nic = f"interface {interface} {{ lladdr {LLADDR} }}"
    return 'vm "net" {\n' + "\n".join(("disable", "memory 64M", boot, nic, *lines)) + "\n}\n"


class Guest:
    """The running guest, which has its peer."""

    def __init__(self, vmd: NetDaemon, console: Terminal, tap: Interface, peer: Peer) -> None:
        self.vmd = vmd
        self.console = console
        self.tap = tap
        self.peer = peer
        console.expect("ready", DEADLINE_S)

    def tell(self, line: str) -> str:
        """Have it do something; return what it says meanwhile."""
        return self.console.answer(line, "ready", DEADLINE_S).replace("\r", "")

    def switch_off(self) -> None:
        """Have it end."""
        self.console.type("off\r")
        self.console.drain(DEADLINE_S)
        assert self.vmd.wait_state("net", "stopped")["text"] == "powered off by the guest"


@contextlib.contextmanager
def running(directory: Path, text: str, *, number: int = 0) -> Iterator[Guest]:
    """Run the guest in a network where nothing else speaks, with the peer on the tap of one of its interfaces."""
    with Network() as network, contextlib.ExitStack() as stack:
        for scope in ("all", "default"):
            network.write(f"/proc/sys/net/ipv6/conf/{scope}/disable_ipv6", "1")
        vmd = stack.enter_context(NetDaemon(directory, network, text))
        vmd.must("log", "verbose")
        vmd.must("start", "net")
        tap = Interface(network, vmd.interfaces("net")[number]["tap"])
        with Peer(tap) as peer, vmd.console("net") as console:
            yield Guest(vmd, console, tap, peer)


def check(report: str, *interfaces: str) -> None:
    """Raise AssertionError unless all checks of these interfaces were made, and good."""
    assert f"interfaces: {' '.join(interfaces)}\n" in report
    assert not re.findall(r"^FAIL .*", report, re.MULTILINE)
    assert not re.findall(r"^skip .*", report, re.MULTILINE)
    good = re.findall(r"^ok (\S+)", report, re.MULTILINE)
    assert f"net: {len(good)} ok, 0 failed" in report
    assert {name.split(".")[0] for name in good} == set(interfaces)
    assert len(good) > CHECKS_OF_ONE_INTERFACE * len(interfaces)
    assert f"address {LLADDR}\n" in report


@pytest.mark.parametrize(("lines", "interfaces"), [
    (("vcpus 2",), ("modern", "legacy")),
    (("virtio legacy",), ("legacy",)),
    (("virtio modern",), ("modern",)),
])  # fmt: skip
def test_frames(tmp_path: Path, lines: tuple[str, ...], interfaces: tuple[str, ...]) -> None:
    """Every byte both ways: all registers, interrupts, buffers and offloads, chains and tables, flags and events."""
    with running(tmp_path, conf(*lines)) as net:
        check(net.tell("test"), *interfaces)
        net.switch_off()


@pytest.mark.parametrize("how", ["", "intx", "legacy", "legacy intx"])
def test_the_link_goes_and_comes_back(tmp_path: Path, how: str) -> None:
    """The guest has a configuration interrupt for each change of the host's interface, and frames pass again."""
    with running(tmp_path, conf()) as net:
        net.console.answer(f"link {how}", "link up, and works", DEADLINE_S)
        for _ in range(2):
            net.tap.set("down")
            net.console.expect("link down", DEADLINE_S)
            net.tap.set("up")
            net.console.expect("link up, and works", DEADLINE_S)
        net.console.expect("ready", DEADLINE_S)
        net.switch_off()


def test_the_second_interface_is_another(tmp_path: Path) -> None:
    """A guest that works on its second interface has that one's address, and that one's frames."""
    slot = 3  # behind the random numbers' and the first interface's
    text = conf("interface lladdr fe:e1:ba:00:00:0a", cmdline=f"slot={slot}", interface="tap5")
    with running(tmp_path, text, number=1) as net:
        assert net.tap.name == "tap0"
        assert "frames are through" in net.tell("frames count=100")
        assert net.peer.guest == bytes.fromhex("fee1ba00000a")
        net.switch_off()


def exits_of_frames(directory: Path, count: int) -> int:
    """Return how often a vCPU came back to the VM process while its guest sent and got so many frames, asleep."""
    directory.mkdir()
    with running(directory, conf()) as net:
        assert "frames are through" in net.tell(f"frames count={count:05}")
        net.switch_off()
        found = re.search(r"vm/net: vcpu 0: (\d+) exits", net.vmd.log)
        assert found is not None
        return int(found[1])


def test_frames_do_not_enter_the_vm_process(tmp_path: Path) -> None:
    """Notifications and MSI-X interrupts are between the guest, KVM and the device process (DESIGN 5).

    The guest does the same but for the number of frames, and so would exit more often if frames took exits.
    """
    few, many = exits_of_frames(tmp_path / "few", 500), exits_of_frames(tmp_path / "many", 4500)

    assert many == few
