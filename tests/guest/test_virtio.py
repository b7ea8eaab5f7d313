"""Virtio functions with the real KVM: real-mode guests and real devices (hostile-input 4-10).

A guest here does only what needs its processor: notify, take interrupts, read ISR.  The test does the rest of the
driver's work, with accesses to the same registers as from another vCPU.
"""

import os
import signal
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, given, settings

from tests.support.fakedriver import WRITE, Desc, Ring
from tests.support.realmode import HALT_FOR_EVER, HANDLER, Guest, Runner, out, wait_until
from tests.support.virtiopci import (
    ACKNOWLEDGE,
    ACTIONS,
    DRIVER,
    DRIVER_OK,
    FEATURES_OK,
    LEGACY,
    LEGACY_PFN,
    LEGACY_STATUS,
    MODERN,
    QUEUE_MSIX,
    STATUS,
    Machine,
    Process,
    act,
)
from vmd.ipc import devmsg
from vmd.ipc.loop import Loop
from vmd.kvmapi import abi
from vmd.kvmapi.exits import Exit, PioIn, PioOut
from vmd.kvmapi.system import System
from vmd.kvmapi.vcpu import KICK_SIGNAL, install_kick_handler
from vmd.memfile import sealed_file
from vmd.virtio import spec
from vmd.vm import virtio
from vmd.vm.devproc import DeviceProcess
from vmd.vm.entropy import Entropy
from vmd.vm.kinds import DISK, ENTROPY
from vmd.vm.slots import Slot

pytestmark = [
    pytest.mark.kvm,
    pytest.mark.skipif(not os.path.exists("/dev/kvm"), reason="there is no /dev/kvm on this host"),
]

NOTIFY, ISR = MODERN + virtio.NOTIFY, MODERN + virtio.ISR
SAW, TOLD = 0x500, 0x502  # ports to which a guest writes the ISR, and that it had an interrupt
MAY_READ_ISR = 0x2000  # a byte in its memory
RINGS = 0x4000
BUFFER, HEADER = 0x9000, 0x9800
END_TIMEOUT_S = 20.0
IRQ10_VECTOR = 0x2A


def set_ports(*writes: tuple[int, int]) -> bytes:
    """Return mov al, value; out port, al for each."""
    return b"".join(bytes((0xB0, value, 0xE6, port)) for port, value in writes)


# Both 8259s for vectors 20h and 28h up; IRQ 10, behind the cascade, is the only line.
PIC_SETUP = (
    set_ports((0x20, 0x11), (0x21, 0x20), (0x21, 0x04), (0x21, 0x01), (0x21, 0xFB))
    + set_ports((0xA0, 0x11), (0xA1, 0x28), (0xA1, 0x02), (0xA1, 0x01), (0xA1, 0xFB))
    + b"\xfb"  # sti
)
READ_ISR = b"\xba" + ISR.to_bytes(2, "little") + b"\xec" + b"\xba" + SAW.to_bytes(2, "little") + b"\xee"
# push ax; push dx; tell the test; cmp byte [2000h], 0; je over READ_ISR; end the interrupt; pop dx; pop ax; iret
LINE_HANDLER = (
    b"\x50\x52" + out(TOLD, 1) + b"\x80\x3e\x00\x20\x00\x74" + bytes((len(READ_ISR),)) + READ_ISR
    + set_ports((0xA0, 0x20), (0x20, 0x20)) + b"\x5a\x58\xcf"
)  # fmt: skip


@pytest.fixture(autouse=True)
def kick_handler() -> Iterator[None]:
    """Install the signal handler that every process with vCPUs needs."""
    before = signal.getsignal(KICK_SIGNAL)
    install_kick_handler()
    yield
    signal.signal(KICK_SIGNAL, before)


@pytest.fixture
def system() -> Iterator[System]:
    """An open /dev/kvm."""
    with System(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)) as opened:
        yield opened


@pytest.fixture
def guest(system: System) -> Iterator[Guest]:
    """A VM with KVM's interrupt controllers.  IRQ 10 is level triggered from the start, as in our machine.

    Otherwise an interrupt before the guest has set up its 8259s would be lost.
    """
    made = Guest(system, irqchip=True)
    chip = made.vm.get_irqchip(abi.KVM_IRQCHIP_PIC_SLAVE)
    chip.chip.pic.elcr = 1 << 10 - 8
    made.vm.set_irqchip(chip)
    yield made
    made.close()


class Subject:
    """A device in slot 1 of a VM with one vCPU, and the driver's half of its queue.  Subclasses serve the device."""

    process: DeviceProcess | Entropy
    size: int  # of its queue
    answer_bytes: int  # the used length of a request

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self.figures_fd = sealed_file("figures", devmsg.FIGURES_BYTES)
        self.open()
        self.machine = Machine(guest.vm, self.process)
        self.renew()

    def open(self) -> None:
        """Make the server of the device."""
        raise NotImplementedError

    def renew(self) -> None:
        """Make a new ring in the legacy layout."""
        self.ring = Ring(self.guest.memory, self.size, RINGS)
        self.ring.used = self.ring.avail + 6 + 2 * self.size + 0xFFF & ~0xFFF

    def come_up(self) -> None:
        """Initialise the device as a legacy driver, up to DRIVER_OK."""
        self.machine.legacy_write(LEGACY_STATUS, 1, ACKNOWLEDGE | DRIVER)
        self.machine.legacy_write(LEGACY_PFN, 4, RINGS >> 12)
        self.machine.legacy_write(LEGACY_STATUS, 1, ACKNOWLEDGE | DRIVER | DRIVER_OK)

    def offer(self) -> None:
        """Make a request available, without notifying."""
        self.guest.memory.write(BUFFER, bytes(512))
        self.ring.add(self.request())

    def request(self) -> list[Desc]:
        """Return a request for bytes at BUFFER."""
        raise NotImplementedError

    def filled(self) -> bool:
        """Return whether the bytes have arrived."""
        ((_, length),) = self.ring.reap()
        return length == self.answer_bytes and self.guest.memory.read(BUFFER, 64) != bytes(64)

    def run(self, enough: Callable[[list[int]], bool]) -> list[Exit]:
        """Run the guest with the bus until its writes to SAW and TOLD are enough; return its exits."""
        said: list[int] = []

        def proceed(exit_: Exit) -> bool:
            if isinstance(exit_, PioIn):
                self.guest.vcpu.answer(self.machine.bus.pio_read(exit_.port, exit_.size).to_bytes(exit_.size, "little"))
                return True
            assert isinstance(exit_, PioOut)
            self.machine.bus.pio_write(exit_.port, exit_.size, int.from_bytes(exit_.data, "little"))
            said.append(exit_.port)
            return not enough(said)

        return Runner(self.guest.vcpu, proceed).join()

    def close(self) -> None:
        """Close everything."""
        function = self.machine.function
        self.process.interrupts._words.release()
        for fd in (*self.process.kicks, *self.process.calls, function.config_call, function.config_resample,
                   self.figures_fd):  # fmt: skip
            os.close(fd)
        assert self.machine.failures == []


class Disk(Subject):
    """A disk with its process."""

    (size,) = DISK.queues
    answer_bytes = 512 + 1

    def open(self) -> None:
        """Start the process."""
        with tempfile.TemporaryFile() as image:
            image.write(b"sector!!" * 64)
            image.flush()
            self.process = self.disk = DeviceProcess(DISK)
            slot = Slot(kind=DISK, index=0, number=1, fds=(image.fileno(),), notes=(0,), names=("image",))
            self.disk.begin("vm/test", slot, self.guest.memory, self.figures_fd, 0)
        self.disk.wait_ready()

    def request(self) -> list[Desc]:
        """Read the first sector."""
        self.guest.memory.write(HEADER, struct.pack("<IIQ", spec.VIRTIO_BLK_T_IN, 0, 0))
        return [Desc(HEADER, 16), Desc(BUFFER, 512, WRITE), Desc(HEADER + 16, 1, WRITE)]

    def close(self) -> None:
        """End the process."""
        self.disk.shut_down()
        self.disk.reap(END_TIMEOUT_S)
        os.close(self.disk.resample)
        os.close(self.disk.page)
        for channel in (self.disk._sync, self.disk._async):
            channel.close()
        assert self.disk.status == 0
        super().close()


class Rng(Subject):
    """The entropy device, with an event thread."""

    (size,) = ENTROPY.queues
    answer_bytes = 64

    def open(self) -> None:
        """Make the device; it is served once its function exists."""
        slot = Slot(kind=ENTROPY, index=0, number=1)
        self.process = self.rng = Entropy(slot, self.guest.memory, self.figures_fd, 0)

    def __init__(self, guest: Guest) -> None:
        super().__init__(guest)
        function = self.machine.function
        self.loop = Loop()
        self.loop.add(function.config_resample, function.on_config_resample)
        self.rng.serve(
            self.loop,
            on_interrupt=function.on_interrupt,
            on_needs_reset=function.on_needs_reset,
            on_event=lambda _what, _text: None,
        )
        self.events = threading.Thread(target=self.loop.run)
        self.events.start()

    def request(self) -> list[Desc]:
        """Ask for some bytes."""
        return [Desc(BUFFER, 64, WRITE)]

    def close(self) -> None:
        """End the event thread."""
        self.loop.call_from_thread(self.loop.stop)
        self.events.join(END_TIMEOUT_S)
        self.loop.close()
        self.rng.command(devmsg.RESET)  # releases guest memory
        super().close()


@pytest.fixture(params=[Disk, Rng])
def subject(request: pytest.FixtureRequest, guest: Guest) -> Iterator[Subject]:
    """Yield a device of either kind, and close it."""
    made = request.param(guest)
    yield made
    made.close()


def handle(guest: Guest, vector: int, code: bytes, at: int = HANDLER) -> None:
    """Point a vector at code."""
    guest.memory.write(at, code)
    guest.memory.write(vector * 4, at.to_bytes(4, "little"))


def test_notification_and_line_interrupt(subject: Subject) -> None:
    """The guest gets the interrupt after the answer; neither notification nor interrupt passes through the test."""
    handle(subject.guest, IRQ10_VECTOR, LINE_HANDLER)
    subject.guest.memory.write(MAY_READ_ISR, b"\1")
    subject.come_up()
    subject.offer()
    subject.guest.load(PIC_SETUP + out(NOTIFY, 0, 2) + HALT_FOR_EVER)

    exits = subject.run(lambda said: SAW in said)

    assert exits == [PioOut(TOLD, 1, 1, b"\1"), PioIn(ISR, 1, 1), PioOut(SAW, 1, 1, b"\1")]
    assert subject.filled()


def test_interrupt_that_was_not_read_comes_again(subject: Subject) -> None:
    """The end of the interrupt wakes the device's server, which sees that ISR has not been read."""
    handle(subject.guest, IRQ10_VECTOR, LINE_HANDLER)
    subject.come_up()
    subject.offer()
    subject.guest.load(PIC_SETUP + out(NOTIFY, 0, 2) + HALT_FOR_EVER)

    def enough(said: list[int]) -> bool:
        if said.count(TOLD) == 5:
            subject.guest.memory.write(MAY_READ_ISR, b"\1")
        return SAW in said

    exits = subject.run(enough)

    assert exits.count(PioOut(TOLD, 1, 1, b"\1")) >= 5
    assert exits[-1] == PioOut(SAW, 1, 1, b"\1")
    assert not subject.process.interrupts.pending(0)


def test_masked_message_waits_and_follows_its_vector_9(subject: Subject) -> None:
    """Hostile input 9: a masked interrupt is delivered once, with the message at the time of the unmasking."""
    lapic = bytearray(subject.guest.vcpu.get_lapic())
    lapic[0xF0:0xF4] = (0x1FF).to_bytes(4, "little")  # switched on, in the spurious vector register
    subject.guest.vcpu.set_lapic(bytes(lapic))
    handle(subject.guest, 0x4A, out(SAW, 0x4A) + b"\xcf")
    handle(subject.guest, 0x5A, out(SAW, 0x5A) + b"\xcf", HANDLER + 0x40)
    machine = subject.machine
    machine.enable_msix()
    machine.set_vector(0, 0x4A, masked=True)
    subject.come_up()
    machine.write(QUEUE_MSIX, 2, 0)
    subject.offer()
    subject.guest.load(b"\xfb" + out(NOTIFY, 0, 2) + out(TOLD, 1) + HALT_FOR_EVER)
    assert subject.run(lambda said: TOLD in said) == [PioOut(TOLD, 1, 1, b"\1")]
    wait_until(lambda: machine.pending() == 1)
    assert subject.filled()
    machine.set_vector(0, 0x5A)

    assert subject.run(lambda said: SAW in said) == [PioOut(SAW, 1, 1, b"\x5a")]
    assert machine.pending() == 0


def test_reset_while_notifications_come_6_7(subject: Subject) -> None:
    """Hostile input 6, 7: the guest notifies without pause while the device is reset and set up again."""
    subject.guest.load(out(NOTIFY, 0, 2) + out(TOLD, 1) + b"\xeb\xf1")  # and again; without an ioeventfd the port exits
    rounds = 0

    def enough(said: list[int]) -> bool:
        nonlocal rounds
        if said[-1] == TOLD:
            rounds += 1
            subject.come_up() if rounds % 2 else subject.machine.write(STATUS, 1, 0)
        return rounds == 200

    exits = subject.run(enough)

    assert PioOut(NOTIFY, 2, 1, b"\0\0") in exits
    assert subject.process.activations == 100
    subject.renew()
    subject.come_up()
    subject.offer()
    subject.machine.bus.pio_write(NOTIFY, 2, 0)  # as through the window
    wait_until(lambda: subject.process.interrupts.pending(0))
    assert subject.filled()


def test_notify_port_moves_with_its_bar_8(guest: Guest) -> None:
    """Hostile input 8: the old port exits, and the new one does not."""
    machine = Machine(guest.vm, Process())
    machine.start()
    machine.set_bar(2, MODERN + 0x100)
    guest.load(out(NOTIFY, 1, 2) + out(NOTIFY + 0x100, 0, 2) + out(NOTIFY + 0x100, 1) + out(TOLD, 1) + HALT_FOR_EVER)

    exits = Runner(guest.vcpu, lambda exit_: exit_ != PioOut(TOLD, 1, 1, b"\1")).join()

    assert exits == [PioOut(NOTIFY, 2, 1, b"\1\0"), PioOut(NOTIFY + 0x100, 1, 1, b"\1"), PioOut(TOLD, 1, 1, b"\1")]
    assert machine.kicked() == [0]
    machine.close()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(ACTIONS)
def test_kvm_accepts_everything_that_a_driver_does_4_to_10(
    system: System, actions: list[tuple[str, int, int, int]]
) -> None:
    """Hostile input 4-10: KVM accepts all messages, ports and vectors that a guest programs."""
    with system.create_vm() as vm:
        vm.create_irqchip()
        machine = Machine(vm, Process())
        machine.function.complaints.burst = machine.function.remarks.burst = 0
        try:
            for action in actions:
                act(machine, *action)
            machine.config_write(4, 2, 7)
            machine.set_bar(0, LEGACY)
            machine.set_bar(2, MODERN)
            machine.write(STATUS, 1, 0)
            machine.start()
            assert machine.failures == []
            assert machine.status == ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK
        finally:
            machine.close()
