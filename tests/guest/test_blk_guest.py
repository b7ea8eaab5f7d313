"""Our own guest driver (`guests/blk`) with disks of the whole daemon, on this host's KVM.

This tests the whole path: registers, notifications and interrupts in the VM process and KVM, rings and requests in
the device process, and images.
"""

import json
import re
from pathlib import Path

import pytest

from tests.support import churn
from tests.support.blkdisk import SECTOR, SECTORS, Disk
from tests.support.daemon import Daemon
from tests.support.guests import guest
from tests.support.images import problems, qemu
from tests.support.transfers import Stream, from_file, to_file
from vmd.config.model import DiskConfig, VmConfig
from vmd.vm.kinds import disk_serial

pytestmark = [pytest.mark.root, pytest.mark.kvm, pytest.mark.timeout(240)]

CHECKS_OF_ONE_INTERFACE = 400  # at least; two have twice as many
SECOND = VmConfig(name="blk", disks=(DiskConfig(path=""),) * 2)  # the part that determines serial numbers


def conf(disk: str, *lines: str, cmdline: str = "") -> str:
    """Return a vm block with a disk."""
    boot = f'boot "{guest("blk")}" cmdline "{cmdline}"'
    return 'vm "blk" {\n' + "\n".join(("disable", "memory 64M", boot, f"disk {disk}", *lines)) + "\n}\n"


def run(vmd: Daemon) -> str:
    """Run the guest to its end; return its output."""
    said = vmd.run_to_end("blk")
    assert vmd.wait_state("blk", "stopped")["text"] == "powered off by the guest"
    return said.replace("\r", "")


def check(report: str, *interfaces: str) -> None:
    """Raise AssertionError unless all checks of these interfaces were made and passed."""
    assert f"interfaces: {' '.join(interfaces)}\n" in report
    assert not re.findall(r"^FAIL .*", report, re.MULTILINE)
    assert not re.findall(r"^skip .*", report, re.MULTILINE)
    good = re.findall(r"^ok (\S+)", report, re.MULTILINE)
    assert f"blk: {len(good)} ok, 0 failed" in report
    assert {name.split(".")[0] for name in good} == {*interfaces, "final"}
    assert len(good) > CHECKS_OF_ONE_INTERFACE * len(interfaces)


@pytest.mark.parametrize(("lines", "interfaces", "cmdline"), [
    pytest.param(("vcpus 2",), ("modern", "legacy"), "", marks=pytest.mark.deep),
    pytest.param(("virtio legacy",), ("legacy",), "", marks=pytest.mark.deep),
    pytest.param(("virtio modern",), ("modern",), "", marks=pytest.mark.deep),
    (("virtio memory",), ("modern",), ""),
    pytest.param(("virtio transitional",), ("modern",), "mapped", marks=pytest.mark.deep),
])  # fmt: skip
def test_raw_disk(tmp_path: Path, lines: tuple[str, ...], interfaces: tuple[str, ...], cmdline: str) -> None:
    """All requests, both interfaces, polling, INTx and MSI-X, chains and tables, flags and event indices.

    A guest that is `mapped` uses no port; with `virtio memory` there is none that it could use.
    """
    disk = Disk(tmp_path / "disk")
    with Daemon(tmp_path, conf(f'"{disk.path}" format raw', *lines, cmdline=cmdline)) as vmd:
        check(run(vmd), *interfaces)
    disk.check_tested()


@pytest.mark.deep
def test_qcow2_disk_on_a_backing_file(tmp_path: Path) -> None:
    """The same checks with a qcow2 image on a raw backing file, which is not written."""
    base, overlay = Disk(tmp_path / "base"), tmp_path / "overlay"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-b", base.path, "-F", "raw", overlay)
    with Daemon(tmp_path, conf(f'"{overlay}" format qcow2')) as vmd:
        check(run(vmd), "modern", "legacy")

    assert not problems(overlay)
    base.check_untouched()
    flat = Disk(tmp_path / "flat")
    qemu("qemu-img", "convert", "-f", "qcow2", "-O", "raw", overlay, flat.path)
    flat.check_tested()


def test_problems_of_a_disk_are_in_the_status(tmp_path: Path) -> None:
    """Problems reach `vmctl status -v` from the device process, while the VM runs."""
    disk = Disk(tmp_path / "disk")
    with disk.path.open("ab") as file:
        file.write(b"tail!")
    with Daemon(tmp_path, conf(f'"{disk.path}" format raw', cmdline="bench")) as vmd:
        vmd.must("start", "blk")
        (row,) = json.loads(vmd.must("status", "-v", "--json"))["vms"]
        shown = vmd.must("status", "-v")
        vmd.must("stop", "-f", "-w", "blk")
        (stopped,) = json.loads(vmd.must("status", "-v", "--json"))["vms"]
        log = vmd.log

    text = f"its {SECTORS * SECTOR + 5} bytes are no multiple of 512; its last sector is padded with zeroes"
    assert [(trouble["device"], trouble["text"]) for trouble in row["troubles"]] == [("disk0", text)]
    assert f"blk disk0: {text} (since " in shown
    assert stopped["troubles"] == []
    assert log.count(text) == 1


@pytest.mark.deep
def test_the_second_disk_is_another(tmp_path: Path) -> None:
    """A guest that works on its second disk leaves the first one alone."""
    first, second = Disk(tmp_path / "first"), Disk(tmp_path / "second")
    slot = 3  # after the slots of the random numbers and the first disk
    lines = (f'disk "{second.path}" format raw', "virtio modern")
    text = conf(f'"{first.path}" format raw', *lines, cmdline=f"slot={slot}")
    with Daemon(tmp_path, text) as vmd:
        report = run(vmd)
    check(report, "modern")
    assert f"id {disk_serial(SECOND, 1).decode()}\n" in report
    first.check_untouched()
    second.check_tested()


def test_serial_number_goes_with_the_guest(tmp_path: Path) -> None:
    """The serial number stays when the guest moves to a VM of another name, until that VM starts again."""
    disk = Disk(tmp_path / "disk")
    with Daemon(tmp_path, conf(f'"{disk.path}" format raw', cmdline="churn")) as vmd:
        vmd.must("start", "blk")
        with vmd.console("blk") as console:
            churn.ask_until_rounds(console, 1)
        to_file(vmd, "blk", tmp_path / "first")
        status, said = from_file(vmd, "other", tmp_path / "first")
        assert status == 0, said
        to_file(vmd, "other", tmp_path / "second")

    for name in ("first", "second"):
        header = Stream((tmp_path / name).read_bytes()).header
        (serial,) = (device.serial for device in header.devices if device.kind == "blk")
        assert serial == disk_serial(SECOND, 0)
        assert header.config.disks[0].serial.encode() == serial


def exits_of_reads(directory: Path, count: int, mode: str = "transitional", option: str = "") -> int:
    """Return the vCPU's exits to the VM process while its guest makes `count` reads and sleeps between them."""
    directory.mkdir()
    disk = Disk(directory / "disk")
    text = conf(f'"{disk.path}" format raw', f"virtio {mode}", cmdline=f"reads={count}{option}")
    with Daemon(directory, text) as vmd:
        vmd.must("log", "verbose")
        assert "reads are done" in run(vmd)
        found = re.search(r"vm/blk: vcpu 0: (\d+) exits", vmd.log)
        assert found is not None
        return int(found[1])


@pytest.mark.parametrize("mode", [pytest.param("transitional", marks=pytest.mark.deep), "memory"])
def test_requests_of_mapped_registers_do_not_enter_the_vm_process(tmp_path: Path, mode: str) -> None:
    """The same for notifications in memory, with one address for all queues or one for each."""
    few, many = (exits_of_reads(tmp_path / str(count), count, mode, " mapped") for count in (1000, 9000))

    assert many == few


def test_requests_do_not_enter_the_vm_process(tmp_path: Path) -> None:
    """Notifications and MSI-X interrupts are between the guest, KVM and the device process (arch. 5).

    Only the number of reads differs, so the guest would exit more often if reads caused exits.
    """
    few, many = exits_of_reads(tmp_path / "few", 1000), exits_of_reads(tmp_path / "many", 9000)

    assert many == few
