"""stop and wait: the texts of *cat. 3.5*, exit statuses, JSON, and stopping all VMs."""

import errno
import json
import signal
from collections.abc import Callable, Iterator

import pytest

from tests.unit.vmctl.conftest import Vmctl
from tests.unit.vmctl.fake import Answers, FakeDaemon, spawn, vm_info
from vmd.errors import VMD_VM_STOP_INVALID
from vmd.ipc.messages.clients import (
    End,
    Failed,
    ListRequest,
    StopAccepted,
    StopRequest,
    VmInfo,
    VmTerminated,
    WaitRequest,
)
from vmd.ipc.messages.figures import LifeEnd
from vmd.record import Record

ACCEPTED = StopAccepted(vmid=3, name="web")
TERMINATED = VmTerminated(vmid=3, name="web", text="powered off by the guest")


@pytest.mark.parametrize(
    ("arguments", "request_"),
    [
        (("web",), StopRequest(name="web")),
        (("-f", "web"), StopRequest(name="web", force=True)),
        (("-w", "web"), StopRequest(name="web", wait=True)),
        (("-fw", "web"), StopRequest(name="web", force=True, wait=True)),
        (("web", "-w", "-f"), StopRequest(name="web", force=True, wait=True)),
        (("--", "web"), StopRequest(name="web")),
        (("3",), StopRequest(vmid=3, name="3")),
    ],
)
def test_requests_of_stop(
    vmctl: Vmctl, daemon: FakeDaemon, arguments: tuple[str, ...], request_: Record
) -> None:
    """Options stand before or after the VM, which is a name or an id."""
    daemon.answers(TERMINATED)

    vmctl("stop", *arguments)

    assert daemon.requests == [request_]


@pytest.mark.parametrize(
    ("arguments", "answer", "status", "line"),
    [
        (("web",), ACCEPTED, 0, "stopping vm web: requested to shutdown vm 3\n"),
        (("-f", "web"), ACCEPTED, 0, "stopping vm web: forced to terminate vm 3\n"),
        (("3",), ACCEPTED, 0, "stopping vm: requested to shutdown vm 3\n"),
        (("-w", "web"), TERMINATED, 0, "stopping vm web: terminated vm 3\n"),
        (("-fw", "3"), TERMINATED, 0, "stopping vm: terminated vm 3\n"),
        (("-f", "web"), TERMINATED, 0, "stopping vm web: forced to terminate vm 3\n"),
        (
            ("web",),
            Failed(code=VMD_VM_STOP_INVALID, text="vm web is not running"),
            1,
            "stopping vm web: cannot stop vm that is not running\n",
        ),
        (("web",), Failed(code=errno.ENOENT, text="vm web not found"), 4, "stopping vm web: vm not found\n"),
        (("web",), Failed(code=errno.EINTR, text=""), 1, "stopping vm web: interrupted call\n"),
        (
            ("web",),
            Failed(code=errno.EALREADY, text="vm web is already stopping"),
            1,
            "stopping vm web: failed: vm web is already stopping\n",
        ),
        (("web",), Failed(code=errno.EPERM, text=""), 1, "stopping vm web: failed: Operation not permitted\n"),
        (("web",), Failed(code=errno.EPERM, text="no\nno"), 1, "stopping vm web: failed: no\\x0ano\n"),
    ],
)
def test_messages_of_stop(
    vmctl: Vmctl, daemon: FakeDaemon, arguments: tuple[str, ...], answer: Record, status: int, line: str
) -> None:
    """Each is one line on standard error, and there is no other output."""
    daemon.answers(answer)

    assert vmctl("stop", *arguments) == (status, "", line)


@pytest.mark.parametrize(
    ("word", "answer", "status", "line"),
    [
        ("web", TERMINATED, 0, "waiting for vm web: terminated vm 3\n"),
        ("3", TERMINATED, 0, "waiting for vm: terminated vm 3\n"),
        ("web", Failed(code=errno.ENOENT, text="vm web not found"), 4, "waiting for vm web: vm not found\n"),
        (
            "web",
            Failed(code=errno.EINVAL, text="vm web is not running"),
            1,
            "waiting for vm web: failed: vm web is not running\n",
        ),
    ],
)
def test_wait(vmctl: Vmctl, daemon: FakeDaemon, word: str, answer: Record, status: int, line: str) -> None:
    """Its messages have the same form."""
    daemon.answers(answer)

    assert vmctl("wait", word) == (status, "", line)
    assert isinstance(daemon.requests[0], WaitRequest)


@pytest.mark.parametrize("command", [("wait", "--"), ("stop", "--")])
def test_leading_dash_is_refused(vmctl: Vmctl, daemon: FakeDaemon, command: tuple[str, ...]) -> None:
    """No name begins with a dash."""
    assert vmctl(*command, "-x") == (2, "", "vmctl: invalid id: -x\n")
    assert daemon.requests == []


def test_daemon_that_dies_while_we_wait(vmctl: Vmctl, daemon: FakeDaemon) -> None:
    """The unfinished line is ended first."""
    daemon.script = lambda _request: None

    assert vmctl("wait", "web") == (3, "", "waiting for vm web: \nvmctl: pipe closed\n")


@pytest.mark.parametrize(("soon_s", "asked"), [(1e9, 4), (-1.0, 9)])
def test_daemons_that_hang_up(
    vmctl: Vmctl, daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch, soon_s: float, asked: int
) -> None:
    """A request is repeated three times at once, because it may be the reason.  Later ends of daemons do not count."""
    monkeypatch.setattr("vmctl.ending.SOON_S", soon_s)
    script: Iterator[Answers] = iter((*(None,) * 8, (TERMINATED,)))
    daemon.script = lambda _request: next(script)

    assert vmctl("wait", "web")[0] == (3 if soon_s > 0 else 0)
    assert daemon.requests == [WaitRequest(name="web")] * asked


def test_wait_continues_with_the_next_daemon(vmctl: Vmctl, daemon: FakeDaemon) -> None:
    """The request is repeated.  If that daemon has seen the VM end, this counts as the end."""
    gone = vm_info("web", vmid=3, running=False).replace(ended=LifeEnd(at_s=1, how="powered-off", text="by itself"))
    script: Iterator[Answers] = iter((None, (Failed(code=errno.EINVAL, text="is not running"),), (gone, End())))
    daemon.script = lambda _request: next(script)

    assert vmctl("wait", "web") == (0, "", "waiting for vm web: terminated vm 3\n")
    assert daemon.requests == [WaitRequest(name="web"), WaitRequest(name="web"), ListRequest()]


ENDED = LifeEnd(at_s=1, how="powered-off", text="by itself")


@pytest.mark.parametrize(
    "vm",
    [
        vm_info("web", vmid=3), vm_info("web", vmid=3, running=False), vm_info("web", vmid=3).replace(ended=ENDED),
        vm_info("other", vmid=4, running=False).replace(ended=ENDED),
    ],
    ids=["runs", "unknown", "runs again", "another"],
)  # fmt: skip
def test_a_next_daemon_that_does_not_know_how_the_vm_ended(vmctl: Vmctl, daemon: FakeDaemon, vm: VmInfo) -> None:
    """Its refusal is the result."""
    script: Iterator[Answers] = iter((None, (Failed(code=errno.EINVAL, text="is not running"),), (vm, End())))
    daemon.script = lambda _request: next(script)

    assert vmctl("wait", "web") == (1, "", "waiting for vm web: failed: is not running\n")
    assert daemon.requests == [WaitRequest(name="web"), WaitRequest(name="web"), ListRequest()]


def test_stop_continues_with_the_next_daemon(vmctl: Vmctl, daemon: FakeDaemon) -> None:
    """If the VM is stopping already, vmctl waits for its end."""
    script: Iterator[Answers] = iter((None, (Failed(code=errno.EALREADY, text="is already stopping"),), (TERMINATED,)))
    daemon.script = lambda _request: next(script)

    assert vmctl("stop", "-w", "web") == (0, "", "stopping vm web: terminated vm 3\n")
    stop = StopRequest(name="web", wait=True)
    assert daemon.requests == [stop, stop, WaitRequest(name="web")]


def test_verbose_says_how_the_vm_ended(vmctl: Vmctl, daemon: FakeDaemon) -> None:
    """Upstream's text does not have the reason."""
    daemon.answers(TERMINATED)

    _, _, errors = vmctl("-v", "wait", "web")

    assert errors.endswith("terminated vm 3\nvmctl: vm web: powered off by the guest\n")


@pytest.mark.parametrize(
    ("arguments", "begun"), [(("wait", "web"), "waiting for vm web: "), (("stop", "-w", "3"), "stopping vm: ")]
)
def test_interrupted(daemon: FakeDaemon, arguments: tuple[str, ...], begun: str) -> None:
    """SIGINT ends the wait, and not the VM."""
    process = spawn(daemon, *arguments)
    daemon.requested()

    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=20)

    assert (process.returncode, output, errors) == (1, "", f"{begun}interrupted call\n")


@pytest.mark.parametrize(
    ("answer", "status", "document"),
    [
        (ACCEPTED, 0, {"id": 3, "name": "web", "result": "requested", "how": None, "text": "", "code": None}),
        (
            TERMINATED,
            0,
            {
                "id": 3,
                "name": "web",
                "result": "terminated",
                "how": None,
                "text": "powered off by the guest",
                "code": None,
            },
        ),
        (
            Failed(code=errno.ENOENT, text="vm web not found"),
            4,
            {
                "id": None,
                "name": "web",
                "result": "failed",
                "how": None,
                "text": "vm web not found",
                "code": errno.ENOENT,
            },
        ),
    ],
)
def test_json(vmctl: Vmctl, daemon: FakeDaemon, answer: Record, status: int, document: dict[str, object]) -> None:
    """Both commands print the same document, but only `stop` can be answered before the end."""
    daemon.answers(answer)

    for command in ("stop",) if answer is ACCEPTED else ("stop", "wait"):
        done, output, _ = vmctl(command, "--json", "web")
        assert (done, json.loads(output)) == (status, {"schema": 1, "vms": [document]})


# --- all of them -----------------------------------------------------------------------------------------

VMS = (
    vm_info("a", vmid=1),
    vm_info("off", vmid=2, running=False),
    vm_info("b", vmid=3),
    vm_info("late", vmid=4, running=False, state="waiting"),
)


def all_vms(answer: Callable[[Record], Answers]) -> Callable[[Record], Answers]:
    """Return a script that lists `VMS` and passes other requests to `answer`."""
    return lambda request: (*VMS, End()) if isinstance(request, ListRequest) else answer(request)


def terminated(request: Record) -> Answers:
    """Answer a stop or a wait with the end of its VM."""
    assert isinstance(request, StopRequest | WaitRequest)
    vmid = next(vm.vmid for vm in VMS if vm.name == request.name)
    return [VmTerminated(vmid=vmid, name=request.name)]


def accepted(request: Record) -> Answers:
    """Accept a stop, and answer a wait with the end of the VM."""
    assert isinstance(request, StopRequest | WaitRequest)
    vmid = next(vm.vmid for vm in VMS if vm.name == request.name)
    if isinstance(request, StopRequest):
        return [StopAccepted(vmid=vmid, name=request.name)]
    return [VmTerminated(vmid=vmid, name=request.name)]


def test_stop_all(vmctl: Vmctl, daemon: FakeDaemon) -> None:
    """All VMs that run or will run are stopped by name, in order, on one connection."""
    daemon.script = all_vms(accepted)

    assert vmctl("stop", "-a") == (
        0,
        "",
        "stopping vm a: requested to shutdown vm 1\n"
        "stopping vm b: requested to shutdown vm 3\n"
        "stopping vm late: requested to shutdown vm 4\n",
    )
    assert daemon.requests[1:] == [StopRequest(name=name) for name in ("a", "b", "late")]


def test_stop_all_by_force(vmctl: Vmctl, daemon: FakeDaemon) -> None:
    """The options are -af."""
    daemon.script = all_vms(accepted)

    assert vmctl("stop", "-af")[0] == 0
    assert daemon.requests[1:] == [StopRequest(name=name, force=True) for name in ("a", "b", "late")]


def test_stop_all_and_wait_asks_all_guests_first(vmctl: Vmctl, daemon: FakeDaemon) -> None:
    """vmctl sends all stops before the first wait, so that guests shut down at the same time."""
    daemon.script = all_vms(accepted)

    assert vmctl("stop", "-aw") == (
        0,
        "",
        "stopping vm a: terminated vm 1\nstopping vm b: terminated vm 3\nstopping vm late: terminated vm 4\n",
    )
    names = ("a", "b", "late")
    assert daemon.requests[1:] == [*(StopRequest(name=n) for n in names), *(WaitRequest(name=n) for n in names)]


def test_stop_all_and_wait_with_vms_that_end_at_once(vmctl: Vmctl, daemon: FakeDaemon) -> None:
    """A VM that ended before the wait counts as terminated, whichever error reports it.  `late` never ran."""

    def script(request: Record) -> Answers:
        match request:
            case StopRequest(name="late"):
                return terminated(request)
            case WaitRequest(name="a"):
                return [Failed(code=errno.ENOENT, text="vm a not found")]
            case WaitRequest(name="b"):
                return [Failed(code=errno.EINVAL, text="vm b is not running")]
        return accepted(request)

    daemon.script = all_vms(script)

    assert vmctl("stop", "-aw") == (
        0,
        "",
        "stopping vm a: terminated vm 1\nstopping vm b: terminated vm 3\nstopping vm late: terminated vm 4\n",
    )


@pytest.mark.parametrize("options", ["-a", "-aw"])
def test_stop_all_continues_after_a_failure(vmctl: Vmctl, daemon: FakeDaemon, options: str) -> None:
    """The exit status reports the failure, and the other VMs are stopped."""

    def script(request: Record) -> Answers:
        if isinstance(request, StopRequest) and request.name == "a":
            return [Failed(code=errno.EPERM, text="uid 5 may not stop vm a")]
        return accepted(request)

    daemon.script = all_vms(script)

    status, _, errors = vmctl("stop", options)

    assert status == 1
    assert errors.startswith("stopping vm a: failed: uid 5 may not stop vm a\nstopping vm b: ")
    assert errors.count("\n") == 3


@pytest.mark.parametrize(("options", "words"), [("-a", "requested to shutdown vm 1"), ("-aw", "terminated vm 1")])
def test_stop_all_counts_a_stopping_vm_as_asked(
    vmctl: Vmctl, daemon: FakeDaemon, options: str, words: str
) -> None:
    """Either the list says so, or another client was faster."""

    def script(request: Record) -> Answers:
        if isinstance(request, ListRequest):
            return [vm_info("a", state="stopping"), vm_info("b", vmid=3), End()]
        if isinstance(request, StopRequest):
            return [Failed(code=errno.EALREADY, text="vm b is already stopping")]
        return accepted(request)

    daemon.script = script

    status, _, errors = vmctl("stop", options)

    assert status == 0
    assert errors == f"stopping vm a: {words}\nstopping vm b: {words.replace('1', '3')}\n"
    assert StopRequest(name="a") not in daemon.requests


def test_stop_all_with_nothing_to_stop(vmctl: Vmctl, daemon: FakeDaemon) -> None:
    """It is a success without a message."""
    daemon.answers(vm_info(running=False), End())

    assert vmctl("stop", "-a") == (0, "", "")
    assert json.loads(vmctl("stop", "-a", "--json")[1]) == {"schema": 1, "vms": []}


@pytest.mark.parametrize(("options", "at"), [("-a", StopRequest), ("-aw", StopRequest), ("-aw", WaitRequest)])
def test_stop_all_interrupted(daemon: FakeDaemon, options: str, at: type[Record]) -> None:
    """vmctl ends.  The stops that it has requested still happen."""
    daemon.script = all_vms(lambda request: [] if isinstance(request, at) else accepted(request))
    process = spawn(daemon, "stop", options)
    while not isinstance(daemon.requested(), at):
        pass

    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=20)

    assert (process.returncode, output, errors) == (1, "", "stopping vm a: interrupted call\n")


def test_json_of_stop_all(vmctl: Vmctl, daemon: FakeDaemon) -> None:
    """There is one document for all VMs."""
    daemon.script = all_vms(accepted)

    _, output, _ = vmctl("stop", "-aw", "--json")

    assert [(vm["name"], vm["result"]) for vm in json.loads(output)["vms"]] == [
        ("a", "terminated"),
        ("b", "terminated"),
        ("late", "terminated"),
    ]
