"""vmctl send and receive with the whole daemon: under load, refused, interrupted, and with false streams.

*cat. 4.7*, docs/formats.md 4, hostile-input 26 and 55.
"""

import errno
import os
import random
import re
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import churn, fusefile
from tests.support.blkdisk import Disk
from tests.support.clocks import Clocks
from tests.support.daemon import DEADLINE_S, ROOT, Daemon
from tests.support.fusefile import FuseFile
from tests.support.guests import guest
from tests.support.transfers import (
    Footprint,
    Relay,
    Stream,
    changed_header,
    changed_version,
    ended,
    from_file,
    move,
    to_file,
    vmctl,
)
from tests.support.waiting import pause
from vmd.config import rules
from vmd.config.model import DiskConfig
from vmd.record import Record
from vmd.vm.header import Header
from vmd.vm.state import MachineState, Register
from vmd.vm.stream import MEMORY, OLDEST, STATE, VERSION

pytestmark = [pytest.mark.root, pytest.mark.kvm, pytest.mark.timeout(240)]

PROMPT = "vmd-demo> "
ROUNDS = 10
CPUID_MAX = 256  # the most leaves that KVM accepts


def block(name: str, kernel: str, cmdline: str = "", *lines: str) -> str:
    """Return a vm block."""
    options = ("disable", "memory 64M", f'boot "{guest(kernel)}" cmdline "{cmdline}"', *lines)
    return f'vm "{name}" {{\n' + "\n".join(options) + "\n}\n"


@contextmanager
def running(tmp_path: Path, kernel: str, cmdline: str = "", *lines: str, ready: str = "") -> Iterator[Daemon]:
    """Run a guest as VM `a`, with a disk; VM `b` is configured and stopped."""
    disk = Disk(tmp_path / "disk")
    conf = block("a", kernel, cmdline, f'disk "{disk.path}" format raw', *lines) + block("b", "demo")
    with Daemon(tmp_path, conf) as vmd:
        vmd.must("start", "a")
        if ready:
            with vmd.console("a") as console:
                console.expect(ready, DEADLINE_S)
        yield vmd


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Daemon]:
    """Yield a daemon whose VM `a` is at its prompt and does not use its disk."""
    with running(tmp_path, "demo", "", "vcpus 2", ready=PROMPT) as vmd:
        yield vmd


@pytest.fixture
def busy(tmp_path: Path) -> Iterator[Daemon]:
    """Yield a daemon whose VM `a` keeps its disk busy."""
    with running(tmp_path, "blk", "churn smp", "vcpus 2", ready="churn: begin") as vmd:
        yield vmd


def works(vmd: Daemon, name: str, more: int = ROUNDS) -> churn.Report:
    """Raise AssertionError unless the busy guest goes on without loss."""
    with vmd.console(name) as console:
        return churn.ask_until_rounds(console, more)


def answers(vmd: Daemon, name: str) -> None:
    """Raise AssertionError unless the guest at its prompt answers."""
    with vmd.console(name) as console:
        console.answer("echo a" "live", "alive\r\nalive\r\n")


# --- from one to the other -------------------------------------------------------------------------------------------


def move_often(tmp_path: Path, times: int, cmdline: str, lines: tuple[str, ...]) -> None:
    """Send the busy guest back and forth."""
    with running(tmp_path, "blk", f"churn {cmdline}", *lines, ready="churn: begin") as vmd:
        before = works(vmd, "a")
        here, there = "a", "new-name"
        for _ in range(times):
            move(vmd, here, there)
            assert vmd.status(there)["state"] == "running"
            assert all(row["state"] == "stopped" for row in vmd.rows() if row["name"] != there)
            now = works(vmd, there)
            assert now.rounds > before.rounds
            before, here, there = now, there, here
        with vmd.console(here) as console:
            churn.finish(console)
            console.drain(DEADLINE_S)


@churn.WAYS
def test_moving_under_load(tmp_path: Path, cmdline: str, lines: tuple[str, ...]) -> None:
    """The guest moves three times, to a new name and back to the configured VM: no request or interrupt is lost."""
    move_often(tmp_path, 3, cmdline, lines)


@pytest.mark.deep
@pytest.mark.timeout(1200)
@churn.WAYS
def test_moving_often_under_load(tmp_path: Path, cmdline: str, lines: tuple[str, ...]) -> None:
    """The guest moves a hundred times in a row."""
    move_often(tmp_path, 100, cmdline, lines)


def test_a_transfer_is_reported(demo: Daemon) -> None:
    """Both commands, the state and the log report the transfer."""
    sent, received = move(demo, "a", "c")

    row = demo.status("c")
    assert sent.startswith("vmctl: sent vm 1 successfully (")
    assert received == f"vmctl: received vm {row['id']} successfully, tty {row['tty']}\n"
    assert (row["state"], row["vcpus"], row["memory_bytes"]) == ("running", 2, 64 << 20)
    assert demo.status("a")["text"] == "sent"
    answers(demo, "c")
    demo.wait_log(f"received c (vm {row['id']}) successfully, tty {row['tty']}")


def test_between_two_daemons(tmp_path: Path) -> None:
    """As between two hosts, only the stream and the disk are shared."""
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    with running(tmp_path / "here", "blk", "churn smp", "vcpus 2", ready="churn: begin") as here:
        before = works(here, "a")
        with Daemon(tmp_path / "there") as there:
            move(here, "a", "a", into=there)
            assert works(there, "a").rounds > before.rounds
            move(there, "a", "a", into=here)
            assert there.rows() == []
            works(here, "a")


def test_through_a_file_across_a_restart(busy: Daemon, tmp_path: Path) -> None:
    """A VM outlives its daemon; memory that was never touched is not in the file."""
    before = works(busy, "a")
    to_file(busy, "a", tmp_path / "stream")
    assert (tmp_path / "stream").stat().st_size < 8 << 20
    assert busy.stop() == 0

    busy.start()
    assert from_file(busy, "a", tmp_path / "stream")[0] == 0

    assert works(busy, "a").rounds > before.rounds


def test_paused_machines_are_sent_and_stay_paused_where_wanted(busy: Daemon) -> None:
    """`receive -p` waits for `unpause`; without it the machine runs again."""
    before = works(busy, "a")
    busy.must("pause", "a")
    _, received = move(busy, "a", "c", receive=("-p",))
    assert received.endswith(", paused\n")
    assert busy.status("c")["state"] == "paused"
    disk = (busy.directory / "disk").read_bytes()
    for _ in range(3):
        busy.must("pause", "c")
    assert (busy.directory / "disk").read_bytes() == disk

    move(busy, "c", "d", receive=("-p",))  # moved again, without having run
    assert (busy.directory / "disk").read_bytes() == disk
    busy.must("unpause", "d")

    assert works(busy, "d").rounds > before.rounds
    busy.must("pause", "d")
    move(busy, "d", "e")
    works(busy, "e")


def test_keep(demo: Daemon, tmp_path: Path) -> None:
    """`send -k` takes a snapshot.  The VM stays running or paused, and the snapshot can be received repeatedly."""
    for state in ("running", "paused"):
        demo.must("unpause" if state == "running" else "pause", "a")
        assert "successfully" in to_file(demo, "a", tmp_path / state, "-k")
        assert demo.status("a")["state"] == state
    demo.must("unpause", "a")
    answers(demo, "a")
    with demo.console("a") as console:
        console.answer("off", "off")
    demo.wait_state("a", "stopped")

    for state in ("running", "paused"):
        assert from_file(demo, "c", tmp_path / state)[0] == 0
        answers(demo, "c")
        demo.must("stop", "-fw", "c")


def test_into_a_configured_vm(demo: Daemon) -> None:
    """The VM has the stream's configuration until it ends; then it has its own again."""
    move(demo, "a", "b")
    assert demo.status("b")["vcpus"] == 2
    answers(demo, "b")
    demo.must("stop", "-fw", "b")
    assert demo.status("b")["vcpus"] == 1


@pytest.mark.parametrize("name", ["b", "c"])
def test_reset_of_a_received_guest(demo: Daemon, name: str) -> None:
    """The guest reboots with the received configuration, not that of its name in vm.conf, any number of times."""
    move(demo, "a", name)
    before = demo.status(name)
    with demo.console(name) as console:
        console.answer("", PROMPT)
        console.answer("reset", PROMPT)
        after = demo.status(name)
        assert after["pid"] != before["pid"]
        console.answer("reset", PROMPT)
        console.answer("cpu", PROMPT)
    last = demo.status(name)
    for row in (after, last):
        assert {key: row[key] for key in ("id", "tty", "vcpus", "memory_bytes", "state")} == {
            key: before[key] for key in ("id", "tty", "vcpus", "memory_bytes", "state")
        }


def test_reset_of_a_received_guest_that_was_booted_once(demo: Daemon) -> None:
    """The VM ends, as it would have at its source, because its boot image is not available here."""
    demo.must("start", "-b", guest("demo"), "-k", "once", "b")
    with demo.console("b") as console:
        console.answer("", PROMPT)
    move(demo, "b", "c")
    with demo.console("c") as console:
        console.answer("", PROMPT)
        vmid = demo.status("c")["id"]
        console.type("reset\r")
        demo.wait_log(f"c: terminated vm {vmid}: rebooted; not started again because only that start said")
    assert all(row["name"] != "c" for row in demo.rows())


@pytest.mark.deep
def test_firmware_can_be_sent(tmp_path: Path) -> None:
    """A guest in its firmware can be sent, with its read-only memory and disks."""
    firmware = "/usr/share/seabios/bios-256k.bin"
    conf = f'vm "bios" {{\n disable\n memory 64M\n boot "{firmware}"\n}}\n'
    with Daemon(tmp_path, conf) as vmd:
        vmd.must("start", "bios")
        with vmd.console("bios") as console:
            console.expect("SeaBIOS (version", DEADLINE_S)
            move(vmd, "bios", "other")
        with vmd.attached("other") as viewer:
            viewer.expect("No bootable device", 2 * DEADLINE_S)
        vmd.must("stop", "-fw", "other")


def test_clocks_go_on(tmp_path: Path) -> None:
    """kvmclock and the ACPI timer continue where they stopped; the battery-backed clock has the present time."""
    with running(tmp_path, "clocks", ready="clocks: ready") as vmd:
        with vmd.console("a") as console:
            before = Clocks.ask(console)
            to_file(vmd, "a", tmp_path / "stream", "-k")
            assert Clocks.ask(console).kvmclock > before.kvmclock
            vmd.must("stop", "-fw", "a")
        assert from_file(vmd, "a", tmp_path / "stream")[0] == 0
        with vmd.console("a") as console:
            after = Clocks.ask(console)

    ran_s = (after.kvmclock - before.kvmclock) / 1e9
    print(before, after)
    assert 0 < ran_s < 2
    assert (after.pm - before.pm) % (1 << 24) / 3579545 == pytest.approx(ran_s, abs=0.2)
    assert after.rtc >= before.rtc


def test_model_specific_registers_arrive(tmp_path: Path) -> None:
    """Registers that a 64-bit kernel sets once arrive: the entries of SYSCALL and SYSENTER, KERNEL_GS_BASE, the PAT."""
    with running(tmp_path, "clocks", ready="clocks: ready") as vmd:
        with vmd.console("a") as console:
            assert "no msr" not in console.text()
            assert Clocks.ask(console).lost == 0
        move(vmd, "a", "c")
        with vmd.console("c") as console:
            assert Clocks.ask(console).lost == 0


# --- refused, and the sender goes on -------------------------------------------------------------------------------


NOT_SENT = (
    "vmctl: send vm command failed: vm a was not sent, and is as before: the stream was closed by its reader\n"
)


def other_vendor(header: Header) -> Record:
    """Return a header from a host with another processor."""
    first = header.cpuid[0]
    return header.replace(cpuid=(first.replace(ebx=first.ebx ^ 1), *header.cpuid[1:]))


def more_features(header: Header) -> Record:
    """Return a header from a host with a better processor."""
    return header.replace(
        cpuid=tuple(
            leaf.replace(ebx=0xFFFFFFFF) if (leaf.function, leaf.index) == (7, 0) else leaf for leaf in header.cpuid
        )
    )


def with_config(**changes: object) -> Callable[[Header], Record]:
    """Return a change of the VM's configuration."""
    return lambda header: header.replace(config=header.config.replace(**changes))


HEADERS: list[tuple[str, Callable[[Header], Record], str]] = [
    ("vendor", other_vendor, "it comes from a host with a processor of another vendor"),
    ("features", more_features, "it needs processor features that this host lacks: cpuid 0x7.0 ebx"),
    ("table", lambda header: header.replace(cpuid=header.cpuid * (CPUID_MAX // len(header.cpuid) + 1)),
     "KVM does not take its processor"),
    ("tsc", lambda header: header.replace(tsc_khz=1000), "its time stamp counter runs at 1000 kHz"),
    ("xsave", lambda header: header.replace(xsave_bytes=1), "its extended state has 1 bytes"),
    ("no memory", with_config(memory_bytes=0), "memory size must be at least 1MB"),
    ("half a page", with_config(memory_bytes=(64 << 20) + 1), "it has 67108865 bytes of memory"),
    ("too much memory", with_config(memory_bytes=1 << 60), "memory size too large (limit is 1.0T)"),
    ("negative memory", with_config(memory_bytes=-(1 << 20)), "memory size must be at least 1MB"),
    ("no vcpus", with_config(vcpus=0), "invalid number of vcpus: 0 (limit is 16)"),
    ("vcpus", with_config(vcpus=1000), "invalid number of vcpus: 1000 (limit is 16)"),
    ("firmware", lambda header: header.replace(firmware_bytes=1 << 40), "it has firmware of"),
    ("half firmware", lambda header: header.replace(firmware_bytes=1000), "it has firmware of 1000 bytes"),
    ("devices", lambda header: header.replace(devices=header.devices[:1]), "its 1 devices are not the 2"),
    ("missing disk", with_config(disks=(DiskConfig(path="/nowhere/disk"),)), "/nowhere/disk"),
    ("nul in a path", with_config(disks=(DiskConfig(path="/disk\0"),)), "disk: not an absolute path: /disk\\x00"),
    ("nul in a kernel", with_config(kernel="/bsd\0"), "boot image: not an absolute path: /bsd\\x00"),
    ("nul in a disc", with_config(cdrom="/disc\0", disks=()), "are not the"),
    ("directory", with_config(disks=(DiskConfig(path="/etc"),)), "/etc"),
    ("disc", with_config(cdrom="/nowhere/disc"), "are not the"),
    ("long", with_config(origin="x" * 20000), "its configuration is longer than this vmd accepts"),
]  # fmt: skip


@pytest.mark.deep
def test_refused_by_its_header(busy: Daemon) -> None:
    """The receiver reports the reason before it reads any memory, and the sender's VM goes on unaffected."""
    before = Footprint(busy)
    for name, change, what in HEADERS:
        sent, received = Relay(busy, "a", "c", lambda raw, change=change: changed_header(raw, change)).ended()  # type: ignore[misc]
        print(f"{name}: {received[1].strip()}")
        assert (received[0], sent[0]) == (1, 1), name
        assert received[1].startswith("vmctl: receive vm command failed: vm c: "), name
        assert what in received[1], name
        assert sent[1] == NOT_SENT, name
        assert {row["name"]: row["state"] for row in busy.rows()} == {"a": "running", "b": "stopped"}, name
        works(busy, "a")
    before.check(busy)


def test_refused_by_its_version(busy: Daemon) -> None:
    """The same for the version."""
    sent, received = Relay(busy, "a", "c", lambda raw: changed_version(raw, 99)).ended()
    assert received[1] == (
        "vmctl: receive vm command failed: vm c: the stream has version 99 of the format, this vmd reads versions"
        f" {OLDEST} to {VERSION}\n"
    )
    assert sent[0] == 1
    works(busy, "a")


def test_a_reader_that_leaves(busy: Daemon) -> None:
    """The sender's VM goes on after `vmctl send a | false`, and after a full disk."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    os.close(reading)
    assert ended(vmctl(busy, "send", "a", stdout=writing)) == (1, NOT_SENT)
    os.close(writing)
    with open("/dev/full", "wb") as full:
        assert ended(vmctl(busy, "send", "a", stdout=full.fileno())) == (
            1, "vmctl: send vm command failed: vm a was not sent, and is as before: the stream cannot be written:"
            " No space left on device\n"
        )  # fmt: skip
    works(busy, "a")


@pytest.mark.deep
def test_a_disk_that_is_in_use(busy: Daemon, tmp_path: Path) -> None:
    """After the whole stream the receiver has the VM, which stays paused until the disk is free, and reports that.

    This is the careful way in the manual: the source pauses and keeps the VM, and ends it only when the target has
    everything.  Three VMs do this, because each waits for ten seconds: one goes on in the end, one is stopped, and
    one is stopped by force.
    """
    stream, rounds, before = tmp_path / "stream", works(busy, "a").rounds, Footprint(busy)
    busy.must("pause", "a")
    to_file(busy, "a", stream, "-k")
    with stream.open("rb") as first, stream.open("rb") as second, stream.open("rb") as third:
        clients = {
            "c": vmctl(busy, "receive", "-p", "c", stdin=first.fileno()),
            "d": vmctl(busy, "receive", "d", stdin=second.fileno()),
            "e": vmctl(busy, "receive", "e", stdin=third.fileno()),
        }
    for name, client in clients.items():
        status, errors = ended(client)
        assert status == 1
        assert f"vm {name} was received and stays paused: disk {tmp_path}/disk" in errors
        assert errors.endswith(f"`vmctl unpause {name}` tries again\n")
        row = busy.status(name)
        assert row["state"] == "paused"
        assert "disk" in row["text"]

    for words in (("stop", "-w", "d"), ("stop", "-fw", "e")):  # there is no guest to be asked
        busy.must(*words)
    refused = busy.vmctl("unpause", "c")
    assert refused.returncode == 1
    assert "stays paused" in refused.stderr
    assert busy.must("pause", "c").endswith("successfully\n")
    assert "still waits for its disks" in ended(vmctl(busy, "send", "-k", "c"))[1]
    assert busy.status("a")["state"] == "paused"
    busy.must("stop", "-fw", "a")
    assert busy.must("unpause", "c").endswith("successfully\n")
    assert works(busy, "c").rounds > rounds
    busy.must("stop", "-fw", "c")
    busy.must("start", "a")
    before.check(busy)


def test_names_that_are_taken(demo: Daemon, tmp_path: Path) -> None:
    """The name belongs to a running VM, so nothing is read."""
    to_file(demo, "a", tmp_path / "stream", "-k")
    assert from_file(demo, "a", tmp_path / "stream") == (
        1, "vmctl: receive vm command failed: vm a exists, and is running\n"
    )  # fmt: skip
    assert from_file(demo, "../c", tmp_path / "stream") == (
        1, f"vmctl: receive vm command failed: invalid VM name: ../c: {rules.NAME_FORM}\n"
    )  # fmt: skip
    demo.must("stop", "-fw", "a")
    with (tmp_path / "again").open("wb") as file:
        assert ended(vmctl(demo, "send", "a", stdout=file.fileno())) == (
            1, "vmctl: send vm command failed: vm a is not running\n"
        )  # fmt: skip


# --- false streams ---------------------------------------------------------------------------------------------------


@pytest.fixture
def snapshot(demo: Daemon, tmp_path: Path) -> Stream:
    """Return the stream of a VM that goes on; in the stream its disk is not locked."""
    path = tmp_path / "snapshot"
    to_file(demo, "a", path, "-k")
    Disk(tmp_path / "other")
    other = with_config(disks=(DiskConfig(path=str(tmp_path / "other"), format="raw"),))
    return Stream(Stream(path.read_bytes()).with_header(other))


def receive(vmd: Daemon, raw: bytes) -> tuple[int, str]:
    """Receive a stream as VM c."""
    path = vmd.directory / "to-receive"
    path.write_bytes(raw)
    return from_file(vmd, "c", path)


def damage(vmd: Daemon, snapshot: Stream, times: int) -> None:
    """Check that cut, changed and random streams are refused, without effect on others."""
    raw = snapshot.with_state(lambda state: state)
    assert receive(vmd, raw)[0] == 0  # unchanged it is accepted
    answers(vmd, "c")
    vmd.must("stop", "-fw", "c")
    before, generator = Footprint(vmd), random.Random(55)
    for _ in range(times):
        flipped, place = bytearray(raw), generator.randrange(len(raw))
        flipped[place] ^= 1 << generator.randrange(8)
        foreign = generator.randbytes(generator.randrange(1, 5000))
        beginning = raw[: generator.choice((8, 16, 100, 2000))]
        for bad in (raw[: generator.randrange(len(raw))], bytes(flipped), foreign, beginning + foreign):
            status, errors = receive(vmd, bad)
            assert (status, errors.count("\n")) == (1, 1), errors
            assert errors.startswith("vmctl: receive vm command failed: vm c: the stream "), errors
    answers(vmd, "a")
    before.check(vmd)
    assert "Traceback" not in vmd.log


def test_damaged_streams(demo: Daemon, snapshot: Stream) -> None:
    """Streams are damaged at twenty places."""
    damage(demo, snapshot, 5)


@pytest.mark.deep
@pytest.mark.timeout(1800)
def test_many_damaged_streams(demo: Daemon, snapshot: Stream) -> None:
    """Streams are damaged at a thousand places."""
    damage(demo, snapshot, 250)


def vcpu(**changes: object) -> Callable[[MachineState], Record]:
    """Return a change of the first vCPU."""
    return lambda state: state.replace(vcpus=(state.vcpus[0].replace(**changes), *state.vcpus[1:]))


def disk(**changes: object) -> Callable[[MachineState], Record]:
    """Return a change of the disk's registers."""
    return lambda state: state.replace(virtio=(state.virtio[0], state.virtio[1].replace(**changes)))


def ring(**changes: object) -> Callable[[MachineState], Record]:
    """Return a change to a disk with a running driver and rings at some address."""

    def change(state: MachineState) -> Record:
        queues = tuple(
            queue.replace(**{"enabled": True, "desc": 0x10000, "avail": 0x11000, "used": 0x12000} | changes)
            for queue in state.virtio[1].queues
        )
        running = disk(active=True, status=0xF, driver_features=1 << 32, features_locked=True, queues=queues)
        changed = running(state)
        assert isinstance(changed, MachineState)
        return changed

    return change


def chip(name: str, **registers: int | bytes) -> Callable[[MachineState], Record]:
    """Return a change of a chip."""

    def change(state: MachineState) -> Record:
        return state.replace(
            chips=tuple(
                each.replace(
                    registers=tuple(
                        register
                        if register.name not in registers
                        else Register(name=register.name, number=0, data=value)
                        if isinstance(value := registers[register.name], bytes)
                        else Register(name=register.name, number=value)
                        for register in each.registers
                    )
                )
                if each.name == name
                else each
                for each in state.chips
            )
        )

    return change


def function(slot: int, **changes: object) -> Callable[[MachineState], Record]:
    """Return a change of a PCI function."""
    return lambda state: state.replace(
        functions=tuple(each.replace(**changes) if each.slot == slot else each for each in state.functions)
    )


BAD_STATES: list[tuple[str, Callable[[MachineState], Record], str]] = [
    ("no vcpus", lambda state: state.replace(vcpus=()), "the state has 0 vcpus, not 2"),
    ("a vcpu too many", lambda state: state.replace(vcpus=state.vcpus * 2), "the state has 4 vcpus, not 2"),
    ("no registers", vcpu(regs=b""), "kvm_regs of 0 bytes, not 144"),
    ("registers and a byte", lambda state: vcpu(regs=state.vcpus[0].regs + b"x")(state),
     "kvm_regs of 145 bytes, not 144"),
    ("segments of ones", lambda state: vcpu(sregs=b"\xff" * len(state.vcpus[0].sregs))(state),
     "KVM does not take it: KVM_SET_SREGS: Invalid argument"),
    ("half an xsave area", lambda state: vcpu(xsave=state.vcpus[0].xsave[:100])(state), "xsave area of 100 bytes"),
    ("an xsave area of ones", lambda state: vcpu(xsave=b"\xff" * len(state.vcpus[0].xsave))(state),
     "KVM does not take it: KVM_SET_XSAVE: Invalid argument"),
    ("no xcrs", vcpu(xcrs=b""), "kvm_xcrs of 0 bytes, not 392"),
    ("xcrs of ones", lambda state: vcpu(xcrs=b"\xff" * len(state.vcpus[0].xcrs))(state),
     "KVM does not take it: KVM_SET_XCRS: Invalid argument"),
    ("no apic", vcpu(lapic=b""), "kvm_lapic_state of 0 bytes, not 1024"),
    ("events of ones", lambda state: vcpu(events=b"\xff" * len(state.vcpus[0].events))(state),
     "KVM does not take it: KVM_SET_VCPU_EVENTS: Invalid argument"),
    ("half an msr", vcpu(msrs=b"12345"), "the state of a vcpu has 5 bytes of MSRs"),
    ("a state of its own", vcpu(mp_state=77), "KVM does not take it: KVM_SET_MP_STATE: Invalid argument"),
    ("no interrupt controllers", lambda state: state.replace(irqchips=()),
     "the state has 0 interrupt controllers, not 3"),
    ("the same controller", lambda state: state.replace(irqchips=state.irqchips[:1] * 3),
     "the state of interrupt controller 1 has another number"),
    ("short controllers", lambda state: state.replace(irqchips=tuple(raw[:10] for raw in state.irqchips)),
     "kvm_irqchip of 10 bytes, not 520"),
    ("no pit", lambda state: state.replace(pit=b""), "kvm_pit_state2 of 0 bytes, not 112"),
    ("no chips", lambda state: state.replace(chips=()), "the state has other chips than this machine"),
    ("another chip", lambda state: state.replace(chips=(state.chips[0].replace(name="vga"), *state.chips[1:])),
     "the state has other chips than this machine"),
    ("chips twice", lambda state: state.replace(chips=state.chips * 2), "the state has other chips than this machine"),
    ("a number of zeros", chip("uart", rx=1 << 40), "register rx of uart has another type"),
    ("a long fifo", chip("uart", rx=bytes(1000), rx_errors=bytes(1000)),
     "an impossible state of uart: uart: receiver of 1000 bytes with 1000 error bytes"),
    ("memory of a clock", chip("rtc", ram=1 << 40), "register ram of rtc has another type"),
    ("a clock of the far future", chip("rtc", offset_us=1 << 62),
     "an impossible state of rtc: clock: offset of 4611686018427387904 microseconds"),
    ("no devices", lambda state: state.replace(virtio=()), "the state has 0 virtio devices, not 2"),
    ("devices twice", lambda state: state.replace(virtio=state.virtio * 2), "the state has 4 virtio devices, not 2"),
    ("devices swapped", lambda state: state.replace(virtio=state.virtio[::-1]),
     "a device of kind 'blk' in the place of viornd0"),
    ("status", disk(status=1 << 20), "status is 1048576, which does not fit 8 bits"),
    ("features", disk(driver_features=-1), "driver_features is -1, which does not fit 64 bits"),
    ("selected queue", disk(queue_select=-5), "queue_select is -5, which does not fit 16 bits"),
    ("no configuration", disk(config=b""), "vioblk0 has other queues or another size of configuration"),
    ("another disk", lambda state: disk(config=b"\xff" * len(state.virtio[1].config))(ring()(state)),  # type: ignore[arg-type]
     "vioblk0 is a different device here, such as a disk of another size"),
    ("no queues", disk(queues=()), "vioblk0 has other queues or another size of configuration"),
    ("queue of no size", ring(size=0), "vioblk0 has a queue of 0"),
    ("queue of an odd size", ring(size=100), "vioblk0 has a queue of 100"),
    ("queue too large", ring(size=1024), "vioblk0 has a queue of 1024"),
    ("rings beyond 63 bits", ring(desc=-(1 << 63)), "desc is -9223372036854775808, which does not fit 64 bits"),
    ("rings below zero", ring(used=-4096), "used is -4096, which does not fit 64 bits"),
    ("place in a ring", ring(next_avail=1 << 16), "next_avail is 65536, which does not fit 16 bits"),
    ("negative place in a ring", ring(next_used=-1), "next_used is -1, which does not fit 16 bits"),
    ("vector", ring(vector=-1), "vector is -1, which does not fit 16 bits"),
    ("no functions", lambda state: state.replace(functions=()), "saved pci slots [] are not those of this machine"),
    ("short configuration space", function(2, config=b""), "pci slot 2: configuration space of 0 bytes"),
    ("another device", function(2, config=bytes(256)), "pci slot 2: saved byte 0x0 is 0x0, here it is 0x"),
    ("no msi-x table", function(2, msix=b""), "pci slot 2: msi-x table of 0 bytes"),
    ("vmmci", lambda state: state.replace(vmmci=state.vmmci.replace(registers=())), "vmmci has no register config"),
]  # fmt: skip


@pytest.mark.deep
def test_states_that_no_machine_has(demo: Daemon, snapshot: Stream) -> None:
    """The VM's process refuses each with its own message and ends; no other process ends (hostile-input 26)."""
    before = Footprint(demo)
    for name, change, what in BAD_STATES:
        status, errors = receive(demo, snapshot.with_state(change))
        print(f"{name}: {errors.strip()}")
        assert (status, errors.count("\n")) == (1, 1), name
        assert f"vm c: the stream is not usable: {what}" in errors, name
    answers(demo, "a")
    before.check(demo)
    assert "Traceback" not in demo.log


ODD_STATES: list[tuple[str, Callable[[MachineState], Record]]] = [
    ("rings at the end of memory", ring(desc=(64 << 20) - 16)),
    ("rings beyond memory", ring(desc=1 << 40, avail=1 << 41, used=1 << 42)),
    ("rings at the last address", ring(desc=(1 << 64) - 16, avail=(1 << 64) - 16, used=(1 << 64) - 16)),
    ("rings that are not aligned", ring(desc=3, avail=1, used=1)),
    ("rings on one another", ring(desc=0x10000, avail=0x10000, used=0x10000)),
    ("rings in the firmware's place", ring(desc=0xFFFC0000)),
    ("a place behind the ring", ring(next_avail=40000)),
    ("a driver that is broken", disk(status=0xCF)),
    ("interrupts under way", ring(called=True, unseen=True)),
    ("vectors of another device", ring(vector=0x7FFF)),
    ("a table of ones", function(2, msix=b"\xff" * 32)),
    ("registers of ones", vcpu(regs=b"\xff" * 144)),
    ("an apic of ones", vcpu(lapic=b"\xff" * 1024)),
    ("every msr", vcpu(msrs=b"".join(index.to_bytes(4, "little") + b"\xff" * 8 for index in range(2000)))),
    ("a clock before its time", lambda state: state.replace(kvmclock_ns=-1)),
    ("a tsc before its time", vcpu(tsc=-1)),
    ("a request of vmmci", lambda state: state.replace(
        vmmci=state.vmmci.replace(registers=tuple(
            register.replace(data=b"\xff" * 20) if register.name == "config" else register
            for register in state.vmmci.registers
        )))),
    ("a controller of ones", lambda state: state.replace(
        irqchips=tuple(raw[:4] + b"\xff" * (len(raw) - 4) for raw in state.irqchips))),
    ("a pit of ones", lambda state: state.replace(pit=b"\xff" * len(state.pit))),
    ("chips of large numbers", lambda state: state.replace(chips=tuple(
        each.replace(registers=tuple(
            register if register.data is not None else register.replace(number=(1 << 64) - 1)
            for register in each.registers
        )) if each.name in ("uart", "keyboard", "reset", "port 92", "fw_cfg", "pm") else each
        for each in state.chips))),
]  # fmt: skip


@pytest.mark.deep
def test_states_that_no_driver_makes(demo: Daemon, snapshot: Stream) -> None:
    """Such states affect only the guest: it may run, fail or be refused with a message, and the host goes on."""
    before = Footprint(demo)
    for name, change in ODD_STATES:
        status, errors = receive(demo, snapshot.with_state(change))
        print(f"{name}: {status} {errors.strip()}")
        assert errors.count("\n") == 1, name
        if status == 0:
            if demo.status("c")["state"] == "running":
                demo.vmctl("pause", "c")  # its devices answer, or the VM has ended by itself
            demo.vmctl("stop", "-fw", "c")
        else:
            assert "vm c: the stream is not usable: " in errors, name
        while any(row["name"] == "c" for row in demo.rows()):
            demo.vmctl("stop", "-fw", "c")
    answers(demo, "a")
    before.check(demo)
    assert "Traceback" not in demo.log


BOMBS: list[tuple[str, bytes | Callable[[Stream], bytes], str]] = [
    ("not msgpack", b"\xc1" * 100, "section "),
    ("deep", b"\x91" * 100_000, "section "),
    ("many lists", b"\xdd\x00\x01\x00\x00" + b"\x90" * 65536, "section "),
    ("a list that says it is long", b"\xdd\xff\xff\xff\xff", "section "),
    ("a map", b"\x80", "section "),
    ("too long", bytes(16 << 20), "kind 2 and length 16777216"),
    ("thousands of sections", lambda stream: stream.with_sections(
        lambda sections: [(MEMORY, (32 << 20 | number).to_bytes(8, "little") + b"x") for number in range(20000)]
        + [each for each in sections if each[0] == STATE]), ""),
    ("memory twice", lambda stream: stream.with_sections(lambda sections: sections[:1] * 2), "comes twice"),
    ("state twice", lambda stream: stream.with_sections(lambda sections: sections + sections[-1:]), "comes twice"),
    ("no state", lambda stream: stream.with_sections(lambda sections: sections[:-1]), "has no state of the machine"),
    ("memory outside", lambda stream: stream.with_sections(
        lambda sections: [(MEMORY, (1 << 50).to_bytes(8, "little") + b"x")]), "no memory"),
]  # fmt: skip


def test_bombs(demo: Daemon, snapshot: Stream) -> None:
    """Streams with correct digests that would take unlimited time or memory are refused."""
    for name, bomb, what in BOMBS:
        raw = snapshot.with_state(bomb) if isinstance(bomb, bytes) else bomb(snapshot)
        status, errors = receive(demo, raw)
        print(f"{name}: {errors.strip()}")
        assert what in errors, name
        assert (status == 0) == (what == ""), name
        if status == 0:
            demo.must("stop", "-fw", "c")
    answers(demo, "a")


# --- interrupted -----------------------------------------------------------------------------------------------------


class Stuck:
    """A transfer without progress: VM `a` is sent and nobody reads, or VM `c` is received and nothing comes."""

    def __init__(self, vmd: Daemon, command: str) -> None:
        self.vmd = vmd
        reading, writing = os.pipe2(os.O_CLOEXEC)
        if command == "send":
            self.name, state = "a", "sending"
            self.client = vmctl(vmd, "send", "a", stdout=writing)
            os.close(writing)
            self.end = reading
        else:
            self.name, state = "c", "receiving"
            snapshot = vmd.directory / "stuck"
            if not snapshot.exists():
                to_file(vmd, "a", snapshot, "-k")
            self.client = vmctl(vmd, "receive", "c", stdin=reading)
            os.close(reading)
            os.write(writing, snapshot.read_bytes()[:60000])
            self.end = writing
        deadline = time.monotonic() + DEADLINE_S
        while state not in (row["state"] for row in vmd.rows()) or f"vmd: vm/{self.name}" not in vmd.processes():
            assert time.monotonic() < deadline, vmd.rows()

    def close(self) -> None:
        """Close the other end."""
        os.close(self.end)
        if self.client.poll() is None:
            self.client.kill()
        self.client.communicate()


@contextmanager
def stuck(vmd: Daemon, command: str) -> Iterator[Stuck]:
    """Yield a transfer without progress."""
    made = Stuck(vmd, command)
    try:
        yield made
    finally:
        made.close()


COMMANDS = pytest.mark.parametrize("command", ["send", "receive"])


def as_before(vmd: Daemon) -> None:
    """Raise AssertionError unless the guest goes on, and nothing is left of the other VM."""
    deadline = time.monotonic() + DEADLINE_S
    while {row["name"]: row["state"] for row in vmd.rows()} != {"a": "running", "b": "stopped"}:
        assert time.monotonic() < deadline, vmd.rows()
    works(vmd, "a")


@COMMANDS
def test_client_that_is_ended(busy: Daemon, command: str) -> None:
    """After ^C or a kill the stream is incomplete, so the sent VM goes on and the received one is gone."""
    before = Footprint(busy)
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        with stuck(busy, command) as transfer:
            transfer.client.send_signal(signum)
            transfer.client.wait(DEADLINE_S)
            as_before(busy)
    before.check(busy)


def test_sending_meanwhile(busy: Daemon) -> None:
    """Other requests are refused with the state.  Only a stop by force ends the VM, and the client is told."""
    with stuck(busy, "send") as transfer:
        for words in (("pause", "a"), ("unpause", "a"), ("send", "-k", "a")):
            assert "vm a is sending" in ended(vmctl(busy, *words))[1]
        assert "vm a is being sent; interrupt that, or stop it by force" in busy.vmctl("stop", "a").stderr
        assert "vm a exists, and is sending" in from_file(busy, "a", busy.conf)[1]
        assert "vm a is sending" in busy.vmctl("start", "a").stderr

        busy.must("stop", "-fw", "a")

        assert ended(transfer.client) == (1, "vmctl: send vm command failed: vm a: stopped by force\n")
    assert busy.status("a")["state"] == "stopped"


@pytest.mark.parametrize("options", [(), ("-f",)])
def test_receiving_meanwhile(busy: Daemon, options: tuple[str, ...]) -> None:
    """Other requests are refused with the state.  A stop ends the VM, and the client is told."""
    with stuck(busy, "receive") as transfer:
        for words in (("pause", "c"), ("unpause", "c"), ("send", "-k", "c")):
            assert "vm c is receiving" in ended(vmctl(busy, *words))[1]
        assert "vm c exists, and is receiving" in from_file(busy, "c", busy.conf)[1]

        busy.must("stop", "-w", *options, "c")

        status, errors = ended(transfer.client)
        assert status == 1
        assert errors.startswith("vmctl: receive vm command failed: vm c: stopped ")
    as_before(busy)


@COMMANDS
def test_daemon_that_ends_meanwhile(busy: Daemon, command: str) -> None:
    """Guests are asked to shut down, also those in a transfer.  Nothing hangs, and nothing is left."""
    pids = list(busy.processes().values())
    with stuck(busy, command) as transfer:
        assert busy.stop() == 0
        assert ended(transfer.client)[0] == 1
    wait_gone(pids)


def wait_gone(pids: list[int]) -> None:
    """Wait until all these processes have ended."""
    deadline = time.monotonic() + DEADLINE_S
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline
        select.select([], [], [], 0.02)


@pytest.mark.parametrize(("command", "victim"), [
    ("send", "vm/a"), ("send", "vm/a/vioblk0"), ("receive", "vm/c"),
])  # fmt: skip
def test_death_meanwhile(busy: Daemon, command: str, victim: str) -> None:
    """The client is told, the VM has ended, and all other processes live."""
    with stuck(busy, command) as transfer:
        os.kill(busy.processes()[f"vmd: {victim}"], signal.SIGKILL)
        status, errors = ended(transfer.client)
    print(errors)
    assert status == 1
    assert "SIGKILL" in errors
    if command == "receive":
        as_before(busy)
    else:
        assert busy.status("a")["state"] == "stopped"
        busy.must("start", "a")


@pytest.mark.parametrize("command", ["send", "pause"])
def test_death_of_a_device_that_is_to_pause(busy: Daemon, tmp_path: Path, command: str) -> None:
    """The VM that waits for the device's answer ends, and the client is told why."""
    processes = busy.processes()
    waiting = Path(f"/proc/{processes['vmd: vm/a']}/wchan")
    os.kill(processes["vmd: vm/a/vioblk0"], signal.SIGSTOP)
    with (tmp_path / "stream").open("wb") as stream:
        client = vmctl(busy, command, "a", stdout=stream.fileno())
    deadline = time.monotonic() + DEADLINE_S
    while not re.search("sys_poll|poll_schedule", waiting.read_text()):  # the poll for one answer, not the event loop
        assert time.monotonic() < deadline
        pause()
    os.kill(processes["vmd: vm/a/vioblk0"], signal.SIGKILL)

    status, errors = ended(client)

    assert (status, errors) == (
        1, f"vmctl: {command} vm command failed: vm a: vm/a/vioblk0: was killed by SIGKILL\n"
    )  # fmt: skip
    assert busy.wait_state("a", "stopped")["text"] == "vm/a/vioblk0: was killed by SIGKILL"
    busy.must("start", "a")


@COMMANDS
def test_death_of_vmm_meanwhile(busy: Daemon, command: str) -> None:
    """The daemon ends too, cleanly."""
    with stuck(busy, command) as transfer:
        processes = busy.processes()
        os.kill(processes["vmd: vmm"], signal.SIGKILL)
        assert busy.process is not None
        assert busy.process.wait(DEADLINE_S) == 1
        assert ended(transfer.client) == (3, "vmctl: pipe closed\n")
    wait_gone(list(processes.values()))
    assert "lost child: vmm" in busy.log


def test_a_sender_whose_reader_dies_goes_on(busy: Daemon) -> None:
    """`vmctl send a | vmctl receive c`, and the receiving VM's process is killed in the middle."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    receiver = vmctl(busy, "receive", "c", stdin=reading)
    os.close(reading)
    deadline = time.monotonic() + DEADLINE_S
    while (pid := busy.processes().get("vmd: vm/c", 0)) == 0:
        assert time.monotonic() < deadline
        pause()
    os.kill(pid, signal.SIGSTOP)
    sender = vmctl(busy, "send", "a", stdout=writing)
    os.close(writing)
    busy.wait_state("a", "sending")
    os.kill(pid, signal.SIGKILL)

    assert "SIGKILL" in ended(receiver)[1]
    assert ended(sender) == (1, NOT_SENT)
    works(busy, "a")


@pytest.mark.deep
def test_two_at_once(tmp_path: Path) -> None:
    """Two VMs are moved at the same time."""
    disks = [Disk(tmp_path / name) for name in "xy"]
    conf = "".join(
        block(name, "blk", "churn", f'disk "{each.path}" format raw') for name, each in zip("xy", disks, strict=True)
    )
    with Daemon(tmp_path, conf) as vmd:
        vmd.must("start", "x")
        vmd.must("start", "y")
        for name in "xy":
            with vmd.console(name) as console:
                churn.begin(console)
        pipes = [os.pipe2(os.O_CLOEXEC) for _ in "xy"]
        clients = []
        for name, (reading, writing) in zip("xy", pipes, strict=True):
            clients.append(vmctl(vmd, "send", name, stdout=writing))
            clients.append(vmctl(vmd, "receive", f"new-{name}", stdin=reading))
            os.close(reading)
            os.close(writing)
        assert [ended(client)[0] for client in clients] == [0, 0, 0, 0]
        for name in "xy":
            works(vmd, f"new-{name}")


# The errors in the state of each send, in order; the last state is correct.
BROKEN = '''

_right = save
_broken = iter([
    lambda state: state.replace(chips=state.chips[:-1]),
    lambda state: state.replace(chips=(ChipState(name="uart", registers=tuple(
        Register(name=each.name, number=0, data=bytes(99)) if each.name == "rx" else each
        for each in state.chips[0].registers
    )), *state.chips[1:])),
    lambda state: state.replace(virtio=(state.virtio[0].replace(status=512), *state.virtio[1:])),
    lambda state: state.replace(virtio=state.virtio[::-1]),
    lambda state: state.replace(functions=state.functions[:-1]),
    lambda state: state.replace(pit=bytes(400_000)),
    lambda state: state.replace(kvmclock_ns=1 << 70),
])

def save(machine, clocks):
    return next(_broken, lambda state: state)(_right(machine, clocks))
'''
REFUSALS = (
    "the state has other chips than this machine",
    "an impossible state of uart: uart: receiver of 99 bytes with 0 error bytes",
    "status is 512, which does not fit 8 bits", "a device of kind 'blk' in the place of viornd0",
    "saved pci slots [0, 1, 2] are not", "the state has ", "Integer value out of range",
)  # fmt: skip


@pytest.mark.deep
def test_a_machine_with_an_invalid_state_is_not_sent(tmp_path: Path) -> None:
    """A sender with a bug notices the invalid state before it gives up the guest, and reports what is wrong."""
    code = tmp_path / "code"
    code.mkdir()
    subprocess.run(["cp", "-a", ROOT / "vmd", ROOT / "vmctl", code], check=True)
    with (code / "vmd" / "vm" / "state.py").open("a") as module:
        module.write(BROKEN)
    disk = Disk(tmp_path / "disk")
    conf = block("a", "demo", "", f'disk "{disk.path}" format raw') + block("b", "demo")
    with Daemon(tmp_path, conf, code=code) as vmd:
        vmd.must("start", "a")
        with vmd.console("a") as console:
            console.expect(PROMPT, DEADLINE_S)
        pid = vmd.status("a")["pid"]
        for reason in REFUSALS:
            with (tmp_path / "stream").open("wb") as stream:
                status, said = ended(vmctl(vmd, "send", "a", stdout=stream.fileno()))
            assert status == 1
            assert f"vm a was not sent, and is as before: nobody could receive it: {reason}" in said
            answers(vmd, "a")
            assert (vmd.status("a")["pid"], vmd.status("a")["state"]) == (pid, "running")
        move(vmd, "a", "b")
        answers(vmd, "b")


def test_a_viewer_sees_the_end(busy: Daemon, tmp_path: Path) -> None:
    """A viewer of a sent VM is disconnected when the VM is gone."""
    with busy.attached("a") as viewer:
        viewer.expect("churn: begin", DEADLINE_S)
        to_file(busy, "a", tmp_path / "stream")
        viewer.drain(DEADLINE_S)
    assert busy.status("a")["text"] == "sent"


# --- disks ----------------------------------------------------------------------------------------------------------


def test_a_disk_that_cannot_be_flushed_keeps_its_vm_here(tmp_path: Path) -> None:
    """Data that the guest was told is written would be lost at the target, so the VM stays, with a message."""
    folder = tmp_path / "mnt"
    folder.mkdir()
    with FuseFile(bytes(1 << 20), for_all=True) as file, attached(file, folder) as path:
        conf = block("a", "demo", "", f'disk "{path}" format raw')
        with Daemon(tmp_path, conf) as vmd:
            vmd.must("start", "a")
            with vmd.console("a") as console:
                console.expect(PROMPT, DEADLINE_S)
            file.rule(fusefile.FSYNC, errno.EIO)

            with (tmp_path / "stream").open("wb") as stream:
                status, said = ended(vmctl(vmd, "send", "a", stdout=stream.fileno()))

            assert (status, said) == (
                1,
                "vmctl: send vm command failed: vm a was not sent, and is as before: disk0: what the guest has written"
                " cannot be brought to stable storage; `vmctl status -v` and the log say why\n",
            )
            assert "disk0: flush fails: data was lost: Input/output error (since " in vmd.must("status", "-v", "a")
            assert f"vm/a/vioblk0: flush fails: {path}: data was lost: Input/output error" in vmd.log
            answers(vmd, "a")
            vmd.must("stop", "-fw", "a")


@contextmanager
def attached(file: FuseFile, folder: Path) -> Iterator[Path]:
    """Attach a FUSE file system to a folder while the context lasts."""
    try:
        yield file.attach(folder)
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)
