"""ClockWatch notices that the host's clock has jumped (*cat. 4.6*).

No test may set this host's clock, and a namespace has no wall clock of its own.  So these tests imitate the kernel's
reports, as timerfd_create(2) describes them.
"""

import errno
import os
import time
from collections.abc import Iterator

import pytest

from vmd.errors import HostError
from vmd.ipc.loop import Loop
from vmd.log import log
from vmd.privsep import linux
from vmd.vm import clockwatch
from vmd.vm.clockwatch import JUMP_S, ClockWatch


class Host:
    """A wall clock, a timer that is cancelled when the clock is set, and a loop that watches the timer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, loop: Loop) -> None:
        self.loop = loop
        self.wall_s, self.monotonic_s = 1_700_000_000.0, 1000.0
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.armed = 0
        self.jumps = 0
        self.error: int | None = errno.ECANCELED
        monkeypatch.setattr(linux, "timerfd_create", lambda _clock, _flags: self.fd)
        monkeypatch.setattr(linux, "timerfd_cancel_on_set", self.arm)
        monkeypatch.setattr(clockwatch, "time", self)
        monkeypatch.setattr(clockwatch, "os", self)

    def time(self) -> float:
        """Replace time.time."""
        return self.wall_s

    def monotonic(self) -> float:
        """Replace time.monotonic, which stops while a host sleeps."""
        return self.monotonic_s

    def read(self, fd: int, size: int) -> bytes:
        """Replace os.read on the timer."""
        data = os.read(fd, size)
        if self.error is not None:
            raise OSError(self.error, os.strerror(self.error))
        return data

    def arm(self, fd: int) -> None:
        """Count how often the timer is armed."""
        assert fd == self.fd
        self.armed += 1

    def jumped(self) -> None:
        """Count a reported jump."""
        self.jumps += 1

    def pass_s(self, wall_s: float, monotonic_s: float) -> None:
        """Let time pass, and make the timer readable, as when the clock is set."""
        self.wall_s += wall_s
        self.monotonic_s += monotonic_s
        os.eventfd_write(self.fd, 1)
        # The loop handles ready descriptors before a call that was posted later.
        self.loop.call_later(0, lambda: self.loop.call_from_thread(self.loop.stop))
        self.loop.run()


@pytest.fixture
def loop() -> Iterator[Loop]:
    """Yield an event loop."""
    made = Loop()
    yield made
    made.close()


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, loop: Loop) -> Iterator[Host]:
    """Yield a host whose clock is watched."""
    made = Host(monkeypatch, loop)
    ClockWatch(loop, made.jumped)
    yield made
    os.close(made.fd)


@pytest.mark.parametrize("wall_s", [3600.0, JUMP_S + 0.1, -3600.0, -JUMP_S - 0.1])
def test_jumps_are_reported(host: Host, wall_s: float) -> None:
    """A sleep of the host and a clock that is set forward or back are each reported once, and so is the next jump."""
    host.pass_s(wall_s, 0)
    assert host.jumps == 1
    host.pass_s(wall_s, 0)
    assert (host.jumps, host.armed) == (2, 3)


@pytest.mark.parametrize(("wall_s", "monotonic_s"), [
    (0.0, 0.0), (1.0, 0.0), (-4.9, 0.0), (JUMP_S, 0.0), (86400.0, 86400.0),
])  # fmt: skip
def test_a_step_that_a_time_daemon_corrects_is_not_reported(host: Host, wall_s: float, monotonic_s: float) -> None:
    """Small steps are not reported, and time that has passed is no jump.  The watch continues."""
    host.pass_s(wall_s, monotonic_s)
    assert (host.jumps, host.armed) == (0, 2)
    host.pass_s(JUMP_S + 1, 0)
    assert host.jumps == 1


def test_small_steps_do_not_add_up(host: Host) -> None:
    """Each step is measured from the step before, because the guest's time daemon has corrected that."""
    for _ in range(10):
        host.pass_s(1.0, 0)
    assert host.jumps == 0


def test_a_timer_that_expires_is_armed_again(host: Host) -> None:
    """The timer is set far in the future.  If it expires, that is no jump."""
    host.error = None
    host.pass_s(0, 0)
    assert (host.jumps, host.armed) == (0, 2)


def test_a_spurious_wake_up_is_ignored(host: Host) -> None:
    """The read of the timer gives EAGAIN."""
    host.error = errno.EAGAIN
    host.pass_s(3600, 0)
    assert (host.jumps, host.armed) == (0, 1)


def test_another_error_is_not_taken_for_a_jump(host: Host) -> None:
    """It is a mistake of ours, and must not be lost."""
    host.error = errno.EIO
    with pytest.raises(OSError, match="Input/output error"):
        host.pass_s(0, 0)
    assert host.jumps == 0


def test_a_host_without_cancellable_timers_gets_a_warning(monkeypatch: pytest.MonkeyPatch, loop: Loop) -> None:
    """The log has one warning, and the VM runs."""
    written: list[str] = []
    monkeypatch.setattr(log, "write", lambda _severity, text: written.append(text))

    def refuse(_clock: int, _flags: int) -> int:
        raise HostError("timerfd_create", errno.ENOSYS)

    monkeypatch.setattr(linux, "timerfd_create", refuse)

    ClockWatch(loop, loop.stop)

    assert len(written) == 1
    assert written[0].startswith(
        "guests are not told when this host has slept: timerfd_create: Function not implemented: this kernel, or"
    )


def test_the_kernel_accepts_the_timer(loop: Loop) -> None:
    """The kernel's real timer can be created and armed, and does not fire."""
    ClockWatch(loop, loop.stop)
    began = time.monotonic()
    loop.call_later(0.01, loop.stop)
    loop.run()
    assert time.monotonic() - began >= 0.01
