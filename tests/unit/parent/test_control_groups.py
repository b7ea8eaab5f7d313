"""Where the control group of a process is, and how it is limited."""

from pathlib import Path

import pytest

from vmd.config.model import VmLimits
from vmd.parent import groups
from vmd.parent.groups import located

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
