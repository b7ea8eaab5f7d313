"""Where the control group of a process is, and how it is limited."""

import os
from pathlib import Path

import pytest

from vmd.config.model import VmLimits
from vmd.errors import HostError, VmdError
from vmd.parent import groups
from vmd.parent.groups import located
from vmd.privsep.ids import TASKS_MAX

V2_ONLY = "22 27 0:20 / /sys rw - sysfs sysfs rw\n24 22 0:22 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n"
HYBRID = (
    "33 22 0:30 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids\n"
    "34 22 0:31 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
)
IN_CONTAINER = "34 22 0:31 /pods/7 /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
V1_ONLY = "33 22 0:30 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids\n"


@pytest.mark.parametrize(
    ("mountinfo", "cgroup", "directory"),
    [
        (V2_ONLY, "0::/system.slice/vmd.service\n", "/sys/fs/cgroup/system.slice/vmd.service"),
        (V2_ONLY, "0::/\n", "/sys/fs/cgroup"),
        (HYBRID, "8:pids:/there\n0::/here\n", "/sys/fs/cgroup/unified/here"),
        (IN_CONTAINER, "0::/pods/7/vmd\n", "/sys/fs/cgroup/vmd"),
        (IN_CONTAINER, "0::/pods/7\n", "/sys/fs/cgroup"),
        (IN_CONTAINER, "0::/pods/77\n", None),
        (V2_ONLY, "0::/../vmd\n", None),
        (V1_ONLY, "8:pids:/there\n", None),
        (V1_ONLY, "8:pids:/there\n0::/\n", None),
        ("", "", None),
    ],
)
def test_the_directory_of_a_group(mountinfo: str, cgroup: str, directory: str | None) -> None:
    """It is found on hosts with version 2, with both versions, and in containers.

    It is None where it is not visible.
    """
    assert located(mountinfo, cgroup) == directory


class Tree:
    """The files of control groups that the code reads and writes.  Nothing happens by itself."""

    def __init__(self, above: Path, name: str, controllers: str) -> None:
        self.above, self.top = above, above / name
        self.vm = self.top / "vm-1"
        self.vm.mkdir(parents=True)
        for group in (self.above, self.top):
            (group / "cgroup.controllers").write_text(controllers)
            (group / "cgroup.subtree_control").write_text("")

    def give(self, *files: str) -> None:
        """Create files of a controller in the group of the VM."""
        for file in files:
            (self.vm / file).write_text("")

    def limits(self) -> dict[str, str]:
        """Return the limits of the group of the VM."""
        return {path.name: path.read_text() for path in sorted(self.vm.iterdir())}

    def controllers(self) -> list[str]:
        """Return which controllers were switched on, above the top and in it."""
        return [(group / "cgroup.subtree_control").read_text() for group in (self.above, self.top)]


EVERYTHING = VmLimits(memory_bytes=1 << 30, cpu_percent=150, weight=7)
FILES = ("cpu.max", "cpu.weight", "memory.max", "memory.oom.group")


def test_a_group_has_the_limits_of_its_vm(tmp_path: Path) -> None:
    """Limits are set, and removed again."""
    tree = Tree(tmp_path, "vmd-guests-0", "cpu memory pids\n")
    tree.give(*FILES)

    assert groups.limit(str(tree.vm), EVERYTHING) == {}
    assert tree.limits() == {
        "cpu.max": "150000 100000", "cpu.weight": "7", "memory.max": "1073741824", "memory.oom.group": "1",
    }  # fmt: skip
    assert groups.limit(str(tree.vm), VmLimits()) == {}
    assert tree.limits() == {
        "cpu.max": "max 100000", "cpu.weight": "100", "memory.max": "max", "memory.oom.group": "0",
    }  # fmt: skip
    assert tree.controllers() == ["", ""]


@pytest.mark.parametrize(
    ("text", "lack"),
    [
        (None, ""),
        ("", ""),
        ("no pair\n", ""),
        ("low 0\nhigh 0\nmax 12\noom 3\noom_kill 0\n", ""),  # other groups had to free memory
        ("low 0\nhigh 0\nmax 12\noom 1\noom_kill 3\noom_group_kill 1\n", groups.LIMIT),
        ("low 0\nhigh 0\nmax 0\noom 0\noom_kill 1\n", groups.HOST),
        ("oom_kill 1\n", groups.HOST),
    ],
)
def test_which_memory_limit_killed_a_vm(tmp_path: Path, text: str | None, lack: str) -> None:
    """The counters are read when the last process of the group has ended, just before the group is removed."""
    made = groups.Groups(str(tmp_path), limited=False)
    group = tmp_path / "vm-1"
    group.mkdir()
    if text is not None:
        (group / "memory.events").write_text(text)

    assert made.end(1) == lack


@pytest.mark.parametrize(("name", "above"), [("vmd-guests-0", "+cpu"), ("vmd-guests-0.scope", "")])
def test_the_cpu_controller_is_switched_on_with_the_first_cpu_limit(tmp_path: Path, name: str, above: str) -> None:
    """In a scope systemd has switched it on above."""
    tree = Tree(tmp_path, name, "cpu memory pids\n")
    tree.give("memory.max", "memory.oom.group")

    groups.limit(str(tree.vm), VmLimits(memory_bytes=1 << 30))
    assert tree.controllers() == ["", ""]
    groups.limit(str(tree.vm), VmLimits(weight=3))
    assert tree.controllers() == [above, "+cpu"]


@pytest.mark.parametrize(
    ("limits", "missing"),
    [
        (EVERYTHING, {"cpu": ["cpu", "weight"], "memory": ["memory"]}),
        (VmLimits(weight=3), {"cpu": ["weight"]}),
        (VmLimits(), {}),
    ],
)
def test_what_a_host_cannot_limit_is_named(tmp_path: Path, limits: VmLimits, missing: dict[str, list[str]]) -> None:
    """The answer names the missing controller, and nothing is written."""
    tree = Tree(tmp_path, "vmd-guests-0", "hugetlb\n")

    assert groups.limit(str(tree.vm), limits) == missing
    assert tree.limits() == {}


# --- the groups of a daemon's VMs -------------------------------------------------------------------------------


def test_a_group_is_made_limited_and_removed(tmp_path: Path) -> None:
    """Its number is new, and its tasks are limited where the host can do that.  One that fails is removed."""
    for number in (2, 7):
        (tmp_path / f"vm-{number}").mkdir()
    (tmp_path / "vm-x").mkdir()
    (tmp_path / "vmm").mkdir()
    for limited in (False, True):
        made = groups.Groups(str(tmp_path), limited=limited)
        with pytest.raises(HostError, match=f"make {tmp_path}/vm-8: No such file or directory"):
            made.make()  # this directory is no control group: it has no cgroup.procs
        limit = tmp_path / "vm-8/pids.max"
        assert limit.exists() == limited
        if limited:
            assert limit.read_text() == str(TASKS_MAX)
            limit.unlink()
        assert not made.remove()
        assert not (tmp_path / "vm-8").exists()


def test_a_descriptor_moves_a_process_to_its_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that writes to it cannot read it, and does not pass it on."""
    mkdir = os.mkdir

    def make(path: str, mode: int) -> None:
        mkdir(path, mode)
        Path(path, "cgroup.procs").touch()

    monkeypatch.setattr(os, "mkdir", make)
    made = groups.Groups(str(tmp_path), limited=False)
    numbers = []
    for _ in range(2):
        number, fd = made.make()
        numbers.append(number)
        os.write(fd, b"0")
        assert not os.get_inheritable(fd)
        os.close(fd)
        assert (tmp_path / f"vm-{number}/cgroup.procs").read_text() == "0"
    assert numbers == [1, 2]


def test_groups_whose_processes_end_late_are_removed_later(tmp_path: Path) -> None:
    """All processes are killed at once.  A directory that has vanished is no trouble."""
    made = groups.Groups(str(tmp_path), limited=False)
    for number in (1, 2, 3):
        (tmp_path / f"vm-{number}").mkdir()
    (tmp_path / "vm-1/busy").mkdir()  # as a group with processes, it cannot be removed
    for number in (1, 2, 9):
        made.end(number)
    for number in (1, 2):
        assert (tmp_path / f"vm-{number}/cgroup.kill").read_text() == "1"
        (tmp_path / f"vm-{number}/cgroup.kill").unlink()
    assert made.remove()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["vm-1", "vm-3"]
    (tmp_path / "vm-1/busy").rmdir()
    assert not made.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["vm-3"]


def test_groups_of_an_earlier_daemon_end_if_no_vm_uses_them(tmp_path: Path) -> None:
    """Those of VMs that run stay."""
    for number in (1, 2, 3):
        (tmp_path / f"vm-{number}").mkdir()
    groups.Groups(str(tmp_path), limited=False).keep_only([2])

    assert [(tmp_path / f"vm-{number}/cgroup.kill").exists() for number in (1, 2, 3)] == [True, False, True]


# --- a host without systemd --------------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the group that the daemon was started in."""
    own = tmp_path / "own"
    own.mkdir()
    (own / "cgroup.controllers").write_text("cpu memory pids\n")
    monkeypatch.setattr(groups, "directory_of", lambda _pid: str(own))
    make = os.mkdir

    def make_group(path: str, mode: int = 0o777) -> None:
        make(path, mode)
        if os.path.basename(path).startswith(groups.PREFIX):
            Path(path, "cgroup.controllers").write_text("cpu memory pids\n")

    monkeypatch.setattr(os, "mkdir", make_group)
    return own


def test_a_host_without_systemd(own: Path) -> None:
    """The daemon moves to a group of its own, because one with groups of VMs below it may have no processes."""
    place = groups.Below()
    assert (own / "core/cgroup.procs").read_text() == str(os.getpid())
    (own / "vmd-guests-0").mkdir()
    made = place.groups(4711)
    assert (made.top, made.limited) == (f"{own}/vmd-guests-1", True)
    assert (own / "vmd-guests-1/vmm/cgroup.procs").read_text() == "4711"
    assert (own / "vmd-guests-1/cgroup.subtree_control").read_text() == "+pids"


def test_a_daemon_that_was_executed_in_place(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is in the group `core` already, and makes no other one below that."""
    (own / "core").mkdir()
    monkeypatch.setattr(groups, "directory_of", lambda _pid: str(own / "core"))
    (own / "core/cgroup.controllers").write_text("pids\n")
    (own / "vmd-guests-0").mkdir()
    assert groups.Below().own == str(own)
    assert not (own / "core/core").exists()
    (own / "vmd-guests-0/cgroup.controllers").unlink()
    (own / "vmd-guests-0").rmdir()
    assert groups.Below().own == str(own / "core")  # a group that is called core by chance


def test_a_host_where_the_daemon_may_not_give_controllers(own: Path) -> None:
    """It goes back to the group that it was started in."""
    (own / "cgroup.subtree_control").mkdir()
    removed: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "rmdir", removed.append)
        with pytest.raises(HostError, match=r"write \+pids to"):
            groups.Below()
    assert removed == [f"{own}/core"]
    assert (own / "cgroup.procs").read_text() == str(os.getpid())


def test_groups_that_killed_daemons_have_left(own: Path) -> None:
    """Those without processes are removed, with all groups in them.  Others are left alone."""
    for name, populated in (("vmd-guests-0", 0), ("vmd-guests-1", 1), ("other", 0)):
        (own / name / "vm-1").mkdir(parents=True)
        (own / name / "cgroup.events").write_text(f"populated {populated}\nfrozen 0\n")
    removed: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "rmdir", removed.append)
        place = groups.Below()
        place.adopt(f"{own}/vmd-guests-0")
        place.adopt(f"{own}/vmd-guests-1")
        place.close()
        assert removed == [f"{own}/vmd-guests-0/vm-1", f"{own}/vmd-guests-0"]
        removed.clear()
        place.groups(1)
    assert removed == [f"{own}/vmd-guests-0/vm-1", f"{own}/vmd-guests-0"]


# --- a host with systemd ----------------------------------------------------------------------------------------


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: Path) -> Path:
    """Return a file with the words of each call of systemd-run.  It answers as a scope, except for taken units."""
    script = tmp_path / "systemd-run"
    calls = tmp_path / "calls"
    script.write_text(
        f'#!/bin/sh\necho "$@" >> {calls}\ncase "$*" in\n'
        '*guests-0.scope*) echo "Unit vmd-guests-0.scope was already loaded." >&2; exit 1;;\n'
        "*) exec cat;;\nesac\n"
    )
    script.chmod(0o755)
    monkeypatch.setattr(groups, "ENVIRONMENT", {"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    return calls


@pytest.mark.parametrize("unit", ["vmd.service", "session-1.scope"])
def test_a_scope_of_systemd(systemd: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, unit: str) -> None:
    """A unit that exists belongs to another daemon.  The scope outlives the daemon's unit, and has its slice."""
    top = tmp_path / "vmd-guests-1.scope"
    top.mkdir()
    (top / "cgroup.controllers").write_text("memory pids\n")
    monkeypatch.setattr(groups, "directory_of", lambda pid: f"/x/vm.slice/{unit}" if pid == os.getpid() else str(top))
    made = groups.Scope().groups(4711)

    assert (made.top, made.limited) == (str(top), True)
    first, second = systemd.read_text().splitlines()
    assert ("--unit=vmd-guests-0.scope" in first, "--unit=vmd-guests-1.scope" in second) == (True, True)
    assert "--property=Delegate=yes" in second
    assert ("--property=Slice=vm.slice" in second) == (unit == "vmd.service")
    assert ("--property=Before=vmd.service" in second) == (unit == "vmd.service")
    moved = (top / "vmm/cgroup.procs").read_text()
    assert moved.isdigit()  # the last that was moved, the process that held the scope
    assert moved != "4711"


def test_a_scope_that_systemd_refuses(systemd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error has systemd's words.  A host without systemd-run has an error, too."""
    script = tmp_path / "systemd-run"
    script.write_text('#!/bin/sh\necho "Failed to connect to bus" >&2; exit 1\n')
    with pytest.raises(VmdError, match=r"make vmd-guests-0.scope by systemd-run: Failed to connect to bus"):
        groups.Scope().groups(4711)
    script.unlink()
    monkeypatch.setattr(groups, "ENVIRONMENT", {"PATH": str(tmp_path)})
    with pytest.raises(HostError, match="No such file or directory"):
        groups.Scope().groups(4711)
    assert not systemd.exists()


def test_a_systemd_that_does_not_answer(systemd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The daemon starts without a scope, and its question is ended."""
    script = tmp_path / "systemd-run"
    script.write_text("#!/bin/sh\nexec sleep 1000\n")
    monkeypatch.setattr(groups, "SCOPE_S", 0.0)
    with pytest.raises(HostError, match=r"make vmd-guests-0\.scope by systemd-run: Connection timed out"):
        groups.Scope().groups(4711)
    assert not systemd.exists()


def test_units_of_other_daemons_have_taken_all_names(systemd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is a limit to what is tried."""
    monkeypatch.setattr(groups, "SCOPES_MAX", 1)
    with pytest.raises(VmdError, match=r"make a control group: there are 1 units vmd-guests-N\.scope"):
        groups.Scope().groups(4711)
    assert len(systemd.read_text().splitlines()) == 1


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Return what is written to the files of groups, in order."""
    found: list[tuple[str, str]] = []
    write = groups.write

    def note(path: str, text: str) -> None:
        found.append((path, text))
        write(path, text)

    monkeypatch.setattr(groups, "write", note)
    return found


def test_what_is_written_on_a_host_without_systemd(own: Path, writes: list[tuple[str, str]]) -> None:
    """The daemon moves before it gives controllers, which a group with processes may not give."""
    below = groups.Below()
    top = f"{own}/vmd-guests-0"
    assert writes == [
        (f"{own}/core/cgroup.procs", str(os.getpid())),
        (f"{own}/cgroup.subtree_control", "+pids"),
        (f"{own}/cgroup.subtree_control", "+memory"),
    ]
    writes.clear()
    below.groups(4711)
    assert writes == [
        (f"{top}/vmm/cgroup.procs", "4711"),
        (f"{top}/cgroup.subtree_control", "+memory"),
        (f"{top}/cgroup.subtree_control", "+pids"),
    ]


@pytest.mark.usefixtures("systemd")
def test_what_is_written_in_a_scope(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: list[tuple[str, str]]
) -> None:
    """All processes move before it gives controllers."""
    top = tmp_path / "vmd-guests-1.scope"
    top.mkdir()
    (top / "cgroup.controllers").write_text("memory pids\n")
    monkeypatch.setattr(groups, "directory_of", lambda pid: "/x/y.slice/z" if pid == os.getpid() else str(top))
    groups.Scope().groups(4711)

    holder = writes[1][1]
    assert writes == [
        (f"{top}/vmm/cgroup.procs", "4711"),
        (f"{top}/vmm/cgroup.procs", holder),
        (f"{top}/cgroup.subtree_control", "+memory"),
        (f"{top}/cgroup.subtree_control", "+pids"),
    ]
    with pytest.raises(ProcessLookupError):
        os.kill(int(holder), 0)


# --- the host ---------------------------------------------------------------------------------------------------


def test_a_host_without_groups_of_version_2(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a process that has ended.  The error says what was looked for."""
    monkeypatch.setattr(groups, "located", lambda _mounts, _cgroup: None)
    with pytest.raises(HostError, match="find the control groups of version 2: No such device"):
        groups.directory_of(os.getpid())
    monkeypatch.setattr(groups, "located", lambda _mounts, cgroup: cgroup)
    with pytest.raises(HostError, match="find the control groups of version 2: No such file"):
        groups.directory_of(1 << 30)


@pytest.mark.parametrize(("there", "place"), [(True, groups.Scope), (False, groups.Below)])
def test_where_groups_are_made(own: Path, monkeypatch: pytest.MonkeyPatch, there: bool, place: type[object]) -> None:
    """Systemd makes them if it runs the host."""
    monkeypatch.setattr(groups, "SYSTEMD", str(own if there else own / "no"))
    assert type(groups.place()) is place


def test_groups_can_be_read_by_everybody(own: Path) -> None:
    """Their figures are no secret."""
    mask = os.umask(0)
    try:
        made = groups.Below().groups(4711)
        with pytest.raises(HostError, match="No such file or directory"):
            made.make()
    finally:
        os.umask(mask)
    modes = {each: (own / each).stat().st_mode & 0o777 for each in ("core", "vmd-guests-0", "vmd-guests-0/vm-1")}
    assert set(modes.values()) == {0o755}
