"""Records of the configuration: their defaults, and the parts of a running VM that a changed vm.conf replaces."""

import pytest

from vmd.config.model import (
    DiskConfig,
    Forward,
    Globals,
    NicConfig,
    Owner,
    VmConfig,
    VmLimits,
    with_forwards,
    with_limits,
)

ONE, OTHER = (Forward(port=1, to=1),), (Forward(port=2, to=2),)


def test_the_socket_is_root_s() -> None:
    """Without a statement nobody else may use it."""
    assert Globals().socket_owner == Owner(uid=0, gid=0)


@pytest.mark.parametrize(
    ("local", "wanted_local", "taken"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_new_forwards(local: bool, wanted_local: bool, taken: bool) -> None:
    """An interface takes them if it is local and stays so.  Further interfaces need another start."""
    first = NicConfig(local=True, forwards=ONE)
    running = VmConfig(name="a", nics=(first, NicConfig(local=local, forwards=ONE)))
    wanted = VmConfig(name="a", nics=(first, NicConfig(local=wanted_local, forwards=OTHER), first))

    assert [nic.forwards for nic in with_forwards(running, wanted).nics] == [ONE, OTHER if taken else ONE]


def test_new_limits() -> None:
    """A disk takes them if it is the same file, and each interface and the VM take theirs."""
    running = VmConfig(name="a", disks=(DiskConfig(path="/a"), DiskConfig(path="/b")), nics=(NicConfig(tap="tap1"),))
    wanted = VmConfig(
        name="a",
        memory_bytes=1 << 30,
        disks=tuple(DiskConfig(path=path, iops_limit=5, rate_limit=6) for path in ("/a", "/c")),
        nics=(NicConfig(rate_limit=7),),
        limit=VmLimits(weight=8),
    )

    assert with_limits(running, wanted) == running.replace(
        disks=(DiskConfig(path="/a", iops_limit=5, rate_limit=6), DiskConfig(path="/b")),
        nics=(NicConfig(tap="tap1", rate_limit=7),),
        limit=VmLimits(weight=8),
    )
