"""How taps are made and attached, with a stand-in for the kernel."""

import errno
import fcntl
import os
import struct
import subprocess

import pytest

from vmd.errors import OperatorError
from vmd.priv import tap
from vmd.privsep.confine import TUNSETIFF

FD = 7


class Kernel:
    """A kernel in which some interfaces exist.  Making one of these fails with its errno."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **there: int) -> None:
        self.there = there
        self.made: list[tuple[str, int]] = []
        monkeypatch.setattr(fcntl, "ioctl", self.ioctl)

    def ioctl(self, fd: int, request: int, raw: bytes) -> int:
        """Serve TUNSETIFF."""
        assert (fd, request, len(raw)) == (FD, TUNSETIFF, 40)
        name, flags = struct.unpack_from("=16sH", raw)
        assert not any(raw[18:])
        shown = name.rstrip(b"\0").decode()
        if shown in self.there:
            raise OSError(self.there[shown], os.strerror(self.there[shown]))
        self.made.append((shown, flags))
        return 0


def test_the_first_free_name_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of other programs' interfaces are passed over, and so are reserved ones."""
    kernel = Kernel(monkeypatch, tap0=errno.EBUSY, tap1=errno.EEXIST, tap2=errno.EINVAL)

    assert tap.make(FD, "", reserved=("tap3", "tap5")) == "tap4"
    assert tap.make(FD, "", reserved=("tap3", "tap4")) == "tap5"
    assert [name for name, _ in kernel.made] == ["tap4", "tap5"]


def test_all_names_may_be_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sentence says so."""
    kernel = Kernel(monkeypatch)

    with pytest.raises(OperatorError, match="tap0 to tap4095 are all taken") as refused:
        tap.make(FD, "", reserved={f"tap{number}" for number in range(4096)})
    assert refused.value.number == errno.ENOSPC
    assert tap.make(FD, "", reserved={f"tap{number}" for number in range(4095)}) == "tap4095"
    assert len(kernel.made) == 1


def test_a_named_tap_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never from an interface that exists: that one may be another program's."""
    kernel = Kernel(monkeypatch, tap9=errno.EBUSY)

    assert tap.make(FD, "tap8", reserved=("tap8",)) == "tap8"
    with pytest.raises(OperatorError, match="interface tap9 exists already") as refused:
        tap.make(FD, "tap9")

    assert refused.value.number == errno.EBUSY
    assert kernel.made == [("tap8", tap.IFF_TAP | tap.IFF_NO_PI | tap.IFF_VNET_HDR | tap.IFF_TUN_EXCL)]


def test_other_errors_end_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would be the same for each name."""
    kernel = Kernel(monkeypatch, tap0=errno.EPERM)

    with pytest.raises(OperatorError, match="make interface tap0: Operation not permitted") as refused:
        tap.make(FD, "")

    assert refused.value.number == errno.EPERM
    assert kernel.made == []


def test_an_existing_tap_is_attached(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the flag that makes a new one."""
    kernel = Kernel(monkeypatch)

    tap.attach(FD, "tap9")

    assert kernel.made == [("tap9", tap.IFF_TAP | tap.IFF_NO_PI | tap.IFF_VNET_HDR)]


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EBUSY, "interface tap9 exists already, and another program uses it"),
        (errno.EINVAL, "interface tap9 exists already, and is not a tap of one queue: ip tuntap add tap9 mode tap"),
        (errno.EPERM, "attach to interface tap9: Operation not permitted"),
    ],
)
def test_an_interface_that_cannot_be_attached(monkeypatch: pytest.MonkeyPatch, number: int, words: str) -> None:
    """The sentence says why, and what to do."""
    Kernel(monkeypatch, tap9=number)

    with pytest.raises(OperatorError) as refused:
        tap.attach(FD, "tap9")

    assert (refused.value.number, str(refused.value)) == (number, words)


def test_flags_are_the_kernels() -> None:
    """A compiler compares them."""
    names = ("IFF_TAP", "IFF_NO_PI", "IFF_VNET_HDR", "IFF_TUN_EXCL")
    lines = ["#include <sys/ioctl.h>", "#include <linux/if_tun.h>"]
    lines += [f'_Static_assert({name} == {getattr(tap, name)}, "{name}");' for name in names]
    lines += [f'_Static_assert(TUNSETIFF == {TUNSETIFF}, "TUNSETIFF");']

    subprocess.run(["gcc", "-fsyntax-only", "-x", "c", "-"], input="\n".join(lines) + "\n", text=True, check=True)
