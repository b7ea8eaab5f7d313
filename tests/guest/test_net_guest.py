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
    nic = f"interface {{ lladdr {LLADDR} {interface} }}"
    return 'vm "net" {\n' + "\n".join(("disable", "memory 64M", boot, nic, *lines)) + "\n}\n"


class Guest:
    """The running guest, which has its peer."""

    def __init__(self, vmd: NetDaemon, console: Terminal, tap: Interface) -> None:
        self.vmd = vmd
        self.console = console
        self.tap = tap
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
def running(directory: Path, text: str) -> Iterator[Guest]:
    """Run the guest in a network where nothing else speaks, with the peer on its first interface's tap."""
    with Network() as network, contextlib.ExitStack() as stack:
        for scope in ("all", "default"):
            network.write(f"/proc/sys/net/ipv6/conf/{scope}/disable_ipv6", "1")
        vmd = stack.enter_context(NetDaemon(directory, network, text))
        vmd.must("log", "verbose")
        vmd.must("start", "net")
        tap = Interface(network, vmd.interfaces("net")[0]["tap"])
        with Peer(tap), vmd.console("net") as console:
            yield Guest(vmd, console, tap)


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
