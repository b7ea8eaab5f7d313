"""The keyboard controller: every command is answered at once, and reset works."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmd.vm.chips.i8042 import DATA, I8042, STATUS

OBF, IBF, AUX_OBF = 0x01, 0x02, 0x20


class Port:
    """A controller that counts resets."""

    def __init__(self) -> None:
        self.resets = 0
        self.chip = I8042(self.on_reset)

    def on_reset(self) -> None:
        """Count a reset."""
        self.resets += 1

    def status(self) -> int:
        """Read the status port, 64h."""
        return self.chip.pio_read(STATUS, 1)

    def read(self) -> int:
        """Read the data port, 60h."""
        return self.chip.pio_read(DATA, 1)

    def command(self, byte: int, *data: int) -> int | None:
        """Write a command to 64h and its data bytes to 60h.  Return the answer, or None."""
        self.chip.pio_write(STATUS, 1, byte)
        for value in data:
            self.chip.pio_write(DATA, 1, value)
        return self.read() if self.status() & OBF else None


@pytest.fixture
def port() -> Port:
    """Return a controller after reset."""
    return Port()


def test_both_buffers_are_empty_after_reset(port: Port) -> None:
    """Without a command, neither buffer is full."""
    assert port.status() & (OBF | IBF) == 0
    assert [port.chip.pio_read(offset, 1) for offset in (1, 2, 3)] == [0xFF] * 3  # no ports of this chip


def test_seabios_finds_the_controller_and_no_keyboard(port: Port) -> None:
    """SeaBIOS's setup ends with the failed keyboard test, without a timeout."""
    assert port.command(0xAA) == 0x55
    assert port.command(0xAB) not in (0, None)


def test_linux_sets_the_controller_up_and_finds_no_mouse(port: Port) -> None:
    """Linux reads the command byte twice, writes it, and tests the second port in two ways."""
    assert port.command(0xAA) == 0x55
    control = port.command(0x20)
    assert control is not None
    assert port.command(0x20) == control
    assert port.command(0x60, control & ~0x40 | 0x10) is None
    assert port.command(0x20) == control & ~0x40 | 0x10
    port.chip.pio_write(STATUS, 1, 0xD3)
    port.chip.pio_write(DATA, 1, 0x5A)
    assert port.status() & OBF
    assert not port.status() & AUX_OBF
    port.read()
    assert port.command(0xA9) not in (0, 0xFA, 0xFF, None)


@pytest.mark.parametrize("command", [0x20, 0x2F, 0xA4, 0xA9, 0xAA, 0xAB, 0xC0, 0xD0])
def test_every_command_with_an_answer_answers(port: Port, command: int) -> None:
    """The next read of the status port shows the answer."""
    assert port.command(command) is not None
    assert not port.status() & OBF


ANSWERS = {
    0x20: 0x34,  # the command byte: self-test passed, both ports are disabled
    **dict.fromkeys(range(0x21, 0x40), 0),  # the controller's RAM
    0xA4: 0xF1,  # no password
    0xA9: 0x01, 0xAB: 0x01,  # the clock line of a port is stuck low: nothing is plugged in
    0xAA: 0x55, 0xC0: 0x80,  # not locked
    0xD0: 0x03,  # A20 is on, no reset
}  # fmt: skip


@pytest.mark.parametrize("command", [command for command in range(0x100) if not (command >= 0xF0 and not command & 1)])
def test_answer_of_each_command(port: Port, command: int) -> None:
    """Firmware and drivers compare them.  All other commands have no answer, and no command resets by chance."""
    assert port.command(command) == ANSWERS.get(command)
    assert port.resets == 0


@pytest.mark.parametrize(("command", "answer"), [
    (0x5F, 0xFE), (0x61, None), (0x7F, None), (0x80, 0xFE), (0xD0, 0xFE), (0xD2, 0x5A), (0xD3, 0x5A), (0xD4, 0xFE),
    (0xD5, 0xFE),
])  # fmt: skip
def test_data_byte_after_a_command(port: Port, command: int, answer: int | None) -> None:
    """It is the command's, if that takes one: for the RAM, or to be sent back.  Else it is for the keyboard."""
    port.chip.pio_write(STATUS, 1, command)
    port.chip.pio_read(DATA, 1)
    port.chip.pio_write(DATA, 1, 0x5A)
    assert port.status() & OBF == (answer is not None)
    if answer is not None:
        assert port.read() == answer
    assert port.command(0x20) == 0x34
    port.chip.pio_write(DATA, 1, 0x5A)
    assert port.read() == 0xFE  # a second byte is for the keyboard


def test_each_register_of_a_state_is_restored(port: Port) -> None:
    """Each bit is restored, except those that the controller does not have.  A20 cannot be lost, and nothing resets."""
    state = port.chip.state()
    for name, kept, always in (
        ("control", 0xFF, 0), ("output_port", 0xFF, 1), ("output", 0xFF, 0), ("flags", 0x41, 0), ("command", 0xFF, 0),
    ):  # fmt: skip
        for bit in range(9):
            port.chip.restore(state | {name: 1 << bit})
            assert port.chip.state() == state | {name: 1 << bit & kept | always}
    assert port.resets == 0


@pytest.mark.parametrize("before", [(), (0xD4,)])
def test_byte_for_a_device_comes_back_as_no_response(port: Port, before: tuple[int, ...]) -> None:
    """The device is the keyboard or the mouse."""
    for command in before:
        port.chip.pio_write(STATUS, 1, command)
    port.chip.pio_write(DATA, 1, 0xFF)
    assert port.status() & 0x41 == 0x41
    assert port.read() == 0xFE


def test_answer_of_a_command_replaces_an_old_one(port: Port) -> None:
    """A byte that a driver has not read does not confuse it later."""
    port.chip.pio_write(DATA, 1, 0xED)
    assert port.command(0xAA) == 0x55
    assert not port.status() & OBF


def test_port_switches_show_in_the_command_byte(port: Port) -> None:
    """The commands are A7h, A8h, ADh and AEh."""
    for command in (0xA8, 0xAE):
        port.command(command)
    assert port.command(0x20) == 0x04
    for command in (0xA7, 0xAD):
        port.command(command)
    assert port.command(0x20) == 0x34


@pytest.mark.parametrize(("command", "resets"), [(0xFE, 1), (0xF0, 1), (0xFF, 0), (0xFD, 0)])
def test_pulse_of_the_reset_line(port: Port, command: int, resets: int) -> None:
    """A command with bit 0 clear pulses the line.  FFh pulses no line; code for A20 sends it."""
    port.command(command)
    assert port.resets == resets


@pytest.mark.parametrize(("value", "resets"), [(0xDF, 0), (0xDD, 0), (0xDE, 1)])
def test_output_port(port: Port, value: int, resets: int) -> None:
    """A20 can be written and read back.  Bit 0 clear resets."""
    port.command(0xD1, value)
    assert port.resets == resets
    assert port.command(0xD0) == value | 1


def test_saved_state_continues(port: Port) -> None:
    """The state is between a command and its data, with an unread answer."""
    port.chip.pio_write(STATUS, 1, 0xAA)
    port.chip.pio_write(STATUS, 1, 0x60)
    other = Port()
    other.chip.restore(port.chip.state())
    assert other.read() == 0x55
    other.chip.pio_write(DATA, 1, 0x47)
    assert other.command(0x20) == 0x47


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 255), st.booleans()), max_size=60))
def test_no_sequence_breaks_an_invariant(steps: list[tuple[int, int, bool]]) -> None:
    """After random accesses, the input buffer is empty, values fit, and one read empties the output buffer."""
    port = Port()
    for offset, value, write in steps:
        if write:
            port.chip.pio_write(offset, 1, value)
        else:
            assert 0 <= port.chip.pio_read(offset, 1) <= 0xFF
        assert not port.status() & IBF
        assert set(port.chip.state().values()) <= set(range(256))
    port.read()
    assert not port.status() & OBF
