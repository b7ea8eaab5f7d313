"""VMs in SNMP: Debian's agent, queried with its tools, and its receiver of traps."""

import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.process.test_daemon import PROMPT
from tests.support.daemon import DEADLINE_S
from tests.support.guests import guest
from tests.support.hostnet import NetDaemon
from tests.support.network import Network
from tests.support.snmp import CONTEXT, Agent, agent, wait_for
from vmd.version import VERSION

pytestmark = [pytest.mark.root, pytest.mark.kvm]

CONF = """
{agentx}
vm "demo" {{
    disable
    memory 128M
    vcpus 2
    boot "{kernel}"
    disk "{directory}/disk.raw" format raw
    interface {{ switch "lan", lladdr 02:00:00:00:00:07 }}
}}
vm "other" {{
    disable
    memory 64M
    boot "{blk}" cmdline "bench"
    disk "{directory}/busy.raw" format raw
    cdrom "{directory}/disc.iso"
}}
switch "lan" {{ interface br9 }}
"""
RUNNING, SHUTTING_DOWN, SHUTDOWN, PAUSED, CRASHED, DELETED = "1", "2", "3", "4", "9", "10"
NAME, OPER_STATE, CPU_TIME = ".1.4.1.2", ".1.4.1.6", ".1.4.1.17"


class Rig:
    """A daemon, and an agent that is started after it."""

    def __init__(self, vmd: NetDaemon, snmp: Agent) -> None:
        self.vmd = vmd
        self.snmp = snmp

    def configure(self, agentx: str) -> None:
        """Load another configuration."""
        self.vmd.conf.write_text(configured(self.vmd.directory, agentx))
        self.vmd.must("reload")


def configured(directory: Path, agentx: str) -> str:
    """Return a configuration."""
    return CONF.format(agentx=agentx, kernel=guest("demo"), blk=guest("blk"), directory=directory)


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """Yield a daemon and an agent."""
    tmp_path = tmp_path_factory.mktemp("agentx")
    for name, size in (("disk.raw", 1 << 20), ("busy.raw", 16 << 20), ("disc.iso", 1 << 20)):
        (tmp_path / name).write_bytes(bytes(size))
    with Network() as network, agent(tmp_path / "snmp", network) as snmp:
        conf = configured(tmp_path, f'agentx path "{snmp.socket}"')
        with NetDaemon(tmp_path, network, conf) as vmd:
            vmd.wait_log("no SNMP agent at")
            snmp.listen()
            snmp.start()
            snmp.wait_served()
            yield Rig(vmd, snmp)


def test_what_there_is_and_what_happens(rig: Rig) -> None:
    """Variables match the host, and notifications arrive, with an agent that starts after the daemon."""
    vmd, snmp = rig.vmd, rig.snmp
    assert vmd.log.count("no SNMP agent at") == 1
    limits = Path(f"/proc/{vmd.processes()['vmd: agentx']}/limits").read_text()
    assert re.search(rf"Max address space +{512 << 20} +{512 << 20} ", limits)
    vmd.must("start", "demo")
    with vmd.console("demo") as console:
        console.expect(PROMPT, DEADLINE_S)
    vmd.must("pause", "demo")
    snmp.wait_heard(RUNNING, PAUSED)

    walked = snmp.walk()

    assert walked == snmp.walk("snmpwalk") | {name: walked[name] for name in (".1.1.4.0", ".1.4.1.16.1")}
    assert [walked[name] for name in (".1.1.1.0", ".1.1.2.0", ".1.2.0")] == [
        'STRING: "vmd on Linux KVM"', f'STRING: "{VERSION}"', "INTEGER: 2",
    ]  # fmt: skip
    row = {name.rpartition(".")[0]: value for name, value in walked.items() if name.startswith(".1.4.1.")}
    columns = (NAME, OPER_STATE, ".1.4.1.5", ".1.4.1.7", ".1.4.1.8", ".1.4.1.9", ".1.4.1.15")
    assert [walked[f"{column}.1"].partition(": ")[2] for column in columns] == [
        '"demo"',
        "8",
        "3",
        "3",
        "2",
        "2",
        "128",
    ]
    assert len(row) == 16
    _cpu_time_is_the_kernel_s(vmd, walked)
    (link,) = json.loads(vmd.network.run("ip", "-j", "link", "show", "dev", vmd.interfaces("demo")[0]["tap"]))
    bridge = json.loads(vmd.network.run("ip", "-j", "link", "show", "dev", "br9"))[0]["ifindex"]
    network = [walked[f".1.8.1.{column}.1.1"] for column in (2, 3, 4, 5)]
    assert network == [
        f"INTEGER: {link['ifindex']}", f"INTEGER: {bridge}", 'STRING: "virtio-net"', "Hex-STRING: 02 00 00 00 00 07",
    ]  # fmt: skip
    assert walked[".1.7.1.6.1.1"] == f'STRING: "{vmd.directory}/disk.raw"'

    vmd.must("unpause", "demo")
    vmd.must("stop", "-fw", "demo")
    snmp.wait_heard(RUNNING, PAUSED, RUNNING, SHUTTING_DOWN, SHUTDOWN)
    assert snmp.notifications()[-1][".1.3.6.1.2.1.236.1.4.1.2.1"] == 'STRING: "demo"'
    assert snmp.walk(root=f".1.3.6.1.2.1.236{OPER_STATE}") == {".1": "INTEGER: 11", ".2": "INTEGER: 11"}


def _cpu_time_is_the_kernel_s(vmd: NetDaemon, walked: dict[str, str]) -> None:
    """Compare the CPU time of a paused VM, whose vCPUs do not run."""
    pid = vmd.status("demo")["pid"]
    for task in Path(f"/proc/{pid}/task").iterdir():
        thread = (task / "comm").read_text().strip()
        if thread in ("vcpu0", "vcpu1"):
            ran_ns = int((task / "schedstat").read_text().split()[0])
            assert walked[f".1.5.1.2.1.{int(thread[-1]) + 1}"] == f"Counter64: {ran_ns // 1000}"


@pytest.mark.deep
def test_a_vm_that_crashes_and_one_that_is_forgotten(rig: Rig) -> None:
    """The state of a crashed VM stays; an ad hoc VM is deleted when it ends."""
    vmd, snmp = rig.vmd, rig.snmp
    since = len(snmp.heard())
    vmd.must("start", "demo")
    os.kill(vmd.status("demo")["pid"], signal.SIGKILL)
    vmd.wait_state("demo", "stopped")
    snmp.wait_heard(RUNNING, CRASHED, since=since)
    assert snmp.walk(root=f".1.3.6.1.2.1.236{OPER_STATE}")[".1"] == "INTEGER: 12"

    vmd.must("start", "-b", guest("demo"), "adhoc")
    vmd.must("stop", "-fw", "adhoc")
    snmp.wait_heard(RUNNING, CRASHED, RUNNING, SHUTTING_DOWN, SHUTDOWN, DELETED, since=since)
    assert snmp.notifications()[-1][".1.3.6.1.2.1.236.1.4.1.8.3"] == "INTEGER: 3"


@pytest.mark.deep
def test_what_a_disk_has_done(rig: Rig) -> None:
    """The disk's counters match those of its guest exactly."""
    vmd, snmp = rig.vmd, rig.snmp
    since = len(snmp.heard())
    vmd.must("start", "other")
    with vmd.console("other") as console:
        for command, requests, length in (("write", 40, 65536), ("read", 12, 1 << 20)):
            console.expect("ready", DEADLINE_S)
            console.type(f"{command} bytes={length} depth=4 count={requests} piece={min(length, 65536)} asleep\r")
            console.expect(f"done {requests} requests", DEADLINE_S)
    vmd.must("pause", "other")
    snmp.wait_heard(RUNNING, PAUSED, since=since)  # from now on the cached figures of the last second are not used
    storage = snmp.walk(root=".1.3.6.1.2.1.236.1.7.1")
    counted = [storage[f".{column}.2.1"] for column in range(11, 17)]
    assert counted == [
        "INTEGER: 16", "INTEGER: -1", "Counter64: 12", "Counter64: 40", f"Counter64: {12 << 20}",
        f"Counter64: {40 << 16}",
    ]  # fmt: skip
    assert [storage[f".{column}.2.1"] != "Counter64: 0" for column in (17, 18)] == [True, True]
    drive = [storage[f".{column}.2.101"] for column in (6, 7, 8, 11)]
    assert drive == [f'STRING: "{vmd.directory}/disc.iso"', "INTEGER: 3", "INTEGER: 4", "INTEGER: 1"]
    vmd.must("stop", "-fw", "other")
    snmp.wait_heard(RUNNING, PAUSED, SHUTTING_DOWN, SHUTDOWN, since=since)


@pytest.mark.deep
def test_a_daemon_that_takes_over(rig: Rig) -> None:
    """A takeover sends no notification of a VM; later events do."""
    vmd, snmp = rig.vmd, rig.snmp
    since, process = len(snmp.heard()), vmd.processes()["vmd: agentx"]
    vmd.must("start", "other")
    snmp.wait_heard(RUNNING, since=since)
    vmd.must("upgrade")
    wait_for(lambda: vmd.family().get("vmd: agentx", process) != process, vmd.log_path)
    snmp.wait_served()
    assert snmp.walk(root=f".1.3.6.1.2.1.236{OPER_STATE}")[".2"] == "INTEGER: 4"
    vmd.must("stop", "-fw", "other")
    snmp.wait_heard(RUNNING, SHUTTING_DOWN, SHUTDOWN, since=since)


@pytest.mark.deep
def test_an_agent_that_is_started_again(rig: Rig) -> None:
    """The daemon connects again, however the agent ended."""
    vmd, snmp = rig.vmd, rig.snmp
    for signum in (signal.SIGTERM, signal.SIGKILL):
        lost = vmd.log.count(f"the SNMP agent at {snmp.socket} ")
        snmp.stop(signum)
        vmd.wait_log(f"the SNMP agent at {snmp.socket} ", times=lost + 1)
        snmp.start()
        snmp.wait_served()


@pytest.mark.deep
def test_a_process_that_is_killed_is_started_again(rig: Rig) -> None:
    """A killed AgentX process is started again, and no VM is affected."""
    vmd, snmp = rig.vmd, rig.snmp
    since = len(snmp.heard())
    vmd.must("start", "other")
    snmp.wait_heard(RUNNING, since=since)
    before = vmd.status("other")["pid"]
    killed = vmd.processes()["vmd: agentx"]
    os.kill(killed, signal.SIGKILL)
    wait_for(lambda: vmd.family().get("vmd: agentx", killed) != killed, vmd.log_path)
    snmp.wait_served()
    assert vmd.status("other")["pid"] == before
    vmd.must("stop", "-fw", "other")
    snmp.wait_heard(RUNNING, SHUTTING_DOWN, SHUTDOWN, since=since)


@pytest.mark.deep
def test_another_configuration(rig: Rig) -> None:
    """Change to no agent, to a context, and back.  A reload without such a change keeps the session."""
    vmd, snmp = rig.vmd, rig.snmp
    process, heard = vmd.processes()["vmd: agentx"], snmp.heard()
    vmd.must("reload")
    assert vmd.processes()["vmd: agentx"] == process
    rig.configure(f'agentx context "{CONTEXT}" path "{snmp.socket}"')
    snmp.wait_served(CONTEXT)
    assert not snmp.serves()
    assert snmp.walk(community=CONTEXT)[f"{NAME}.1"] == 'STRING: "demo"'
    assert snmp.heard() == heard

    rig.configure("")
    snmp.wait_served(CONTEXT, served=False)
    wait_for(lambda: "vmd: agentx" not in vmd.family(), vmd.log_path)

    rig.configure(f'agentx path "{snmp.socket}"')
    snmp.wait_served()


@pytest.mark.deep
def test_notifications_are_switched(rig: Rig) -> None:
    """Only a community that may write can switch them.  A notification of several VMs names them by bits."""
    vmd, snmp = rig.vmd, rig.snmp
    since = len(snmp.heard())
    per_vm, bulk = ".1.3.6.1.2.1.236.1.9.0", ".1.3.6.1.2.1.236.1.10.0"
    assert "noAccess" in snmp.ask("snmpset", "public", bulk, "i", "1")
    assert "wrongValue" in snmp.ask("snmpset", "private", bulk, "i", "3")
    assert "notWritable" in snmp.ask("snmpset", "private", ".1.3.6.1.2.1.236.1.2.0", "i", "3")
    snmp.ask("snmpset", "private", bulk, "i", "1", per_vm, "i", "2")
    vmd.must("start", "other")
    wait_for(lambda: snmp.heard()[since:] == ["11"], snmp.traps)
    assert snmp.notifications()[-1][".1.3.6.1.2.1.236.1.11.0"] == 'STRING: "@"'  # 0x40: VM 2
    snmp.ask("snmpset", "private", bulk, "i", "2", per_vm, "i", "1")
    vmd.must("stop", "-fw", "other")
    snmp.wait_heard("11", SHUTTING_DOWN, SHUTDOWN, since=since)
