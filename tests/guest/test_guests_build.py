"""Our own guests compile without a warning, have the right formats for loaders, and run under QEMU too.

A guest that fails under QEMU has a bug itself; our machine is not the cause.
"""

import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import churn
from tests.support.blkdisk import Disk
from tests.support.clocks import Clocks
from tests.support.console import Console
from tests.support.daemon import Attached
from tests.support.guests import GuestBuildError, build, guest, guests

PVH_GUESTS = ("demo", "selftest", "hello", "serial", "tick", "blk", "vmmci", "clocks", "fill", "net")
OPENBSD_KERNELS = ("openbsd-amd64", "openbsd-i386")
# qboot starts a kernel a second earlier than SeaBIOS.  `pc` has the chips that our guests look for.
QBOOT = "/usr/share/qemu/qboot.rom"
QEMU = (
    *("qemu-system-x86_64", "-accel", "kvm", "-M", "pc", "-bios", QBOOT, "-m", "64", "-nodefaults"),
    *("-display", "none", "-no-reboot", "-serial", "stdio"),
)
TIMEOUT_S = 60.0  # a watchdog; each takes a few seconds
# Instructions that a KVM which interprets ring 0 lacks, as objdump writes them
MISSING = {
    *("cmpxchg16b", "xsave", "xrstor", "clac", "stac", "popcnt", "int3", "fwait", "syscall", "sysret", "endbr64"),
    *("fxsave", "fxrstor", "rdrand", "rdseed"),
}


@contextmanager
def under_qemu(name: str, *options: str) -> Iterator[tuple["subprocess.Popen[bytes]", Console]]:
    """Run a guest under QEMU; kill QEMU at the end if it still runs."""
    with subprocess.Popen(
        [*QEMU, "-kernel", guest(name), *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,
    ) as process:
        assert process.stdout is not None
        try:
            yield process, Console(process.stdout.fileno())
        finally:
            process.kill()


def qemu_disk(path: Path, options: str = "") -> tuple[str, ...]:
    """Return the options for a virtio disk with all features, like ours."""
    drive = f"if=none,id=disk,format=raw,cache=writeback,discard=unmap,file={path}{options}"
    return ("-drive", drive, "-device", "virtio-blk-pci,drive=disk,serial=disk0")


def ask(process: "subprocess.Popen[bytes]", line: str) -> None:
    """Type a line."""
    assert process.stdin is not None
    process.stdin.write(line.encode() + b"\r")


def sections(path: Path) -> str:
    """Return the output of readelf for headers and notes."""
    return subprocess.run(["readelf", "-hlnW", path], capture_output=True, text=True, check=True).stdout


def test_builds_without_warning(tmp_path: Path) -> None:
    """Compiler and linker print nothing, and every guest is built."""
    assert build(tmp_path / "out") == ""

    assert {path.stem for path in (tmp_path / "out").glob("*.elf")} == {*PVH_GUESTS, *OPENBSD_KERNELS}


def test_a_failed_build_shows_the_output_of_the_compiler(tmp_path: Path) -> None:
    """A failing build raises an error with the compiler's output."""
    (tmp_path / "file").touch()

    with pytest.raises(GuestBuildError, match="file"):
        build(tmp_path / "file" / "out")


def test_unchanged_sources_are_not_built_again() -> None:
    """The second call returns the directory of the first one."""
    first = guests()
    guests.cache_clear()

    assert guests() == first


@pytest.mark.parametrize("name", PVH_GUESTS)
def test_pvh_guest_has_the_note(name: str) -> None:
    """A 64-bit ELF, loaded low, with Xen's note of type 18."""
    text = sections(guest(name))

    assert "ELF64" in text
    assert "Xen" in text
    assert "0x00000012" in text


@pytest.mark.parametrize(("name", "elf", "entry"), [
    ("openbsd-amd64", "ELF64", "0xffffffff81000000"),
    ("openbsd-i386", "ELF32", "0xd0200000"),
])  # fmt: skip
def test_openbsd_kernel_has_no_pvh_note(name: str, elf: str, entry: str) -> None:
    """It is linked high, has a segment for random bytes, and no PVH note."""
    text = sections(guest(name))

    assert elf in text
    assert entry in text
    assert "OPENBSD_RANDOM" in text
    assert "Xen" not in text


@pytest.mark.parametrize("name", PVH_GUESTS)
def test_guest_uses_nothing_that_cannot_be_interpreted(name: str) -> None:
    """Guests use no vector register, and no instruction that a KVM without hardware support lacks."""
    listing = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", guest(name)], capture_output=True, text=True, check=True
    ).stdout

    instructions = {line.split("\t")[1].split()[0] for line in listing.splitlines() if line.count("\t") >= 1}
    assert "out" in " ".join(instructions)
    assert not instructions & MISSING
    assert "%xmm" not in listing


@pytest.mark.kvm
def test_hello_under_qemu() -> None:
    """The guest prints one byte, and nothing after it."""
    with under_qemu("hello") as (_, console):
        console.expect("!", TIMEOUT_S)

        assert console.text() == "!"


@pytest.mark.kvm
def test_demo_under_qemu() -> None:
    """The monitor edits lines, answers, can be interrupted, and switches the machine off."""
    with under_qemu("demo", "-append", "quiet") as (process, console):
        console.expect("vmd-demo> ", TIMEOUT_S)
        ask(process, "echo wromg\x7f\x7fng\x08\x08\x08\x08ight")
        assert console.expect("wight\r\n", TIMEOUT_S)
        ask(process, "thrown away\x15mem")
        assert "ram\r\n" in console.expect("MiB of ram", TIMEOUT_S)
        ask(process, "nonsense")
        console.expect("nonsense: no such command", TIMEOUT_S)
        ask(process, "spin 1000")
        console.expect("spin 1000", TIMEOUT_S)
        ask(process, "\x03pci")
        console.expect("host bridge", TIMEOUT_S)
        for _ in range(10):
            ask(process, "spin 1000\r\x03")  # some input arrives before the command has begun
            console.expect("^C\r\n", TIMEOUT_S)
        ask(process, "off")
        console.drain(TIMEOUT_S)
        assert process.wait(TIMEOUT_S) == 0
        assert "cannot be switched off" not in console.text()


@pytest.mark.kvm
@pytest.mark.parametrize("name", ["demo", "tick"])
def test_power_button_under_qemu(name: str, tmp_path: Path) -> None:
    """The ACPI power button wakes the guest from HLT by the SCI."""
    path = tmp_path / "monitor"
    with under_qemu(name, "-monitor", f"unix:{path},server=on,wait=off") as (process, console):
        console.expect({"demo": "vmd-demo> ", "tick": "READY"}[name], TIMEOUT_S)
        with socket.socket(socket.AF_UNIX) as monitor:
            monitor.connect(str(path))
            monitor.sendall(b"system_powerdown\n")
            console.drain(TIMEOUT_S)
        assert process.wait(TIMEOUT_S) == 0
        assert "cannot be switched off" not in console.text()


@pytest.mark.kvm
def test_panic_resets_under_qemu() -> None:
    """A triple fault ends a QEMU that may not reboot, as does the reset port."""
    for command in ("panic", "reset"):
        with under_qemu("demo") as (process, console):
            console.expect("vmd-demo> ", TIMEOUT_S)
            ask(process, command)
            console.drain(TIMEOUT_S)
            assert process.wait(TIMEOUT_S) == 0


@pytest.mark.kvm
@pytest.mark.parametrize(("cmdline", "kib", "how"), [("kib=2", 2, "polled"), ("kib=3 nopoll", 3, "not polled")])
def test_serial_under_qemu(cmdline: str, kib: int, how: str) -> None:
    """The requested number of bytes is between the two markers."""
    with under_qemu("serial", "-append", cmdline) as (process, console):
        console.expect("serial: begin\r\n", TIMEOUT_S)
        written = console.expect("serial: end, ", TIMEOUT_S)
        console.expect(f"{kib} KiB {how}", TIMEOUT_S)
        console.drain(TIMEOUT_S)
        assert process.wait(TIMEOUT_S) == 0
    assert len(written) - len("serial: end, ") == kib * 1024


@pytest.mark.kvm
def test_selftest_under_qemu() -> None:
    """Checks for any PC pass, and those for our machine only are skipped by name."""
    with under_qemu("selftest", "-smp", "2", "-append", "qemu cpus=2 mem=64") as (_, console):
        console.expect("selftest: begin", TIMEOUT_S)
        report = console.expect(" failed", TIMEOUT_S).splitlines()

    assert [line for line in report if line.startswith("FAIL")] == []
    assert "ok smp.long-mode-entered" in report
    assert "skip acpi.pm-ports" in report
    assert report[-1] == f"selftest: {sum(line.startswith('ok ') for line in report)} ok, 0 failed"


@pytest.mark.deep
@pytest.mark.kvm
def test_blk_under_qemu(tmp_path: Path) -> None:
    """A disk of QEMU passes.  Checks of behaviour in which QEMU differs are skipped by name."""
    disk = Disk(tmp_path / "disk")
    with under_qemu("blk", "-append", "qemu", *qemu_disk(disk.path)) as (process, console):
        console.expect("blk: begin", TIMEOUT_S)
        report = console.expect(" failed", TIMEOUT_S).splitlines()
        console.drain(TIMEOUT_S)
        assert process.wait(TIMEOUT_S) == 0

    assert [line for line in report if line.startswith("FAIL")] == []
    assert "interfaces: modern legacy" in report
    assert "ok legacy.rings.intx-pic.chains.flags.one-interrupt-each" in report
    assert "ok modern.registers.works-at-another-place" in report  # a BAR in memory
    assert report[-1] == f"blk: {sum(line.startswith('ok ') for line in report)} ok, 0 failed"
    disk.check_tested()


@pytest.mark.kvm
def test_blk_read_only_under_qemu(tmp_path: Path) -> None:
    """The guest writes nothing to a read-only disk."""
    disk = Disk(tmp_path / "disk")
    with under_qemu("blk", "-append", "qemu readonly", *qemu_disk(disk.path, ",readonly=on")) as (_, console):
        report = console.expect(" failed", TIMEOUT_S).splitlines()

    assert report[-1].endswith(", 0 failed")
    assert "ok modern.write" in report
    disk.check_untouched()


@pytest.mark.kvm
@pytest.mark.parametrize("cmdline", ["smp", "smp intx-ioapic", "intx-pic legacy flags", "polled"])
def test_churn_under_qemu(tmp_path: Path, cmdline: str) -> None:
    """A disk of QEMU loses nothing, and returns the written data."""
    disk = Disk(tmp_path / "disk")
    with under_qemu("blk", "-smp", "2", "-append", f"churn {cmdline}", *qemu_disk(disk.path)) as (process, console):
        assert process.stdin is not None
        attached = Attached(console.fd, process.stdin.fileno())
        churn.begin(attached)
        churn.ask_until_rounds(attached, 500)
        report = churn.finish(attached)
        attached.drain(TIMEOUT_S)
        assert process.wait(TIMEOUT_S) == 0

    assert (report.interrupts > 0) == ("polled" not in cmdline)
    assert (report.beats > 0) == ("smp" in cmdline)


@pytest.mark.kvm
def test_clocks_under_qemu() -> None:
    """All clocks go forward."""
    with under_qemu("clocks") as (process, console):
        assert process.stdin is not None
        attached = Attached(console.fd, process.stdin.fileno())
        attached.expect("clocks: ready", TIMEOUT_S)
        first = Clocks.ask(attached)
        second = Clocks.ask_until(attached, lambda now: now.beats > first.beats + 20 and now.rtc > first.rtc)

    assert second.tsc > first.tsc
    assert second.kvmclock > first.kvmclock > 0
    assert second.up == first.up < first.tsc
