"""Which messages of a VM process vmm accepts."""

import errno
import os
import time
from typing import Any, cast

import pytest

from tests.support.descriptors import open_descriptors
from tests.support.vmprocesses import is_reaped
from vmd.closing import close_all
from vmd.config.model import VmConfig
from vmd.errors import PeerError
from vmd.ipc.messages.shared import DiskImages, ImageLink, TransferProgress
from vmd.ipc.messages.vm import (
    AskResolvers,
    DisksBack,
    DisksLent,
    DisksLetGo,
    EndSend,
    LendDisks,
    LetDisksGo,
    NicLink,
    PauseDone,
    PauseVm,
    ReceivedHeader,
    ReceivedMachine,
    ReceiveMemory,
    ReceiveVm,
    ResumeReceived,
    SendDone,
    SendUndone,
    SendVm,
    StartVm,
    StopMode,
    StopVm,
    TakeDisksBack,
    TakenBack,
    VmEnding,
    VmFailed,
    VmHalted,
    VmRunning,
)
from vmd.ipc.routes import BY_CLASS, Proc, relays
from vmd.record import Record
from vmd.vmm.children import BUDGETS, SPARES_MAX, UNASKED, Slot, VmChild, device_words, end_all

# What vmm sends to a VM, or hears from it, while the VM is sent, received, or lends its disks.
SEND, MIGRATE = SendVm(vmid=1, keep=True, one_shot=False), SendVm(vmid=1, keep=False, one_shot=False, two_way=True)
WRITTEN, BROKEN = SendDone(vmid=1, sent_bytes=1), SendDone(vmid=1, sent_bytes=1, text="broken pipe")
LET_GO = [MIGRATE, WRITTEN, LetDisksGo(vmid=1), DisksLetGo(vmid=1)]
UNDO = EndSend(vmid=1, sent=False)
LEND = LendDisks(vmid=1)
STOP = StopVm(vmid=1, mode=StopMode.GRACEFUL)
RECEIVE = ReceiveVm(vmid=1, name="a", verbosity=0)
RESUME = ResumeReceived(vmid=1, config=VmConfig(name="a"), paused=True)

PROGRESS = TransferProgress(done_bytes=1, total_bytes=2)


class Channel:
    """The part of a channel that is used here."""

    label = "vm/a"


@pytest.fixture
def child() -> VmChild:
    """Return a VM process without requests."""
    return VmChild(1, -1, cast("Any", Channel()))


def message_of(cls: type[Any]) -> Record:
    """Return a message of this class.  vmm does not look at its fields."""
    made: Record = object.__new__(cls)
    return made


def test_requests_for_name_servers_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parent gets a burst, and then a few per second."""
    now_s = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    child = VmChild(1, -1, cast("Any", Channel()))
    at_once, per_s = BUDGETS[AskResolvers]

    assert sum(child.account(AskResolvers(vmid=1)) for _ in range(60)) == at_once
    now_s += 1
    assert sum(child.account(AskResolvers(vmid=1)) for _ in range(16)) == per_s
    now_s += 1000
    assert sum(child.account(AskResolvers(vmid=1)) for _ in range(60)) == at_once


@pytest.mark.parametrize("question", [cls for cls in relays(Proc.VMM, Proc.PARENT) if BY_CLASS[cls].answers])
def test_each_question_is_answered_once(child: VmChild, question: type[Any]) -> None:
    """The answer is one of those declared.  Without a question, or after the answer, an answer ends the VM."""
    for answer in BY_CLASS[question].answers:
        if BY_CLASS[answer].partial:
            continue
        with pytest.raises(PeerError, match=f"vm/a: answers with {answer.__name__}, which was not requested"):
            child.account(message_of(answer))
        child.expect(message_of(question))
        child.expect(message_of(question))
        assert child.account(message_of(answer))
        assert child.account(message_of(answer))
        with pytest.raises(PeerError, match="which was not requested"):
            child.account(message_of(answer))


def test_parts_of_an_answer_come_before_it(child: VmChild) -> None:
    """Some of them are passed on.  A part without a question is dropped, and is no error."""
    assert not child.account(PROGRESS)
    child.expect(message_of(SendVm))
    assert child.account(PROGRESS)
    assert not child.account(PROGRESS)  # too soon after the last one
    assert child.account(message_of(SendDone))
    with pytest.raises(PeerError, match="SendDone"):
        child.account(message_of(SendDone))


def test_steps_of_receiving_are_taken_in_their_order(child: VmChild) -> None:
    """The answer to a later step is not accepted before its request."""
    with pytest.raises(PeerError, match="ReceivedHeader"):
        child.account(message_of(ReceivedHeader))
    child.expect(message_of(ReceiveMemory))
    for wrong in (ReceivedHeader, VmRunning):
        with pytest.raises(PeerError, match=wrong.__name__):
            child.account(message_of(wrong))
    assert child.account(message_of(ReceivedMachine))
    with pytest.raises(PeerError, match="VmFailed"):
        child.account(message_of(VmFailed))


@pytest.mark.parametrize("message", [PROGRESS, AskResolvers(vmid=1), VmEnding(text="bye")])
def test_a_vm_process_that_sends_without_end_breaks_the_protocol(
    monkeypatch: pytest.MonkeyPatch, message: Record
) -> None:
    """Messages of all types without a request are limited to a few per second."""
    monkeypatch.setattr(time, "monotonic", lambda: 1000.0)
    child = VmChild(1, -1, cast("Any", Channel()))
    for _ in range(int(UNASKED[0])):
        child.account(message)

    with pytest.raises(PeerError, match="vm/a: sends more than 16 messages a second unasked"):
        child.account(message)
    monkeypatch.setattr(time, "monotonic", lambda: 1001.0)
    for _ in range(int(UNASKED[1])):
        child.account(message)
    with pytest.raises(PeerError, match="vm/a: sends more than 16 messages a second unasked"):
        child.account(message)


@pytest.mark.parametrize(
    ("messages", "held"),
    [
        ([PauseVm(vmid=1, paused=True)], []),
        ([VmRunning(vmid=1)], ["running"]),
        ([VmRunning(vmid=1), VmHalted(vmid=1)], ["running", "paused"]),
        ([VmRunning(vmid=1), PauseDone(vmid=1, paused=True)], ["running", "paused"]),
        ([VmRunning(vmid=1, paused=True), PauseDone(vmid=1, paused=False)], ["running"]),
        ([STOP], ["stopping"]),
        ([RECEIVE], ["arriving"]),
        ([RECEIVE, ReceivedMachine(vmid=1)], ["arriving", "complete"]),
        ([RECEIVE, ReceivedMachine(vmid=1), RESUME], ["arriving", "complete", "resumed"]),
        (
            [RECEIVE, ReceivedMachine(vmid=1), RESUME, VmRunning(vmid=1, paused=True)],
            ["running", "paused", "complete", "resumed"],
        ),
        ([SEND], ["sending", "keep"]),
        ([SEND, WRITTEN], ["keep"]),
        ([MIGRATE], ["sending", "two_way"]),
        ([MIGRATE, BROKEN], ["two_way"]),
        ([MIGRATE, WRITTEN], ["sending", "two_way", "written"]),
        (LET_GO[:3], ["sending", "two_way", "written", "letting_go"]),
        (LET_GO, ["sending", "two_way", "written", "let_go"]),
        ([*LET_GO[:3], DisksLetGo(vmid=1, text="in use")], ["sending", "two_way", "written"]),
        ([*LET_GO, EndSend(vmid=1, sent=True)], ["stopping", "sending", "two_way", "written", "let_go"]),
        ([*LET_GO, UNDO], ["sending", "two_way", "written", "let_go", "undoing"]),
        ([STOP, *LET_GO, UNDO], ["stopping", "sending", "two_way", "written", "let_go", "undoing"]),
        ([*LET_GO, UNDO, SendUndone(vmid=1, outcome=TakenBack.DONE)], ["two_way", "written"]),
        (
            [*LET_GO, UNDO, SendUndone(vmid=1, outcome=TakenBack.CHANGED)],
            ["sending", "two_way", "written", "let_go"],
        ),
        ([MIGRATE, WRITTEN, UNDO, SendUndone(vmid=1, outcome=TakenBack.FAILED)], ["sending", "two_way", "written"]),
        ([*LET_GO, SEND], ["sending", "keep"]),
        ([LendDisks(vmid=1, look=True), DisksLent(vmid=1), TakeDisksBack(vmid=1)], []),
        ([LEND], ["lending"]),
        ([LEND, LendDisks(vmid=1, look=True)], ["lending"]),
        ([LEND, DisksLent(vmid=1)], ["lending", "lent"]),
        ([LEND, TakeDisksBack(vmid=1)], ["lending"]),
        ([LEND, DisksLent(vmid=1), TakeDisksBack(vmid=1)], ["lending", "lent", "returning"]),
        ([LEND, DisksLent(vmid=1), TakeDisksBack(vmid=1), DisksBack(vmid=1)], []),
    ],
)  # fmt: skip
def test_the_next_parent_learns_how_far_a_vm_has_got(child: VmChild, messages: list[Record], held: list[str]) -> None:
    """It goes on from there: a VM whose disks are let go may run elsewhere, and one that lends them is paused."""
    for message in messages:
        child.become(message)

    assert [name for name, value in child.held.as_dict().items() if value is True] == held


def test_descriptors_are_kept_for_the_next_parent(child: VmChild) -> None:
    """As copies, which a later one of the same name replaces.  Others are not kept."""
    before = open_descriptors()
    given = [os.open(os.devnull, os.O_RDONLY) for _ in range(4)]
    child.keep({"taps": given[:2], "boot": [], "couriers": given[:1], "tty": given[:1]})
    child.keep({"taps": given[1:], "tty": []})

    assert {name: len(fds) for name, fds in child.kept.items()} == {"taps": 3, "tty": 1}
    assert len(open_descriptors()) == len(before) + 4 + 4
    child.drop("tty", "boot")
    assert [*child.kept] == ["taps"]
    child.drop()
    close_all(given)
    assert open_descriptors() == before


def test_descriptors_that_cannot_be_kept(
    child: VmChild, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The earlier ones stay, and no copy is left open.  The VM runs on."""
    given = [os.open(os.devnull, os.O_RDONLY) for _ in range(2)]
    child.keep({"taps": given})
    before, kept = open_descriptors(), child.kept["taps"]
    dup, copies = os.dup, [0]

    def second_fails(fd: int) -> int:
        copies[0] += 1
        if copies[0] == 2:
            raise OSError(errno.EMFILE, "Too many open files")
        return dup(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "dup", second_fails)
        child.keep({"taps": given})
    assert (open_descriptors(), child.kept["taps"]) == (before, kept)
    assert "vm/a: taps is not kept for another daemon: Too many open files" in capfd.readouterr().err
    child.drop()
    close_all(given)


def test_the_devices_that_the_next_vm_probably_needs() -> None:
    """Those of the last one, up to a limit.  Only a raw disk without backing files needs no more than its format."""
    nic = NicLink(name="tap0", lladdr=b"", host_mac=b"", locked=False, local=False, mtu=1500)
    disks = [DiskImages(images=tuple(ImageLink(path="/d", format=each) for each in formats)) for formats in (
        ["raw"], ["qcow2"], ["raw", "raw"], ["raw"],
    )]  # fmt: skip
    start = StartVm(vmid=1, config=VmConfig(name="a"), boot_name="", verbosity=0)
    assert device_words(start) == []
    assert device_words(start.replace(nics=(nic, nic.replace(vhost=True)))) == ["vionet.main", "vionet.kernel"]
    assert device_words(start.replace(disks=tuple(disks[:3]))) == ["vioblk.raw", "vioblk.main", "vioblk.main"]
    assert device_words(start.replace(disks=tuple(disks))) == ["vioblk.raw", *["vioblk.main"] * 2, "vioblk.raw"]
    many = device_words(start.replace(nics=(nic,) * 3, disks=tuple(disks)))
    assert many == [*["vionet.main"] * 3, "vioblk.raw"]
    assert len(many) == SPARES_MAX


def test_a_slot_is_closed_once() -> None:
    """Its descriptor may be another's afterwards.  A slot without a group has none."""
    assert (Slot().uid, Slot().group, Slot().group_fd) == (0, 0, -1)
    before = open_descriptors()
    slots = [Slot(uid=5, group=6, group_fd=os.open(os.devnull, os.O_RDONLY)), Slot()]
    for slot in slots * 2:
        slot.close()
        assert slot.group_fd == -1
    assert open_descriptors() == before


def test_the_end_of_vmm_ends_its_vms() -> None:
    """All are killed first, and then waited for.  One that has ended already is left alone, and one may be stuck."""
    pids = [os.posix_spawn("/bin/sleep", ["sleep", "1000"], {}) for _ in range(3)]
    children = [VmChild(pid, os.pidfd_open(pid), cast("Any", Channel())) for pid in pids]
    gone, stuck = VmChild(1, children[0].pidfd, cast("Any", Channel())), children[2]
    gone.gone = True
    kill, stuck_pidfd = stuck.kill, stuck.pidfd
    stuck.pidfd = os.pidfd_open(os.getpid())  # it does not end
    stuck.kill = lambda: None  # type: ignore[method-assign]
    end_all([gone, *children[:2]], 60.0)
    assert [child.gone for child in children] == [True, True, False]
    assert [is_reaped(pid) for pid in pids] == [True, True, False]
    end_all([stuck], 0.0)
    assert not stuck.gone
    os.close(stuck.pidfd)
    stuck.pidfd, stuck.kill = stuck_pidfd, kill  # type: ignore[method-assign]
    end_all([stuck], 60.0)
    assert is_reaped(pids[2])
    close_all(child.pidfd for child in children)
