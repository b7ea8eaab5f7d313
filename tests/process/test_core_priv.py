"""priv is compromised, killed or stopped, or its network is damaged: the consequences, and VMs that are unaffected."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.bystander import PROMPT, Bystander
from tests.support.daemon import DEADLINE_S, ROOT
from tests.support.guests import guest
from tests.support.hostnet import NetDaemon, addresses, links, ours, rules, setting
from tests.support.network import Network
from tests.support.privdriver import Priv, nic
from tests.support.program import changed_program
from vmd.config.model import DEFAULT_FIRST_ID, IDS
from vmd.priv.sysctl import state_path

pytestmark = [pytest.mark.root, pytest.mark.kvm]

SWITCH = 'switch "lan" {\n    interface br7\n}\n'


def block(name: str, *lines: str) -> str:
    """Return a vm block of the demonstration guest."""
    options = ["disable", "memory 32M", f'boot "{guest("demo")}"', *lines]
    return f'vm "{name}" {{\n' + "".join(f"    {line}\n" for line in options) + "}\n"


# --- compromised -----------------------------------------------------------------------------------------------

INTRUDER = '''
import ctypes, socket
def _tries(where):
    """What somebody who has taken priv over does first: ask the daemon for a VM, as root."""
    def connect(family_call):
        with family_call() as sock:
            sock.connect("{path}")
            sock.send(b"x")
    for what, call in (
        ("socket", lambda: socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)),
        ("pair", lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0]),
    ):
        try:
            connect(call)
        except OSError as error:
            log.warn(f"{{where}}: {{what}} is refused: {{error.errno}}")
        else:
            log.warn(f"{{where}}: {{what}} has connected")
_confine, _make_nics = confine, HostNetwork.make_nics
def confine(*arguments):
    _tries("before its filter")
    return _confine(*arguments)
def _made(self, *arguments):
    _tries("in its filter")
    return _make_nics(self, *arguments)
HostNetwork.make_nics = _made
'''


def test_a_taken_over_priv_is_not_root_to_the_daemon(network: Network, tmp_path: Path) -> None:
    """priv cannot connect to the control socket: its filter refuses, and its user alone would be refused too."""
    conf = SWITCH + block("a", 'interface switch "lan"') + block("b")
    vmd = NetDaemon(tmp_path, network, conf)
    vmd.code = changed_program(tmp_path / "code", {"vmd/priv/main.py": INTRUDER.format(path=vmd.socket)})
    vmd.directory.chmod(0o755)
    with vmd, Bystander(vmd, "b"):
        vmd.must("start", "a")
        log = vmd.log

    assert "has connected" not in log
    assert log.count("before its filter: socket is refused: 13") == 1
    assert log.count("in its filter: socket is refused: 1\n") == 1
    assert log.count("in its filter: pair is refused: 1\n") == 1


def test_priv_is_no_root_and_has_a_filter(network: Network, tmp_path: Path) -> None:
    """priv has a user of its own, which is no VM's and no user of the host."""
    with NetDaemon(tmp_path, network, block("b")) as vmd, Bystander(vmd, "b"):
        people = {title: Path(f"/proc/{pid}/status").read_text() for title, pid in vmd.processes().items()}
    status = {
        title: dict(line.partition(":\t")[::2] for line in text.splitlines()) for title, text in people.items()
    }
    own = set(status["vmd: priv"]["Uid"].split())

    assert len(own) == 1
    assert own != {"0"}
    assert all(own.isdisjoint(lines["Uid"].split()) for title, lines in status.items() if title != "vmd: priv")
    assert (status["vmd: priv"]["Seccomp"], status["vmd: priv"]["Groups"].strip()) == ("2", "")
    assert int(status["vmd: priv"]["CapEff"], 16) == int(status["vmd: priv"]["CapBnd"], 16) == 1 << 12 | 1 << 13


def test_what_an_earlier_version_has_to_put_back_is_put_back(network: Network) -> None:
    """An earlier version kept its file beside the directory that priv uses now."""
    with network.inside():
        new = Path(state_path())
    old = new.parents[1] / new.name
    network.write("/proc/sys/net/ipv4/ip_forward", "1")
    old.parent.mkdir(exist_ok=True)
    old.write_text(json.dumps(["ipv4/ip_forward", "0", "1"]) + "\n")
    with Priv(network) as priv:
        assert setting(network, "ipv4/ip_forward") == "0"
        assert not old.exists()
        with priv.make(nic()):
            assert new.stat().st_uid == DEFAULT_FIRST_ID + IDS
    assert not new.exists()


def test_what_a_priv_of_another_id_has_to_put_back_is_put_back(network: Network, tmp_path: Path) -> None:
    """vm.conf may have had other ids before.  A link that the earlier priv left discloses nothing."""
    target = tmp_path / "root-s"
    target.touch()
    with network.inside():
        kept = Path(state_path())
    network.write("/proc/sys/net/ipv4/ip_forward", "1")
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(["ipv4/ip_forward", "0", "1"]) + "\n")
    kept.chmod(0o600)
    os.chown(kept, DEFAULT_FIRST_ID - 1, DEFAULT_FIRST_ID - 1)
    links = [kept.with_name(f"{kept.name}-{kind}") for kind in ("symbolic", "hard")]
    links[0].symlink_to(target)
    links[1].touch()
    kept.with_name(f"{kept.name}-other").hardlink_to(links[1])
    try:
        with Priv(network):
            assert setting(network, "ipv4/ip_forward") == "0"
            assert target.stat().st_uid == 0
            assert links[1].stat().st_uid == 0
    finally:
        for path in (*links, kept.with_name(f"{kept.name}-other")):
            path.unlink()


# --- ended, and stopped ----------------------------------------------------------------------------------------


def another_priv(vmd: NetDaemon, before: int) -> int:
    """Wait until a new priv has got the whole configuration; return its pid."""
    deadline_s = time.monotonic() + DEADLINE_S
    while vmd.processes().get("vmd: priv", before) == before:
        assert time.monotonic() < deadline_s
        select.select([], [], [], 0.02)
    return vmd.processes()["vmd: priv"]


def world(network: Network) -> dict[str, object]:
    """Return the state of the network: every interface with number, master and addresses, and our rules."""
    there = {
        name: (link["ifindex"], link.get("master"), link.get("ifalias"), link["operstate"], sorted(addresses(link)))
        for name, link in links(network).items()
    }
    return {**there, "rules": rules(network), "forwarding": setting(network, "ipv4/ip_forward")}


def world_without_rules(network: Network) -> dict[str, object]:
    """Return the state of every interface."""
    return {name: (link["ifindex"], link.get("master"), addresses(link)) for name, link in links(network).items()}


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until something is so."""
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s
        select.select([], [], [], 0.05)


@contextlib.contextmanager
def starting(vmd: NetDaemon, name: str) -> Iterator[subprocess.Popen[str]]:
    """Yield a client that starts a VM."""
    with subprocess.Popen(
        [sys.executable, "-m", "vmctl", "-s", vmd.socket, "start", name],
        cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    ) as client:  # fmt: skip
        yield client


def test_priv_is_killed_and_guests_go_on(network: Network, tmp_path: Path) -> None:
    """The next priv continues with the existing network, serves a waiting start, and removes unneeded interfaces."""
    network.run("ip", "tuntap", "add", "tap7", "mode", "tap")
    before = world_without_rules(network)
    conf = SWITCH + block("a", 'interface switch "lan"', "local interface", "local interface tap7")
    conf += block("b", "local interface") + block("c", 'interface switch "lan"')
    with NetDaemon(tmp_path, network, conf) as vmd:
        vmd.must("start", "b")
        with Bystander(vmd, "a") as bystander:
            # The kernel notices a carrier later, and only then adds the interface's second address.
            wait_for(lambda: len(addresses(links(network)["tap7"])) == 2)
            made = world(network)
            priv = vmd.processes()["vmd: priv"]
            os.kill(priv, signal.SIGSTOP)
            with starting(vmd, "c") as client:
                vmd.wait_state("c", "starting")
                os.kill(priv, signal.SIGKILL)
                _, said = client.communicate(timeout=DEADLINE_S)
            assert client.returncode == 0, said
            assert another_priv(vmd, priv) != priv
            assert made.items() <= {**world(network), "rules": made["rules"]}.items()
            vmd.must("stop", "-fw", "c")
            wait_for(lambda: world(network) == made)
            vmd.must("reload")
            assert world(network) == made
            bystander.core = bystander.core_now()
        priv = vmd.processes()["vmd: priv"]
        os.kill(priv, signal.SIGSTOP)
        vmd.must("stop", "-fw", "b")  # only the next priv hears of its interface
        vmd.must("stop", "-fw", "a")
        os.kill(priv, signal.SIGKILL)
        wait_for(lambda: {**before, **world_without_rules(network)} == {**world_without_rules(network), **before})
        wait_for(lambda: world_without_rules(network).keys() == {*before, "br7"})
    assert world_without_rules(network) == before
    assert setting(network, "ipv4/ip_forward") == "0"
    assert vmd.log.count("lost child: priv: it is started again") == 2


@pytest.mark.deep
def test_priv_that_does_not_answer_is_replaced(network: Network, tmp_path: Path) -> None:
    """After SIGSTOP a start waits at most until its deadline, while root gets the status and other guests run."""
    conf = SWITCH + block("a", 'interface switch "lan"') + block("b", "local interface")
    with NetDaemon(tmp_path, network, conf) as vmd, Bystander(vmd, "b") as bystander:
        priv = vmd.processes()["vmd: priv"]
        os.kill(priv, signal.SIGSTOP)
        with starting(vmd, "a") as client:
            vmd.wait_state("a", "starting")
            assert vmd.status("b")["state"] == "running"
            _, said = client.communicate(timeout=DEADLINE_S)
        assert client.returncode == 0, said
        assert another_priv(vmd, priv) != priv
        wait_for(lambda: not Path(f"/proc/{priv}").exists())
        bystander.core = bystander.core_now()
    assert "priv: does not answer for 30 s: it is started again" in vmd.log


@pytest.mark.parametrize("signum", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.deep)])
def test_the_daemon_ends_without_its_priv(network: Network, tmp_path: Path, signum: signal.Signals) -> None:
    """priv is killed, before a new one knows the network, or stopped: nothing of the network is left at the end."""
    before = world_without_rules(network)
    with NetDaemon(tmp_path, network, SWITCH + block("a", 'interface switch "lan"', "local interface")) as vmd:
        if signum == signal.SIGSTOP:  # after a kill, a new priv would run before the guest has shut down
            vmd.must("start", "a")
        assert world_without_rules(network) != before
        os.kill(vmd.processes()["vmd: priv"], signum)
        assert vmd.stop() == 0
    assert world_without_rules(network) == before
    assert ours(network) == []
    assert setting(network, "ipv4/ip_forward") == "0"
    assert vmd.log.count("could not remove its interfaces and rules: another one does") == 1


SLOW = """
import time
_close = HostNetwork.close
def _slowly(network):
    time.sleep(8)
    _close(network)
HostNetwork.close = _slowly
"""


@pytest.mark.deep
def test_a_priv_that_takes_its_time_to_end_is_waited_for(network: Network, tmp_path: Path) -> None:
    """priv may be slow on a busy host with many interfaces.  It finishes its work."""
    vmd = NetDaemon(tmp_path, network, SWITCH)
    vmd.code = changed_program(tmp_path / "code", {"vmd/priv/main.py": SLOW})
    with vmd:
        assert "br7" in links(network)
        assert vmd.stop() == 0
    assert ours(network) == []
    assert "killing it" not in vmd.log
    assert "another one does" not in vmd.log


def test_processes_start_from_the_code_that_the_daemon_began_with(network: Network, tmp_path: Path) -> None:
    """The program's files are gone, as during an upgrade: a new priv and new openers start all the same."""
    vmd = NetDaemon(tmp_path, network, block("a", "local interface") + block("b", "local interface"))
    vmd.code = changed_program(tmp_path / "code", {})
    with vmd:
        vmd.code.rename(tmp_path / "removed")
        vmd.code = ROOT
        before = vmd.processes()["vmd: priv"]
        os.kill(before, signal.SIGKILL)
        wait_for(lambda: vmd.processes().get("vmd: priv", before) != before)
        for name in ("a", "b"):  # an opener serves one start
            vmd.must("start", name)
            wait_for(lambda: "vmd: opener" in vmd.processes())
        log = vmd.log
    assert "Traceback" not in log


# --- damaged ---------------------------------------------------------------------------------------------------


def test_what_others_delete_is_made_again_and_said(network: Network, tmp_path: Path) -> None:
    """A bridge, an address and the rules are restored within seconds; for a tap, `status -v` reports the loss."""
    conf = SWITCH + block("a", 'interface switch "lan"', "local interface") + block("b", "local interface")

    def told(name: str, words: str) -> bool:
        return words in vmd.must("status", "-v", name)

    with NetDaemon(tmp_path, network, conf) as vmd, Bystander(vmd, "b"):
        vmd.must("start", "a")
        on_switch, local = (nic["tap"] for nic in vmd.interfaces("a"))
        (host4,) = (address for address in addresses(links(network)[local]) if address.startswith("100."))

        network.run("ip", "link", "delete", "br7")
        wait_for(lambda: links(network)[on_switch].get("master") == "br7")
        network.run("ip", "addr", "del", host4, "dev", local)
        wait_for(lambda: host4 in addresses(links(network)[local]))
        network.run("nft", "flush", "ruleset")
        # Changes before that moment belong to the same damage.
        wait_for(lambda: told("b", "the nftables table inet vmd was removed by another program: it was written again"))
        assert "masquerade" in rules(network)
        network.run("nft", "flush", "table", "inet", "vmd")
        network.run("ip", "link", "set", on_switch, "nomaster")
        wait_for(lambda: "masquerade" in rules(network))
        wait_for(lambda: links(network)[on_switch].get("master") == "br7")
        network.run("ip", "link", "delete", on_switch)

        wait_for(lambda: told("a", f"{on_switch} was deleted by another program"))
        assert told("a", "bridge br7 was deleted by another program: it was made again")
        assert told("a", f"was removed from {local} by another program: it was added again")
        assert not told("b", "br7")
        assert vmd.interfaces("b")
        assert vmd.log.count("rules or elements of the nftables table") == 1  # priv's own changes do not count
        assert "Traceback" not in vmd.log
        vmd.must("stop", "-fw", "a")
        vmd.must("start", "a")
        assert not told("a", f"{on_switch} was deleted")


@pytest.mark.deep
def test_what_others_change_is_put_right_and_said(network: Network, tmp_path: Path) -> None:
    """Repaired are single rules and set elements, bridge ports, interfaces that are down, and settings."""
    lines = 'interface switch "lan"', "local interface"
    conf = "local inet6\n" + SWITCH + block("a", *lines) + block("b", *lines)
    with NetDaemon(tmp_path, network, conf) as vmd, Bystander(vmd, "b"):
        vmd.must("start", "a")
        tap, local = (nic["tap"] for nic in vmd.interfaces("a"))
        has = addresses(links(network)[local])
        network.run("nft", "add chain inet vmd mine; add rule inet vmd mine accept")

        def damage(command: str, is_well: Callable[[], bool]) -> None:
            assert is_well()
            network.run("sh", "-c", command)
            wait_for(is_well)

        def is_up(name: str) -> bool:
            return "UP" in links(network)[name]["flags"]

        def counts(words: str, times: int) -> Callable[[], bool]:
            return lambda: rules(network).count(words) == times

        def is_set(setting_name: str) -> Callable[[], bool]:
            return lambda: setting(network, setting_name) == "1"

        damage("nft flush table inet vmd", counts("masquerade", 2))
        postrouting = network.run("nft", "-a", "list", "chain", "inet", "vmd", "postrouting")
        handle = next(line for line in postrouting.splitlines() if "@nat4" in line).split()[-1]
        damage(f"nft delete rule inet vmd postrouting handle {handle}", counts("saddr @nat4", 1))
        damage("nft flush set inet vmd source4", counts(f'"{local}" . ', 2))
        names = rules(network).count(f'"{local}"')
        damage(f"nft delete element inet vmd local '{{ \"{local}\" }}'", counts(f'"{local}"', names))
        damage(f"ip link set {tap} nomaster", lambda: links(network)[tap].get("master") == "br7")
        damage("ip link set br7 down", lambda: is_up("br7"))
        damage(f"ip link set {tap} down", lambda: is_up(tap))
        damage(f"ip link set {local} down", lambda: is_up(local) and addresses(links(network)[local]) == has)
        for name in ("ipv4/ip_forward", f"ipv4/conf/{local}/rp_filter"):
            damage(f"echo 0 > /proc/sys/net/{name}", is_set(name))

        for words in (
            "rules or elements of the nftables table inet vmd (chain ",
            "rules or elements of the nftables table inet vmd (set source4) were deleted by another program",
            "rules or elements of the nftables table inet vmd (set local) were deleted by another program",
            f"{tap} was taken out of br7 by another program: it was put back",
            "bridge br7 was switched off by another program: it was switched on again",
            f"{tap} was switched off by another program: it was switched on again",
            f"{local} was switched off by another program: it was switched on again",
            "IPv4 forwarding was switched off by another program: it was switched on again",
            f"net/ipv4/conf/{local}/rp_filter was changed by another program: it is 1 again",
        ):
            vmd.wait_log(words)
        assert f"{tap} was taken out of br7" in vmd.must("status", "-v", "a")
        assert f"{tap} was" not in vmd.must("status", "-v", "b")
        network.run("ip", "link", "add", "br8", "type", "bridge")
        network.run("ip", "link", "set", tap, "master", "br8")
        vmd.wait_log(f"{tap} was put into br8 instead of br7 by another program")
        network.run("ip", "link", "set", tap, "master", "br7")
        wait_for(lambda: "br8" not in vmd.must("status", "-v", "a"))
        assert "chain mine" in rules(network)
        assert vmd.log.count("rules or elements of the nftables table") == 4
        assert "Traceback" not in vmd.log


def test_a_guest_whose_tap_was_deleted_resets_itself(network: Network, tmp_path: Path) -> None:
    """The guest boots again, with a new interface."""
    with NetDaemon(tmp_path, network, SWITCH + block("a", 'interface switch "lan"')) as vmd:
        vmd.must("start", "a")
        pid, (nic,) = vmd.status("a")["pid"], vmd.interfaces("a")
        with vmd.console("a") as console:
            console.expect(PROMPT, DEADLINE_S)
            network.run("ip", "link", "delete", nic["tap"])
            console.type("reset\r")
            console.expect("resetting", DEADLINE_S)
            console.expect(PROMPT, DEADLINE_S)

        assert vmd.status("a")["pid"] != pid
        (nic,) = vmd.interfaces("a")
        assert links(network)[nic["tap"]]["master"] == "br7"
