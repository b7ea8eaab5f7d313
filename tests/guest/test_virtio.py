"""Virtio functions and KVM's own word on them: real-mode guests, a real device process (hostile-input 4-10).

A guest here only does what has to be done on its processor: notify, take interrupts, read ISR.  The rest of the
driver is the test, whose accesses reach the same registers as another vCPU's would.
"""

import os
import signal
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
from vmd.kvmapi import abi
from vmd.kvmapi.exits import Exit, PioIn, PioOut
from vmd.kvmapi.system import System
from vmd.kvmapi.vcpu import KICK_SIGNAL, install_kick_handler
from vmd.memfile import sealed_file
from vmd.vm import virtio
from vmd.vm.devproc import DeviceProcess
from vmd.vm.kinds import ENTROPY
from vmd.vm.slots import Slot

pytestmark = [
    pytest.mark.kvm,
    pytest.mark.skipif(not os.path.exists("/dev/kvm"), reason="there is no /dev/kvm on this host"),
]

NOTIFY, ISR = MODERN + virtio.NOTIFY, MODERN + virtio.ISR
SAW, TOLD = 0x500, 0x502  # ports on which a guest says what ISR was, and that it has an interrupt
MAY_READ_ISR = 0x2000  # a byte in its memory
RINGS, LEGACY_USED = 0x4000, 0x5000
(SIZE,) = ENTROPY.queues
BUFFER = 0x6000
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
# push ax; push dx; say so; cmp byte [2000h], 0; je over READ_ISR; end the interrupt; pop dx; pop ax; iret
LINE_HANDLER = (
    b"\x50\x52" + out(TOLD, 1) + b"\x80\x3e\x00\x20\x00\x74" + bytes((len(READ_ISR),)) + READ_ISR
    + set_ports((0xA0, 0x20), (0x20, 0x20)) + b"\x5a\x58\xcf"
)  # fmt: skip


@pytest.fixture(autouse=True)
def kick_handler() -> Iterator[None]:
    """The handler every process with vCPUs needs."""
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
    """A VM with KVM's interrupt controllers; IRQ 10 is level triggered from the start, as in a machine of ours.

    Else an interrupt that comes before the guest has set up its 8259s would be forgotten.
    """
    made = Guest(system, irqchip=True)
    chip = made.vm.get_irqchip(abi.KVM_IRQCHIP_PIC_SLAVE)
    chip.chip.pic.elcr = 1 << 10 - 8
    made.vm.set_irqchip(chip)
    yield made
    made.close()


class Rng:
    """An entropy device in slot 1, with its process, in a VM with one vCPU; the driver's half of its queue."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self.process = DeviceProcess(ENTROPY)
        figures = sealed_file("figures", devmsg.FIGURES_BYTES)
        self.process.begin("vm/test", Slot(kind=ENTROPY, index=0, number=1), guest.memory, figures, 0)
        os.close(figures)
        self.process.wait_ready()
        self.machine = Machine(guest.vm, self.process)
        self.ring = Ring(guest.memory, SIZE, RINGS)
        self.ring.used = LEGACY_USED

    def come_up(self) -> None:
        """Be a driver of old, up to DRIVER_OK."""
        self.machine.legacy_write(LEGACY_STATUS, 1, ACKNOWLEDGE | DRIVER)
        self.machine.legacy_write(LEGACY_PFN, 4, RINGS >> 12)
        self.machine.legacy_write(LEGACY_STATUS, 1, ACKNOWLEDGE | DRIVER | DRIVER_OK)

    def offer(self) -> None:
        """Ask for some bytes, without notifying."""
        self.guest.memory.write(BUFFER, bytes(64))
        self.ring.add([Desc(BUFFER, 64, WRITE)])

    def filled(self) -> bool:
        """Return whether they have come."""
        return self.ring.reap() == [(self.ring.free - 1, 64)] and self.guest.memory.read(BUFFER, 64) != bytes(64)

    def run(self, enough: Callable[[list[int]], bool]) -> list[Exit]:
        """Let the guest run, with the bus behind it, until it has said enough on SAW and TOLD; return its exits."""
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
        """End the process."""
        self.process.shut_down()
        self.process.reap(END_TIMEOUT_S)
        function = self.machine.function
        self.process.interrupts._words.release()
        for fd in (*self.process.kicks, *self.process.calls, self.process.resample, self.process.interrupts.fd,
                   function.config_call, function.config_resample):  # fmt: skip
            os.close(fd)
        for channel in (self.process._sync, self.process._async):
            channel.close()
        assert self.machine.failures == []
        assert self.process.status == 0


@pytest.fixture
def rng(guest: Guest) -> Iterator[Rng]:
    """The device, which ends well."""
    made = Rng(guest)
    yield made
    made.close()


def handle(guest: Guest, vector: int, code: bytes, at: int = HANDLER) -> None:
    """Point a vector at code."""
    guest.memory.write(at, code)
    guest.memory.write(vector * 4, at.to_bytes(4, "little"))


def test_notification_and_line_interrupt(rng: Rng) -> None:
    """The guest sees the interrupt once the device has answered; neither of the two passed through us."""
    handle(rng.guest, IRQ10_VECTOR, LINE_HANDLER)
    rng.guest.memory.write(MAY_READ_ISR, b"\1")
    rng.come_up()
    rng.offer()
    rng.guest.load(PIC_SETUP + out(NOTIFY, 0, 2) + HALT_FOR_EVER)

    exits = rng.run(lambda said: SAW in said)

    assert exits == [PioOut(TOLD, 1, 1, b"\1"), PioIn(ISR, 1, 1), PioOut(SAW, 1, 1, b"\1")]
    assert rng.filled()


def test_interrupt_that_was_not_read_comes_again(rng: Rng) -> None:
    """The end of the interrupt wakes the device process, which finds that ISR has not been read."""
    handle(rng.guest, IRQ10_VECTOR, LINE_HANDLER)
    rng.come_up()
    rng.offer()
    rng.guest.load(PIC_SETUP + out(NOTIFY, 0, 2) + HALT_FOR_EVER)

    def enough(said: list[int]) -> bool:
        if said.count(TOLD) == 5:
            rng.guest.memory.write(MAY_READ_ISR, b"\1")
        return SAW in said

    exits = rng.run(enough)

    assert exits.count(PioOut(TOLD, 1, 1, b"\1")) >= 5
    assert exits[-1] == PioOut(SAW, 1, 1, b"\1")
    assert not rng.process.interrupts.pending(0)


def test_masked_message_waits_and_follows_its_vector_9(rng: Rng) -> None:
    """Hostile input 9: what came while the vector was masked is delivered once, as the message that it has then."""
    lapic = bytearray(rng.guest.vcpu.get_lapic())
    lapic[0xF0:0xF4] = (0x1FF).to_bytes(4, "little")  # switched on, in the spurious vector register
    rng.guest.vcpu.set_lapic(bytes(lapic))
    handle(rng.guest, 0x4A, out(SAW, 0x4A) + b"\xcf")
    handle(rng.guest, 0x5A, out(SAW, 0x5A) + b"\xcf", HANDLER + 0x40)
    machine = rng.machine
    machine.enable_msix()
    machine.set_vector(0, 0x4A, masked=True)
    rng.come_up()
    machine.write(QUEUE_MSIX, 2, 0)
    rng.offer()
    rng.guest.load(b"\xfb" + out(NOTIFY, 0, 2) + out(TOLD, 1) + HALT_FOR_EVER)
    assert rng.run(lambda said: TOLD in said) == [PioOut(TOLD, 1, 1, b"\1")]
    wait_until(lambda: machine.pending() == 1)
    assert rng.filled()
    machine.set_vector(0, 0x5A)

    assert rng.run(lambda said: SAW in said) == [PioOut(SAW, 1, 1, b"\x5a")]
    assert machine.pending() == 0


def test_reset_while_notifications_come_6_7(rng: Rng) -> None:
    """Hostile input 6, 7: the guest notifies for all it is worth while the device is reset and set up again."""
    rng.guest.load(out(NOTIFY, 0, 2) + out(TOLD, 1) + b"\xeb\xf1")  # and again; the port exits when nobody listens
    rounds = 0

    def enough(said: list[int]) -> bool:
        nonlocal rounds
        if said[-1] == TOLD:
            rounds += 1
            rng.come_up() if rounds % 2 else rng.machine.write(STATUS, 1, 0)
        return rounds == 200

    exits = rng.run(enough)

    assert PioOut(NOTIFY, 2, 1, b"\0\0") in exits
    assert rng.process.activations == 100
    rng.ring = Ring(rng.guest.memory, SIZE, RINGS)
    rng.ring.used = LEGACY_USED
    rng.come_up()
    rng.offer()
    rng.machine.bus.pio_write(NOTIFY, 2, 0)  # as through the window
    wait_until(lambda: rng.process.interrupts.pending(0))
    assert rng.filled()


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
def test_kvm_takes_whatever_the_driver_does_4_to_10(
    system: System, actions: list[tuple[str, int, int, int]]
) -> None:
    """Hostile input 4-10: KVM refuses nothing, whatever messages, ports and vectors a guest programs."""
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
