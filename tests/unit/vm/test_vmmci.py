"""vmmci with OpenBSD's driver, and with a hostile driver (*cat. 4.4, 4.6, 6.7*; hostile-input 48)."""

import time
from typing import cast

import pytest

from vmd.vm import layout
from vmd.vm.bus import Bus
from vmd.vm.pci import PciBus
from vmd.vm.vmmci import (
    CONFIG_BYTES,
    F_ACK,
    F_SYNCRTC,
    F_TIMESYNC,
    NONE,
    REBOOT,
    SHUTDOWN,
    SYNCRTC,
    Vmmci,
)

SLOT = 5
PORT = 0xC040
IRQ = layout.pci_irq(SLOT, 1)
ADDRESS, DATA = 0xCF8, 0xCFC
FEATURES, ACCEPTED, QUEUE_PFN, QUEUE_SIZE, QUEUE_SELECT, NOTIFY, STATUS, ISR, CONFIG = 0, 4, 8, 12, 14, 16, 18, 19, 20
COMMAND, SECONDS, MICROSECONDS = CONFIG, CONFIG + 4, CONFIG + 12
ACKNOWLEDGE, DRIVER, DRIVER_OK = 1, 2, 4
ISR_CONFIG = 2
ALL = F_TIMESYNC | F_ACK | F_SYNCRTC


class Machine:
    """A bus with vmmci, and the accesses of a driver."""

    def __init__(self) -> None:
        self.levels: dict[int, bool] = {}
        self.acknowledged: list[int] = []
        self.announced = 0
        self.bus = Bus()
        self.pci = PciBus(self.bus, 64 << 20)
        self.bus.add_pio(ADDRESS, 8, self.pci)
        self.vmmci = Vmmci(self.levels.__setitem__, self.acknowledged.append, self.on_announced)
        self.pci.add(SLOT, self.vmmci)
        self.config_write(0x10, 4, PORT)
        self.config_write(4, 2, 1)

    def on_announced(self) -> None:
        """Count an announcement."""
        self.announced += 1

    def line(self) -> bool:
        """Return the level of the interrupt line."""
        return self.levels.get(IRQ, False)

    def config_read(self, register: int, size: int) -> int:
        """Read configuration space."""
        self.bus.pio_write(ADDRESS, 4, 1 << 31 | SLOT << 11 | register & 0xFC)
        return self.bus.pio_read(DATA + (register & 3), size)

    def config_write(self, register: int, size: int, value: int) -> None:
        """Write configuration space."""
        self.bus.pio_write(ADDRESS, 4, 1 << 31 | SLOT << 11 | register & 0xFC)
        self.bus.pio_write(DATA + (register & 3), size, value)

    def read(self, offset: int, size: int = 4) -> int:
        """Read a register."""
        return self.bus.pio_read(PORT + offset, size)

    def write(self, offset: int, value: int, size: int = 4) -> None:
        """Write a register."""
        self.bus.pio_write(PORT + offset, size, value)

    def start(self, features: int = ALL) -> None:
        """Start a driver."""
        self.write(STATUS, 0, 1)
        self.write(STATUS, ACKNOWLEDGE | DRIVER, 1)
        self.write(ACCEPTED, features)
        self.write(STATUS, ACKNOWLEDGE | DRIVER | DRIVER_OK, 1)

    def interrupt(self) -> int:
        """Handle an interrupt as a driver does, and return the command.  To read ISR must lower the line."""
        assert self.line()
        assert self.read(ISR, 1) == ISR_CONFIG
        assert not self.line()
        return self.read(COMMAND)


@pytest.fixture
def machine() -> Machine:
    """Return a machine whose driver has not started."""
    return Machine()


# --- registers ---------------------------------------------------------------------------------------------------


def test_device_has_the_ids_that_drivers_look_for(machine: Machine) -> None:
    """It has ids, class, an I/O BAR of 64 ports and INTA (sys/dev/pci/virtio_pci.c attaches to 0b5d:0777)."""
    assert machine.config_read(0, 4) == 0x0777_0B5D
    assert machine.config_read(0x2C, 4) == 0xFFFF_0B5D
    assert machine.config_read(8, 4) >> 8 == 0x078000
    assert machine.config_read(0x3D, 1) == 1
    machine.config_write(0x10, 4, 0xFFFFFFFF)
    assert machine.config_read(0x10, 4) == 0xFFFFFFC1


def test_registers_of_a_device_without_queues(machine: Machine) -> None:
    """Legacy registers without a meaning here read as zero, after any write."""
    assert machine.read(FEATURES) == ALL
    for offset, size in ((QUEUE_PFN, 4), (QUEUE_SIZE, 2), (NOTIFY, 2), (ISR, 1)):
        machine.write(offset, 0xFFFFFFFF & (1 << 8 * size) - 1, size)
        assert machine.read(offset, size) == 0
    assert machine.read(STATUS, 1) == 0


def test_driver_starts_and_resets(machine: Machine) -> None:
    """The accepted features are kept until a reset."""
    up = [machine.vmmci.driver_is_up]
    machine.start(F_ACK)
    up.append(machine.vmmci.driver_is_up)
    assert machine.vmmci.acknowledges
    assert machine.read(ACCEPTED) == F_ACK
    machine.write(STATUS, 0, 1)
    up.append(machine.vmmci.driver_is_up)

    assert up == [False, True, False]
    assert machine.read(ACCEPTED) == 0


def test_clock_is_sampled_with_its_first_word(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """All 128 bits are of the same moment.  Unlike vmd's, the high words are correct."""
    machine.start()
    moments = iter(((1 << 33) * 10**9 + 123_456_789, (1 << 34) * 10**9))
    monkeypatch.setattr(time, "time_ns", lambda: next(moments))

    words = [machine.read(SECONDS + at) for at in (0, 4, 8, 12)]

    assert words == [0, 2, 123_456, 0]
    assert machine.read(SECONDS) == 0  # a new sample
    assert machine.read(SECONDS + 4) == 4


def test_a_mistake_of_the_driver_is_logged(machine: Machine, capfd: pytest.CaptureFixture[str]) -> None:
    """And ignored."""
    machine.vmmci.complain("has no idea")
    assert "vmmci: the driver has no idea" in capfd.readouterr().err


def test_clock_cannot_be_set_by_the_guest(machine: Machine) -> None:
    """The clock is the host's, so writes are ignored."""
    machine.start()
    before = machine.read(SECONDS)
    for at in range(SECONDS, SECONDS + 16, 4):
        machine.write(at, 0)
    assert machine.read(SECONDS) >= before
    assert machine.read(COMMAND) == NONE


# --- commands ------------------------------------------------------------------------------------------------------


def test_a_driver_that_is_not_up_is_not_asked(machine: Machine) -> None:
    """`ask` returns False before the driver has started, and after it has reset the device."""
    assert not machine.vmmci.ask(REBOOT)
    machine.start()
    machine.write(STATUS, 0, 1)
    assert not machine.vmmci.ask(REBOOT)
    assert not machine.line()


def test_driver_acknowledges(machine: Machine) -> None:
    """The driver gets an interrupt, reads the command, and writes it back (cat. 4.4)."""
    machine.start()
    assert machine.vmmci.ask(REBOOT)

    assert machine.interrupt() == REBOOT
    assert machine.acknowledged == []
    machine.write(COMMAND, REBOOT)

    assert machine.acknowledged == [REBOOT]
    assert machine.announced == 0


@pytest.mark.parametrize(("offset", "size", "value"), [
    (COMMAND, 4, SHUTDOWN | 1 << 31), (COMMAND, 4, NONE), (COMMAND, 4, SYNCRTC), (COMMAND, 4, 0xFFFFFFFF),
    (COMMAND, 1, REBOOT), (COMMAND, 2, REBOOT), (COMMAND + 1, 1, REBOOT), (COMMAND + 2, 4, REBOOT),
    (SECONDS, 4, REBOOT), (CONFIG + CONFIG_BYTES, 4, REBOOT), (0x3F, 1, REBOOT), (0x3C, 4, REBOOT),
])  # fmt: skip
def test_nothing_else_is_an_acknowledgement(machine: Machine, offset: int, size: int, value: int) -> None:
    """The register, the size or the value is wrong."""
    machine.start()
    machine.vmmci.ask(REBOOT)

    machine.write(offset, value, size)

    assert machine.acknowledged == []
    assert machine.announced == 0
    assert machine.vmmci.command_now == REBOOT


def test_guest_announces_its_end(machine: Machine) -> None:
    """It writes SHUTDOWN without having been asked (cat. 4.4).  Other commands are ignored."""
    machine.start()
    machine.write(COMMAND, REBOOT)
    assert machine.announced == 0

    machine.write(COMMAND, SHUTDOWN)

    assert machine.announced == 1
    assert machine.acknowledged == []


def test_acknowledgement_of_a_shutdown_is_no_announcement(machine: Machine) -> None:
    """Both are the same write."""
    machine.start()
    machine.vmmci.ask(SHUTDOWN)
    machine.write(COMMAND, SHUTDOWN)
    assert (machine.acknowledged, machine.announced) == ([SHUTDOWN], 0)


def test_driver_is_asked_to_read_the_clock(machine: Machine) -> None:
    """It is asked only if it accepted that feature.  The acknowledgement clears the command (cat. 4.6)."""
    machine.start(F_ACK)
    assert not machine.vmmci.ask(SYNCRTC)
    machine.start(F_ACK | F_SYNCRTC)
    assert machine.vmmci.ask(SYNCRTC)

    assert machine.interrupt() == SYNCRTC
    machine.write(COMMAND, SYNCRTC)

    assert machine.read(COMMAND) == NONE
    assert machine.acknowledged == [SYNCRTC]


def test_a_request_to_end_replaces_a_request_to_read_the_clock(machine: Machine) -> None:
    """A later SYNCRTC must not replace a shutdown that the guest has not read yet."""
    machine.start()
    machine.vmmci.ask(SYNCRTC)
    assert machine.vmmci.ask(REBOOT)

    assert not machine.vmmci.ask(SYNCRTC)

    assert machine.interrupt() == REBOOT


def test_a_reset_clears_the_command(machine: Machine) -> None:
    """The command was not for the next driver or the next kernel."""
    machine.start()
    machine.vmmci.ask(REBOOT)
    machine.write(STATUS, 0, 1)

    assert not machine.line()
    machine.start()
    assert machine.read(COMMAND) == NONE
    assert machine.read(ISR, 1) == 0


def test_line_can_be_disabled(machine: Machine) -> None:
    """The command register disables the line.  STATUS still shows the interrupt."""
    machine.start()
    machine.config_write(4, 2, 1 | 1 << 10)
    machine.vmmci.ask(REBOOT)
    assert not machine.line()
    assert machine.config_read(6, 2) & 8

    machine.config_write(4, 2, 1)

    assert machine.line()


# --- saving --------------------------------------------------------------------------------------------------------


def test_saved_state_continues(machine: Machine) -> None:
    """The new device has the unread command, its interrupt, and the accepted features."""
    machine.start(F_ACK)
    machine.vmmci.ask(REBOOT)
    other = Machine()

    other.vmmci.restore_registers(machine.vmmci.save())

    assert other.vmmci.driver_is_up
    assert other.vmmci.acknowledges
    assert other.read(STATUS, 1) == ACKNOWLEDGE | DRIVER | DRIVER_OK
    assert other.interrupt() == REBOOT
    other.write(COMMAND, REBOOT)
    assert other.acknowledged == [REBOOT]


@pytest.mark.parametrize("changes", [{"config": b""}, {"config": bytes(21)}, {"config": 20}, {"status": b"x"}])
def test_impossible_states_are_refused(machine: Machine, changes: dict[str, int | bytes]) -> None:
    """A wrong type or length raises TypeError or ValueError."""
    with pytest.raises((TypeError, ValueError)):
        machine.vmmci.restore_registers({**machine.vmmci.save(), **changes})


@pytest.mark.parametrize("missing", ["status", "features", "active", "config", "pending"])
def test_incomplete_states_are_refused(machine: Machine, missing: str) -> None:
    """A missing value raises KeyError."""
    saved = machine.vmmci.save()
    del saved[missing]
    with pytest.raises(KeyError):
        machine.vmmci.restore_registers(saved)


@pytest.mark.parametrize("value", [-1, 1 << 63, (1 << 64) - 1])
def test_numbers_are_cut_to_their_registers(machine: Machine, value: int) -> None:
    """Any saved number is accepted, and cut to the width of its register."""
    numbers = dict.fromkeys(("status", "features", "active", "pending"), value)

    machine.vmmci.restore_registers({**machine.vmmci.save(), **numbers})

    for offset, size in ((STATUS, 1), (ACCEPTED, 4), (ISR, 1)):
        assert 0 <= machine.read(offset, size) < 1 << 8 * size


def test_unknown_command_in_a_state_is_kept(machine: Machine) -> None:
    """The guest reads it unchanged, and will not know it either."""
    saved = machine.vmmci.save()
    config = cast("bytes", saved["config"])
    machine.start()
    machine.vmmci.restore_registers({**machine.vmmci.save(), "config": b"\xff" * 4 + config[4:]})

    assert machine.read(COMMAND) == 0xFFFFFFFF
