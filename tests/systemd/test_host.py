"""A whole host, from its installation over two boots: what needs a kernel, udev and a power switch of its own."""

import contextlib
import re
from typing import Any

import pytest

from tests.l1.machine import L1Error
from tests.support.debian import NEWER, built_deb, debian_host, newer_deb
from tests.systemd import host

pytestmark = [pytest.mark.root, pytest.mark.deep, pytest.mark.timeout(2400)]

ATTEMPTS = 2  # the emulator breaks its machine now and then
Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Give what has been seen on the host."""
    newer = newer_deb(tmp_path_factory.mktemp("newer"))
    for _ in range(ATTEMPTS - 1):
        with contextlib.suppress(L1Error):
            return host.run(debian_host(), built_deb(), newer, tmp_path_factory.mktemp("host"))
    return host.run(debian_host(), built_deb(), newer, tmp_path_factory.mktemp("host"))


@pytest.fixture
def seen(results: Results, request: pytest.FixtureRequest) -> dict[str, Any]:
    """Give what a step has seen, that is called as the test is."""
    name = request.node.name.removeprefix("test_")
    result = results.get(name, {"error": "the host did not come to this step"})
    assert "error" not in result, result["error"]
    found: dict[str, Any] = result["seen"]
    return found


def test_enable(seen: dict[str, Any]) -> None:
    """VMs with a disk, a CD, a switch and a local interface run, and nothing is odd about them."""
    assert "kvm" in seen["devices"]  # udev has loaded its module
    assert [row["text"] for row in seen["rows"].values()] == [""]
    taps = {nic["tap"] for nic in seen["rows"]["full"]["interfaces"]}
    links = {link["ifname"]: link for link in seen["links"]}
    assert len(taps) == 2
    assert {"br0", *taps} <= links.keys()
    assert [links[tap].get("master") for tap in sorted(taps)].count("br0") == 1


def test_control_group(seen: dict[str, Any]) -> None:
    """The host's controllers count what is in it."""
    assert seen["ControlGroup"] == "/system.slice/vmd.service"
    assert int(seen["MemoryCurrent"]) > 0
    assert int(seen["TasksCurrent"]) > len(("vmd", "priv", "control", "vmm", "vm/full"))


def test_journal_fields(seen: dict[str, Any]) -> None:
    """Each line has its severity, its unit and the name of its process."""
    entries = seen["entries"]
    assert any(entry["MESSAGE"] == "vmd: startup" for entry in entries)
    for entry in entries:
        assert re.match(r"(vmd|priv|control|vmm|vm/full\S*): ", entry["MESSAGE"])
        assert (entry["SYSLOG_IDENTIFIER"], entry["_SYSTEMD_UNIT"]) == ("vmd", "vmd.service")
        assert int(entry["PRIORITY"]) >= 6, entry["MESSAGE"]


def test_upgrade(seen: dict[str, Any]) -> None:
    """A newer package leaves the daemon and its guests alone, and says so."""
    assert "the daemon was not restarted" in seen["said"]
    assert seen["after"] == seen["before"]
    assert seen["states"] == {"full": "running"}
    assert NEWER in seen["version"]


def test_previous(seen: dict[str, Any]) -> None:
    """The host's power-off asks its guests to do the same, and waits for them."""
    assert any("powered off by the guest" in line for line in seen["said"])
    assert "vmd: terminating" in seen["said"]


def test_again(seen: dict[str, Any]) -> None:
    """The next boot starts what is enabled, at once or when KVM is there."""
    assert seen["unit"] == {"ActiveState": "active", "NRestarts": "0"}
    assert "vmd: startup" in seen["said"]
