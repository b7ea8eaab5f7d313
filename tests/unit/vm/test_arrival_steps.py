"""The steps of a VM that is received: what is read when, who may go on, and what vmm is told."""

import errno
import os
import select
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from tests.support import saved
from tests.support.descriptors import open_files
from tests.support.vminside import VMID, VmRig, start_vm
from tests.unit.vm.test_transfer import GOOD, Run, stream
from vmd.errors import HostError
from vmd.ipc.messages.shared import DiskImages, ImageLink, TransferProgress
from vmd.ipc.messages.vm import (
    ReceivedHeader,
    ReceivedMachine,
    ReceiveMemory,
    ReceiveVm,
    ResumeReceived,
    VmEnding,
    VmFailed,
    VmRunning,
)
from vmd.record import Record
from vmd.units import PAGE
from vmd.vm import arrival, streamprobe
from vmd.vm.arrival import PROBE_LOOK_S
from vmd.vm.stream import IDLE_TIMEOUT_S, PREAMBLE, Pipe

CONFIG = saved.header().config
DISK = DiskImages(images=(ImageLink(path="/disk", format="raw"),))
RUNS: tuple[Run, ...] = ((3 * PAGE, b"memory of the guest"),)
MEMORY = ReceiveMemory(vmid=VMID)
RESUME = ResumeReceived(vmid=VMID, config=CONFIG, paused=False, disks=(DISK,))


class Probe:
    """A streamprobe that gives an answer at once, or never."""

    def __init__(self) -> None:
        self.title = "vm/sent/streamprobe"
        self.answer: bytes | None = b""
        self.honest = True
        self.status = 0
        self.calls: list[str] = []
        self.refusal: Exception | None = None

    def spawn(self, _title: str, *, fds: Mapping[int, int], entry: str) -> "Probe":
        """Replaces `spawn`."""
        assert entry == "vmd.vm.streamprobe:main"
        if self.refusal is not None:
            raise self.refusal
        if self.honest:
            self.answer = streamprobe.probe(Pipe(fds[streamprobe.FD_STREAM], select.POLLIN))
        if self.answer is None:
            self.kept = os.dup(fds[streamprobe.FD_ANSWER])
        else:
            os.write(fds[streamprobe.FD_ANSWER], self.answer)
        return self

    def kill(self) -> None:
        """End."""
        self.calls.append("kill")
        os.close(self.kept)

    def reap(self, _timeout_s: float) -> int:
        """Return the status."""
        self.calls.append("reap")
        return self.status


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[VmRig]:
    """A VM process that can be resumed as one that was received."""
    made = VmRig(monkeypatch)
    made.arriving = True
    monkeypatch.setattr(arrival, "check_host", lambda _header: made.steps.append("check host"))
    yield made
    made.close()


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> Probe:
    """Its streamprobe, which is honest."""
    made = Probe()
    monkeypatch.setattr(arrival, "spawn", made.spawn)
    return made


def receive(rig: VmRig, fd: int) -> list[Record]:
    """Give the process a stream."""
    memory = os.memfd_create("memory", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    fds = {**rig.console_fds(), "memory": [memory], "courier": [rig.courier(stream=fd)]}
    return rig.tell(ReceiveVm(vmid=VMID, name="sent", verbosity=0), fds=fds)


def resume(rig: VmRig) -> list[Record]:
    """Let the machine run."""
    disk = os.open(os.devnull, os.O_RDWR)
    return rig.tell(RESUME, fds={"couriers": [rig.courier(disks=disk)]})


def failure(told: list[Record]) -> VmFailed:
    """Return the report of a failure, which the end follows."""
    failed, ending = (each for each in told if not isinstance(each, TransferProgress))
    assert isinstance(failed, VmFailed)
    assert ending == VmEnding(text=failed.text)
    return failed


def test_a_vm_arrives(rig: VmRig, probe: Probe) -> None:
    """Step by step: each waits for vmm.  The process is confined before it looks at the header."""
    pipes = [name for name in open_files(os.getpid()).values() if name.startswith("pipe:")]
    assert receive(rig, stream(*RUNS, states=(GOOD,))) == [ReceivedHeader(vmid=VMID, config=CONFIG, one_shot=True)]
    assert probe.calls == ["reap"]
    assert [name for name in open_files(os.getpid()).values() if name.startswith("pipe:")] == pipes
    assert rig.devices.log[0] == [("rng", "main"), ("blk", "main")]
    assert [step if isinstance(step, str) else step[0] for step in rig.steps] == ["confine", "check host"]

    rig.vmm.send(MEMORY)
    told = rig.wait_for(ReceivedMachine)
    assert told[-1] == ReceivedMachine(vmid=VMID)
    assert {each.round for each in told if isinstance(each, TransferProgress)} == {0}
    assert resume(rig) == [VmRunning(vmid=VMID)]
    source = rig.built[1]
    assert source.memory.read(3 * PAGE, 19) == RUNS[0][1]
    assert source.saved == saved.machine_state()
    assert [slot.kind.name for slot in rig.built[3]] == ["rng", "blk"]
    assert rig.machine.is_running()


@pytest.mark.parametrize(("content", "text"), [
    (b"", "the stream ends before its header"), (b"#!/bin/sh\n" * 100, "the stream"), (bytes(1 << 17), "the stream"),
])  # fmt: skip
def test_what_is_no_stream(rig: VmRig, probe: Probe, content: bytes, text: str) -> None:
    """The VM fails with the sentence of streamprobe, and no device is started."""
    fd = os.memfd_create("stream")
    os.write(fd, content)
    os.lseek(fd, 0, os.SEEK_SET)
    failed = failure(receive(rig, fd))
    assert failed.code == errno.EINVAL
    assert failed.text.startswith("the stream")
    assert rig.steps == []


@pytest.mark.parametrize("answer", [b"", b"\x01", b"\x07" * 100])
def test_a_streamprobe_that_fails(rig: VmRig, probe: Probe, answer: bytes) -> None:
    """The VM fails, and the sentence has its status."""
    probe.honest, probe.answer, probe.status = False, answer, -9
    failed = failure(receive(rig, stream(states=(GOOD,))))
    assert failed.text == f"vm/sent/streamprobe: answer of {len(answer)} bytes, status -9"
    assert rig.steps == []


def test_a_streamprobe_that_says_too_much(rig: VmRig, probe: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more of it is read than an answer can have."""
    monkeypatch.setattr(streamprobe, "ANSWER_MAX", 1000)
    probe.honest, probe.answer = False, b"\x01" * 1001
    assert "answer of 1001 bytes" in failure(receive(rig, stream(states=(GOOD,)))).text


def test_a_streamprobe_that_lies(rig: VmRig, probe: Probe) -> None:
    """Its devices are compared with those of the header."""
    fd = stream(states=(GOOD,))
    honest = streamprobe.probe(Pipe(fd, select.POLLIN))
    counts = [*honest[: streamprobe.HEAD.size]]
    counts[5 + 1] += 1  # one interface more
    probe.honest, probe.answer = False, bytes(counts) + honest[streamprobe.HEAD.size :]
    text = "the stream is not usable: its devices are not those that streamprobe has found"
    assert failure(receive(rig, fd)).text == text


@pytest.mark.parametrize("error", [ValueError("it needs a newer processor"), OSError(errno.EMFILE, "KVM_CREATE_VM")])
def test_a_machine_that_cannot_run_here(
    rig: VmRig, probe: Probe, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """That is found before any memory is read, while the sender still has it."""

    def refuse(_header: object) -> None:
        raise error

    monkeypatch.setattr(arrival, "check_host", refuse)
    failed = failure(receive(rig, stream(states=(GOOD,))))
    assert failed.code == errno.EINVAL
    assert failed.text.startswith("the stream is not usable: ")


@pytest.mark.parametrize("readable", [True, False])
def test_a_streamprobe_that_does_not_read(rig: VmRig, probe: Probe, readable: bool) -> None:
    """It is killed at the second look at bytes that it leaves, or when it should have given up by itself."""
    probe.honest, probe.answer = False, None
    reading, writing = os.pipe2(os.O_CLOEXEC)
    if readable:
        os.write(writing, bytes(PREAMBLE.size))
    assert receive(rig, reading) == []
    looks = 1 if readable else round(IDLE_TIMEOUT_S / PROBE_LOOK_S)
    for _ in range(looks):
        assert rig.pass_time(PROBE_LOOK_S) == []
    assert probe.calls == []
    failed = failure(rig.pass_time(PROBE_LOOK_S + 1))
    assert failed.text == "vm/sent/streamprobe does not read the stream: Connection timed out"
    assert probe.calls == ["kill", "reap"]
    os.close(writing)


def test_a_streamprobe_that_reads_slowly(rig: VmRig, probe: Probe) -> None:
    """Bytes that come between two looks are not held against it."""
    probe.honest, probe.answer = False, None
    reading, writing = os.pipe2(os.O_CLOEXEC)
    stream_fd = os.dup(reading)
    receive(rig, reading)
    for _ in range(4):
        os.write(writing, b"x")
        assert rig.pass_time(PROBE_LOOK_S) == []
        os.read(stream_fd, 1)
        assert rig.pass_time(PROBE_LOOK_S) == []
    assert probe.calls == []
    os.close(probe.kept)
    rig.turn()
    for fd in (stream_fd, writing):
        os.close(fd)


def test_a_streamprobe_that_cannot_be_started(rig: VmRig, probe: Probe) -> None:
    """The VM fails with the reason."""
    probe.refusal = HostError("start streamprobe", errno.ENOMEM)
    failed = failure(receive(rig, stream(states=(GOOD,))))
    assert (failed.code, failed.text) == (errno.ENOMEM, "start streamprobe: Cannot allocate memory")


def test_a_device_process_that_cannot_be_started(rig: VmRig, probe: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    """The VM fails before its header is looked at."""

    def refuse(_devices: object) -> None:
        raise HostError("start vioblk0", errno.ENOMEM)

    monkeypatch.setattr(rig.devices, "spawn", refuse)
    assert failure(receive(rig, stream(states=(GOOD,)))).text == "start vioblk0: Cannot allocate memory"
    assert "check host" not in rig.steps


@pytest.mark.parametrize(("runs", "states", "text"), [
    ((), (), "the stream has no state of the machine"),
    (((1 << 40, b"x"),), (GOOD,), "no memory"),
    (RUNS, (GOOD, GOOD), "comes twice"),
])  # fmt: skip
def test_a_stream_that_is_wrong_after_its_header(
    rig: VmRig, probe: Probe, runs: tuple[Run, ...], states: tuple[bytes, ...], text: str
) -> None:
    """The VM fails with a sentence, and cannot be resumed."""
    receive(rig, stream(*runs, states=states))
    rig.vmm.send(MEMORY)
    failed = failure(rig.wait_for(VmEnding))
    assert (failed.code, text in failed.text) == (errno.EINVAL, True)


@pytest.mark.parametrize(("name", "error"), [
    ("start_thread", HostError("start thread receive", errno.EAGAIN)),
    ("GuestMemory.create", HostError("reserve memory", errno.ENOMEM)),
    ("GuestMemory.create", ValueError("a region overlaps another one")),
])  # fmt: skip
def test_a_host_that_cannot_take_the_memory(
    rig: VmRig, probe: Probe, monkeypatch: pytest.MonkeyPatch, name: str, error: Exception
) -> None:
    """The VM fails with the reason."""
    receive(rig, stream(states=(GOOD,)))

    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(f"vmd.vm.arrival.{name}", refuse)
    assert failure(rig.tell(MEMORY)).text == str(error)


def test_a_process_is_received_once(rig: VmRig, probe: Probe, capfd: pytest.CaptureFixture[str]) -> None:
    """Another VM is refused, whether it is to be started or received, and the first one arrives."""
    receive(rig, stream(*RUNS, states=(GOOD,)))
    reading, writing = os.pipe2(os.O_CLOEXEC)
    assert receive(rig, reading) == []
    assert rig.tell(start_vm(CONFIG), fds=rig.start_fds()) == []
    errors = capfd.readouterr().err
    assert "unexpected ReceiveVm" in errors
    assert "unexpected StartVm" in errors
    rig.vmm.send(MEMORY)
    rig.wait_for(ReceivedMachine)
    assert resume(rig) == [VmRunning(vmid=VMID)]
    os.close(writing)


def test_steps_out_of_order(rig: VmRig, probe: Probe, capfd: pytest.CaptureFixture[str]) -> None:
    """They are dropped: memory is read once, and no machine runs of which a part is missing."""
    receive(rig, stream(*RUNS, states=(GOOD,)))
    assert resume(rig) == []
    rig.vmm.send(MEMORY)
    rig.vmm.send(MEMORY)
    rig.wait_for(ReceivedMachine)
    assert rig.tell(MEMORY) == []
    errors = capfd.readouterr().err
    assert errors.count("unexpected ReceiveMemory") == 2
    assert errors.count("unexpected ResumeReceived") == 1
    assert resume(rig) == [VmRunning(vmid=VMID)]


def test_a_machine_is_not_resumed_before_all_of_it_is_there(
    rig: VmRig, probe: Probe, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its last byte is missing.  The request is dropped, and a later one is served."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    whole = os.read(stream(*RUNS, states=(GOOD,)), 1 << 16)
    os.write(writing, whole[:-1])
    receive(rig, reading)
    rig.tell(MEMORY)
    assert [each for each in resume(rig) if not isinstance(each, TransferProgress)] == []
    assert "unexpected ResumeReceived" in capfd.readouterr().err
    os.write(writing, whole[-1:])
    rig.wait_for(ReceivedMachine)
    assert resume(rig) == [VmRunning(vmid=VMID)]
    os.close(writing)


def test_memory_is_not_read_before_the_header(rig: VmRig, probe: Probe, capfd: pytest.CaptureFixture[str]) -> None:
    """Nobody knows yet how much there is."""
    probe.honest, probe.answer = False, None
    reading, writing = os.pipe2(os.O_CLOEXEC)
    receive(rig, reading)
    assert rig.tell(MEMORY) == []
    assert "unexpected ReceiveMemory" in capfd.readouterr().err
    for fd in (probe.kept, writing):
        os.close(fd)


def test_a_configuration_that_fits_no_message(rig: VmRig, probe: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes from a version that accepts more."""
    send = rig.process.vmm.send

    def too_long(message: Record, **given: Any) -> None:  # noqa: ANN401
        if isinstance(message, ReceivedHeader):
            raise ValueError("too long")
        send(message, **given)

    monkeypatch.setattr(rig.process.vmm, "send", too_long)
    failed = failure(receive(rig, stream(states=(GOOD,))))
    assert failed.text == "the stream is not usable: its configuration is longer than this vmd accepts"


def test_files_that_do_not_come_for_a_received_machine(rig: VmRig, probe: Probe) -> None:
    """The VM fails: the sender may still have it."""
    receive(rig, stream(states=(GOOD,)))
    rig.vmm.send(MEMORY)
    rig.wait_for(ReceivedMachine)
    memory = rig.process.arrival._memory  # type: ignore[union-attr]
    failed = failure(rig.tell(RESUME, fds={"couriers": [rig.lost_courier()]}))
    assert failed.text == "opener: its files did not come"
    assert "build" not in rig.steps
    assert memory is not None
    memory.close()
