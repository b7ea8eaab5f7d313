"""An upgrade in place: who is told what, and that a program that cannot be executed leaves the daemon as it was."""

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.support.descriptors import open_descriptors
from vmd.config.model import Config
from vmd.errors import HostError, OperatorError
from vmd.ipc.imsg import Envelope
from vmd.ipc.messages.clients import Caller, End, Failed, GenerationInfo, GenerationsRequest, Ok, UpgradeRequest
from vmd.ipc.routes import Proc
from vmd.parent import upgrade
from vmd.parent.core import Core
from vmd.parent.upgrade import Upgrade
from vmd.record import Record

CLIENT = 7
ROOT = Caller(uid=0, gid=0, pid=1)


class Executed(Exception):
    """The program runs in place of this one."""


class Rig:
    """The room, and what it asks others for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
        self.core = Core(cast("Any", None), Config())
        self.core.peers.channels = cast("Any", {Proc.CONTROL: self})
        self.sent: list[tuple[int, Record]] = []
        self.calls: list[str] = []  # what is done, in order
        self.done: list[Callable[[str], None]] = []
        self.trouble: Exception = Executed()
        self.no_copy: OSError | None = None
        self.no_start: HostError | None = None
        store = SimpleNamespace(execute=self.execute)
        lasting = SimpleNamespace(
            copy=self.copy, plan=lambda planned: self.calls.append(f"planned {planned}"), store=store,
            save_now=lambda: self.calls.append("saved"), write=lambda: self.calls.append("written"),
        )  # fmt: skip
        scores = SimpleNamespace(
            give_back=lambda: self.calls.append("score given back"), lower=lambda: self.calls.append("score lowered")
        )
        vms = {1: [4, 5], 2: []}
        generations = [SimpleNamespace(number=number, version=f"0.{number}") for number in vms]
        self.generations = cast("Any", Generations(generations, vms))
        self.room = Upgrade(
            self.core, self.generations, cast("Any", lasting), cast("Any", SimpleNamespace(scores=scores))
        )
        self.room.program = cast("Any", SimpleNamespace(directory=str(directory), command=lambda: ["vmd", "-d"]))
        monkeypatch.setattr(upgrade, "Rehearsal", self.rehearse)

    def send(self, message: Record, *, peerid: int, fds: dict[str, list[int]]) -> None:
        """Replaces the channel to control."""
        assert not fds
        self.sent.append((peerid, message))

    def copy(self) -> int:
        """Replaces `Lasting.copy`."""
        if self.no_copy is not None:
            raise self.no_copy
        return os.dup(0)

    def rehearse(self, _loop: object, _program: object, state_fd: int, done: Callable[[str], None]) -> object:
        """Replaces `Rehearsal`."""
        assert os.path.exists(f"/proc/self/fd/{state_fd}")
        if self.no_start is not None:
            raise self.no_start
        self.done.append(done)
        return object()

    def execute(self, command: list[str]) -> None:
        """Replaces `Store.execute`."""
        assert command == ["vmd", "-d"]
        self.calls.append(f"executed in {os.getcwd()}")
        raise self.trouble

    def ask(self, client: int = CLIENT, *, rehearse_only: bool = False) -> None:
        """Let a client ask."""
        message = UpgradeRequest(rehearse_only=rehearse_only)
        self.room.serve(message, ROOT, Envelope(message, client, 0, {}))


class Generations:
    """Two vmms."""

    def __init__(self, all_of_them: list[Any], vms: dict[int, list[int]]) -> None:
        self.all_of_them, self.of = all_of_them, vms

    def __iter__(self) -> Iterator[Any]:
        return iter(self.all_of_them)

    def vms(self, generation: Any) -> list[int]:  # noqa: ANN401
        """Return the ids of its VMs."""
        return self.of[generation.number]


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Rig]:
    """Give the room.  No descriptor is left, and the working directory is as before."""
    before, directory = open_descriptors(), os.getcwd()
    yield Rig(monkeypatch, tmp_path)
    os.chdir(directory)
    assert open_descriptors() == before


CANNOT = "the version that is installed now cannot take over:\n"


@pytest.mark.parametrize("trouble", ["", "/etc/vm.conf:1: syntax error\n/etc/vm.conf:2: syntax error"])
def test_only_a_rehearsal(rig: Rig, capfd: pytest.CaptureFixture[str], trouble: str) -> None:
    """Nothing is executed.  The client gets the reason, and the log each of its lines."""
    rig.ask(rehearse_only=True)
    with pytest.raises(OperatorError, match="an upgrade is under way") as refused:
        rig.ask(8)
    assert (refused.value.number, rig.sent) == (errno.EBUSY, [])
    rig.done[0](trouble)

    answer = Failed(code=errno.EINVAL, text=CANNOT + trouble) if trouble else Ok()
    assert (rig.sent, rig.calls) == ([(CLIENT, answer)], [])
    said = capfd.readouterr().err
    assert all(line in said for line in trouble.splitlines())
    rig.ask()


def test_an_upgrade(rig: Rig, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The state is written for the next program, which starts in the daemon's first directory, with its first score."""
    rig.ask()
    with pytest.raises(Executed):
        rig.done[0]("")
    assert rig.calls[:4] == ["planned True", "saved", "score given back", f"executed in {tmp_path}"]
    assert rig.sent == []  # the client sees the end of its connection
    assert "upgrade: the version that is installed now takes over" in capfd.readouterr().err


def test_a_rehearsal_that_fails(rig: Rig) -> None:
    """Nothing is executed."""
    rig.ask()
    rig.done[0]("it ended with status 3")
    assert (rig.calls, rig.sent) == ([], [(CLIENT, Failed(code=errno.EINVAL, text=f"{CANNOT}it ended with status 3"))])


@pytest.mark.parametrize("gone", [False, True])
def test_a_program_that_cannot_be_executed(rig: Rig, tmp_path: Path, gone: bool) -> None:
    """The daemon goes on as before, and the next upgrade is possible."""
    rig.trouble = OSError(errno.ENOEXEC, "Exec format error")
    if gone:
        tmp_path.rmdir()
    rig.ask()
    rig.done[0]("")

    assert rig.calls[-3:] == ["planned False", "written", "score lowered"]
    assert (rig.calls[2] == "score given back") != gone
    assert os.getcwd() == "/"
    why = "No such file or directory" if gone else "Exec format error"
    assert rig.sent == [(CLIENT, Failed(code=errno.EINVAL, text=f"{CANNOT}it cannot be started: {why}"))]
    rig.ask()


def test_a_rehearsal_that_cannot_be_started(rig: Rig) -> None:
    """The client has its answer at once, and the next one may try."""
    rig.no_copy = OSError(errno.ENOMEM, "Cannot allocate memory")
    with pytest.raises(HostError, match="copy the state for the new program: Cannot allocate memory"):
        rig.ask()
    rig.no_copy, rig.no_start = None, HostError("start vmd", errno.ENOENT)
    with pytest.raises(HostError, match="start vmd"):
        rig.ask()
    rig.no_start = None
    rig.ask()


def test_the_list_of_generations(rig: Rig) -> None:
    """Each vmm has a row, with its version and number of VMs."""
    message = GenerationsRequest()
    rig.room.serve_generations(message, ROOT, Envelope(message, CLIENT, 0, {}))
    assert rig.sent == [
        (CLIENT, GenerationInfo(number=1, version="0.1", vms=2)),
        (CLIENT, GenerationInfo(number=2, version="0.2", vms=0)),
        (CLIENT, End()),
    ]
