"""What is asked of kernels of different age; whether they keep it is for tests/process."""

import errno
import os
import struct
import subprocess

import pytest

from vmd.errors import HostError
from vmd.privsep import landlock, linux


@pytest.mark.parametrize("name", ["EXECUTE", "WRITE_FILE", "READ_FILE", "READ_DIR", "REMOVE_FILE", "MAKE_REG"])
def test_rights_are_the_kernels(name: str) -> None:
    """A compiler finds each right equal to ours."""
    value = getattr(landlock, name)
    source = f'#include <linux/landlock.h>\n_Static_assert(LANDLOCK_ACCESS_FS_{name} == {value}, "{name}");\n'

    subprocess.run(["gcc", "-fsyntax-only", "-x", "c", "-"], input=source, text=True, check=True)


@pytest.mark.parametrize(
    ("version", "words"),
    [
        (1, (0x1FFF,)),
        (2, (0x3FFF,)),
        (3, (0x7FFF,)),
        (4, (0x7FFF, 3)),
        (5, (0xFFFF, 3)),
        (6, (0xFFFF, 3, 3)),
        (9, (0xFFFF, 3, 3)),
    ],
)
def test_ruleset_grows_with_the_kernel(version: int, words: tuple[int, ...]) -> None:
    """A kernel is asked for all it knows, and for nothing newer, which it would refuse."""
    assert landlock.ruleset(version) == struct.pack(f"={len(words)}Q", *words)


def test_scopes_are_those_that_are_wanted() -> None:
    """A VM process leaves signals to the ruleset of its start."""
    assert landlock.ruleset(6, landlock.SCOPE_SOCKETS) == struct.pack("=3Q", 0xFFFF, 3, 1)


def test_only_what_can_be_changed_is_warned_of() -> None:
    """Landlock that is missing is; an older one is not, and has one sentence for all that it lacks."""
    (warning,) = landlock.missing(0)
    assert "lsm=landlock" in warning
    assert [landlock.missing(version) for version in (1, 4, 6)] == [[], [], []]

    assert landlock.limits(2) == [
        "landlock 2 of this kernel cannot restrict truncating files, TCP, ioctl on devices,"
        " abstract unix sockets and signals"
    ]
    assert landlock.limits(4) == [
        "landlock 4 of this kernel cannot restrict ioctl on devices, abstract unix sockets and signals"
    ]
    assert landlock.limits(6) == landlock.limits(0) == []


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EPERM, errno.EOPNOTSUPP])
def test_refused_landlock_is_none(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """A container that does not know the call answers either of the first two."""

    def refuse(tried: str, *_: object) -> int:
        raise HostError(tried, number)

    monkeypatch.setattr(linux, "syscall", refuse)

    assert landlock.abi() == 0


def test_directory_rights_on_a_file_are_left_out() -> None:
    """The kernel refuses to let a file be listed; the rule is made with what fits."""
    version = landlock.abi() or pytest.skip("kernel without landlock")
    attr = landlock.ruleset(version)
    fd = linux.syscall("ruleset", linux.SYS_LANDLOCK_CREATE_RULESET, attr, len(attr), 0)
    try:
        landlock.allow(fd, "/dev/null", landlock.WRITE & landlock.file_rights(version))
        landlock.allow(fd, "/no/such/file", landlock.READ)
    finally:
        os.close(fd)
