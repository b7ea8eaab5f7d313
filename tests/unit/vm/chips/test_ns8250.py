"""The UART, used as by the drivers of SeaBIOS, Linux and OpenBSD."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmd.vm.chips.ns8250 import (
    DATA,
    FIFO_BYTES,
    IER,
    IER_MSI,
    IER_RDI,
    IER_RLSI,
    IER_THRI,
    IIR_FCR,
    IIR_NONE,
    IIR_RDI,
    IIR_RLSI,
    IIR_THRI,
    IIR_TIMEOUT,
    LCR,
    LSR,
    LSR_BI,
    LSR_DR,
    LSR_EMPTY,
    LSR_FE,
    LSR_FIFO_ERROR,
    LSR_OE,
    MCR,
    MCR_LOOP,
    MSR,
    SCR,
    Uart,
)

FIFO_ON = 0x01
FIFO_ON_TRIGGER_8 = 0x81
IIR_FIFO = 0xC0


class Port:
    """A UART with its output, the changes of its interrupt line, and a count of the calls of `on_room`."""

    def __init__(self) -> None:
        self.sent = bytearray()
        self.levels: list[bool] = []
        self.rooms = 0
        self.uart = Uart(self.levels.append, self.sent.extend, self.on_room)

    def on_room(self) -> None:
        """Count a call."""
        self.rooms += 1

    def line(self) -> bool:
        """Return the level of the interrupt line."""
        return bool(self.levels and self.levels[-1])

    def read(self, register: int) -> int:
        """Read a register."""
        return self.uart.pio_read(register, 1)

    def write(self, register: int, value: int) -> None:
        """Write a register."""
        self.uart.pio_write(register, 1, value)


@pytest.fixture
def port() -> Port:
    """Return a UART after reset."""
    return Port()


def test_a_polling_driver_sends_without_waiting(port: Port) -> None:
    """SeaBIOS waits for both LSR bits before each byte."""
    for byte in b"SeaBIOS":
        assert port.read(LSR) & LSR_EMPTY == LSR_EMPTY
        port.write(DATA, byte)

    assert port.sent == b"SeaBIOS"
    assert port.levels == []


def test_linux_recognises_a_16550a(port: Port) -> None:
    """This is the probe of Linux's 8250 driver, in its order."""
    # IER has exactly four bits.  Otherwise Linux would take the chip for an XScale, or for absent
    port.write(IER, 0)
    assert port.read(IER) & 0x0F == 0
    port.write(IER, 0x0F)
    assert port.read(IER) & 0x0F == 0x0F
    port.write(IER, 0)
    port.write(IER, 0x40)
    assert port.read(IER) & 0x40 == 0
    port.write(IER, 0)
    # Loopback connects RTS to CTS and OUT2 to DCD
    port.write(MCR, MCR_LOOP | 0x0A)
    assert port.read(MSR) & 0xF0 == 0x90
    port.write(MCR, 0)
    # IIR shows a FIFO, and with LCR BFh no registers of a later chip appear
    port.write(LCR, 0xBF)
    port.write(IIR_FCR, 0)
    port.write(LCR, 0)
    port.write(IIR_FCR, FIFO_ON)
    assert port.read(IIR_FCR) >> 6 == 3
    port.write(LCR, 0xBF)
    assert port.read(IIR_FCR) != 0
    port.write(LCR, 0xE0)
    banked = port.read(IIR_FCR)
    assert not (banked ^ port.read(MCR)) & MCR_LOOP
    port.write(LCR, 0)
    port.write(IIR_FCR, FIFO_ON)
    port.write(LCR, 0xBF)
    port.write(IIR_FCR, FIFO_ON | 0x20)
    assert port.read(IIR_FCR) >> 5 == 6  # 7 would be a 16750
    port.write(LCR, 0)


def test_linux_finds_a_working_transmitter_interrupt(port: Port) -> None:
    """These are the two startup tests that set UART_BUG_THRE and UART_BUG_TXEN for broken chips."""
    port.write(IER, IER_THRI)
    first = port.read(IIR_FCR)
    port.write(IER, 0)
    port.write(IER, IER_THRI)
    second = port.read(IIR_FCR)
    port.write(IER, 0)

    assert (first & 0x0F, second & 0x0F) == (IIR_THRI, IIR_THRI)
    assert not port.line()


def test_linux_sends_with_interrupts(port: Port) -> None:
    """Linux enables the interrupt, sends 16 bytes for each, and disables it after the last byte."""
    port.write(IIR_FCR, FIFO_ON_TRIGGER_8)
    pending = bytes(range(40))
    port.write(IER, IER_RDI | IER_RLSI | IER_THRI)
    interrupts = 0
    while port.line():
        interrupts += 1
        assert port.read(IIR_FCR) & 0x0F == IIR_THRI
        assert not port.line()
        for byte in pending[:16]:
            port.write(DATA, byte)
        pending = pending[16:]
        if not pending:
            port.write(IER, IER_RDI | IER_RLSI)

    assert port.sent == bytes(range(40))
    assert interrupts == 3
    assert len(port.levels) == 8  # a rise and a fall for the start and each burst, not for each byte


def test_reading_iir_clears_the_transmitter_interrupt(port: Port) -> None:
    """It is cleared only if IIR reports it, and until the next byte."""
    port.write(IER, IER_THRI)
    assert port.read(IIR_FCR) == IIR_THRI
    assert port.read(IIR_FCR) == IIR_NONE
    port.write(DATA, 0x41)
    assert port.line()
    assert port.read(IIR_FCR) == IIR_THRI


def test_transmitter_interrupt_hidden_by_another_stays(port: Port) -> None:
    """Reading IIR does not clear it while IIR reports received data."""
    port.write(IER, IER_THRI | IER_RDI)
    port.uart.receive(b"x")
    assert port.read(IIR_FCR) == IIR_RDI
    port.read(DATA)
    assert port.read(IIR_FCR) == IIR_THRI


def test_without_fifo_each_byte_gives_an_edge(port: Port) -> None:
    """A driver that acknowledges only by writing THR gets its next interrupt."""
    port.write(IER, IER_THRI)
    port.write(DATA, 1)
    port.write(DATA, 2)
    assert port.levels == [True, False, True, False, True]


def test_enabling_an_enabled_transmitter_interrupt_requests_nothing(port: Port) -> None:
    """To write IER with the same bit again requests no interrupt."""
    port.write(IER, IER_THRI)
    port.read(IIR_FCR)
    port.write(IER, IER_THRI | IER_RDI)
    assert port.read(IIR_FCR) == IIR_NONE


def test_input_fills_the_fifo_and_is_read_in_order(port: Port) -> None:
    """The FIFO takes 16 bytes.  The owner keeps the rest, and is called when there is room."""
    port.write(IIR_FCR, FIFO_ON)
    data = bytes(range(1, 21))
    assert port.uart.receive(data) == FIFO_BYTES

    got = bytearray()
    while port.read(LSR) & LSR_DR:
        assert port.rooms == 0
        got.append(port.read(DATA))

    assert got == data[:16]
    assert port.rooms == 1
    assert port.uart.receive(data[16:]) == 4
    while port.read(LSR) & LSR_DR:
        got.append(port.read(DATA))
    assert got == data
    assert port.rooms == 1  # nothing was refused the second time


def test_without_fifo_there_is_room_for_one_byte(port: Port) -> None:
    """RBR holds one byte."""
    assert port.uart.receive(b"ab") == 1
    assert port.uart.receive(b"b") == 0
    assert port.read(DATA) == ord("a")
    assert port.rooms == 1
    assert port.uart.receive(b"b") == 1


def test_owner_may_deliver_from_within_on_room() -> None:
    """`on_room` is called without the chip's lock."""
    left = bytearray(b"abc")

    def deliver() -> None:
        del left[: uart.receive(bytes(left))]

    uart = Uart(lambda _level: None, len, deliver)
    deliver()
    assert bytes(uart.pio_read(DATA, 1) for _ in range(3)) == b"abc"
    assert not left


def test_flushing_the_fifo_makes_room(port: Port) -> None:
    """A driver that opens the port clears earlier input."""
    port.write(IIR_FCR, FIFO_ON)
    port.uart.receive(bytes(20))
    port.write(IIR_FCR, FIFO_ON | 0x02)
    assert port.read(LSR) == LSR_EMPTY
    assert port.rooms == 1


def test_switching_fifos_clears_them(port: Port) -> None:
    """Enabling and disabling clear them (8.4).  No bytes of a longer FIFO are left in a shorter one."""
    port.write(IIR_FCR, FIFO_ON)
    port.uart.receive(b"abc")
    port.write(IIR_FCR, 0)
    assert port.read(LSR) == LSR_EMPTY
    assert port.read(IIR_FCR) == IIR_NONE
    port.uart.receive(b"d")
    port.write(IIR_FCR, FIFO_ON)
    assert port.read(LSR) == LSR_EMPTY


def test_receive_interrupt_says_timeout_below_the_trigger_level(port: Port) -> None:
    """From the trigger level on, it says "data available".  Both end when the FIFO is empty."""
    port.write(IIR_FCR, FIFO_ON_TRIGGER_8)
    port.write(IER, IER_RDI)
    port.uart.receive(b"1234567")
    assert port.read(IIR_FCR) == IIR_FIFO | IIR_TIMEOUT
    port.uart.receive(b"8")
    assert port.read(IIR_FCR) == IIR_FIFO | IIR_RDI
    for _ in range(8):
        assert port.line()
        port.read(DATA)
    assert not port.line()
    assert port.read(IIR_FCR) == IIR_FIFO | IIR_NONE
    assert port.levels == [True, False]


def test_break_is_seen_in_its_place(port: Port) -> None:
    """It is seen once, between the bytes before and after it."""
    port.write(IIR_FCR, FIFO_ON)
    port.write(IER, IER_RDI | IER_RLSI)
    port.uart.receive(b"a")
    port.uart.send_break()
    port.uart.receive(b"b")

    assert port.read(LSR) == LSR_EMPTY | LSR_DR | LSR_FIFO_ERROR
    assert port.read(DATA) == ord("a")
    assert port.read(IIR_FCR) == IIR_FIFO | IIR_RLSI
    assert port.read(LSR) == LSR_EMPTY | LSR_DR | LSR_BI | LSR_FE
    assert port.read(LSR) == LSR_EMPTY | LSR_DR
    assert port.read(IIR_FCR) == IIR_FIFO | IIR_RDI
    assert port.read(DATA) == 0
    assert port.read(LSR) == LSR_EMPTY | LSR_DR
    assert port.read(DATA) == ord("b")


def test_break_is_not_lost_in_a_full_fifo(port: Port) -> None:
    """The break waits for room, and later input waits too."""
    port.uart.receive(b"a")
    port.uart.send_break()
    assert port.uart.receive(b"b") == 0
    assert port.read(DATA) == ord("a")
    assert port.rooms == 0
    assert port.read(LSR) & LSR_BI
    assert port.read(DATA) == 0
    assert port.rooms == 1


def test_loopback_returns_bytes_and_keeps_them_off_the_line(port: Port) -> None:
    """In loopback, sent bytes are received, and input from outside waits."""
    port.write(IIR_FCR, FIFO_ON)
    port.write(MCR, MCR_LOOP)
    port.write(DATA, 0xAE)
    assert port.uart.receive(b"x") == 0
    assert port.read(LSR) == LSR_EMPTY | LSR_DR
    port.write(DATA, 0x51)
    assert port.read(LSR) == LSR_EMPTY | LSR_DR  # without errors
    assert (port.read(DATA), port.read(DATA)) == (0xAE, 0x51)
    port.write(MCR, 0)
    assert port.sent == b""
    assert port.rooms == 1
    assert port.uart.receive(b"x") == 1


@pytest.mark.parametrize(("fcr", "kept"), [(0, bytes([17])), (FIFO_ON, bytes(range(1, 17)))])
def test_loopback_overrun(port: Port, fcr: int, kept: bytes) -> None:
    """With a FIFO the new byte is lost, and without one the old byte.  LSR shows the overrun once (8.3)."""
    port.write(IIR_FCR, fcr)
    port.write(IER, IER_RLSI)
    port.write(MCR, MCR_LOOP)
    for byte in range(1, 18):
        port.write(DATA, byte)
    assert port.read(IIR_FCR) & 0x0F == IIR_RLSI
    assert port.read(LSR) & LSR_OE
    assert not port.read(LSR) & LSR_OE
    assert bytes(port.read(DATA) for _ in kept) == kept
    assert not port.read(LSR) & LSR_DR


def test_modem_status_shows_changes_once(port: Port) -> None:
    """In loopback four outputs drive four inputs.  The delta bit of RI marks the end of the ring only."""
    assert port.read(MSR) == 0xB0
    port.write(IER, IER_MSI)
    port.write(MCR, MCR_LOOP | 0x04)  # RI rises, the other three fall
    assert port.line()
    assert port.read(IIR_FCR) == 0
    assert port.read(MSR) == 0x4B
    assert not port.line()
    assert port.read(MSR) == 0x40
    port.write(MCR, MCR_LOOP)
    assert port.read(MSR) == 0x04
    port.write(MCR, MCR_LOOP | 0x0F)
    assert port.read(MSR) == 0xFB
    port.write(MCR, 0x0B)
    assert port.read(MSR) == 0xB4


def test_control_registers_are_read_back(port: Port) -> None:
    """The upper bits of MCR and IER do not exist."""
    for register, mask in ((MCR, 0x1F), (IER, 0x0F), (SCR, 0xFF), (LCR, 0xFF)):
        for bit in range(8):
            port.write(register, 1 << bit)
            assert port.read(register) == 1 << bit & mask
            port.write(register, 0)


def test_divisor_and_scratch_are_kept_apart_from_data(port: Port) -> None:
    """DLAB selects the divisor in place of two registers."""
    port.write(LCR, 0x83)
    assert (port.read(DATA), port.read(IER), port.read(LCR)) == (1, 0, 0x83)  # 115200 baud
    for low, high in ((0x35, 0x13), (0xFF, 0xFF), (0, 0xFF), (0xFF, 0), (0x34, 0x12)):
        port.write(DATA, low)
        assert port.read(DATA) == low
        port.write(IER, high)
        assert (port.read(DATA), port.read(IER)) == (low, high)
    port.write(LCR, 0x03)
    assert (port.read(DATA), port.read(IER)) == (0, 0)
    port.write(SCR, 0xA5)
    assert port.read(SCR) == 0xA5
    assert port.sent == b""


def test_status_registers_cannot_be_written(port: Port) -> None:
    """LSR and MSR are read-only."""
    port.write(LSR, 0xFF)
    port.write(MSR, 0xFF)
    assert port.read(LSR) == LSR_EMPTY
    assert port.read(MSR) == 0xB0


def test_saved_state_continues(port: Port) -> None:
    """Bytes, errors, pending requests and the line are restored."""
    port.write(IIR_FCR, FIFO_ON_TRIGGER_8)
    port.write(IER, IER_RDI | IER_THRI)
    port.uart.receive(b"ab")
    port.uart.send_break()
    other = Port()
    other.uart.restore(port.uart.state())

    assert other.line()
    assert other.uart.state() == port.uart.state()
    assert other.read(IIR_FCR) == IIR_FIFO | IIR_TIMEOUT
    assert (other.read(DATA), other.read(DATA)) == (ord("a"), ord("b"))
    assert other.read(LSR) & LSR_BI


def test_registers_after_power_on(port: Port) -> None:
    """The transmitter is empty, the console is connected, and nothing is enabled."""
    assert [port.read(register) for register in range(8)] == [0, 0, IIR_NONE, 0, 0, LSR_EMPTY, 0xB0, 0]
    assert port.levels == []


# Registers of a state, and the largest value that a stream can set.
WIDTHS = {"ier": 0x0F, "fcr": 0xC9, "lcr": 0xFF, "mcr": 0x1F, "msr": 0xFF, "scr": 0xFF, "divisor": 0xFFFF, "lsr": 0x7E}


@pytest.mark.parametrize("name", WIDTHS)
def test_each_register_of_a_state_is_restored(port: Port, name: str) -> None:
    """Each bit is restored, and bits that the register does not have are dropped."""
    state = port.uart.state()
    for bit in range(17):
        port.uart.restore(state | {name: 1 << bit})
        found = port.uart.state()
        assert found == state | {name: 1 << bit & WIDTHS[name] | (LSR_EMPTY if name == "lsr" else 0)}


def test_a_full_receiver_is_restored(port: Port) -> None:
    """A FIFO has 16 bytes, and errors that have not reached its top.  Without FIFOs there is one byte."""
    port.write(IIR_FCR, FIFO_ON)
    state = port.uart.state()
    full: dict[str, int | bytes] = {"rx": bytes(range(16)), "rx_errors": bytes((0, *[0x1E] * 15))}
    port.uart.restore(state | full)
    assert [port.uart.state()[name] for name in full] == list(full.values())
    assert port.read(LSR) == LSR_EMPTY | LSR_DR | LSR_FIFO_ERROR
    for rx, errors in ((bytes(16), bytes(15)), (b"", b"x")):
        with pytest.raises(ValueError, match="uart: receiver of"):
            port.uart.restore(state | {"rx": rx, "rx_errors": errors})

    port.uart.restore(state | full | {"fcr": 0})
    assert port.read(LSR) == LSR_EMPTY | LSR_DR
    assert (port.read(DATA), port.read(LSR)) == (0, LSR_EMPTY)


@pytest.mark.parametrize(("fcr", "level"), [(0x01, 1), (0x41, 4), (0x81, 8), (0xC1, 14)])
def test_trigger_levels(port: Port, fcr: int, level: int) -> None:
    """From so many bytes on, IIR says "data available" (8.4)."""
    port.write(IIR_FCR, fcr)
    port.write(IER, IER_RDI)
    for count in range(1, FIFO_BYTES + 1):
        port.uart.receive(b"x")
        assert port.read(IIR_FCR) == IIR_FIFO | (IIR_RDI if count >= level else IIR_TIMEOUT)


def test_impossible_state_is_refused(port: Port) -> None:
    """A stream cannot create an impossible FIFO."""
    state = port.uart.state()
    with pytest.raises(ValueError, match="receiver of 17 bytes"):
        port.uart.restore(state | {"rx": bytes(17), "rx_errors": bytes(17)})
    with pytest.raises(KeyError):
        port.uart.restore({"rx": b"", "rx_errors": b""})


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("read"), st.integers(0, 7), st.just(0)),
        st.tuples(st.just("write"), st.integers(0, 7), st.integers(0, 255)),
        st.tuples(st.just("receive"), st.just(0), st.integers(0, 40)),
        st.tuples(st.just("break"), st.just(0), st.just(0)),
    ),
    max_size=60,
)


@given(STEPS)
def test_no_sequence_breaks_an_invariant(steps: list[tuple[str, int, int]]) -> None:
    """After random accesses registers are bytes, the FIFO is bounded, the line is right, and the owner was called."""
    port = Port()
    refused = False
    rooms = 0
    for kind, register, value in steps:
        if kind == "read":
            assert 0 <= port.read(register) <= 0xFF
        elif kind == "write":
            port.write(register, value)
        elif kind == "receive":
            data = bytes(value)
            accepted = port.uart.receive(data)
            assert 0 <= accepted <= min(value, FIFO_BYTES)
            refused, rooms = accepted < value, port.rooms
        else:
            port.uart.send_break()
        state = port.uart.state()
        rx, mcr, ier = state["rx"], state["mcr"], state["ier"]
        assert isinstance(rx, bytes)
        assert isinstance(mcr, int)
        assert isinstance(ier, int)
        assert len(rx) <= FIFO_BYTES
        assert port.uart.lsr & LSR_EMPTY == LSR_EMPTY
        assert bool(port.uart.lsr & LSR_DR) == bool(rx)
        if not ier:
            assert not port.line()
        if refused and port.rooms == rooms:  # the owner still waits, so there must be a reason
            assert rx or mcr & MCR_LOOP
    assert all(a != b for a, b in zip(port.levels, port.levels[1:], strict=False))
    twin = Port()
    twin.uart.restore(port.uart.state())
    assert twin.uart.state() == port.uart.state()
    assert twin.line() == port.line()
