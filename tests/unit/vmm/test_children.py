"""Which messages of a VM process vmm accepts."""

import time
from typing import Any, cast

import pytest

from vmd.errors import PeerError
from vmd.ipc.messages.shared import TransferProgress
from vmd.ipc.messages.vm import (
    AskResolvers,
    ReceivedHeader,
    ReceivedMachine,
    ReceiveMemory,
    SendDone,
    SendVm,
    VmEnding,
    VmFailed,
    VmRunning,
)
from vmd.ipc.routes import BY_CLASS, Proc, relays
from vmd.record import Record
from vmd.vmm.children import BUDGETS, UNASKED, VmChild

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
