"""Where the control group of a process is."""

import pytest

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
