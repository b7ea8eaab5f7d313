"""The order and the arguments of the steps by which a process gives up its rights.

Whether the kernel enforces them is tested in tests/process.
"""

import _thread
import errno
import posix
from collections.abc import Callable

import pytest

from tests.unit.privsep.test_seccomp import verdict
from vmd.privsep import confine, landlock, linux, refused, seccomp
from vmd.privsep.seccomp import NUMBERS, RET_ALLOW, RET_ERRNO, RET_KILL_PROCESS, RET_TRAP

NO_CALL = 9999
SETPCAP = 1 << linux.CAP_SETPCAP
Step = tuple[object, ...]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    """The steps that `confine` takes, in a process without capabilities.  None of them has an effect."""
    found: list[Step] = []

    def record(name: str, result: object = None) -> Callable[..., object]:
        def step(*arguments: object, **named: object) -> object:
            found.append((name, *arguments, *named.values()))
            return result

        return step

    monkeypatch.setattr(linux, "set_limit", record("limit"))
    monkeypatch.setattr(linux, "hard_limit", lambda _number: 2000)
    monkeypatch.setattr(linux, "permitted_capabilities", lambda: 0)
    monkeypatch.setattr(linux, "limit_bounding_set", record("bound"))
    monkeypatch.setattr(linux, "set_capabilities", record("keep"))
    monkeypatch.setattr(linux, "prctl", record("prctl"))
    monkeypatch.setattr(landlock, "restrict", record("landlock", ["a warning"]))
    monkeypatch.setattr(seccomp, "install", record("filter"))
    monkeypatch.setattr(refused, "show", record("show"))
    monkeypatch.setattr(_thread, "_count", lambda: 0)
    monkeypatch.delitem(posix.environ, confine.DEBUG, raising=False)
    return found


@pytest.fixture
def debugged(monkeypatch: pytest.MonkeyPatch) -> None:
    """A daemon that was started to find a refused call."""
    monkeypatch.setitem(posix.environ, confine.DEBUG, b"1")


FILES = (("/", landlock.READ),)
SOME = confine.Confinement(syscalls=("read",), files=FILES, scopes=landlock.SCOPE_SOCKETS, open_files=77)


def test_all_steps_are_taken(steps: list[Step]) -> None:
    """The filter is last, because it forbids the calls of the other steps."""
    warnings = confine.confine(SOME)

    assert warnings == ["a warning"]
    assert steps == [
        ("limit", "limit resources", linux.RLIMIT_CORE, 0),
        ("limit", "limit open files", linux.RLIMIT_NOFILE, 77),
        ("prctl", "set no_new_privs", linux.PR_SET_NO_NEW_PRIVS, 1),
        ("prctl", "forbid being traced", linux.PR_SET_DUMPABLE, 0),
        ("landlock", FILES, landlock.SCOPE_SOCKETS),
        ("filter", confine.filter_of(SOME), False),
    ]


def test_a_process_that_writes_no_file(steps: list[Step]) -> None:
    """Its limit of file sizes is 0."""
    confine.confine(SOME.replace(writes_files=False))

    assert steps[1] == ("limit", "limit resources", linux.RLIMIT_FSIZE, 0)


def test_a_process_that_sees_others(steps: list[Step]) -> None:
    """Landlock would forbid that, so there is nothing that the kernel lacks either."""
    assert confine.confine(SOME.replace(sees_others=True)) == []
    assert "landlock" not in [name for name, *_ in steps]


def test_refused_calls_are_logged_if_they_only_fail(steps: list[Step]) -> None:
    """By the kernel: nothing else would show them."""
    confine.confine(SOME.replace(deadly=("mount",)))

    assert steps[-1][2] is True


def test_a_filter_that_was_made_before_is_used(steps: list[Step]) -> None:
    """It is not made again."""
    confine.confine(SOME, b"the filter")
    confine.narrow_requests((1, 2), b"the requests")
    confine.narrow_requests((1, 2))

    assert [step[1] for step in steps if step[0] == "filter"] == [
        b"the filter", b"the requests", seccomp.assemble_requests((1, 2)),
    ]  # fmt: skip


def test_a_process_with_threads_is_not_confined(steps: list[Step], monkeypatch: pytest.MonkeyPatch) -> None:
    """Landlock would not hold for them."""
    monkeypatch.setattr(_thread, "_count", lambda: 1)

    with pytest.raises(RuntimeError, match="before the first thread"):
        confine.confine(SOME)

    assert steps == []


def test_a_refused_call_is_shown_to_developers(steps: list[Step], request: pytest.FixtureRequest) -> None:
    """This begins before the filter.  A process whose refused calls only fail does not show them."""
    request.getfixturevalue("debugged")
    confine.confine(SOME)
    assert steps[0] == ("show",)
    steps.clear()

    confine.confine(SOME.replace(deadly=("mount",)))
    assert ("show",) not in steps


# --- single steps ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("most", "limit"), [(1999, 1999), (2000, 2000), (2001, 2000)])
def test_a_limit_is_only_lowered(steps: list[Step], most: int, limit: int) -> None:
    """The kernel refuses to raise it, and the process would not start."""
    confine.limit_open_files(most)
    confine.limit_memory(most)

    assert steps == [
        ("limit", "limit open files", linux.RLIMIT_NOFILE, limit),
        ("limit", "limit memory", linux.RLIMIT_AS, limit),
    ]


@pytest.mark.parametrize(
    ("permitted", "expected"),
    [
        (0, []),
        (0b11, []),
        (0b111, [("keep", 0b11, 0b11)]),
        (0b100, [("keep", 0, 0)]),
        (SETPCAP, [("bound", 0b11), ("keep", 0, 0)]),
        (SETPCAP | 0b110, [("bound", 0b11), ("keep", 0b10, 0b10)]),
    ],
)
def test_capabilities_are_given_up(
    steps: list[Step], monkeypatch: pytest.MonkeyPatch, permitted: int, expected: list[Step]
) -> None:
    """Those that are left pass on to programs.  None can be gained: the bounding set goes first, which needs one."""
    monkeypatch.setattr(linux, "permitted_capabilities", lambda: permitted)

    confine.give_up_capabilities(0b11)

    assert steps == expected


def test_a_call_without_a_rule() -> None:
    """It kills, except in a process that runs programs of the host."""
    forgiving = SOME.replace(deadly=("mount",))

    assert verdict(confine.filter_of(SOME), NO_CALL) == RET_KILL_PROCESS
    assert verdict(confine.filter_of(forgiving), NO_CALL) == RET_ERRNO | errno.EPERM
    assert verdict(confine.filter_of(forgiving), NUMBERS["mount"]) == RET_KILL_PROCESS


@pytest.mark.usefixtures("debugged")
def test_a_call_without_a_rule_is_trapped_for_developers() -> None:
    """libffi needs one more call then.  A process whose refused calls only fail is not changed."""
    assert verdict(confine.filter_of(SOME), NO_CALL) == RET_TRAP
    assert verdict(confine.filter_of(SOME), NUMBERS["statfs"]) == RET_ALLOW
    assert verdict(confine.filter_of_requests((1,)), NUMBERS["seccomp"]) == RET_TRAP
    forgiving = confine.filter_of(SOME.replace(deadly=("mount",)))
    assert verdict(forgiving, NO_CALL) == verdict(forgiving, NUMBERS["statfs"]) == RET_ERRNO | errno.EPERM


def test_signals_reach_the_process_itself() -> None:
    """The filter has the pid of the process that makes it."""
    program = confine.filter_of(SOME.replace(syscalls=("tgkill",)))

    assert verdict(program, NUMBERS["tgkill"], posix.getpid()) == RET_ALLOW
    assert verdict(program, NUMBERS["tgkill"], posix.getppid()) == RET_KILL_PROCESS


def test_a_c_library_without_that_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only glibc loads it later."""

    def fail(_name: str) -> None:
        raise OSError(errno.ENOENT, "no such library")

    monkeypatch.setattr(linux, "load_library", fail)

    confine.prime()
