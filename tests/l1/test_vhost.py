"""Interfaces whose frames the kernel moves.  The kernel of the emulated machine has vhost-net."""

import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.process.test_vionet_vhost import direct, packet_socket
from tests.support.fakedriver import DEADLINE_S, EVENT_IDX, INDIRECT_DESC, MODERN, Desc
from tests.support.hostnet import load_modules
from tests.support.netdriver import (
    ALL,
    GUEST_TSO,
    MRG,
    OFFLOADS,
    RX_BASE,
    TX,
    NetDriver,
    Nic,
    net_start,
)
from tests.support.network import Network, TapInterface
from tests.support.packets import LLADDR, any_frame
from tests.support.waiting import pause
from vmd.ipc import devmsg
from vmd.units import PAGE

pytestmark = [pytest.mark.l1, pytest.mark.root, pytest.mark.timeout(900)]

VHOST = "/dev/vhost-net"
KERNELS = (MODERN | MRG | GUEST_TSO, MODERN | MRG | OFFLOADS | EVENT_IDX, MRG | OFFLOADS | INDIRECT_DESC, ALL)
ROUNDS, FLIGHT = 40, 16
PROCESSES = (MODERN, MODERN | MRG, MODERN | OFFLOADS, 0)


@pytest.fixture
def nic() -> Iterator[Nic]:
    """Yield an interface whose rings the kernel serves."""
    load_modules()
    net = net_start(flags=devmsg.NET_VHOST)
    with Network() as network, TapInterface(network) as tap, packet_socket(tap) as ear, open(VHOST, "rb+", 0) as vhost:
        made = Nic(tap, NetDriver(tap, net, more=(vhost.fileno(), ear.fileno())))
        vhost.close()
        direct(made, on=True)
        assert in_kernel(made)
        yield made
        print(made.device.read_log())
        made.close()


def in_kernel(nic: Nic) -> bool:
    """Return whether the kernel serves the rings."""
    return bool(nic.device.figures()["vhost"])


def wait_in_kernel(nic: Nic, *, wanted: bool) -> None:
    """Wait until the kernel serves, or no longer serves, the rings.  The process first handles the tap's change."""
    deadline_s = time.monotonic() + DEADLINE_S
    while in_kernel(nic) != wanted:
        assert time.monotonic() < deadline_s
        pause()


def threads_of_kernel(pid: int) -> list[str]:
    """Return the names of the kernel threads that work for a process.  They contain its pid."""
    names = [path.read_text().strip() for path in Path("/proc").glob("[0-9]*/comm")]
    return [name for name in names if name == f"vhost-{pid}"]


@pytest.mark.parametrize("features", [*KERNELS, *PROCESSES], ids=hex)
def test_frames_of_any_length_go_both_ways(nic: Nic, features: int) -> None:
    """The kernel moves them if it supports all negotiated features, else the process does."""
    nic.driver.renew(features)
    assert in_kernel(nic) == (features in KERNELS)
    nic.driver.post(8)

    for seed, length in enumerate((60, 61, 1513, 1514, 60, 200)):
        nic.sends(any_frame(length, seed))
        nic.gets(any_frame(length, seed, destination=LLADDR))
    assert in_kernel(nic) == (features in KERNELS)


def of_limit(nic: Nic, on: bool) -> None:
    """Set or remove a rate limit, which is so high that no frame waits."""
    nic.device.informs.send(devmsg.LIMIT_BODY.pack(devmsg.LIMIT, 0, 1 << 40 if on else 0))
    nic.driver.settle()


def of_marks(nic: Nic, on: bool) -> None:
    """Start or stop the marking of changed memory."""
    nic.device.command(devmsg.MARK if on else devmsg.UNMARK)


def of_pause(nic: Nic, on: bool) -> None:
    """Pause or resume the interface."""
    nic.device.command(devmsg.PAUSE if on else devmsg.RESUME)


CAUSES: tuple[Callable[[Nic, bool], None], ...] = (
    lambda nic, on: direct(nic, on=not on),
    of_limit,
    of_marks,
    of_pause,
)
PAUSE = CAUSES.index(of_pause)


@pytest.mark.parametrize("features", [ALL, ALL & ~EVENT_IDX], ids=hex)
def test_no_frame_is_lost_or_twice_there_while_rings_change_hands(nic: Nic, features: int) -> None:
    """Frames arrive in order in both directions, while the rings wrap several times."""
    random_ = random.Random(features)
    driver = nic.driver
    driver.renew(features)
    driver.post(64)
    on = [False] * len(CAUSES)
    changes = 0
    for first in range(0, ROUNDS * FLIGHT, FLIGHT):
        for number in range(first, first + FLIGHT):
            driver.submit(any_frame(60 + number, number))
            nic.device.kick(TX)
            nic.host.send(any_frame(60 + number, number, destination=LLADDR))
            if random_.random() < 0.3:
                which = on.index(True) if any(on) and random_.random() < 0.8 else random_.randrange(len(CAUSES))
                before = in_kernel(nic)
                on[which] = not on[which]
                CAUSES[which](nic, on[which])
                changes += before != in_kernel(nic)
        if on[PAUSE]:
            on[PAUSE] = False
            of_pause(nic, on=False)
        for number in range(first, first + FLIGHT):
            assert driver.receive().frame == any_frame(60 + number, number, destination=LLADDR)
            assert nic.host.receive() == any_frame(60 + number, number)
        nic.device.collect(driver.tx, FLIGHT, TX)
    assert changes > ROUNDS
    assert nic.host.try_receive() is None
    assert driver.try_receive() is None


def test_a_pause_leaves_the_rings_alone(nic: Nic) -> None:
    """Frames wait, and EXPORT gives the indices of the rings."""
    nic.driver.post(8)
    for number in range(3):
        nic.sends(any_frame(60, number))
        nic.gets(any_frame(60, number, destination=LLADDR))
    nic.device.command(devmsg.PAUSE)
    nic.driver.submit(any_frame(60, 9))
    nic.device.kick(TX)
    nic.host.send(any_frame(60, 9, destination=LLADDR))
    assert nic.device.export() == [(3, 3), (3, 3)]
    assert nic.driver.tx.device_idx == 3
    assert nic.no_frame()

    nic.device.command(devmsg.RESUME)
    assert nic.host.receive() == any_frame(60, 9)
    assert nic.driver.receive().frame == any_frame(60, 9, destination=LLADDR)
    assert in_kernel(nic)


def test_received_frames_are_marked_while_marks_are_kept(nic: Nic) -> None:
    """The kernel marks no memory, so the process serves the rings meanwhile."""
    nic.driver.post(4)
    nic.gets(any_frame(60, 1, destination=LLADDR))
    nic.device.command(devmsg.MARK)
    nic.memory.marks[:] = bytes(len(nic.memory.marks))
    nic.gets(any_frame(60, 2, destination=LLADDR))
    assert any(nic.memory.marks[RX_BASE // PAGE : RX_BASE // PAGE + 2])
    nic.device.command(devmsg.UNMARK)
    assert in_kernel(nic)
    nic.gets(any_frame(60, 3, destination=LLADDR))


def test_a_ring_that_the_kernel_does_not_take(nic: Nic) -> None:
    """The process reports the error.  For the next driver the kernel serves the rings again."""
    nic.driver.tx.describe(0, [Desc(1 << 40, 60)])
    nic.driver.tx.offer(0)
    nic.device.kick(TX)
    assert "0x10000000000" in nic.device.needs_reset()
    assert not in_kernel(nic)

    assert nic.works()
    assert in_kernel(nic)


def test_a_tap_that_goes_down_and_comes_up(nic: Nic) -> None:
    """The guest loses its link and gets it back, and then the kernel serves the rings again."""
    nic.driver.post(4)
    for _ in range(2):
        nic.sends(any_frame(60, 1))
        nic.tap.set("down")
        assert nic.driver.link() is False
        wait_in_kernel(nic, wanted=False)
        nic.driver.send(any_frame(60, 2))
        nic.tap.set("up")
        assert nic.driver.link() is True
        wait_in_kernel(nic, wanted=True)
        nic.forget()  # and that the network was down
        nic.gets(any_frame(60, 3, destination=LLADDR))


def test_a_tap_that_is_removed(nic: Nic) -> None:
    """The interface loses its link.  The process continues, because a driver may still send."""
    nic.tap.remove()

    assert nic.driver.link() is False
    wait_in_kernel(nic, wanted=False)
    nic.driver.send(any_frame(60, 1))
    assert nic.driver.counter("tx_link_down", 1) == 1


def test_the_kernel_lets_go_of_the_tap_when_the_process_is_killed(nic: Nic) -> None:
    """The kernel thread ends with the process, and another process can use the tap."""
    pid = nic.device.child.pid
    os.close(nic.device.resources.pop(1))  # our own /dev/vhost-net
    nic.sends(any_frame(60, 1))
    assert threads_of_kernel(pid)
    nic.device.child.kill()
    nic.device.child.reap(DEADLINE_S)
    deadline_s = time.monotonic() + DEADLINE_S
    while threads_of_kernel(pid):
        assert time.monotonic() < deadline_s
        os.sched_yield()
