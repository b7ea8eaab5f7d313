"""Every kind of image boots on this host's KVM with the whole daemon, and finds the documented machine."""

import re
from pathlib import Path

import pytest

from tests.support.daemon import Daemon
from tests.support.guests import guest
from tests.support.hostnet import NetDaemon
from tests.support.network import Network

pytestmark = [pytest.mark.root, pytest.mark.kvm, pytest.mark.timeout(240)]

FIRMWARE = Path("/usr/share/seabios/bios-256k.bin")
LONG_S = 150.0  # guest kernels may be interpreted at a million instructions a second


def block(name: str, boot: str, *lines: str) -> str:
    """Return a vm block."""
    options = "\n".join(f"    {line}" for line in ("disable", f"boot {boot}", *lines))
    return f'vm "{name}" {{\n{options}\n}}\n'


@pytest.mark.deep
def test_seabios_reports_that_nothing_can_be_booted(tmp_path: Path) -> None:
    """An unmodified SeaBIOS finds its machine, writes to the serial line, and reports that nothing can be booted."""
    with Daemon(tmp_path, block("bios", f'"{FIRMWARE}"', "memory 128M", "vcpus 2")) as vmd:
        vmd.must("start", "bios")
        with vmd.console("bios") as console:
            console.expect("SeaBIOS (version", LONG_S)
            console.expect("No bootable device", LONG_S)
        vmd.must("stop", "-fw", "bios")


@pytest.mark.parametrize(("memory", "vcpus"), [("64M", 1), ("256M", 4)])
def test_selftest_guest(tmp_path: Path, memory: str, vcpus: int) -> None:
    """Memory map, ports, MMIO, timers, interrupts, RTC, UART, fw_cfg, PCI, ACPI and SMP, each reported by name."""
    conf = block("selftest", f'"{guest("selftest")}"', f"memory {memory}", f"vcpus {vcpus}")
    with Daemon(tmp_path, conf) as vmd:
        report = vmd.run_to_end("selftest")
        print(report)
        assert not re.findall(r"^FAIL .*", report, re.MULTILINE)
        summary = re.search(r"selftest: (\d+) ok, 0 failed", report)
        assert summary is not None
        assert int(summary[1]) == len(re.findall(r"^ok ", report, re.MULTILINE)) > 40
        assert re.findall(r"^skip (\S+)", report, re.MULTILINE) == (["smp"] if vcpus == 1 else [])
        assert vmd.status("selftest")["text"] == "powered off by the guest"


def test_openbsd_kernel_gets_its_boot_arguments(tmp_path: Path) -> None:
    """A kernel of OpenBSD's boot protocol prints the memory map, console and end marker it was given (cat. 5.2)."""
    with Daemon(tmp_path, block("bsd", f'"{guest("openbsd-amd64")}"', "memory 64M")) as vmd:
        said = vmd.run_to_end("bsd")
        print(said)
        assert "memmap" in said
        assert re.search(r"consdev dev=800 speed=1c200 address=3f8", said)
        assert "bootmac" not in said
        assert vmd.status("bsd")["text"] == "powered off by the guest"


def test_openbsd_kernel_from_the_network_gets_its_address(tmp_path: Path) -> None:
    """`boot device net` tells the kernel its first interface, whose address it looks for (cat. 5.2)."""
    lines = ("memory 64M", "boot device net", "interface lladdr fe:e1:ba:00:00:09", "interface")
    conf = block("bsd", f'"{guest("openbsd-amd64")}"', *lines)
    with Network() as network, NetDaemon(tmp_path, network, conf) as vmd:
        said = vmd.run_to_end("bsd")
    assert re.findall(r"bootmac (\S+)", said) == ["fe:e1:ba:00:00:09"]


def test_the_kind_of_a_kernel_is_found_by_its_bytes(tmp_path: Path) -> None:
    """A gzip'ed kernel boots like a plain one, with any file name."""
    import gzip

    packed = tmp_path / "vmlinuz.img"
    packed.write_bytes(gzip.compress(guest("demo").read_bytes()))
    with Daemon(tmp_path, block("packed", f'"{packed}"', "memory 32M")) as vmd:
        vmd.must("start", "packed")
        with vmd.console("packed") as console:
            console.expect("vmd-demo> ", LONG_S)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "is empty"),
        (b"just a text, not a kernel at all\n" * 100, ""),
        (b"\x7fELF" + bytes(100), ""),
        (b"\x1f\x8b" + bytes(100), ""),
        (Path("/bin/busybox").read_bytes(), "is a user program, not a kernel: it has no PVH note"),
        (b"QFI\xfb" + bytes(65532), "is a disk image .qcow2.: give it as disk"),
    ],
)
def test_unbootable_files_are_refused_with_a_sentence(tmp_path: Path, content: bytes, complaint: str) -> None:
    """Case 54: the start fails, names the file and leaves no process behind."""
    bad = tmp_path / "bad.img"
    bad.write_bytes(content)
    with Daemon(tmp_path, block("bad", f'"{bad}"', "memory 32M")) as vmd:
        refused = vmd.vmctl("start", "bad")
        assert refused.returncode == 1
        assert re.search(rf"{re.escape(str(bad))}: .*{complaint}", refused.stderr), refused.stderr
        assert vmd.wait_state("bad", "stopped")["pid"] is None
