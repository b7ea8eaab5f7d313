"""A whole host over two boots: the tests that need its own kernel, udev and a real power-off."""

import contextlib
import re
from typing import Any

import pytest

from tests.l1.machine import L1Error
from tests.support.debian import BROKEN, NEWER, built_deb, debian_host, newer_deb
from tests.systemd import host
from vmd.config.model import DEFAULT_FIRST_ID
from vmd.parent.oom import CORE_SCORE
from vmd.privsep.confine import OPENER, PARENT_CAPABILITIES
from vmd.privsep.ids import TASKS_MAX
from vmd.version import VERSION

pytestmark = [pytest.mark.root, pytest.mark.deep, pytest.mark.timeout(2400)]

BUSY = "nft does not answer for 10 s"  # the machine may be that slow on a busy host
SMALL = "vmd: warning: limit vms "  # the machine is too small for as many VMs as vm.conf may have by default
SPARES = {"vioblk", "vionet"}
ATTEMPTS = 2  # the emulator sometimes breaks its machine
Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Give the results of the steps on the host."""
    later = {
        "newer": newer_deb(tmp_path_factory.mktemp("newer")),
        "broken": newer_deb(tmp_path_factory.mktemp("broken"), broken=True),
    }
    for _ in range(ATTEMPTS - 1):
        with contextlib.suppress(L1Error):
            return host.run(debian_host(), built_deb(), later, tmp_path_factory.mktemp("host"))
    return host.run(debian_host(), built_deb(), later, tmp_path_factory.mktemp("host"))


@pytest.fixture
def seen(results: Results, request: pytest.FixtureRequest) -> dict[str, Any]:
    """Give the result of the step that has the name of the test."""
    name = request.node.name.removeprefix("test_")
    result = results.get(name, {"error": "the host did not reach this step"})
    assert "error" not in result, result["error"]
    found: dict[str, Any] = result["seen"]
    return found


def ours(processes: dict[str, str], name: str) -> dict[str, str]:
    """Return the processes of a VM, by pid."""
    return {pid: title for pid, title in processes.items() if f"{title}/".startswith(f"vmd: vm/{name}/")}


def test_enable(seen: dict[str, Any]) -> None:
    """A VM with a disk, a CD, a switch and a local interface runs without trouble, and its guest sees the devices."""
    assert "kvm" in seen["devices"]  # udev has loaded its module
    assert {row["text"] for row in seen["rows"].values()} == {""}
    taps = {nic["tap"] for nic in seen["rows"]["full"]["interfaces"]}
    assert len(taps) == 2
    assert {"br0", *taps} <= seen["links"].keys()
    assert sorted(seen["links"][tap] for tap in taps) == ["", "br0"]
    for device in ("virtio block", "virtio scsi", "virtio network"):
        assert device in seen["answer"]


def test_control_group(seen: dict[str, Any]) -> None:
    """The host's controllers account the unit's memory and tasks."""
    assert seen["ControlGroup"] == "/system.slice/vmd.service"
    assert int(seen["MemoryCurrent"]) > 0
    assert int(seen["TasksCurrent"]) > len(("vmd", "priv", "control", "vmm", "vm/full"))


def test_rights(seen: dict[str, Any]) -> None:
    """All processes are confined and not root, except the parent and an opener in reserve.

    Each VM has its own user and its own control group.
    """
    processes = seen["processes"]
    opener = processes.pop("opener")
    assert (opener["filter"], int(opener["capabilities"], 16)) == ("2", OPENER.capabilities)
    assert processes.keys() >= {"priv", "control", "log", "vmm", "vm", "vm/full", "vm/full/vioblk0", "vm/full/vioscsi0"}
    assert {process["filter"] for process in processes.values()} == {"2"}
    ids = {title: uid for title, process in processes.items() for uid in process["uids"]}
    assert all(set(process["uids"]) == {ids[title]} for title, process in processes.items())
    assert all(int(uid) >= DEFAULT_FIRST_ID for uid in ids.values())
    assert len({ids[title] for title in ("priv", "control", "log", "vmm", "vm", "vm/full")}) == 6
    mask = sum(1 << capability for capability in PARENT_CAPABILITIES)
    assert {int(value, 16) for value in seen["parent"].values()} == {mask}

    whole = {title: process for title, process in processes.items() if f"{title}/".startswith("vm/full/")}
    assert {ids[title] for title in whole} == {ids["vm/full"]}
    ((group, tasks_max),) = {(process["group"], process["tasks_max"]) for process in whole.values()}
    assert re.fullmatch(r"/system\.slice/vmd-guests-0\.scope/vm-\d+", group)
    assert tasks_max == str(TASKS_MAX)
    assert group not in {process["group"] for title, process in processes.items() if title not in whole}
    scores = {title: process["score"] for title, process in processes.items()}
    # A spare process of a device has the score of the VM process that has started it.
    assert {scores.pop(title) for title in SPARES & scores.keys()} <= {CORE_SCORE, 0}
    assert {seen["score"], *(scores.pop(title) for title in ("vmm", "priv", "vm"))} == {CORE_SCORE}
    assert {*scores.values(), opener["score"]} == {0}


def test_journal_fields(seen: dict[str, Any]) -> None:
    """Each line has its severity, its unit and the name of its process."""
    entries = seen["entries"]
    assert any(entry["MESSAGE"] == "vmd: startup" for entry in entries)
    for entry in entries:
        assert re.match(r"(vmd|priv|control|vmm|vm/full\S*): ", entry["MESSAGE"])
        assert (entry["SYSLOG_IDENTIFIER"], entry["_SYSTEMD_UNIT"]) == ("vmd", "vmd.service")
        expected = entry["MESSAGE"].endswith(BUSY) or entry["MESSAGE"].startswith(SMALL)
        assert int(entry["PRIORITY"]) >= 6 or expected, entry["MESSAGE"]


def test_reload(seen: dict[str, Any]) -> None:
    """A file with a mistake is refused, with its line in the journal, and changes nothing.  A new VM is started."""
    assert seen["refused"] == 1
    assert any(re.match(r"vmd: /etc/vm.conf:\d+: ", line) for line in seen["complaint"])
    assert "vmctl: 1 error, configuration unchanged" in seen["complaint"]
    assert ours(seen["before"], "full")
    assert ours(seen["after"], "full") == ours(seen["before"], "full")
    assert "MiB of ram" in seen["answer"]


def test_limits(seen: dict[str, Any]) -> None:
    """The kernel enforces the limits of a running VM as long as vm.conf has them."""
    limited, free = seen["found"]
    assert (limited["cpu.max"], limited["cpu.weight"]) == ("5000 100000", "50")
    assert (limited["memory.max"], limited["memory.oom.group"]) == (str(256 << 20), "1")
    assert (free["cpu.max"], free["cpu.weight"]) == ("max 100000", "100")
    assert (free["memory.max"], free["memory.oom.group"]) == ("max", "0")
    waited = dict(line.split() for line in limited["cpu.stat"].splitlines())
    assert int(waited["nr_throttled"]) > 0
    for each in (limited, free):
        assert "vm second: its new limits count from now on" in each["said"]
        assert "MiB of ram" in each["answer"]


def test_linux(seen: dict[str, Any]) -> None:
    """A stock Linux serves TCP on its local interface."""
    assert "dhcp: eth0 " in seen["greeting"]
    assert seen["same"] is True


def test_broken(seen: dict[str, Any]) -> None:
    """With a version that cannot take over, the daemon and its guests continue, and the message has the reason."""
    assert "the version that is installed now cannot take over" in seen["said"]
    assert "the daemon was not restarted" in seen["said"]
    assert seen["unit"] == seen["unit_before"]
    assert seen["version"].splitlines() == [f"vmctl {BROKEN}", f"vmd {VERSION}"]
    run_on(seen)


def test_upgrade(seen: dict[str, Any]) -> None:
    """A newer package restarts the daemon.  Guests run on, and reach the new version when they reboot."""
    assert "the daemon was not restarted" not in seen["said"]
    assert seen["unit"]["MainPID"] not in ("0", seen["unit_before"]["MainPID"])
    old = f"generation 1: vmd {VERSION}"
    new = f"generation 2: vmd {NEWER}"
    versions = [f"vmctl {NEWER}", f"vmd {NEWER}"]
    assert seen["version"].splitlines() == [*versions, f"{old}, 3 VMs", f"{new}, 0 VMs"]
    run_on(seen)
    assert "guest: userspace is up" in seen["greeting"]
    assert seen["reset"].splitlines() == [*versions, f"{old}, 2 VMs", f"{new}, 1 VM"]


def run_on(seen: dict[str, Any]) -> None:
    """Raise AssertionError unless guests still have their processes, interfaces and connections."""
    for name in ("full", "second", "linux"):
        assert ours(seen["before"], name)
        assert ours(seen["after"], name) == ours(seen["before"], name)
        before, after = (
            {
                **{key: row[key] for key in ("id", "pid", "tty", "owner", "state", "started", "restarts", "disks")},
                "interfaces": [(nic["tap"], nic["lladdr"], nic["host4"]) for nic in row["interfaces"]],
            }
            for row in (seen["rows_before"][name], seen["rows"][name])
        )
        assert after == before
    assert seen["links"] == seen["links_before"]
    assert seen["same"] is True


def test_out_of_memory(seen: dict[str, Any]) -> None:
    """Only the VM that uses too much memory ends, and the unit of the guests is not stopped."""
    assert ours(seen["before"], "second")
    assert ours(seen["after"], "second") == {}
    ends = [line for line in seen["said"] if "second: terminated" in line]
    assert all("memory limit reached: " in line and "killed by SIGKILL" in line for line in ends)
    assert len(ends) == 1
    assert ours(seen["before"], "full")
    assert ours(seen["after"], "full") == ours(seen["before"], "full")
    assert set(seen["scope"]) == {"ActiveState=active", "Result=success", "MemoryAccounting=no"}


def test_kill(seen: dict[str, Any]) -> None:
    """The next daemon adopts the guests, their interfaces and consoles."""
    assert seen["unit"]["ActiveState"] == "active"
    assert seen["unit"]["NRestarts"] == "1"
    assert seen["unit"]["MainPID"] not in ("0", seen["unit_before"]["MainPID"])
    assert ours(seen["before"], "full")
    assert ours(seen["after"], "full") == ours(seen["before"], "full")
    assert not any("removed what an earlier vmd has left" in line for line in seen["said"])
    assert "virtio block" in seen["answer"]
    assert seen["links"] == seen["links_before"]
    assert seen["version"].splitlines()[:2] == [f"vmctl {NEWER}", f"vmd {NEWER}"]


def test_previous(seen: dict[str, Any]) -> None:
    """The host's power-off asks its guests to power off, and waits for them."""
    assert any("full: terminated" in line and "powered off by the guest" in line for line in seen["said"])
    assert "vmd: terminating" in seen["said"]


def test_again(seen: dict[str, Any]) -> None:
    """The next boot starts the enabled unit, at once or when KVM appears."""
    assert seen["unit"] == {"ActiveState": "active", "NRestarts": "0"}
    assert "vmd: startup" in seen["said"]
    assert "virtio block" in seen["answer"]


def test_stop(seen: dict[str, Any]) -> None:
    """The guest is asked to power off.  Then nothing is left of it, of the daemon, and of its network."""
    assert ours(seen["before"], "full")
    assert any("full: terminated" in line and "powered off by the guest" in line for line in seen["said"])
    assert seen["said"][-1] == "vmd: terminating"
    assert seen["unit"] == {"ActiveState": "inactive", "Result": "success", "ExecMainStatus": "0"}
    assert seen["after"] == {}
    assert seen["links"] == {"lo": ""}
    assert seen["tables"] == ""


def test_mistake(seen: dict[str, Any]) -> None:
    """The start fails once, with its own exit status.  systemctl shows the status and the line of the file."""
    assert seen["status"] == 1
    assert "Job for vmd.service failed" in seen["said"]
    assert seen["unit"] == {"ActiveState": "failed", "ExecMainStatus": "78", "NRestarts": "0"}
    assert seen["processes"] == {}
    (entry,) = [entry for entry in seen["entries"] if entry["MESSAGE"].startswith("vmd: /etc/vm.conf:")]
    assert re.match(r"vmd: /etc/vm.conf:\d+: ", entry["MESSAGE"])
    assert entry["PRIORITY"] == "2"
    assert "status=78" in seen["shown"]
    assert entry["MESSAGE"] in seen["shown"]
