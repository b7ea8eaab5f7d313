"""The shipped unit under a real systemd: start, stop, restart, reload, and failures."""

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.daemon import Terminal
from tests.support.debian import built_deb, debian_host
from tests.support.guests import guest
from tests.systemd.box import Box

# The limit is for each test without its fixtures.  The first fixture may fetch a Debian, which has its own limit.
pytestmark = [pytest.mark.root, pytest.mark.kvm, pytest.mark.timeout(240, func_only=True)]

DEMO, BLK = Path("/srv/demo.elf"), Path("/srv/blk.elf")
DISK, DISC = "/srv/disk.img", "/srv/cd.iso"
DISK_BYTES = 1 << 20
EX_UNAVAILABLE, EX_CONFIG = "69", "78"
CRIT = "2"
EXPOSURE_MAX = 6.2  # of `systemd-analyze security`, from 0 (safe) to 10


def conf(*more: str) -> str:
    """Return a vm.conf with a switch, and a VM with one device of each kind, which powers off when asked."""
    return "\n".join((
        'switch "lan" { interface br0 }',
        'vm "demo" {', " memory 32M", f' boot "{DEMO}"', f' disk "{DISK}" format raw', f' cdrom "{DISC}"',
        ' interface switch "lan"', " local interface", "}", *more, "",
    ))  # fmt: skip


class Unit:
    """The unit vmd.service in a box."""

    def __init__(self, box: Box) -> None:
        self.box = box

    def configure(self, text: str) -> None:
        """Write vm.conf."""
        self.box.path("/etc/vm.conf").write_text(text)

    def start(self) -> None:
        """Start the unit, and wait until the daemon serves and has begun to start its VMs."""
        self.box.must("systemctl", "start", "vmd")

    def status(self, name: str, *, verbose: bool = False) -> dict[str, Any]:
        """Return the row of a VM in `vmctl status`."""
        options = ("-v",) if verbose else ()
        rows = json.loads(self.box.must("vmctl", "status", *options, "--json"))["vms"]
        (row,) = [row for row in rows if row["name"] == name]
        found: dict[str, Any] = row
        return found

    def wait_running(self, name: str) -> dict[str, Any]:
        """Wait until a VM runs."""
        self.box.wait_for(lambda: self.status(name)["state"] == "running", f"vm {name} does not run")
        return self.status(name)

    def said(self) -> list[dict[str, Any]]:
        """Return the daemon's own journal entries of its present or last run."""
        entries = [entry for entry in self.box.journal() if entry["_TRANSPORT"] in ("stdout", "journal")]
        last = entries[-1]["_SYSTEMD_INVOCATION_ID"] if entries else ""
        run = self.box.properties("vmd.service").get("InvocationID", last)  # systemd forgets a unit that has ended
        return [entry for entry in entries if entry["_SYSTEMD_INVOCATION_ID"] == run]

    def wait_said(self, text: str) -> dict[str, Any]:
        """Wait until the journal of this run has an entry with a text.  Return the first one."""
        found: list[dict[str, Any]] = []

        def look() -> bool:
            found.extend(entry for entry in self.said() if text in entry["MESSAGE"])
            return bool(found)

        self.box.wait_for(look, f"no {text!r} in the journal")
        return found[0]

    def links(self) -> set[str]:
        """Return the names of all network interfaces."""
        return {link["ifname"] for link in json.loads(self.box.must("ip", "-j", "link"))}

    def network(self) -> list[str]:
        """Return all interfaces, their global addresses, and all rules.  The kernel assigns other addresses later."""
        commands = ("ip -o address show scope global", "ip -o link", "nft --stateless list ruleset")
        return [line for command in commands for line in self.box.must(*command.split()).splitlines()]

    @property
    def main(self) -> int:
        """The pid of the daemon; 0 if there is none."""
        return int(self.box.properties("vmd.service")["MainPID"])

    def groups(self) -> dict[str, str]:
        """Return the control group of every process of ours, by its title."""
        lines = self.box.must("ps", "-eo", "cgroup:200,args").splitlines()
        rows = (line.split(None, 1) for line in lines)
        return {title: group.rpartition("0::")[2] for group, title in rows if title.startswith("vmd: ")}

    def processes(self) -> list[str]:
        """Return every process of ours."""
        return [line for line in self.box.must("ps", "-eo", "args").splitlines() if line.startswith("vmd: ")]


def same(row: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that do not change while a VM only runs."""
    return {key: value for key, value in row.items() if key != "resident_bytes"}


@pytest.fixture(scope="module")
def box() -> Iterator[Box]:
    """Give a Debian with the package installed."""
    with Box(root=debian_host(), target="multi-user.target") as running:
        for name in (DISK, DISC):
            running.path(name).write_bytes(bytes(DISK_BYTES))
        for path in (DEMO, BLK):
            running.copy(guest(path.stem), str(path))
        running.must("dpkg", "--install", running.copy(built_deb(), "/root/vmd.deb"))
        running.must("systemctl", "stop", "vmd")  # a first installation has started it
        yield running


@pytest.fixture
def unit(box: Box) -> Iterator[Unit]:
    """Give the stopped unit with a valid vm.conf, and stop it again afterwards."""
    unit = Unit(box)
    unit.configure(conf())
    box.run("systemctl", "reset-failed", "vmd")
    yield unit
    box.must("systemctl", "stop", "vmd")


def test_vm_with_disk_switch_and_local_interface(unit: Unit) -> None:
    """It runs with the devices of vm.conf, and the guest reads its disk."""
    reader = ('vm "blk" {', " memory 64M", f' boot "{BLK}" cmdline "bench"', ' disk "/srv/blk.img"', "}")
    unit.box.path("/srv/blk.img").write_bytes(bytes(DISK_BYTES))
    unit.configure(conf(*reader))
    unit.start()

    row = unit.wait_running("demo")
    with Terminal(str(unit.box.path(unit.wait_running("blk")["tty"]))) as console:
        said = console.answer("read bytes=4096 depth=1 count=8", "requests")
    unit.box.must("vmctl", "stop", "-f", "-w", "blk")  # this guest has no driver for a power button

    assert row["text"] == ""
    assert "done 8 requests" in said
    taps = [nic["tap"] for nic in unit.status("demo", verbose=True)["interfaces"]]
    assert {"br0", *taps} <= unit.links()
    assert "master br0" in unit.box.must("ip", "link", "show", taps[0])
    assert "masquerade" in unit.box.must("nft", "list", "table", "inet", "vmd")
    assert unit.box.must("cat", "/proc/sys/net/ipv4/ip_forward") == "1\n"


def test_stop_with_a_running_guest(unit: Unit) -> None:
    """The guest is asked to power off.  Then nothing is left of it, of the daemon, and of its network."""
    unit.start()
    unit.wait_running("demo")
    assert unit.processes()

    unit.box.must("systemctl", "stop", "vmd")

    after = unit.box.properties("vmd.service")
    assert (after["ActiveState"], after["Result"], after["ExecMainStatus"]) == ("inactive", "success", "0")
    said = [entry["MESSAGE"] for entry in unit.said()]
    assert any("powered off by the guest" in line for line in said), said
    assert unit.processes() == []
    assert unit.links() == {"lo"}
    assert "table inet vmd" not in unit.box.must("nft", "list", "tables")


def test_power_off_and_the_next_boot(unit: Unit) -> None:
    """A host that powers off first asks its guests to, and waits for them.  The next boot starts the enabled unit."""
    unit.start()
    unit.wait_running("demo")
    run = unit.box.properties("vmd.service")["InvocationID"]

    unit.box.power_off()
    unit.box.boot()

    assert unit.box.properties("vmd.service")["ActiveState"] == "active"
    unit.wait_running("demo")
    said = [entry["MESSAGE"] for entry in unit.box.journal() if entry.get("_SYSTEMD_INVOCATION_ID") == run]
    assert any("powered off by the guest" in line for line in said), said
    assert "vmd: terminating" in said


def restart(unit: Unit) -> None:
    """Restart the daemon as an operator does."""
    unit.box.must("systemctl", "restart", "vmd")


def kill(unit: Unit) -> None:
    """Kill the daemon, and wait for the next one."""
    main = unit.main
    unit.box.must("systemctl", "kill", "--kill-whom=main", "--signal=KILL", "vmd")
    unit.box.wait_for(lambda: unit.main not in (0, main), "no daemon takes its place")
    unit.box.wait_property("vmd.service", "ActiveState", "active")


@pytest.mark.parametrize(("end", "text"), [
    pytest.param(restart, conf(), id="restart", marks=pytest.mark.deep),
    pytest.param(kill, conf(), id="kill"),
    pytest.param(restart, conf("vm lots {"), id="restart-mistake"),
    pytest.param(kill, conf("vm lots {"), id="kill-mistake", marks=pytest.mark.deep),
])  # fmt: skip
def test_guest_outlives_the_daemon(unit: Unit, end: Callable[[Unit], None], text: str) -> None:
    """It keeps process, console and interfaces, even with a mistake in vm.conf.  A stop still ends it."""
    unit.start()
    before, main = unit.wait_running("demo"), unit.main
    network = unit.network()
    groups = unit.groups()
    with Terminal(str(unit.box.path(before["tty"]))) as console:
        console.answer("", "vmd-demo> ")
        unit.configure(text)

        end(unit)

        console.answer("", "vmd-demo> ")
    assert unit.main != main
    assert same(unit.status("demo")) == same(before)
    assert unit.network() == network
    assert {title: group for title, group in unit.groups().items() if "vm/" in title or "vmm" in title} == {
        title: group for title, group in groups.items() if "vm/" in title or "vmm" in title
    }
    assert ("/etc/vm.conf:" in unit.box.unit_log()) >= (end is restart and text != conf())

    unit.box.must("systemctl", "stop", "vmd")

    assert any("powered off by the guest" in entry["MESSAGE"] for entry in unit.said())
    assert unit.processes() == []
    assert unit.links() == {"lo"}
    assert unit.box.properties("vmd.service")["NFileDescriptorStore"] == "0"


@pytest.mark.deep
def test_upgrade_in_place(unit: Unit) -> None:
    """For systemd it remains the same process.  Its lines go to the journal, and its stored descriptors remain."""
    unit.start()
    before, main = unit.wait_running("demo"), unit.main
    shown = ("MainPID", "NRestarts", "NFileDescriptorStore", "ActiveState", "InvocationID")
    had = unit.box.properties("vmd.service")

    unit.box.must("vmctl", "upgrade")
    unit.box.must("vmctl", "upgrade")

    now = unit.box.properties("vmd.service")
    assert {name: now[name] for name in shown} == {name: had[name] for name in shown}
    assert same(unit.status("demo")) == same(before)
    said = [entry["MESSAGE"] for entry in unit.said()]
    assert said.count("vmd: startup") == 3
    restart(unit)
    assert unit.main != main
    assert same(unit.status("demo")) == same(before)


@pytest.mark.deep
def test_a_hanging_daemon_is_replaced(unit: Unit) -> None:
    """Its guest runs on.  The test shortens systemd's timeouts."""
    drop_in = unit.box.path("/run/systemd/system/vmd.service.d/short.conf")
    drop_in.parent.mkdir(parents=True)
    drop_in.write_text("[Service]\nWatchdogSec=4\nTimeoutAbortSec=2\n")
    try:
        unit.box.must("systemctl", "daemon-reload")
        unit.start()
        before, main = unit.wait_running("demo"), unit.main

        unit.box.must("kill", "-STOP", str(main))

        unit.box.wait_for(lambda: unit.main not in (0, main), "no daemon takes its place")
        unit.box.wait_property("vmd.service", "ActiveState", "active")
        assert same(unit.status("demo")) == same(before)
        unit.box.must("systemctl", "stop", "vmd")
    finally:
        drop_in.unlink()
        unit.box.must("systemctl", "daemon-reload")


def test_guests_are_in_a_unit_of_their_own(unit: Unit) -> None:
    """Each VM has its own group in the unit, which ends with the daemon."""
    unit.start()
    unit.wait_running("demo")
    unit.box.wait_for(lambda: "vmd: vm" in unit.groups(), "there is no VM process in reserve")

    groups = unit.groups()
    (scope,) = {group.split("/")[2] for title, group in groups.items() if title.startswith("vmd: vm")}
    assert re.fullmatch(r"vmd-guests-\d\.scope", scope)
    above = f"/system.slice/{scope}"
    assert groups["vmd: vmm"] == f"{above}/vmm"
    assert re.fullmatch(rf"{above}/vm-\d+", groups["vmd: vm/demo"])
    assert groups["vmd: vm"] not in (groups["vmd: vm/demo"], groups["vmd: vmm"])
    assert {group for title, group in groups.items() if title.startswith("vmd: vm/demo/")} == {groups["vmd: vm/demo"]}
    assert {groups[title] for title in ("vmd: priv", "vmd: control", "vmd: log")} == {"/system.slice/vmd.service"}
    shown = unit.box.properties(scope)
    assert (shown["Delegate"], shown["TasksMax"], shown["MemoryAccounting"]) == ("yes", "infinity", "no")
    assert "vmd.service" in shown["Before"].split()

    unit.box.must("systemctl", "stop", "vmd")
    unit.box.wait_for(lambda: not unit.box.path(f"/sys/fs/cgroup{above}").exists(), f"{above} does not end")


def test_the_name_of_the_guests_unit_is_in_use(unit: Unit) -> None:
    """The unit may be that of an earlier daemon whose last guest is about to end.  The next number is used."""
    hold = "systemd-run --scope --quiet --unit=vmd-guests-0 sleep infinity >/dev/null 2>&1 </dev/null &"
    unit.box.must("sh", "-c", hold)
    try:
        unit.box.wait_property("vmd-guests-0.scope", "ActiveState", "active")
        unit.start()
        unit.wait_running("demo")

        assert unit.groups()["vmd: vmm"] == "/system.slice/vmd-guests-1.scope/vmm"
    finally:
        unit.box.must("systemctl", "stop", "vmd-guests-0.scope")


def test_systemd_does_not_restart_after_a_mistake(unit: Unit) -> None:
    """The daemon ends with its own exit status, and the journal has the line of the file as an error."""
    unit.configure(conf("vm lots {"))

    started = unit.box.run("systemctl", "start", "vmd")

    after = unit.box.wait_property("vmd.service", "ActiveState", "failed")
    assert started.returncode != 0
    assert (after["ExecMainStatus"], after["NRestarts"]) == (EX_CONFIG, "0")
    entry = unit.wait_said("/etc/vm.conf:")
    assert re.match(r"vmd: /etc/vm.conf:\d+: ", entry["MESSAGE"])
    assert entry["PRIORITY"] == CRIT


def test_reload(unit: Unit) -> None:
    """A file with a mistake is refused and changes nothing.  A valid one takes effect."""
    unit.start()
    first = unit.wait_running("demo")

    unit.configure(conf("vm lots {"))
    refused = unit.box.run("systemctl", "reload", "vmd")
    unit.configure(conf('vm "second" {', " memory 32M", f' boot "{DEMO}"', "}"))
    unit.box.must("systemctl", "reload", "vmd")

    assert refused.returncode != 0
    assert unit.wait_running("second")["state"] == "running"
    assert unit.status("demo")["pid"] == first["pid"]


def test_kvm_that_appears_late(unit: Unit) -> None:
    """At boot, the unit may start before udev has loaded the module."""
    unit.box.unplug_kvm()
    unit.box.must("systemctl", "start", "--no-block", "vmd")
    try:
        unit.wait_said("waiting up to 30 s for /dev/kvm")
        assert unit.box.properties("vmd.service")["ActiveState"] == "activating"
    finally:
        unit.box.plug_in_kvm()

    unit.box.wait_property("vmd.service", "ActiveState", "active")
    unit.wait_running("demo")


def test_kvm_that_may_not_be_used(unit: Unit) -> None:
    """The unit fails with the daemon's sentence, and is not started again."""
    unit.box.unplug_kvm()
    os.mknod(unit.box.path("/dev/kvm"), 0o600 | 0o020000, os.makedev(1, 3))  # /dev/null's number
    try:
        started = unit.box.run("systemctl", "start", "vmd")
    finally:
        unit.box.unplug_kvm()
        unit.box.plug_in_kvm()

    after = unit.box.wait_property("vmd.service", "ActiveState", "failed")
    assert started.returncode != 0
    assert (after["ExecMainStatus"], after["NRestarts"]) == (EX_UNAVAILABLE, "0")
    assert unit.wait_said("/dev/kvm: ")["PRIORITY"] == CRIT


def test_journal(unit: Unit) -> None:
    """Every line has its severity, its unit and the name of its process.  A normal start has no warning."""
    unit.start()
    unit.wait_running("demo")

    entries = unit.said()

    assert any(entry["MESSAGE"] == "vmd: startup" for entry in entries)
    assert {entry["SYSLOG_IDENTIFIER"] for entry in entries} == {"vmd"}
    for entry in entries:
        assert re.match(r"(vmd|priv|control|vmm|vm/demo\S*): ", entry["MESSAGE"])
        assert int(entry["PRIORITY"]) >= 6, entry["MESSAGE"]


def test_unit_waits_for_remote_file_systems(box: Box) -> None:
    """Disks may be on remote file systems."""
    assert "remote-fs.target" in box.properties("vmd.service")["After"].split()


def test_state_directory_is_the_daemons_own(unit: Unit) -> None:
    """It is made before the daemon starts, and no other user can read it."""
    unit.start()

    status = unit.box.path("/var/lib/vmd").stat()

    assert (status.st_uid, status.st_mode & 0o777) == (0, 0o700)


def test_exposure_of_the_daemon(box: Box) -> None:
    """The restrictions in the unit cannot become weaker unnoticed."""
    path = box.properties("vmd.service")["FragmentPath"]
    table = box.must("systemd-analyze", "security", "--offline=true", path)

    (figure,) = re.findall(r"Overall exposure level for vmd.service: ([\d.]+)", table)
    assert float(figure) <= EXPOSURE_MAX, table


def test_unit_has_no_mistake(box: Box) -> None:
    """systemd knows every setting."""
    done = box.run("systemd-analyze", "verify", "--man=no", "vmd.service")

    assert (done.returncode, done.stdout + done.stderr) == (0, "")
