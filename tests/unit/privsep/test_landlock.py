"""The rules for kernels of different ages.  Whether the kernel enforces them is tested in tests/process."""

import errno
import os
import struct
import subprocess

import pytest

from vmd.errors import HostError
from vmd.privsep import landlock, linux


@pytest.mark.parametrize("name", ["EXECUTE", "WRITE_FILE", "READ_FILE", "READ_DIR", "REMOVE_FILE", "MAKE_REG"])
def test_rights_are_the_kernels(name: str) -> None:
    """A compiler finds that each right equals the kernel's."""
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
    """The ruleset has everything that the kernel knows.  The kernel would refuse anything newer."""
    assert landlock.ruleset(version) == struct.pack(f"={len(words)}Q", *words)


def test_only_the_given_scopes_are_in_the_ruleset() -> None:
    """A VM process leaves signals to the ruleset of its start."""
    assert landlock.ruleset(6, landlock.SCOPE_SOCKETS) == struct.pack("=3Q", 0xFFFF, 3, 1)


def test_there_is_a_warning_only_if_landlock_is_missing() -> None:
    """An older version causes no warning, because nobody can change it.  One message lists its limits."""
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
def test_a_refused_landlock_counts_as_missing(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """A container that does not know the call answers ENOSYS or EPERM."""

    def refuse(tried: str, *_: object) -> int:
        raise HostError(tried, number)

    monkeypatch.setattr(linux, "syscall", refuse)

    assert landlock.abi() == 0


def test_directory_rights_on_a_file_are_left_out() -> None:
    """The kernel refuses such a rule.  The rule is made with the rights that apply to files."""
    version = landlock.abi() or pytest.skip("kernel without landlock")
    attr = landlock.ruleset(version)
    fd = linux.syscall("ruleset", linux.SYS_LANDLOCK_CREATE_RULESET, attr, len(attr), 0)
    try:
        landlock.allow(fd, "/dev/null", landlock.WRITE & landlock.file_rights(version))
        landlock.allow(fd, "/no/such/file", landlock.READ)
    finally:
        os.close(fd)


class Kernel:
    """A kernel with a version of landlock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, version: int) -> None:
        self.version = version
        self.made: list[bytes] = []
        self.rules: list[tuple[str, int]] = []
        self.entered = 0
        monkeypatch.setattr(linux, "syscall", self.syscall)

    def syscall(self, tried: str, number: int, *arguments: object) -> int:
        """Serve the calls of landlock."""
        if number == linux.SYS_LANDLOCK_CREATE_RULESET:
            attr, size, flags = arguments
            if flags == landlock.CREATE_RULESET_VERSION:
                assert (attr, size) == (None, 0)
                return self.version
            assert isinstance(attr, bytes)
            assert (size, flags) == (len(attr), 0)
            self.made.append(attr)
            return os.open("/", os.O_PATH | os.O_CLOEXEC)
        if number == linux.SYS_LANDLOCK_ADD_RULE:
            _ruleset, kind, rule, flags = arguments
            assert (kind, flags) == (1, 0)
            rights, fd = struct.unpack("=Qi", rule.raw)  # type: ignore[attr-defined]
            self.rules.append((os.readlink(f"/proc/self/fd/{fd}"), rights))
            return 0
        assert number == linux.SYS_LANDLOCK_RESTRICT_SELF, tried
        self.entered += 1
        return 0


def test_landlock_grants_what_the_version_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule for a file has no rights of directories.  A file that does not exist needs no rule."""
    kernel = Kernel(monkeypatch, 2)
    before = len(os.listdir("/proc/self/fd"))

    warnings = landlock.restrict((("/", landlock.OWN), ("/dev/null", landlock.WRITE), ("/no/such", landlock.READ)))

    assert warnings == []
    assert kernel.made == [landlock.ruleset(2)]
    assert kernel.rules == [
        ("/", landlock.OWN & ~landlock.TRUNCATE),
        ("/dev/null", landlock.READ_FILE | landlock.WRITE_FILE),
    ]
    assert kernel.entered == 1
    assert len(os.listdir("/proc/self/fd")) == before


def test_without_landlock_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is a warning."""
    kernel = Kernel(monkeypatch, 0)

    assert landlock.restrict((("/", landlock.READ),)) == landlock.missing(0)
    landlock.keep_signals_inside()

    assert (kernel.made, kernel.entered) == ([], 0)


SIGNALS_ONLY = bytes(16) + b"\2" + bytes(7)


@pytest.mark.parametrize(("version", "made"), [(5, []), (6, [SIGNALS_ONLY]), (7, [SIGNALS_ONLY])])
def test_signals_are_kept_inside(monkeypatch: pytest.MonkeyPatch, version: int, made: list[bytes]) -> None:
    """Only signals: files, networks and sockets are not restricted here."""
    kernel = Kernel(monkeypatch, version)

    landlock.keep_signals_inside()

    assert (kernel.made, kernel.entered) == (made, len(made))


def test_an_unexpected_error_of_landlock_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not count as a kernel without landlock."""

    def fail(tried: str, *_: object) -> int:
        raise HostError(tried, errno.ENOMEM)

    monkeypatch.setattr(linux, "syscall", fail)

    with pytest.raises(HostError, match="ask for landlock"):
        landlock.abi()


@pytest.mark.parametrize(
    ("what", "since"),
    [("truncating files", 3), ("TCP", 4), ("ioctl on devices", 5), ("abstract unix sockets", 6), ("signals", 6)],
)
def test_what_an_older_version_cannot_restrict(what: str, since: int) -> None:
    """It is named up to the version before the one that can."""
    named = [version for version in range(1, 8) if any(what in sentence for sentence in landlock.limits(version))]

    assert named == list(range(1, since))
