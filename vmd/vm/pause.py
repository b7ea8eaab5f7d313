"""Stopping a machine between two instructions of every vCPU, and letting it go on as if nothing had been.

The order matters (arch. 8):

    1. every vCPU leaves the guest, with the I/O of its last exit done, and parks
    2. the chips' timers are held back, and so is the input of the console
    3. every device process finishes what is in flight; it touches no ring until it is resumed
    4. eventfds are taken from their interrupts, which ends injections under way: what interrupts there are is then
       either in the interrupt controllers' registers or counted in an eventfd
    5. all of the guest's clocks stop at one moment (`clocks`)

Going on takes the steps back, with the clocks first: they continue where they stood, whatever the host's did.
All of it runs on the event thread, which waits for vCPUs without blocking and for devices up to 10 s each.
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
    """One machine's standing still; `paused` once it does.

    One that was received stands still from the start, with the clocks given; its vCPUs park before they have run.
    """

    def __init__(self, machine: "Machine", loop: "Loop", clocks: Clocks | None = None) -> None:
        self.machine = machine
        self.loop = loop
        self.clocks = clocks
        self.paused = self._arrived = clocks is not None  # from another place, and the network has not been told
        if clocks is not None:
            self._hold_back()
        self._since_s = -2 * JUMP_S  # when it stopped; one that was received, who knows how long ago
        self._round = 0  # of asking vCPUs to park; one that comes too late is of an earlier one
        self._missing = 0  # vCPUs that have yet to park
        self._asked_ns = 0  # when that was
        self._waiting: list[Callable[[str], None]] = []
        self._watchdog: Timer | None = None

    @property
    def since_ns(self) -> int:
        """When it stopped, by CLOCK_MONOTONIC."""
        return int(self._since_s * 1e9)

    @property
    def under_way(self) -> bool:
        """Whether somebody waits for the machine to stand still."""
        return bool(self._waiting)

    def pause(self, done: "Callable[[str], None]") -> None:
        """Stop the machine; calls `done("")`, at once if it stands still already, or `done(why not)`.

        It stands still when `done` is called, whatever those have done with it who asked before.
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
        """Give up a machine that can neither stand still nor go on: a device of it has failed.

        Nobody who waits is told: how the VM ends is the answer.
        """
        self._waiting.clear()
        self.machine.end(Outcome.FAILED, text)

    def _answer(self, text: str) -> None:
        waiting, self._waiting = self._waiting, []
        while waiting:
            if not text and not self.paused:
                for done in waiting:  # the one before had it go on
                    self.pause(done)
                return
            waiting.pop(0)(text)

    def _stand_still(self) -> None:
        machine = self.machine
        self._hold_back()
        for function in machine.virtio:
            function.process.command(devmsg.PAUSE)
        for function in machine.virtio:
            function.detach_interrupts()
        self.clocks = Clocks.take(machine.kvm, machine.vcpus, machine.clock, self._asked_ns)
        self.clocks.hold(machine.kvm, [thread.vcpu for thread in machine.vcpus])

    def _hold_back(self) -> None:
        self.machine.timers.hold()
        self.machine.listening = False

    def unpause(self) -> None:
        """Let the machine go on; nothing happens to one that does.  Raises PeerError or OSError: it cannot."""
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
            function.process.command(devmsg.RESUME)  # which looks at every queue once
        machine.timers.release()
        machine.listen()
        for thread in machine.vcpus:
            thread.unpark()
