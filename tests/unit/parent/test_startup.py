"""The command line of vmd, and what it prints before it serves."""

import errno
import os
import re
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from vmd.config.check import ConfigErrors
from vmd.config.model import Config, Globals, Owner
from vmd.errors import HostError, OperatorError, VmdError, sentence
from vmd.log import JOURNAL, STDERR, log
from vmd.parent import service, startup
from vmd.parent.options import Options
from vmd.parent.startup import (
    EX_CONFIG,
    EX_FAILED,
    EX_UNAVAILABLE,
    EX_USAGE,
    announce,
    as_warning,
    check_adopt,
    control_socket,
    debug_filters,
    exit_status,
    former,
    need_root,
    open_kvm,
)
from vmd.parent.store import Store
from vmd.privsep import spawn
from vmd.version import VERSION

ROOT = Path(__file__).resolve().parents[3]


def run(line: str) -> tuple[int, str, str]:
    """Run `vmd` with the words and redirections of a shell's command line."""
    done = subprocess.run(
        ["sh", "-c", f"exec {sys.executable} -m vmd {line}"],
        cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_version() -> None:
    """Both spellings print it to standard output."""
    assert run("-V") == run("--version") == (0, f"vmd {VERSION}\n", "")


def test_help() -> None:
    """It goes to standard output with status 0, and has every option of the manual and of the usage."""
    status, output, errors = run("--help")

    assert (status, errors) == (0, "")
    assert run("-h") == (0, output, "")
    explained = re.findall(r"^  -(\w)", output, re.M)
    usage = "".join(re.findall(r"\[-(\w+)", output.splitlines()[0]))
    manual = re.findall(r"^\.It Fl (\w)", Path(ROOT, "man/vmd.8").read_text(), re.M)
    assert explained == manual
    assert sorted(usage) == sorted(explained)


@pytest.mark.parametrize(
    ("line", "errors"),
    [
        ("-V >&-", "vmd: standard output: Bad file descriptor\n"),
        ("-h <&- >/dev/full", "vmd: standard output: No space left on device\n"),
    ],
)
def test_output_that_cannot_be_written_is_a_failure(line: str, errors: str) -> None:
    """The exit status is 1."""
    assert run(line) == (1, "", errors)


@pytest.mark.parametrize("redirections", ["2>&-", "<&- 2>/dev/full"])
def test_check_without_a_place_for_errors(tmp_path: Path, redirections: str) -> None:
    """The exit status tells the result.  Errors are not written to standard output instead."""
    good, bad = tmp_path / "good", tmp_path / "bad"
    good.touch()
    bad.write_text("vm\n")

    assert run(f"-n -f {bad} {redirections}")[:2] == (1, "")
    assert run(f"-n -f {good} {redirections}")[:2] == (0, "")


def test_path_of_the_socket_is_too_long() -> None:
    """The kernel's limit is 107 bytes."""
    path = "/tmp/" + "x" * 103

    with pytest.raises(OperatorError) as refused:
        service.listen(path, Owner())

    assert str(refused.value) == f"control socket {path}: has 108 bytes, and at most 107 are possible"


def test_errors_without_a_number() -> None:
    """They are not printed as "Success"."""
    assert str(HostError("bind", OSError("AF_UNIX path too long"))) == "bind: AF_UNIX path too long"
    assert sentence(OSError("timed out")) == "timed out"
    assert sentence(OSError(errno.ENOENT, "")) == "No such file or directory"


def test_the_debug_switch_for_filters_needs_option_d(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Without -d the variable is removed from the environment, so that no process has the weaker filter."""
    monkeypatch.setenv(spawn.DEBUG, "1")
    debug_filters(Options(debug=True))
    passed_on = spawn.environment()
    assert "the confinement is weaker, so use no guests of others" in capfd.readouterr().err
    debug_filters(Options())
    assert "has no effect without -d" in capfd.readouterr().err

    assert passed_on == spawn.ENVIRONMENT | {spawn.DEBUG: "1"}
    assert spawn.environment() == spawn.ENVIRONMENT


# --- what an earlier daemon has left ----------------------------------------------------------------------------


def stored(tmp_path: Path, *names: str) -> dict[str, int]:
    """Return descriptors that the service manager has kept."""
    return {name: os.open(tmp_path, os.O_RDONLY) for name in names}


def are_open(fds: dict[str, int]) -> list[str]:
    """Return the names of the descriptors that are open."""
    return [name for name, fd in fds.items() if os.path.exists(f"/proc/self/fd/{fd}")]


@pytest.mark.parametrize(
    ("error", "check", "guests", "status"),
    [
        (VmdError("no"), False, False, EX_FAILED),
        (ConfigErrors([]), False, False, EX_CONFIG),
        (ConfigErrors([]), True, False, EX_FAILED),
        (service.NoKvm(errno.ENOENT, "no"), False, False, EX_UNAVAILABLE),
        (ConfigErrors([]), False, True, EX_FAILED),
        (service.NoKvm(errno.ENOENT, "no"), False, True, EX_FAILED),
    ],
)
def test_the_exit_status_says_whether_another_start_can_help(
    error: VmdError, check: bool, guests: bool, status: int
) -> None:
    """With guests another start always can: without one they would end."""
    names = {"vmm-1": 3} if guests else {"listener": 3}
    assert exit_status(error, Options(check_only=check), names) == status


def test_the_first_daemon_finds_no_state() -> None:
    """So it reads vm.conf."""
    assert former(Store({})) == (None, None)


def test_a_state_without_a_vmm_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """There are no guests: the daemon starts like the first one, and the operator is told."""
    monkeypatch.setattr(service, "notify", lambda *_: True)
    fds = stored(tmp_path, "state", "listener")
    assert former(Store(fds)) == (None, None)
    assert are_open(fds) == []
    assert "every vmm of the vmd before this one has ended" in capfd.readouterr().err


def test_a_state_that_cannot_be_read_shuts_the_guests_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Their vmm notices the end of its channel."""
    monkeypatch.setattr(service, "notify", lambda *_: True)
    fds = stored(tmp_path, "state", "vmm-1", "listener")
    assert former(Store(fds)) == (None, None)
    assert are_open(fds) == []
    assert "its guests are shut down" in capfd.readouterr().err


def test_a_daemon_that_adopts_vms_needs_no_kvm(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """They run.  The first daemon waits for KVM, but not in the foreground, and does not start without it."""
    waited: list[float] = []

    def wait(timeout_s: float) -> int:
        waited.append(timeout_s)
        raise service.NoKvm(errno.ENOENT, "/dev/kvm: gone")

    monkeypatch.setattr(service, "wait_for_kvm", wait)
    assert open_kvm(Options(), adopts=True) == -1
    assert "/dev/kvm: gone: a start of a VM may fail" in capfd.readouterr().err
    for options in (Options(), Options(debug=True)):
        with pytest.raises(service.NoKvm):
            open_kvm(options, adopts=False)
    assert waited == [0, service.KVM_WAIT_S, 0]


@pytest.mark.parametrize("kept", ["socket", "file", "none"])
@pytest.mark.parametrize("there", [False, True])
def test_the_control_socket_of_an_earlier_daemon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], kept: str, there: bool
) -> None:
    """Clients that wait for it are served.  Where it is gone, or is none, there is a new one."""
    monkeypatch.setattr(service, "notify", lambda *_: True)
    path = tmp_path / "vmd.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as old:
        old.bind(str(path))
        if kept == "socket":
            old.listen()
            fds = {"listener": os.dup(old.fileno())}
        else:
            fds = stored(tmp_path, "listener") if kept == "file" else {}
    if not there:
        path.unlink()
    store = Store(fds)
    owner = Owner(uid=os.getuid(), gid=os.getgid())
    with control_socket(
        Options(socket_path=str(path)), Config(settings=Globals(socket_owner=owner)), store
    ) as listener, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:  # fmt: skip
        client.connect(str(path))
        listener.accept()[0].close()
    unusable = "the control socket of the vmd before this one cannot be used: " in capfd.readouterr().err
    assert unusable == (kept == "file" and there)
    if kept != "socket" or not there:
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
    for name in store.names:
        store.remove(name)


@pytest.mark.parametrize(
    ("options", "fds", "notifies", "background"),
    [
        (Options(), {}, False, True),
        (Options(debug=True), {}, False, False),
        (Options(), {"state": 3}, False, False),
        (Options(), {}, True, False),
    ],
)
def test_who_goes_to_the_background(
    monkeypatch: pytest.MonkeyPatch, options: Options, fds: dict[str, int], notifies: bool, background: bool
) -> None:
    """Neither a daemon in the foreground, nor one that takes the place of another, nor a service of systemd."""
    gone: list[bool] = []

    def daemonize() -> Callable[[], None]:
        gone.append(True)
        return lambda: None

    monkeypatch.setattr(service, "daemonize", daemonize)
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    if notifies:
        monkeypatch.setenv("NOTIFY_SOCKET", "/none")
    ready = announce(options, fds)
    assert (gone, ready is service.notify_ready) == ([True] if background else [], not background)


def test_a_rehearsal_needs_a_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator who calls it by hand is told which command does that.  Nothing starts without root."""
    with pytest.raises(VmdError, match="vmctl upgrade -n does that"):
        check_adopt(Options(), Store({}))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(VmdError, match="need root privileges: run vmd as root"):
        need_root()
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    need_root()


# --- in which order ---------------------------------------------------------------------------------------------


def test_exit_statuses_are_those_of_the_manual_and_the_unit() -> None:
    """The unit does not start a daemon again whose start would fail in the same way."""
    assert (EX_FAILED, EX_USAGE, EX_UNAVAILABLE, EX_CONFIG) == (1, 2, 69, 78)
    unit = Path(ROOT, "etc/vmd.service").read_text()
    assert re.search(r"^RestartPreventExitStatus=.*\b69\b.*\b78\b", unit, re.M)


def test_a_warning_says_that_it_is_one() -> None:
    """Once."""
    assert as_warning("odd") == as_warning("warning: odd") == "warning: odd"


@pytest.mark.parametrize(("journal", "debug", "form"), [
    (True, False, JOURNAL), (True, True, STDERR), (False, False, STDERR), (False, True, STDERR),
])  # fmt: skip
def test_what_is_checked_without_a_start(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], journal: bool, debug: bool, form: str
) -> None:
    """The journal has lines with a level, and a terminal plain ones.  The status tells the result."""
    forms: list[str] = []
    checked: list[str] = []
    monkeypatch.setattr(service, "on_journal", lambda: journal)
    monkeypatch.setattr(log, "setup", lambda _name, form, _verbosity: forms.append(form))
    monkeypatch.setattr(startup, "read_config", lambda _options: Config())
    monkeypatch.setattr(startup, "prefix_warnings", lambda _config, _routes: ["of a prefix"])
    monkeypatch.setattr(startup, "host_warnings", lambda _config: ["warning: of the host"])
    monkeypatch.setattr(startup, "check_vms", lambda _config, warn: warn("of a vm"))
    monkeypatch.setattr(startup, "check_adopt", lambda _options, _store: checked.append("adoption"))
    foreground = ["-d"] if debug else []
    assert startup.run(["-n", *foreground]) == 0
    said = capfd.readouterr().err
    assert said.endswith("configuration OK\n")
    for text in ("warning: of a prefix", "warning: of the host", "warning: of a vm"):
        assert text in said
    assert checked == []
    assert startup.run(["--check-adopt", *foreground]) == 0
    assert (forms, checked) == ([form] * 2, ["adoption"])
    assert capfd.readouterr().err == "adoption OK\n"
    assert startup.run(["-n", "--no-such-option"]) == EX_USAGE


def test_why_a_daemon_does_not_start(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Each reason is a line, and the status says whether another start can help."""
    problems = [OperatorError(errno.EINVAL, "vm.conf:1: no"), OperatorError(errno.EINVAL, "vm.conf:2: no")]

    def fail(_options: Options) -> Config:
        raise ConfigErrors(problems)

    monkeypatch.setattr(log, "setup", lambda *_: None)
    monkeypatch.setattr(startup, "read_config", fail)
    assert startup.run(["-n"]) == EX_FAILED
    assert [line.rpartition("vmd: ")[2] for line in capfd.readouterr().err.splitlines()] == [
        "vm.conf:1: no", "vm.conf:2: no"
    ]  # fmt: skip


@pytest.mark.parametrize("known", [None, Config(settings=Globals(local_nat=False))])
@pytest.mark.parametrize("starting", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_how_a_file_is_read(
    monkeypatch: pytest.MonkeyPatch, known: Config | None, starting: bool, given: bool
) -> None:
    """A further file builds on what is known.  Only a daemon that starts needs no default file."""
    found: list[dict[str, Any]] = []
    warned: list[str] = []

    def load(path: str, **how: Any) -> Config:  # noqa: ANN401 - of check.load
        how.pop("warn")("odd")
        found.append({"path": path, **how})
        return Config()

    monkeypatch.setattr("vmd.config.check.load", load)
    options = Options(conf_path="/c", conf_given=given, macros=(("a", "b"),))
    for path in (None, "/more"):
        startup.read_config(options, path, known, warned.append, starting=starting)
    assert found == [
        {
            "path": path, "macros": {"a": "b"}, "may_be_missing": starting and not given, "starting": starting,
            "settings": known.settings if known else None, "known_switches": known.switches if known else (),
        }
        for path in ("/c", "/more")
    ]  # fmt: skip
    assert warned == ["warning: odd"] * 2


@pytest.mark.parametrize("lost", [False, True])
def test_a_rehearsal_tries_what_a_start_needs(monkeypatch: pytest.MonkeyPatch, lost: bool) -> None:
    """Its rights, the state, vm.conf and the cell.  A VM that would be lost is an error."""
    order: list[str] = []
    truth, config = SimpleNamespace(vms=("a", "b")), Config(settings=Globals(first_id=70000))
    monkeypatch.setattr(startup, "need_root", lambda: order.append("root"))
    monkeypatch.setattr(startup, "read_state", lambda _store: (truth, config))
    monkeypatch.setattr(startup, "vms_of", lambda truth: truth.vms[lost:])
    monkeypatch.setattr(startup, "read_config", lambda _options, *, starting: config if starting else None)
    monkeypatch.setattr(startup, "give_up_capabilities", lambda _kept: order.append("capabilities"))
    monkeypatch.setattr(service, "lookup_user", lambda: (4, 5))
    cell = SimpleNamespace(root_fd=9, close=lambda: order.append("close"))
    monkeypatch.setattr("vmd.privsep.cell.Cell.build", lambda *ids: cell if ids == (4, 5) else None)
    monkeypatch.setattr(startup, "PrivPlace", lambda fd, first_id: order.append(f"place {fd} {first_id}"))
    store = cast("Any", SimpleNamespace(names=["state"]))
    if lost:
        with pytest.raises(VmdError, match="some VMs could not be adopted"):
            check_adopt(Options(), store)
        assert order == ["root"]
    else:
        check_adopt(Options(), store)
        assert order == ["root", "capabilities", "place 9 70000", "close"]


BEGIN = [
    "need_root", "debug_filters", "give_up_capabilities", "lookup_user", "former", "read_config", "open_kvm",
    "raise_file_limit", "make_run_directory", "wait", "control_socket", "announce", "setup of log", "keep_alive",
    "start", "run",
]  # fmt: skip
END = ["finish", "reap", "clean_up", "reap", "end of logs", "remove_socket", "remove lock"]


@pytest.mark.parametrize("adopts", [False, True])
@pytest.mark.parametrize("hands_over", [False, True])
def test_the_order_of_a_start_and_of_an_end(monkeypatch: pytest.MonkeyPatch, adopts: bool, hands_over: bool) -> None:
    """A daemon that adopts guests does not read vm.conf, and does not wait for them to end.

    One that hands over removes nothing, because it belongs to the next one.
    """
    order: list[str] = []
    answers: dict[str, object] = {
        "lookup_user": (1, 2), "former": (object(), Config()) if adopts else (None, None), "read_config": Config(),
        "open_kvm": -1, "announce": lambda: None,
    }  # fmt: skip

    def note(name: str) -> Callable[..., Any]:
        def call(*_given: object, **_more: object) -> Any:  # noqa: ANN401 - of any function
            order.append(name)
            return answers.get(name)

        return call

    class Lock:
        """The lock of the life of guests."""

        wait, remove = staticmethod(note("wait")), staticmethod(note("remove lock"))

        def __init__(self, path: str) -> None:
            assert path == "/s"

    def parent(*_given: object) -> SimpleNamespace:
        return SimpleNamespace(
            life=SimpleNamespace(), upgrade=SimpleNamespace(), logs=SimpleNamespace(end=note("end of logs")),
            loop=SimpleNamespace(run=note("run")), start=note("start"), handed_over=hands_over, exit_status=5,
            lasting=SimpleNamespace(save_now=note("save_now")), finish=note("finish"), clean_up=note("clean_up"),
        )  # fmt: skip

    for name in (
        "need_root", "debug_filters", "give_up_capabilities", "former", "read_config", "open_kvm", "raise_file_limit",
        "control_socket", "announce",
    ):  # fmt: skip
        monkeypatch.setattr(startup, name, note(name))
    for name in ("lookup_user", "make_run_directory", "keep_alive", "remove_socket"):
        monkeypatch.setattr(service, name, note(name))
    monkeypatch.setattr(service, "choose_log", lambda _debug: STDERR)
    monkeypatch.setattr(log, "setup", note("setup of log"))
    monkeypatch.setattr(startup, "LifeLock", Lock)
    monkeypatch.setattr(startup, "Children", lambda *_: SimpleNamespace(reap=note("reap")))
    monkeypatch.setattr(startup, "StateFile", lambda _directory: None)
    monkeypatch.setattr(startup, "Parent", parent)
    assert startup.serve(Options(socket_path="/s"), cast("Any", None), {}) == 5

    left_out = {"read_config", "wait"} if adopts else set()
    assert order == [name for name in BEGIN if name not in left_out] + (["save_now"] if hands_over else END)
