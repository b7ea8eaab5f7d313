"""Name servers of guests, with the whole daemon: DHCP answers have the name servers that the host has at that time."""

from pathlib import Path

import pytest

from tests.support.daemon import DEADLINE_S
from tests.support.guests import guest
from tests.support.hostnet import NetDaemon
from tests.support.network import Network

pytestmark = [pytest.mark.root, pytest.mark.kvm]

CONF = f'vm "net" {{\n disable\n memory 64M\n boot "{guest("net")}"\n local interface\n}}\n'


def test_a_guest_gets_the_present_name_servers(tmp_path: Path) -> None:
    """A warning names a server that only the host can reach.  Changes of the host and of vm.conf need no restart."""
    with Network() as network, NetDaemon(tmp_path, network, CONF, name_servers=["127.0.0.53"]) as vmd:
        started = vmd.must("start", "net")
        with vmd.console("net") as console:
            console.expect("ready", DEADLINE_S)
            (nic,) = vmd.interfaces("net")

            def servers() -> str:
                said = console.answer("dhcp", "ready", DEADLINE_S)
                (line,) = [line for line in said.splitlines() if line.startswith(f"offer {nic['guest4']} servers ")]
                return line.partition(" servers ")[2].strip()

            warning = "the host has no name server that guests can reach (it has 127.0.0.53 in /etc/resolv.conf)"
            assert warning in started
            assert f"net interface0: {warning}" in vmd.must("status", "-v")
            assert servers() == nic["host4"]

            (tmp_path / "etc/resolv.conf").write_text("nameserver 192.0.2.53\n")
            assert servers() == "192.0.2.53"
            assert warning not in vmd.must("status", "-v")

            vmd.conf.write_text("local dns 9.9.9.9 1.1.1.1\n" + CONF)
            vmd.must("reload")
            assert servers() == "9.9.9.9 1.1.1.1"
        assert vmd.log.count(warning) == 1
