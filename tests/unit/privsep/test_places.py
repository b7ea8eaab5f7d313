"""How processes enter their places, step by step, without effect.

Whether the kernel enforces these steps is tested in tests/process.
"""

import errno
import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from vmd.config.model import DEFAULT_FIRST_ID, IDS
from vmd.errors import HostError, VmdError
from vmd.privsep import cell, ids, linux, privplace
from vmd.privsep.cell import BUILT, Cell, LockholderCell, VmmCell, build_in_namespace
from vmd.privsep.hostfiles import HostFiles
from vmd.privsep.privplace import PrivPlace
from vmd.privsep.spawn import FD_TARGETS

Step = tuple[object, ...]
OVER_IDS = 1 << linux.CAP_SETUID | 1 << linux.CAP_SETGID | 1 << linux.CAP_KILL
LEFT: list[Step] = [
    ("setns", 30, linux.CLONE_NEWNS), ("fchdir", 31), ("chroot", "."),
    ("unshare", linux.CLONE_NEWIPC | linux.CLONE_NEWNET | linux.CLONE_NEWUTS), ("chdir", "/"),
]  # fmt: skip


def children() -> set[str]:
    """Return the pids of our children, also of those that have ended and are not reaped.  Other tests may have some."""
    tasks = Path("/proc/self/task").glob("*/children")
    return {pid for task in tasks for pid in task.read_text().split()}


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    """The steps that were taken, in a process that has all capabilities.  None of them has an effect."""
    found: list[Step] = []

    def record(name: str, result: object = None) -> Callable[..., object]:
        def step(*arguments: object, **named: object) -> object:
            found.append((name, *arguments, *named.values()))
            return result

        return step

    for name in (
        "setns", "unshare", "mount", "pivot_root", "umount_lazily", "limit_bounding_set", "become_user",
        "set_capabilities",
    ):  # fmt: skip
        monkeypatch.setattr(linux, name, record(name))
    for name in ("fchdir", "chroot", "chdir"):
        monkeypatch.setattr(os, name, record(name))
    monkeypatch.setattr(os, "umask", record("umask", 0o022))
    monkeypatch.setattr(linux, "permitted_capabilities", lambda: (1 << 41) - 1)
    monkeypatch.setattr(cell, "limit_tasks", record("limit tasks"))
    return found


def test_a_cell_is_entered(steps: list[Step]) -> None:
    """Nothing of the host is left, and no capability can be gained.  The user is the last step."""
    place = Cell(5, 6, 30, 31)
    place.prepare()
    place.enter()
    assert steps == [*LEFT, ("limit_bounding_set", 0), ("become_user", 5, 6, 0)]
    assert (place.import_path, place.code_fd, place.own_pids, place.vital) == (("/vmd",), -1, False, False)


def test_each_process_has_an_id_of_its_own(steps: list[Step], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tasks are limited, because the limit is one of the id."""
    monkeypatch.setattr(ids, "ids_in_use", set)
    place = Cell(5, 6, 30, 31, ids.Ids(1000, 10))
    for uid in (1000, 1001):
        steps.clear()
        place.prepare()
        place.enter()
        assert steps == [("limit tasks",), *LEFT, ("limit_bounding_set", 0), ("become_user", uid, uid, 0)]


def test_vmm_enters_its_cell(steps: list[Step]) -> None:
    """With a user namespace it keeps the capabilities over the ids there, and without one it has none."""
    inner = Cell(5, 6, 30, 31)
    alone = VmmCell(inner, None, own_pids=True)
    alone.enter()
    assert steps == [*LEFT, ("limit_bounding_set", 0), ("become_user", 5, 6, 0)]
    assert (alone.own_pids, alone.vital, alone.users_fd) == (True, True, None)
    steps.clear()
    users = os.open("/proc/self/ns/user", os.O_RDONLY)
    place = VmmCell(inner, users, own_pids=False)
    assert place.users_fd is not None
    assert place.users_fd >= FD_TARGETS
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(users)
    place.enter()
    os.close(place.users_fd)
    assert steps == [
        *LEFT, ("setns", place.users_fd, linux.CLONE_NEWUSER), ("set_capabilities", (1 << 41) - 1, OVER_IDS),
        ("limit_bounding_set", 0), ("become_user", 5, 6, OVER_IDS),
    ]  # fmt: skip


def test_lockholder_enters_its_cell(steps: list[Step]) -> None:
    """With one capability."""
    LockholderCell(Cell(5, 6, 30, 31)).enter()
    mask = 1 << linux.CAP_SYS_PTRACE
    assert steps == [*LEFT, ("limit_bounding_set", mask), ("become_user", 5, 6, mask)]


def test_an_opener_keeps_few_capabilities(steps: list[Step]) -> None:
    """In the bounding set, too: otherwise the exec of root would restore them."""
    place = HostFiles(40)
    place.prepare()
    place.enter()
    mask = HostFiles.CAPABILITIES
    assert steps == [("chdir", "/"), ("limit_bounding_set", mask), ("set_capabilities", mask)]
    assert (place.code_fd, place.own_pids, place.vital) == (40, False, False)
    assert place.import_path == ("/proc/self/fd/9/vmd",)


NO_FILES = linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC


@pytest.mark.parametrize("there", [True, False])
def test_priv_sees_only_its_own_directory_in_run(
    steps: list[Step], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, there: bool
) -> None:
    """It keeps four capabilities, of which it gives up two when it confines itself."""
    run, own = tmp_path / "run/vmd/priv", tmp_path / "own"
    own.mkdir()
    given: list[int] = []
    monkeypatch.setattr(privplace, "PRIV_DIRECTORY", str(run))

    def make(uid: int) -> None:
        given.append(uid)
        if not there:
            raise PermissionError
        run.mkdir(parents=True)

    def mount(*arguments: object) -> None:
        steps.append(("mount", *arguments))
        if arguments[2] == "tmpfs" and there:
            run.rmdir()  # it is hidden now
            run.parent.rmdir()

    monkeypatch.setattr(privplace, "make_priv_directory", make)
    monkeypatch.setattr(linux, "mount", mount)
    place = PrivPlace(40)
    descriptors = os.listdir("/proc/self/fd")
    place.prepare()
    place.enter()
    assert os.listdir("/proc/self/fd") == descriptors
    uid = DEFAULT_FIRST_ID + IDS
    caps = sum(1 << getattr(linux, f"CAP_{name}") for name in ("NET_ADMIN", "NET_RAW", "DAC_READ_SEARCH", "SETPCAP"))
    binds = [step for step in steps if step[0] == "mount" and step[4] == linux.MS_BIND]
    found = [(str(step[1]).startswith("/proc/self/fd/"), step[2]) for step in binds]
    assert found == ([(True, str(run))] if there else [])
    assert given == [uid]
    assert run.exists() is there
    own_directory = [("umask", 0o022), ("umask", 0o077), *binds] if there else []
    assert steps == [
        ("chdir", "/"), ("unshare", linux.CLONE_NEWNS), ("mount", None, "/", None, linux.MS_REC | linux.MS_SLAVE),
        ("mount", "vmd", "/run", "tmpfs", NO_FILES, "mode=0755,size=64k"), *own_directory,
        ("mount", None, "/run", None, linux.MS_REMOUNT | linux.MS_BIND | linux.MS_RDONLY | NO_FILES),
        ("limit_bounding_set", caps), ("become_user", uid, uid, caps),
    ]  # fmt: skip
    assert (place.code_fd, place.own_pids, place.vital) == (40, False, True)
    assert place.import_path[0] == "/proc/self/fd/9/vmd"


# --- building the cell ---------------------------------------------------------------------------------------


def test_the_root_of_a_cell(steps: list[Step], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It has the given mounts and files only, and all of it is read-only."""
    root, library = tmp_path / "root", tmp_path / "library"
    (library / "site-packages").mkdir(parents=True)
    (tmp_path / "program").touch()
    root.mkdir()
    monkeypatch.setattr(cell, "SCAFFOLD", str(root))
    removed: list[str] = []
    monkeypatch.setattr(os, "rmdir", removed.append)
    program = str(tmp_path / "program")
    mounts = {
        "/usr/bin/python": program, "/usr/lib/python": str(library), "/dev/null": "/dev/null", "/gone": "/no/such/file",
    }  # fmt: skip
    cell.build_root(mounts, [("/vmd/vmd/a.py", b"code"), ("/vmd/vmd/b.py", b"")])
    bind, flags = linux.MS_BIND, linux.MS_NOSUID | linux.MS_NODEV
    again = linux.MS_REMOUNT | linux.MS_BIND | linux.MS_RDONLY | linux.MS_NOSUID
    expected: list[Step] = [
        ("umask", 0o022), ("unshare", linux.CLONE_NEWNS),
        ("mount", None, "/", None, linux.MS_REC | linux.MS_PRIVATE),
        ("mount", "vmd", str(root), "tmpfs", flags, "mode=0755,size=64m"),
    ]  # fmt: skip
    for source, target in (
        (program, "/usr/bin/python"), (str(library), "/usr/lib/python"), ("/dev/null", "/dev/null"),
        (f"{root}/.empty", "/usr/lib/python/site-packages"),
    ):  # fmt: skip
        kind = linux.MS_NOEXEC if source == "/dev/null" else linux.MS_NODEV
        expected += [("mount", source, f"{root}{target}", None, bind)]
        expected += [("mount", None, f"{root}{target}", None, again | kind)]
    assert steps == [
        *expected, ("pivot_root", str(root), f"{root}/.old"), ("chdir", "/"), ("umount_lazily", "/.old"),
        ("mount", None, "/", None, linux.MS_REMOUNT | linux.MS_BIND | linux.MS_RDONLY | flags),
    ]  # fmt: skip
    assert removed == ["/.old"]
    assert (root / "vmd/vmd/a.py").read_bytes() == b"code"
    assert (root / ".old").is_dir()
    found = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    assert found == {"usr/bin/python", "dev/null", "vmd/vmd/a.py", "vmd/vmd/b.py"}
    assert {path.stat().st_mode & 0o022 for path in root.rglob("*")} == {0}


def test_a_built_cell_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """By descriptors of its namespace and root.  Its builder ends."""
    built: list[object] = []
    monkeypatch.setattr(cell, "build_root", lambda *given: built.append(given))
    before, earlier = len(os.listdir("/proc/self/fd")), children()
    namespace, root = build_in_namespace({}, [])
    assert os.readlink(f"/proc/self/fd/{namespace}") == os.readlink("/proc/self/ns/mnt")
    assert os.path.samestat(os.fstat(root), os.stat("/"))
    Cell(5, 6, namespace, root).close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert built == []  # only in the builder
    assert children() <= earlier


@pytest.mark.parametrize(
    ("error", "kind", "words", "number"),
    [
        (HostError("mount it", errno.EPERM), HostError, "mount it", errno.EPERM),
        (OSError(errno.ENOSPC, "no", "/the/file"), HostError, "/the/file", errno.ENOSPC),
        (ValueError("a bug"), VmdError, "ValueError", errno.EINVAL),
        (None, VmdError, "its builder has died", errno.EINVAL),
    ],
)
def test_a_cell_that_cannot_be_built(
    monkeypatch: pytest.MonkeyPatch, error: Exception | None, kind: type[VmdError], words: str, number: int
) -> None:
    """The error says which step has failed.  Nothing is left."""

    def fail(*_: object) -> None:
        if error is None:
            os._exit(1)
        raise error

    monkeypatch.setattr(cell, "build_root", fail)
    before, earlier = len(os.listdir("/proc/self/fd")), children()
    with pytest.raises(kind, match=f"build the cell: {words}") as failed:
        build_in_namespace({}, [])
    assert type(failed.value) is kind
    assert failed.value.number == number
    assert len(os.listdir("/proc/self/fd")) == before
    assert children() <= earlier


class Ended(Exception):
    """Raised in place of the end of a process."""


class Peer:
    """A socket that records what is done with it."""

    def __init__(self) -> None:
        self.done: list[Step] = []

    def close(self) -> None:
        """Close it."""
        self.done.append(("close",))

    def send(self, data: bytes) -> None:
        """Send data."""
        self.done.append(("send", data))

    def recv(self, size: int) -> bytes:
        """Wait for the end of the other side."""
        self.done.append(("recv", size))
        return b""


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The statuses with which a process would have ended."""
    statuses: list[int] = []

    def end(status: int) -> None:
        statuses.append(status)
        raise Ended

    monkeypatch.setattr(os, "_exit", end)
    return statuses


def test_a_builder_stays_until_its_namespace_is_kept(monkeypatch: pytest.MonkeyPatch, ends: list[int]) -> None:
    """It has closed our side, or it would wait for itself."""
    monkeypatch.setattr(cell, "build_root", lambda *_: None)
    ours, theirs = Peer(), Peer()
    with pytest.raises(Ended):
        cell.run_builder({}, [], ours, theirs)  # type: ignore[arg-type]
    assert (ours.done, theirs.done, ends) == ([("close",)], [("send", BUILT.encode()), ("recv", 1)], [0])


# --- user namespaces -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("error", "report"), [(None, b"0"), (errno.EPERM, b"1")])
def test_a_user_namespace_is_held(
    monkeypatch: pytest.MonkeyPatch, ends: list[int], error: int | None, report: bytes
) -> None:
    """Its processes together may have more tasks than one id."""
    limits: list[object] = []
    monkeypatch.setattr(resource, "setrlimit", lambda *given: limits.append(given))

    def unshare(flags: int) -> None:
        assert flags == linux.CLONE_NEWUSER
        if error is not None:
            raise HostError("make namespaces", error)

    monkeypatch.setattr(linux, "unshare", unshare)
    ours, theirs = Peer(), Peer()
    with pytest.raises(Ended):
        ids.hold_user_namespace(ours, theirs)  # type: ignore[arg-type]
    assert (ours.done, theirs.done, ends) == ([("close",)], [("send", report), ("recv", 1)], [0])
    assert limits == [(resource.RLIMIT_NPROC, (resource.RLIM_INFINITY,) * 2)]


class Map:
    """A file of a namespace's ids."""

    def __init__(self, written: dict[str, str], path: str) -> None:
        self.written, self.path = written, path

    def __enter__(self) -> "Map":
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""

    def write(self, text: str) -> None:
        """Write it."""
        self.written[self.path.split("/")[-1]] = text


def test_a_user_namespace_has_our_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no others, under the same numbers."""
    written: dict[str, str] = {}
    monkeypatch.setattr(linux, "unshare", lambda _flags: None)
    monkeypatch.setattr(ids, "open", lambda path, *_, **__: Map(written, path), raising=False)
    before, earlier = len(os.listdir("/proc/self/fd")), children()
    fd = ids.user_namespace(7000)
    assert os.readlink(f"/proc/self/fd/{fd}") == os.readlink("/proc/self/ns/user")
    os.close(fd)
    line = f"7000 7000 {IDS}\n"
    assert written == {"uid_map": line, "gid_map": line}
    assert len(os.listdir("/proc/self/fd")) == before
    assert children() <= earlier


def test_there_may_be_no_user_namespace(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container may forbid it, or our own may lack these ids."""

    def refuse(_flags: int) -> None:
        raise HostError("make namespaces", errno.ENOSPC)

    monkeypatch.setattr(linux, "unshare", refuse)
    earlier = children()
    with pytest.raises(HostError, match="make a user namespace") as error:
        ids.user_namespace()
    assert error.value.number == errno.ENOSPC
    assert children() <= earlier


def test_tasks_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """For both limits, so that the process cannot raise its own."""
    given: list[object] = []
    monkeypatch.setattr(resource, "setrlimit", lambda *limit: given.append(limit))
    ids.limit_tasks()
    assert given == [(resource.RLIMIT_NPROC, (ids.TASKS_MAX, ids.TASKS_MAX))]

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "no")

    monkeypatch.setattr(resource, "setrlimit", refuse)
    with pytest.raises(HostError, match="limit threads"):
        ids.limit_tasks()
