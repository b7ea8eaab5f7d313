"""Stops a machine between two instructions of every vCPU, and lets it go on.  The guest does not notice.

The order matters (arch. 8):

    1. every vCPU leaves the guest, completes the I/O of its last exit, and parks
    2. the timers of the chips and the input of the console are held back
    3. every device process finishes what is in flight; it touches no ring until it is resumed
    4. eventfds are detached from their interrupts, which ends injections under way: each pending interrupt is then
       either in a register of an interrupt controller or counted in an eventfd
    5. all clocks of the guest stop at one moment (`clocks`)

Going on undoes these steps, the clocks first: they continue from the values at which they stopped.  Everything here
runs on the event thread.  It waits for vCPUs without blocking, and for each device up to 10 s.
"""

import time

from vmd.errors import HostError, PeerError, sentence
from vmd.ipc import devmsg
from vmd.ipc.messages.vm import Outcome
from vmd.vm.clocks import Clocks
from vmd.vm.clockwatch import JUMP_S
from vmd.vm.vmmci import SYNCRTC

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmd.ipc.loop import Loop, Timer
    from vmd.vm.machine import Machine

PARK_TIMEOUT_S = 15.0  # a vCPU may be waiting for a device, which has 10 s to answer


class Pause:
    """Pauses and resumes one machine.  `paused` is true while the machine stands still.

    A machine that was received is paused from the start, and `clocks` are those of the stream.  Its vCPUs park before
    they run for the first time.
    """

    def __init__(self, machine: "Machine", loop: "Loop", clocks: Clocks | None = None) -> None:
        self.machine = machine
        self.loop = loop
        self.clocks = clocks
        # `_arrived`: the machine was received and has not run here yet, so the network does not know where it is.
        self.paused = self._arrived = clocks is not None
        if clocks is not None:
            self._hold_back()
        # When the machine stopped.  For a received machine that is unknown, and taken to be more than JUMP_S ago.
        self._since_s = -2 * JUMP_S
        self._round = 0  # counts requests to park: the report of a vCPU that was late belongs to an earlier request
        self._missing = 0  # vCPUs that have not parked yet
        self._asked_ns = 0  # when the vCPUs were asked to park
        self._waiting: list[Callable[[str], None]] = []
        self._watchdog: Timer | None = None

    @property
    def since_ns(self) -> int:
        """When the machine stopped, by CLOCK_MONOTONIC."""
        return int(self._since_s * 1e9)

    @property
    def under_way(self) -> bool:
        """Whether the machine was asked to pause and has not stopped yet."""
        return bool(self._waiting)

    def pause(self, done: "Callable[[str], None]") -> None:
        """Stop the machine, then call `done("")`; if it does not stop, call `done` with the reason.

        If the machine is already paused, `done` is called at once.  The machine is paused when `done("")` runs, even if
        an earlier waiter resumed it in between.
        """
        if self.paused:
            done("")
            return
        self._waiting.append(done)
        if len(self._waiting) > 1:
            return
        self._missing = len(self.machine.vcpus)
        self._watchdog = self.loop.call_later(PARK_TIMEOUT_S, self._too_late)
        self._round += 1
        self._asked_ns = time.monotonic_ns()
        this = self._round
        for thread in self.machine.vcpus:
            thread.ask_to_park(lambda: self.loop.call_from_thread(lambda: self._parked(this)))

    def _parked(self, asked_in: int) -> None:
        if asked_in != self._round or not self._waiting:
            return
        self._missing -= 1
        if self._missing:
            return
        assert self._watchdog is not None
        self._watchdog.cancel()
        try:
            self._stand_still()
        except PeerError as error:
            self.give_up(str(error))
        except (HostError, OSError) as error:
            try:
                self._go_on()
            except (PeerError, HostError, OSError) as worse:
                self.give_up(sentence(worse))
            else:
                self._answer(sentence(error))
        else:
            self.paused = True
            self._since_s = time.monotonic()
            self._answer("")

    def _too_late(self) -> None:
        for thread in self.machine.vcpus:
            thread.unpark()
        self._answer(f"a vcpu did not stop within {PARK_TIMEOUT_S:.0f} s")

    def give_up(self, text: str) -> None:
        """End a machine that can neither pause nor go on, because one of its devices has failed.

        The waiters are not called: the message that the VM has ended answers all requests.
        """
        self._waiting.clear()
        self.machine.end(Outcome.FAILED, text)

    def _answer(self, text: str) -> None:
        waiting, self._waiting = self._waiting, []
        while waiting:
            if not text and not self.paused:
                for done in waiting:  # the previous waiter has resumed the machine: stop it again
                    self.pause(done)
                return
            waiting.pop(0)(text)

    def _stand_still(self) -> None:
        machine = self.machine
        self._hold_back()
        for function in machine.virtio:
            function.server.command(devmsg.PAUSE)
        for function in machine.virtio:
            function.detach_interrupts()
        self.clocks = Clocks.take(machine.kvm, machine.vcpus, machine.clock, self._asked_ns)
        self.clocks.hold(machine.kvm, [thread.vcpu for thread in machine.vcpus])

    def _hold_back(self) -> None:
        self.machine.timers.hold()
        self.machine.listening = False

    def unpause(self) -> None:
        """Resume the machine, if it is paused.  Raises PeerError or OSError if it cannot go on."""
        if self.paused:
            if self._arrived:
                self.machine.sign_disks()
            self.paused = False
            self._go_on()
            if time.monotonic() - self._since_s > JUMP_S:
                self.machine.vmmci.ask(SYNCRTC)
            if self._arrived:
                self._arrived = False
                self.machine.announce()

    def _go_on(self) -> None:
        machine = self.machine
        clocks, self.clocks = self.clocks, None
        if clocks is not None:
            clocks.restore(machine.kvm, [thread.vcpu for thread in machine.vcpus], machine.clock)
        for function in machine.virtio:
            function.attach_interrupts()
        for function in machine.virtio:
            function.server.command(devmsg.RESUME)  # the device looks at each of its queues once
        machine.timers.release()
        machine.listen()
        for thread in machine.vcpus:
            thread.unpark()
