"""Networking as an operator sees it, with vm.conf, vmctl, `ip` and `nft`.  Each test has its own network namespace."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.daemon import DEADLINE_S, ROOT, Daemon
from tests.support.guests import guest
from tests.support.hostnet import NetDaemon, addresses, links, ours, rules, setting
from tests.support.network import Host, Interface, Network
from tests.support.waiting import pause
from vmd.client import Client
from vmd.ipc.messages.clients import SwitchInfo

pytestmark = [pytest.mark.root, pytest.mark.kvm]

PROMPT = "vmd-demo> "
RARP = b"\x80\x35"
SWITCH = 'switch "lan" {\n    interface br7\n    group lab\n    locked lladdr\n}\n'


def block(name: str, *lines: str, boot: bool = True) -> str:
    """Return a vm block of the demonstration guest."""
    options = ["disable", "memory 32M", *((f'boot "{guest("demo")}"',) if boot else ()), *lines]
    return f'vm "{name}" {{\n' + "".join(f"    {line}\n" for line in options) + "}\n"


def wait_for_links(vmd: NetDaemon, wanted: set[str], *, alone: str = "") -> None:
    """Wait until exactly the wanted interfaces exist, and the interface `alone` is in no bridge.

    priv removes some interfaces only after vmctl has its answer.
    """
    deadline_s = time.monotonic() + DEADLINE_S
    while set(there := links(vmd.network)) != wanted or (alone and "master" in there[alone]):
        assert time.monotonic() < deadline_s, f"{there}, not {sorted(wanted)}"
        pause()


def test_switches_are_listed(network: Network, tmp_path: Path) -> None:
    """Every client gets the list, such as a shell's completion.  Switches that no VM uses are in it, too."""
    with NetDaemon(tmp_path, network, SWITCH + 'switch "dmz" { interface br8 }\n') as vmd:
        client = Client(str(vmd.socket))
        lan, dmz = SwitchInfo(name="lan", interface="br7"), SwitchInfo(name="dmz", interface="br8")

        assert client.list_switches() == [lan, dmz]
        assert client.list_vms() == []

        vmd.must("reset", "switches")
        assert client.list_switches() == []
        client.close()


def test_interfaces_exist_while_their_vm_runs(network: Network, tmp_path: Path) -> None:
    """Interfaces exist before the guest runs and until the VM ends.  The MAC addresses are the same at every start."""
    conf = SWITCH + block("db1", 'interface switch "lan"', "local interface", "interfaces 3")
    with NetDaemon(tmp_path, network, conf, numbers={"db1": 1}) as vmd:
        wait_for_links(vmd, {"lo", "br7"})
        lladdrs = [nic["lladdr"] for nic in vmd.interfaces("db1")]

        vmd.must("start", "db1")

        on_switch, local, plain = vmd.interfaces("db1")
        there = links(network)
        assert [nic["tap"] for nic in (on_switch, local, plain)] == ["tap0", "tap1", "tap2"]
        assert [there[f"tap{index}"]["ifalias"] for index in range(3)] == ["vm1-if0-db1", "vm1-if1-db1", "vm1-if2-db1"]
        assert there["tap0"]["master"] == "br7"
        assert [on_switch["locked"], local["locked"]] == [True, False]
        assert addresses(there["tap1"]) == ["100.64.1.4/31"]
        assert (local["host4"], local["guest4"], local["prefix6"]) == ("100.64.1.4", "100.64.1.5", None)
        assert 'set vmd_lab { type ifname elements = { "tap0" } }' in rules(network)
        assert [nic["lladdr"] for nic in (on_switch, local, plain)] == lladdrs
        assert [lladdr[:11] for lladdr in lladdrs] == ["fe:e1:bb:d1", "fe:e1:bb:d2", "fe:e1:bb:d3"]

        vmd.must("stop", "-fw", "db1")
        wait_for_links(vmd, {"lo", "br7"})
        vmd.must("reload")
        assert [nic["lladdr"] for nic in vmd.interfaces("db1")] == lladdrs
        assert vmd.interfaces("db1")[0]["tap"] is None
        vmd.must("start", "db1")
    assert set(links(network)) == {"lo"}
    assert setting(network, "ipv4/ip_forward") == "0"


def test_a_guest_that_reboots_keeps_its_taps(network: Network, tmp_path: Path) -> None:
    """The new process of the VM has the same interfaces with the same addresses."""
    with NetDaemon(tmp_path, network, block("db1", "local interface", "interface")) as vmd:
        vmd.must("start", "db1")
        before, taps = vmd.status("db1")["pid"], vmd.interfaces("db1")
        indices = [links(network)[name]["ifindex"] for name in ("tap0", "tap1")]
        with vmd.console("db1") as console:
            console.expect(PROMPT, DEADLINE_S)
            console.answer("reset", PROMPT)

        assert vmd.status("db1")["pid"] != before
        assert vmd.interfaces("db1") == taps
        assert [links(network)[name]["ifindex"] for name in ("tap0", "tap1")] == indices


@pytest.mark.deep
def test_an_interface_that_ends_while_its_vm_is_stopped(network: Network, tmp_path: Path) -> None:
    """The counters are known without the VM process.  When it goes on, the VM ends, and its status names the device."""
    with NetDaemon(tmp_path, network, block("db1", "local interface")) as vmd:
        vmd.must("start", "db1")
        processes = vmd.processes()
        os.kill(processes["vmd: vm/db1"], signal.SIGSTOP)
        (nic,) = vmd.interfaces("db1")  # answered without the VM: the VM process has the question unread
        assert nic["counters"] is not None
        os.kill(processes["vmd: vm/db1/vionet0"], signal.SIGKILL)
        os.kill(processes["vmd: vm/db1"], signal.SIGCONT)
        assert vmd.wait_state("db1", "stopped")["text"].startswith("vm/db1/vionet0: ")


def test_status_describes_interfaces(network: Network, tmp_path: Path) -> None:
    """`status -v` has a line for each interface, for one VM or for all."""
    conf = "local inet6 prefix fd42:1:2::/48\n" + SWITCH
    conf += block("db1", 'interface tap5 { switch "lan", lladdr fe:e1:ba:0:0:9, down }', "local interface")
    with NetDaemon(tmp_path, network, conf, numbers={"db1": 1}) as vmd:
        stopped = vmd.must("show", "-v", "db1")
        vmd.must("start", "db1")
        shown = vmd.must("status", "-v")
        tap = vmd.interfaces("db1")[1]

        assert "db1 interface 0: no tap, switch lan, lladdr fe:e1:ba:00:00:09, down" in stopped
        assert "db1 interface 0: tap5, switch lan, lladdr fe:e1:ba:00:00:09 locked, mtu 1500, down" in shown
        assert f"db1 interface 1: tap0, local, lladdr {tap['lladdr']}, mtu 1500" in shown
        assert "host 100.64.1.4, guest 100.64.1.5, prefix fd42:1:2:5::/64" in shown
        assert set(addresses(links(network)["tap0"])) >= {"100.64.1.4/31", "fd42:1:2:5::1/64"}
        assert vmd.vmctl("status", "-v", "nobody").returncode == 4


def test_an_ad_hoc_vm_with_interfaces(network: Network, tmp_path: Path) -> None:
    """`vmctl start -n lan -L -i 3` makes an interface on a switch, a local one, and a plain one."""
    with NetDaemon(tmp_path, network, SWITCH) as vmd:
        vmd.must("start", "-n", "lan", "-L", "-i", "3", "-m", "32M", "-b", guest("demo"), "adhoc")

        first, second, third = vmd.interfaces("adhoc")

        assert (first["switch"], second["local"], third["switch"]) == ("lan", True, None)
        assert links(network)["tap0"]["master"] == "br7"


@pytest.mark.parametrize(
    ("conf", "words"),
    [
        ('switch "s" { interface wire\n}\n' + block("db1", 'interface switch "s"'), "wire is not a bridge but veth"),
        (block("db1", "interface tap6"), "interface tap6 exists already, and is not a tap"),
        (
            'switch "s" { interface br0\n}\n' + block("db1", "interface { switch s rdomain 3 }"),
            "rdomain 3: an interface on a switch is in the rdomain of the switch, 0",
        ),
    ],
)
def test_a_vm_whose_interfaces_cannot_be_made(
    network: Network, tmp_path: Path, conf: str, words: str
) -> None:
    """The client gets the reason, the VM is stopped, and other VMs can start."""
    network.run("ip", "link", "add", "wire", "type", "veth", "peer", "name", "other")
    network.run("ip", "tuntap", "add", "tap6", "mode", "tun")
    with NetDaemon(tmp_path, network, conf + block("other", "interface")) as vmd:
        failed = vmd.vmctl("start", "db1")

        assert failed.returncode == 1
        assert words in failed.stderr
        assert vmd.status("db1")["state"] == "stopped"
        vmd.must("start", "other")
        assert "tap0" in links(network)


@pytest.mark.parametrize(
    ("switch", "state"),
    [
        ("", "not found"),
        pytest.param('switch "gone" {\n disable\n interface br0\n}\n', "is disabled", marks=pytest.mark.deep),
    ],
)
def test_a_missing_or_disabled_switch(network: Network, tmp_path: Path, switch: str, state: str) -> None:
    """The VM starts without the switch, as upstream.  vmctl warns, and the log and `status -v` say so later."""
    with NetDaemon(tmp_path, network, switch + block("db1", 'interface switch "gone"', "interface")) as vmd:
        what = f'switch "gone" {state}: the interface is connected to nothing'
        assert f"vmctl: warning: interface 0: {what}\n" in vmd.vmctl("start", "db1").stderr
        assert f"{vmd.conf}:1: vm db1: interface 0: {what}".replace(":1:", f":{switch.count(chr(10)) + 1}:") in vmd.log
        (trouble,) = json.loads(vmd.must("status", "-v", "--json", "db1"))["vms"][0]["troubles"]
        assert (trouble["device"], trouble["text"]) == ("interface0", what)
        assert f"db1 interface0: {what} (since " in vmd.must("status", "-v", "db1")
        assert "master" not in links(network)["tap0"]

        vmd.conf.write_text('switch "gone" {\n interface br5\n}\n' + vmd.conf.read_text().removeprefix(switch))
        vmd.must("reload")
        vmd.must("stop", "-fw", "db1")
        vmd.must("start", "db1")
        assert "interface0" not in vmd.must("status", "-v", "db1")
        assert links(network)["tap0"]["master"] == "br5"


@pytest.mark.deep
def test_a_tap_that_another_vm_has(network: Network, tmp_path: Path) -> None:
    """A name in vm.conf is given to no other VM.  A second VM with this name in vm.conf is refused."""
    conf = block("any", "interface") + block("one", "interface tap0") + block("two", "interface tap0")
    with NetDaemon(tmp_path, network, conf) as vmd:
        vmd.must("start", "any")
        vmd.must("start", "one")
        refused = vmd.vmctl("start", "two")

        assert [vmd.interfaces(name)[0]["tap"] for name in ("any", "one")] == ["tap1", "tap0"]
        assert "vm two: interface tap0 is in use by vm one" in refused.stderr


def test_addresses_beyond_the_prefix(network: Network, tmp_path: Path) -> None:
    """A /60 has addresses for three VMs, and a fourth one is refused."""
    conf = "local inet6 prefix fd42:1:2::/60\n"
    conf += "".join(block(f"vm{number}", "local interface") for number in range(1, 5))
    with NetDaemon(tmp_path, network, conf, numbers={"vm1": 1, "vm2": 2, "vm3": 3}) as vmd:
        vmd.must("start", "vm3")
        refused = vmd.vmctl("start", "vm4")

        assert addresses(links(network)["tap0"])[1] == "fd42:1:2:c::1/64"
        assert "vm vm4: no addresses are left for its local interfaces" in refused.stderr


def test_reload_load_and_reset_of_switches(network: Network, tmp_path: Path) -> None:
    """Bridges are added and removed with the configuration.  A bridge in use stays until its last VM has ended."""
    with NetDaemon(tmp_path, network, SWITCH + block("db1", 'interface switch "lan"')) as vmd:
        vmd.must("start", "db1")
        more = tmp_path / "more.conf"
        more.write_text('switch "more" { interface br8\n}\n')
        vmd.must("load", more)
        wait_for_links(vmd, {"lo", "br7", "br8", "tap0"})

        vmd.conf.write_text('switch "new" { interface br9\n}\n' + block("db1", 'interface switch "new"'))
        vmd.must("reload")
        wait_for_links(vmd, {"lo", "br7", "br9", "tap0"})

        vmd.must("reset", "switches")
        wait_for_links(vmd, {"lo", "br7", "tap0"})
        vmd.must("stop", "-fw", "db1")
        wait_for_links(vmd, {"lo"})


def test_a_vm_is_stopped_while_its_interfaces_are_made(network: Network, tmp_path: Path) -> None:
    """The VM ends at once, and the late answer of priv changes nothing."""
    with NetDaemon(tmp_path, network, block("db1", "local interface"), numbers={"db1": 1}) as vmd:
        priv = vmd.processes()["vmd: priv"]
        os.kill(priv, signal.SIGSTOP)
        with subprocess.Popen(
            [sys.executable, "-m", "vmctl", "-s", vmd.socket, "start", "db1"],
            cwd=ROOT, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        ) as starting:  # fmt: skip
            vmd.wait_state("db1", "starting")
            stopped = vmd.must("stop", "-w", "db1")
            _, said = starting.communicate(timeout=DEADLINE_S)
        assert "terminated vm 1" in stopped
        assert "stopped before its guest began" in said
        assert vmd.status("db1")["state"] == "stopped"

        os.kill(priv, signal.SIGCONT)
        vmd.must("start", "db1")
        assert set(links(network)) == {"lo", "tap0"}
        assert addresses(links(network)["tap0"]) == ["100.64.1.2/31"]


@contextlib.contextmanager
def starting(vmd: NetDaemon, name: str) -> Iterator[subprocess.Popen[str]]:
    """Start a VM, and keep it waiting for its interfaces until the context ends; give the vmctl that waits."""
    priv = vmd.processes()["vmd: priv"]
    os.kill(priv, signal.SIGSTOP)
    with subprocess.Popen(
        [sys.executable, "-m", "vmctl", "-s", vmd.socket, "start", name],
        cwd=ROOT, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    ) as waiting:  # fmt: skip
        vmd.wait_state(name, "starting")
        yield waiting
        os.kill(priv, signal.SIGCONT)


def test_the_configuration_changes_while_interfaces_are_made(network: Network, tmp_path: Path) -> None:
    """The VM has the switch, the locked address and the host addresses of the configuration it was started with."""
    conf = SWITCH + block("db1", 'interface switch "lan"', "local interface")
    with NetDaemon(tmp_path, network, conf, numbers={"db1": 1}) as vmd:
        with starting(vmd, "db1") as waiting:
            vmd.must("reset", "switches")
            vmd.conf.write_text("local prefix 10.0.0.0/16\n" + block("other"))
            vmd.must("reload")
        assert waiting.returncode == 0

        on_switch, local = vmd.interfaces("db1")
        assert (on_switch["tap"], on_switch["locked"]) == ("tap0", True)
        assert links(network)["tap0"]["master"] == "br7"
        assert addresses(links(network)["tap1"]) == ["100.64.1.4/31"]
        assert (local["host4"], local["guest4"]) == ("100.64.1.4", "100.64.1.5")
        vmd.must("stop", "-fw", "db1")
        wait_for_links(vmd, {"lo"})


def test_a_console_that_is_attached_while_interfaces_are_made(network: Network, tmp_path: Path) -> None:
    """The viewer waits for the VM, and sees its output from the start."""
    with NetDaemon(tmp_path, network, block("db1", "local interface")) as vmd:
        priv = vmd.processes()["vmd: priv"]
        os.kill(priv, signal.SIGSTOP)
        with subprocess.Popen(
            [sys.executable, "-m", "vmctl", "-s", vmd.socket, "start", "db1"],
            cwd=ROOT, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        ):  # fmt: skip
            vmd.wait_state("db1", "starting")
            with vmd.attached("db1") as console:
                os.kill(priv, signal.SIGCONT)
                console.expect(PROMPT, DEADLINE_S)


def test_terminating_while_interfaces_are_made(network: Network, tmp_path: Path) -> None:
    """SIGTERM does not wait for a VM whose guest has not begun."""
    with NetDaemon(tmp_path, network, block("db1", "local interface").replace("disable", "enable")) as vmd:
        vmd.wait_state("db1", "running")
        vmd.must("stop", "-fw", "db1")
        priv = vmd.processes()["vmd: priv"]
        os.kill(priv, signal.SIGSTOP)
        with subprocess.Popen(
            [sys.executable, "-m", "vmctl", "-s", vmd.socket, "start", "db1"],
            cwd=ROOT, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        ):  # fmt: skip
            vmd.wait_state("db1", "starting")
            os.kill(vmd.pid, signal.SIGTERM)
            vmd.wait_log("stopped before its guest began")
            os.kill(priv, signal.SIGCONT)
            assert vmd.stop() == 0


@pytest.mark.parametrize("victims", [pytest.param(("parent",), marks=pytest.mark.deep), ("parent", "vmd: priv")])
def test_the_next_daemon_cleans_up_after_a_kill(network: Network, tmp_path: Path, victims: tuple[str, ...]) -> None:
    """After a kill of the parent, with or without priv, the next daemon removes the interfaces, rules and settings."""
    network.run("ip", "link", "add", "office", "type", "bridge")
    network.run("ip", "addr", "add", "192.0.2.1/24", "dev", "office")
    before = links(network)
    conf = 'switch "office" { interface office\n}\nlocal inet6\n' + SWITCH
    conf += block("db1", 'interface switch "lan"', 'interface switch "office"', "local interface")
    with NetDaemon(tmp_path, network, conf) as vmd:
        vmd.must("start", "db1")
        pids = {"parent": vmd.pid, **vmd.processes()}
        assert len(ours(network)) == 5
        assert vmd.process is not None
        for victim in victims:
            os.kill(pids[victim], signal.SIGSTOP)  # so that none of them notices the end of another
        for victim in victims:
            os.kill(pids[victim], signal.SIGKILL)
        vmd.process.wait(DEADLINE_S)
        vmd.socket.unlink(missing_ok=True)

        vmd.conf.write_text("")
        vmd.start()
        wait_for_links(vmd, set(before))
        assert ours(network) == []
        assert addresses(links(network)["office"]) == addresses(before["office"])
        assert "inet vmd" not in network.run("nft", "list", "ruleset")
        assert setting(network, "ipv4/ip_forward") == setting(network, "ipv6/conf/all/forwarding") == "0"

        vmd.conf.write_text(conf)
        vmd.must("reload")
        vmd.must("start", "db1")
        assert len(ours(network)) == 5
    assert set(links(network)) == set(before)


def test_a_tap_that_exists_already(network: Network, tmp_path: Path) -> None:
    """A VM uses an existing tap that vm.conf names, as upstream.  The tap stays after the VM and vmd have ended."""
    network.run("ip", "tuntap", "add", "tap4", "mode", "tap")
    network.run("ip", "link", "set", "tap4", "alias", "the accountants")
    with NetDaemon(tmp_path, network, SWITCH + block("db1", 'interface tap4 { switch "lan" }', "interface")) as vmd:
        vmd.must("start", "db1")
        assert [nic["tap"] for nic in vmd.interfaces("db1")] == ["tap4", "tap0"]
        there = links(network)["tap4"]
        assert (there["master"], there["ifalias"]) == ("br7", "the accountants")
        assert {"UP", "LOWER_UP"} <= set(there["flags"])  # a process has it open

        vmd.must("stop", "-fw", "db1")
        wait_for_links(vmd, {"lo", "br7", "tap4"}, alone="tap4")
    assert set(links(network)) == {"lo", "tap4"}


def test_a_vm_keeps_its_addresses_when_it_is_sent(network: Network, tmp_path: Path) -> None:
    """The guest has a DHCP lease for months, so its addresses are still those of the sender's configuration.

    A VM of the receiver with the same id, and a local interface at the same place, has other addresses.
    """
    conf = SWITCH + block("first") + block("db1", 'interface switch "lan"', "local interface")
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    with (
        Network() as other,
        NetDaemon(here, network, "local inet6\n" + conf, numbers={"first": 1, "db1": 2}) as sender,
        NetDaemon(there, other, SWITCH + block("one") + block("resident", "interface", "local interface")) as receiver,
    ):
        sender.must("start", "db1")
        receiver.must("start", "resident")
        assert receiver.status("resident")["id"] == sender.status("db1")["id"] == 2
        wanted = sender.interfaces("db1")
        here_links = links(network)
        host_addresses = addresses(here_links["tap1"])
        on_switch = Host(Interface(other, "br7"))
        move(sender, receiver, "db1")

        moved = receiver.interfaces("db1")
        for key in ("lladdr", "host4", "guest4", "prefix6", "locked"):
            assert [nic[key] for nic in moved] == [nic[key] for nic in wanted]
        assert addresses(links(other)["tap3"])[:2] == host_addresses[:2]
        assert addresses(links(other)["tap3"])[0] == "100.64.2.4/31"
        assert links(other)["tap2"]["master"] == "br7"
        assert [nic["tap"] for nic in moved] == ["tap2", "tap3"]
        for tap, before in (("tap2", "tap0"), ("tap3", "tap1")):
            assert links(other)[tap]["address"] == here_links[before]["address"]
        frame = on_switch.receive()  # the announcement, by which switches learn the guest's new port
        while frame[12:14] != RARP:
            frame = on_switch.receive()
        assert frame[6:12].hex(":") == moved[0]["lladdr"]
        on_switch.socket.close()
        wait_for_links(sender, {"lo", "br7"})

        receiver.must("stop", "-fw", "resident")
        receiver.must("start", "resident")
        assert receiver.interfaces("resident")[1]["guest4"] != moved[1]["guest4"]


@pytest.mark.deep
def test_a_guest_that_is_received_paused_is_announced_when_it_runs(network: Network, tmp_path: Path) -> None:
    """It is not announced before, because it may still run again on the sender."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    with (
        Network() as other,
        NetDaemon(here, network, SWITCH + block("db1", 'interface switch "lan"')) as sender,
        NetDaemon(there, other, SWITCH) as receiver,
    ):
        sender.must("start", "db1")
        on_switch = Host(Interface(other, "br7"))
        move(sender, receiver, "-p", "db1")
        assert receiver.status("db1")["state"] == "paused"
        while (frame := on_switch.try_receive()) is not None:
            assert frame[12:14] != RARP

        receiver.must("unpause", "db1")
        while on_switch.receive()[12:14] != RARP:
            pass
        on_switch.socket.close()


@pytest.mark.deep
def test_a_vm_is_not_received_if_its_addresses_are_in_use(network: Network, tmp_path: Path) -> None:
    """The message names the VM that has them.  The VM runs again on the sender."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    with (
        Network() as other,
        NetDaemon(here, network, block("db1", "local interface"), numbers={"db1": 9}) as sender,
        NetDaemon(there, other, block("resident", "local interface"), numbers={"resident": 9}) as receiver,
    ):
        sender.must("start", "db1")
        receiver.must("start", "resident")

        said = move(sender, receiver, "db1", fails=True)

        assert "its local interfaces have addresses that vm resident has here, such as 100.64.9.2" in said
        assert sender.wait_state("db1", "running")
        assert set(links(other)) == {"lo", "tap0"}


@pytest.mark.deep
def test_a_vm_is_stopped_while_it_is_received(network: Network, tmp_path: Path) -> None:
    """The stream was read, and priv is making the interfaces.  The late answer of priv changes nothing."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    with (
        Network() as other,
        NetDaemon(here, network, block("db1", "local interface")) as sender,
        NetDaemon(there, other, block("other", "interface")) as receiver,
    ):
        sender.must("start", "db1")
        priv = receiver.processes()["vmd: priv"]
        os.kill(priv, signal.SIGSTOP)
        with ThreadPoolExecutor() as threads:
            moving = threads.submit(move, sender, receiver, "db1", fails=True)
            sender.wait_log("db1: sent vm 1")
            receiver.must("stop", "-fw", "db1")
            assert "db1" in moving.result()
        os.kill(priv, signal.SIGCONT)
        receiver.must("start", "other")
        assert set(links(other)) == {"lo", "tap0"}
        assert links(other)["tap0"]["ifalias"].endswith("-other")


@pytest.mark.deep
def test_a_switch_that_the_receiver_lacks(network: Network, tmp_path: Path) -> None:
    """The message names the switch.  The VM runs again on the sender."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    with (
        Network() as other,
        NetDaemon(here, network, SWITCH + block("db1", 'interface switch "lan"')) as sender,
        NetDaemon(there, other) as receiver,
    ):
        sender.must("start", "db1")
        assert 'switch "lan" not found' in move(sender, receiver, "db1", fails=True)
        assert sender.wait_state("db1", "running")


def move(sender: Daemon, receiver: Daemon, *arguments: str, fails: bool = False) -> str:
    """Send a VM, whose name comes last, through a pipe.  Return the messages of `receive`, which has all arguments."""
    command = [sys.executable, "-m", "vmctl", "-s"]
    with subprocess.Popen(
        [*command, sender.socket, "send", arguments[-1]], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as sending:
        received = subprocess.run(
            [*command, receiver.socket, "receive", *arguments],
            cwd=ROOT, stdin=sending.stdout, capture_output=True, text=True, timeout=DEADLINE_S, check=False,
        )  # fmt: skip
        assert sending.stdout is not None
        sending.stdout.close()
    assert (received.returncode != 0) == fails, received.stderr + receiver.log
    return received.stderr


@pytest.mark.deep
def test_a_second_daemon_in_the_same_network(network: Network, tmp_path: Path) -> None:
    """Its VMs without interfaces run.  A VM with an interface is refused, with the reason."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    with NetDaemon(here, network, block("db1", "interface")) as first:
        first.must("start", "db1")
        with NetDaemon(there, network, block("db2", "interface") + block("db3")) as second:
            second.must("start", "db3")
            refused = second.vmctl("start", "db2", "--json")
            assert json.loads(refused.stdout)["code"] == errno.EBUSY
            assert "the network of this host belongs to another vmd" in refused.stderr
        assert set(links(network)) == {"lo", "tap0"}
