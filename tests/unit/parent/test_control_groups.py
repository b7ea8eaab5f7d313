"""Where the control group of a process is, and how it is limited."""

from pathlib import Path

import pytest

from vmd.config.model import VmLimits
from vmd.parent import groups
from vmd.parent.groups import located

WHOLE = "22 27 0:20 / /sys rw - sysfs sysfs rw\n24 22 0:22 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n"
HYBRID = (
    "33 22 0:30 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids\n"
    "34 22 0:31 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
)
PART = "34 22 0:31 /pods/7 /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
OLD = "33 22 0:30 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids\n"


@pytest.mark.parametrize(
    ("mountinfo", "cgroup", "directory"),
    [
        (WHOLE, "0::/system.slice/vmd.service\n", "/sys/fs/cgroup/system.slice/vmd.service"),
        (WHOLE, "0::/\n", "/sys/fs/cgroup"),
        (HYBRID, "8:pids:/there\n0::/here\n", "/sys/fs/cgroup/unified/here"),
        (PART, "0::/pods/7/vmd\n", "/sys/fs/cgroup/vmd"),
        (PART, "0::/pods/7\n", "/sys/fs/cgroup"),
        (PART, "0::/pods/77\n", None),
        (WHOLE, "0::/../vmd\n", None),
        (OLD, "8:pids:/there\n", None),
        (OLD, "8:pids:/there\n0::/\n", None),
        ("", "", None),
    ],
)
def test_the_directory_of_a_group(mountinfo: str, cgroup: str, directory: str | None) -> None:
    """On hosts with version 2, with both, and inside of containers; not where it is out of sight."""
    assert located(mountinfo, cgroup) == directory


class Tree:
    """What a kernel shows of control groups, as far as it is read and written here; it does nothing by itself."""

    def __init__(self, above: Path, name: str, controllers: str) -> None:
        self.above, self.top = above, above / name
        self.vm = self.top / "vm-1"
        self.vm.mkdir(parents=True)
        for group in (self.above, self.top):
            (group / "cgroup.controllers").write_text(controllers)
            (group / "cgroup.subtree_control").write_text("")

    def give(self, *files: str) -> None:
        """Have files of a controller in the group of the VM."""
        for file in files:
            (self.vm / file).write_text("")

    def limits(self) -> dict[str, str]:
        """Return what the group of the VM has been limited to."""
        return {path.name: path.read_text() for path in sorted(self.vm.iterdir())}

    def controllers(self) -> list[str]:
        """Return what was switched on, above and below the top."""
        return [(group / "cgroup.subtree_control").read_text() for group in (self.above, self.top)]


EVERYTHING = VmLimits(memory_bytes=1 << 30, cpu_percent=150, weight=7)
FILES = ("cpu.max", "cpu.weight", "memory.max", "memory.oom.group")


def test_a_group_has_the_limits_of_its_vm(tmp_path: Path) -> None:
    """And loses them."""
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
        ("low 0\nhigh 0\nmax 12\noom 3\noom_kill 0\n", ""),  # others have given way
        ("low 0\nhigh 0\nmax 12\noom 1\noom_kill 3\noom_group_kill 1\n", groups.LIMIT),
        ("low 0\nhigh 0\nmax 0\noom 0\noom_kill 1\n", groups.HOST),
        ("oom_kill 1\n", groups.HOST),
    ],
)
def test_whose_memory_was_at_its_end(tmp_path: Path, text: str | None, lack: str) -> None:
    """As the group has it when its last process is gone, just before it is removed."""
    made = groups.Groups(str(tmp_path), limited=False)
    group = tmp_path / "vm-1"
    group.mkdir()
    if text is not None:
        (group / "memory.events").write_text(text)

    assert made.end(1) == lack


@pytest.mark.parametrize(("name", "above"), [("vmd-guests-0", "+cpu"), ("vmd-guests-0.scope", "")])
def test_the_controller_for_processors_comes_with_the_first_limit(tmp_path: Path, name: str, above: str) -> None:
    """In a scope systemd has it switched on above."""
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
    """By the controller that it does not have, and nothing is written."""
    tree = Tree(tmp_path, "vmd-guests-0", "hugetlb\n")

    assert groups.limit(str(tree.vm), limits) == missing
    assert tree.limits() == {}
