"""A route is declared once.  The handlers, relays and senders of all processes agree with it."""

import ast
import errno
import functools
from pathlib import Path
from typing import Any

import pytest

from tests.support.messages import MESSAGES
from vmd.agentx.main import Agentx
from vmd.consolelog.main import ConsoleLogger
from vmd.control.main import Control
from vmd.errors import OperatorError
from vmd.imgwriter.main import ImgWriter
from vmd.ipc.channel import Channel
from vmd.ipc.imsg import Envelope
from vmd.ipc.messages.clients import ANSWERS, REQUESTS, Caller
from vmd.ipc.messages.vm import PauseDone, VmRunning
from vmd.ipc.process import Process, handles
from vmd.ipc.routes import BY_CLASS, TRUSTED, MessageInfo, Proc, Who, relays
from vmd.logger.main import Logger
from vmd.metrics.main import Metrics
from vmd.opener.main import Opener
from vmd.parent.access import require_allowed
from vmd.parent.main import SERVES, Parent
from vmd.priv.main import Priv
from vmd.vm.main import VmProcess
from vmd.vmm.main import Vmm

PROCESSES: dict[Proc, type[Process]] = {
    Proc.PARENT: Parent,
    Proc.CONTROL: Control,
    Proc.VMM: Vmm,
    Proc.PRIV: Priv,
    Proc.VM: VmProcess,
    Proc.LOG: Logger,
    Proc.OPENER: Opener,
    Proc.IMGWRITER: ImgWriter,
    Proc.AGENTX: Agentx,
    Proc.CONSOLELOG: ConsoleLogger,
    Proc.METRICS: Metrics,
}
ROOT = Path(__file__).resolve().parents[3]
# Code of processes that is not in a directory of their name.  All of them share the code of vmd/ipc.
HOMES = {Proc.CLIENT: ("vmd/client.py", "vmctl"), Proc.LOG: ("vmd/logger",)}


def accepted(proc: Proc) -> set[tuple[Proc, type[Any]]]:
    """Return all messages that a process receives or relays, each with its sender."""
    return {(sender, cls) for cls, info in BY_CLASS.items() for sender, receiver in info.routes if receiver is proc}


def test_every_process_is_compared() -> None:
    """Clients have no table of handlers."""
    assert {*PROCESSES, Proc.CLIENT} == set(Proc)


@pytest.mark.parametrize("proc", PROCESSES)
def test_handlers_agree_with_routes(proc: Proc) -> None:
    """Each route to or through a process has a handler, and each handler has a route."""
    sent, served = accepted(proc), set(PROCESSES[proc].HANDLERS)
    assert {f"{cls.__name__} of {peer.name}" for peer, cls in sent - served} == set(), "no handler serves these"
    assert {f"{cls.__name__} of {peer.name}" for peer, cls in served - sent} == set(), "no route has these"


@functools.cache
def made_by(proc: Proc) -> set[str]:
    """Return the names that the code of a process calls, which include the records that it makes."""
    folders = ("vmd/ipc", *HOMES.get(proc, (f"vmd/{proc.name.lower()}",)))
    paths = [path for folder in folders for path in (ROOT / folder, *(ROOT / folder).rglob("*.py")) if path.is_file()]
    nodes = [node for path in paths for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    return {
        node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func) for node in nodes
    }


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.cls.__name__)
def test_every_message_is_sent(message: MessageInfo) -> None:
    """At least one of its first senders makes such a record."""
    senders = {path[0] for path in message.paths}

    assert any(message.cls.__name__ in made_by(proc) for proc in senders), (
        f"{message.cls.__name__} is never sent: {' or '.join(proc.name.lower() for proc in senders)} should send it"
    )


def test_the_parent_serves_every_request() -> None:
    """control relays all of them."""
    assert set(SERVES) == set(REQUESTS)


def test_requests_declare_who_may_send_them_and_can_fail() -> None:
    """Other messages have no such declaration."""
    for cls, info in BY_CLASS.items():
        assert (info.who is not None) == (cls in REQUESTS), cls
        if info.who is not None:
            assert {answer.__name__ for answer in info.answers} > {"Failed"}, cls
            assert set(info.answers) <= set(ANSWERS), cls
            assert [each for each in info.answers if not BY_CLASS[each].partial], cls


def test_an_answer_takes_the_route_of_its_request_back() -> None:
    """It goes from the receiver of the request to its sender."""
    for info in BY_CLASS.values():
        for path in info.paths[:1]:  # Hello is its own answer
            for answer in info.answers:
                assert path[::-1] in BY_CLASS[answer].paths, f"{info.cls.__name__} and {answer.__name__}"


def test_answers_of_clients_belong_to_requests() -> None:
    """Otherwise no client could wait for them."""
    assert [cls for cls in ANSWERS if not BY_CLASS[cls].is_answer] == []


def test_messages_relayed_to_a_vm_have_its_id() -> None:
    """Otherwise vmm could not find the VM's process."""
    for cls in relays(Proc.VMM, Proc.PARENT):
        assert cls.fields["vmid"] is int, cls


def test_each_process_trusts_its_starter() -> None:
    """The chain ends at the parent, and trust is never mutual."""
    assert set(Proc) - set(TRUSTED) == {Proc.PARENT}
    for proc, above in TRUSTED.items():
        assert TRUSTED.get(above) is not proc


def test_who_may_send_each_request() -> None:
    """The table agrees with vmctl(8).  A new request needs an entry here, too."""
    found = {who: {cls.__name__ for cls in REQUESTS if BY_CLASS[cls].who is who} for who in Who}
    assert found == {
        Who.EVERYBODY: {
            "ListRequest", "SwitchesRequest", "NicsRequest", "FiguresRequest", "EventsRequest", "GenerationsRequest",
        },
        Who.OWNER: {
            "StartRequest", "StopRequest", "WaitRequest", "PauseRequest", "ConsoleRequest", "ConsoleBreak",
            "ConsoleWatch", "ConsoleLogRequest", "SnapshotRequest", "ResizeRequest", "DiscRequest",
        },
        Who.ROOT: {
            "LoadRequest", "ReloadRequest", "ResetRequest", "LogRequest", "SendRequest", "ReceiveRequest",
            "MigrateRequest", "MigrateInRequest", "MigrationStep", "UpgradeRequest",
        },
    }  # fmt: skip


@pytest.mark.parametrize("cls", [cls for cls in REQUESTS if BY_CLASS[cls].who is Who.ROOT])
def test_the_parent_refuses_root_s_requests_of_others(cls: type[Any]) -> None:
    """It does not rely on control.  Other requests are checked with their VM."""
    request = object.__new__(cls)
    require_allowed(request, Caller(uid=0, gid=0, pid=1))
    with pytest.raises(OperatorError, match=r"^only root may ") as refused:
        require_allowed(request, Caller(uid=1000, gid=0, pid=1))
    assert refused.value.number == errno.EPERM


class Wrong(Process):
    """A process with wrong tables.  Type checkers must report them: an unused `type: ignore` is an error."""

    def on_pause_done(self, message: PauseDone, _envelope: Envelope, _channel: Channel) -> None:
        """Serve a message."""

    def on_few(self, message: PauseDone) -> None:
        """Serve a message with too few parameters."""

    HANDLERS = {
        **handles(Proc.VMM, PauseDone, on_pause_done),
        **handles(Proc.VMM, VmRunning, on_pause_done),  # type: ignore[arg-type]
        **handles(Proc.VM, PauseDone, on_few),  # type: ignore[arg-type]
        (Proc.VM, VmRunning): on_pause_done,  # type: ignore[dict-item]
    }


def test_a_row_calls_its_method() -> None:
    """The handler calls the given method with the process."""
    told: list[Any] = []
    row = handles(Proc.VMM, PauseDone, lambda process, message, _envelope, _channel: told.append((process, message)))
    ((key, handler),) = row.items()
    assert key == (Proc.VMM, PauseDone)
    message: Any = object()
    process: Any = object()
    handler(process, message, Envelope(message, 0, 0, {}), process)
    assert told == [(process, message)]
