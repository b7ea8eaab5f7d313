"""The interfaces of a VM: which addresses they cover, and whether a guest that boots again keeps them."""

import errno
import fcntl
import os
import time

import pytest

from vmd.config.model import NicConfig, Prefix
from vmd.ipc.messages.priv import AdoptNics
from vmd.ipc.messages.vm import NicLink
from vmd.parent import plans
from vmd.parent.addresses import Plan
from vmd.parent.plans import Taps, has_interface, range_of

PLAN = Plan(number=3, prefix4=Prefix(address=bytes((100, 64, 0, 0)), length=10))
NICS = (NicConfig(local=True), NicConfig(switch="lan"))
TUNGETIFF = 2 << 30 | 4 << 16 | ord("T") << 8 | 210  # _IOR('T', 210, unsigned int), <linux/if_tun.h>


def link(host4: bytes = b"", length4: int = 31, prefix6: bytes = b"") -> NicLink:
    """Return an interface."""
    return NicLink(
        name="tap0", lladdr=b"", host_mac=b"", locked=False, local=True, mtu=1500, host4=host4, length4=length4,
        prefix6=prefix6,
    )  # fmt: skip


def taps(*links: NicLink, lacking: dict[int, str] | None = None, fds: list[int] | None = None) -> Taps:
    """Return the interfaces of a VM."""
    return Taps(NICS, PLAN, lacking or {}, links, fds or [], AdoptNics(vmid=1, nics=(), made=()))


@pytest.mark.parametrize(
    ("address", "length", "first", "last"),
    [
        ((10, 0, 0, 2), 31, 0x0A000002, 0x0A000003),
        ((10, 0, 0, 3), 31, 0x0A000002, 0x0A000003),
        ((10, 0, 0, 77), 24, 0x0A000000, 0x0A0000FF),
        ((10, 1, 2, 3), 8, 0x0A000000, 0x0AFFFFFF),
        ((10, 0, 0, 77), 32, 0x0A00004D, 0x0A00004D),
        ((0xFD, *[0] * 14, 9), 126, (0xFD << 120) + 8, (0xFD << 120) + 11),
    ],
)
def test_the_addresses_of_a_network(address: tuple[int, ...], length: int, first: int, last: int) -> None:
    """From the first to the last one."""
    assert range_of(bytes(address), length) == (first, last)


def test_the_networks_of_a_vm_are_between_its_first_and_last_address() -> None:
    """An interface without an address has none."""
    low, high, six = link(bytes((10, 0, 0, 2))), link(bytes((10, 0, 9, 1)), 24), link(prefix6=bytes(16))
    found = taps(high, low, link(), six)
    assert found.ranges4 == [(0x0A000900, 0x0A0009FF, high), (0x0A000002, 0x0A000003, low)]
    assert (found.first4, found.last4) == (0x0A000002, 0x0A0009FF)
    assert found.networks6 == {bytes(16): six}
    assert found.since_s <= int(time.time())
    nothing = taps(link())
    assert nothing.ranges4 == []
    assert nothing.first4 > nothing.last4


@pytest.mark.parametrize(
    ("nics", "plan", "lacking", "gone", "serves"),
    [
        (NICS, PLAN, {0: "a", 1: "b"}, (), True),
        (NICS, PLAN, {0: "another reason"}, (), True),
        (NICS, PLAN, {}, (), False),  # a switch that was missing is there
        (NICS, PLAN, {1: "b"}, (), False),
        (NICS[:1], PLAN, {0: "a"}, (), False),
        (NICS, PLAN.replace(number=4), {0: "a"}, (), False),
        (NICS, PLAN, {0: "a"}, (12,), False),  # another program has deleted a tap
    ],
)
def test_interfaces_that_a_guest_keeps_when_it_boots_again(
    monkeypatch: pytest.MonkeyPatch,
    nics: tuple[NicConfig, ...],
    plan: Plan,
    lacking: dict[int, str],
    gone: tuple[int, ...],
    serves: bool,
) -> None:
    """If they are what it should have, and no better ones can be made."""
    monkeypatch.setattr(plans, "has_interface", lambda fd: fd not in gone)
    assert taps(lacking={0: "a"}, fds=[11, 12]).serve(nics, plan, lacking) is serves


@pytest.mark.parametrize(
    ("error", "there"), [(None, True), (errno.EBADFD, False), (errno.EPERM, True), (errno.ENOTTY, True)]
)
def test_a_tap_that_another_program_has_deleted(
    monkeypatch: pytest.MonkeyPatch, error: int | None, there: bool
) -> None:
    """The kernel says so.  Any other error does not mean that."""
    asked: list[tuple[int, int, int]] = []

    def ioctl(fd: int, request: int, data: bytes) -> bytes:
        asked.append((fd, request, len(data)))
        if error is not None:
            raise OSError(error, os.strerror(error))
        return data

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    assert has_interface(7) is there
    assert asked == [(7, TUNGETIFF, 40)]  # struct ifreq


def test_the_descriptors_of_taps_are_closed_once() -> None:
    """They may be others' afterwards."""
    fds = [os.open(os.devnull, os.O_RDONLY) for _ in range(2)]
    made = taps(fds=[*fds])
    for _ in range(2):
        made.close()
    assert made.fds == []
    assert not any(os.path.exists(f"/proc/self/fd/{fd}") for fd in fds)
