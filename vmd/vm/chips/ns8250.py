"""The serial port: a National PC16550D, with its FIFOs, as drivers see it.

The line is infinitely fast: a byte written to the transmitter has left at once, so that LSR always says
"empty" and a guest never polls for it; and received bytes arrive together, so that a FIFO below its trigger
level times out at once.  Section numbers are those of the PC16550D data sheet.

Unlike vmd, whose ns8250 has no FIFO, because a driver that knows one costs a sixteenth of the interrupts.
OUT2, which gates the interrupt on a PC's board, does not here (nor in vmd).
"""

from vmd import threads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

# Registers, by offset; RBR, THR and IER give way to the divisor latch while LCR.DLAB is set
DATA, IER, IIR_FCR, LCR, MCR, LSR, MSR, SCR = range(8)

IER_RDI = 0x01  # received data available
IER_THRI = 0x02  # transmitter holding register empty
IER_RLSI = 0x04  # receiver line status
IER_MSI = 0x08  # modem status

IIR_NONE = 0x01
IIR_MSI = 0x00
IIR_THRI = 0x02
IIR_RDI = 0x04
IIR_RLSI = 0x06
IIR_TIMEOUT = 0x0C
IIR_FIFO = 0xC0  # FIFOs are enabled

FCR_ENABLE = 0x01
FCR_CLEAR_RX = 0x02
FCR_KEPT = 0xC9  # enable, DMA mode, trigger level; the two reset bits clear themselves

LCR_DLAB = 0x80

MCR_DTR = 0x01
MCR_RTS = 0x02
MCR_OUT1 = 0x04
MCR_OUT2 = 0x08
MCR_LOOP = 0x10

LSR_DR = 0x01
LSR_OE = 0x02
LSR_PE = 0x04
LSR_FE = 0x08
LSR_BI = 0x10
LSR_ERRORS = LSR_OE | LSR_PE | LSR_FE | LSR_BI
LSR_EMPTY = 0x60  # THRE and TEMT: see above
LSR_FIFO_ERROR = 0x80

MSR_TERI = 0x04  # of the delta bits the one that shows an edge, not a change
MSR_DELTAS = 0x0F
MSR_CTS = 0x10
MSR_DSR = 0x20
MSR_RI = 0x40
MSR_DCD = 0x80
MSR_CONNECTED = MSR_DCD | MSR_DSR | MSR_CTS  # the console is always there

FIFO_BYTES = 16
TRIGGER_LEVELS = (1, 4, 8, 14)  # 8.4
DIVISOR_115200 = 1
BREAK = LSR_BI | LSR_FE  # what a break leaves in LSR, with a zero byte (8.3)

ONE_BYTE = tuple(bytes([value]) for value in range(256))


class Uart:
    """One 16550A.  The guest's side is called on vCPU threads, `receive` and `send_break` on the event thread.

    `irq(level)` is told every change of the interrupt line, in order, under this chip's lock.
    `transmit(data)` takes one byte at a time from any vCPU thread, two of them at once if the guest does that.
    `on_room()` runs on a vCPU thread once the guest has emptied a receiver that refused something; it may call
    `receive`.
    """

    pio_width = 1

    def __init__(
        self,
        irq: "Callable[[bool], None]",
        transmit: "Callable[[bytes], object]",
        on_room: "Callable[[], None]" = lambda: None,
    ) -> None:
        self.ier = 0
        self.fcr = 0
        self.lcr = 0
        self.mcr = 0
        self.lsr = LSR_EMPTY
        self.msr = MSR_CONNECTED
        self.scr = 0
        self.divisor = DIVISOR_115200
        self._rx = bytearray()  # the receiver FIFO, or RBR alone
        self._rx_errors = bytearray()  # for each byte what LSR shows once it is at the top (8.3)
        self._thri = False  # the transmitter's interrupt is pending, enabled or not
        self._level = False
        self._refused = False  # the owner has input left that did not fit
        self._break = False  # a break waits for room
        self._plain = True  # a byte for THR concerns nobody but the line
        self._irq = irq
        self._transmit = transmit
        self._on_room = on_room
        self._lock = threads.Lock()

    # ---- the guest's side

    def pio_read(self, offset: int, size: int) -> int:
        """Read a register."""
        if offset == LSR:
            lsr = self.lsr
            if not lsr & LSR_ERRORS:  # reading has no effect: spare polling drivers the lock
                return lsr
        room = False
        with self._lock:
            if offset == DATA:
                if self.lcr & LCR_DLAB:
                    value = self.divisor & 0xFF
                else:
                    value = self._pop()
                    room = self._has_news_of_room()
            elif offset == IER:
                value = self.divisor >> 8 if self.lcr & LCR_DLAB else self.ier
            elif offset == IIR_FCR:
                value = self._read_iir()
            elif offset == LCR:
                value = self.lcr
            elif offset == MCR:
                value = self.mcr
            elif offset == LSR:
                value = self.lsr
                self.lsr &= ~LSR_ERRORS
            elif offset == MSR:
                value = self.msr
                self.msr &= ~MSR_DELTAS
            else:
                value = self.scr
            self._update_irq()
        if room:
            self._on_room()
        return value

    def pio_write(self, offset: int, size: int, value: int) -> None:
        """Write a register."""
        if offset == DATA and self._plain:
            self._transmit(ONE_BYTE[value])
            return
        out = room = False
        with self._lock:
            if offset == DATA:
                if self.lcr & LCR_DLAB:
                    self.divisor = self.divisor & 0xFF00 | value
                else:
                    out = self._write_thr(value)
            elif offset == IER:
                if self.lcr & LCR_DLAB:
                    self.divisor = self.divisor & 0x00FF | value << 8
                else:
                    self._write_ier(value)
            elif offset == IIR_FCR:
                self._write_fcr(value)
            elif offset == LCR:
                self.lcr = value
            elif offset == MCR:
                self._write_mcr(value)
            elif offset == SCR:
                self.scr = value
            # LSR and MSR are for reading; the data sheet reserves writing them for factory tests.
            self._plain = not (self.lcr & LCR_DLAB or self.mcr & MCR_LOOP or self.ier & IER_THRI)
            room = self._has_news_of_room()
            self._update_irq()
        if out:
            self._transmit(ONE_BYTE[value])
        if room:
            self._on_room()

    # ---- the line's side

    def receive(self, data: bytes) -> int:
        """Take input and return how many bytes fitted; if not all did, `on_room` will be called."""
        with self._lock:
            accepted = 0
            # The modem test's loop disconnects the line; rather than lost, input then waits.
            if not self._break and not self.mcr & MCR_LOOP:
                accepted = min(len(data), self._room())
                for byte in data[:accepted]:
                    self._push(byte, 0)
                self._update_irq()
            self._refused = accepted < len(data)
            return accepted

    def send_break(self) -> None:
        """Let the line break; it stands behind the input that was accepted before."""
        with self._lock:
            self._break = True
            self._place_break()
            self._update_irq()

    # ---- send and receive

    def state(self) -> dict[str, int | bytes]:
        """Return what `restore` takes."""
        with self._lock:
            return {
                "ier": self.ier,
                "fcr": self.fcr,
                "lcr": self.lcr,
                "mcr": self.mcr,
                "lsr": self.lsr,
                "msr": self.msr,
                "scr": self.scr,
                "divisor": self.divisor,
                "rx": bytes(self._rx),
                "rx_errors": bytes(self._rx_errors),
                "thri": int(self._thri),
                "break": int(self._break),
            }

    def restore(self, state: "dict[str, int | bytes]") -> None:
        """Continue where another one stopped; the interrupt line is driven to where it was.

        Raises:
            KeyError, TypeError, ValueError: this is no state of a UART.
        """
        rx, rx_errors = bytes(state["rx"]), bytes(state["rx_errors"])
        if len(rx) != len(rx_errors) or len(rx) > FIFO_BYTES:
            raise ValueError(f"uart: receiver of {len(rx)} bytes with {len(rx_errors)} error bytes")
        register = {name: int(value) for name, value in state.items() if not name.startswith("rx")}
        with self._lock:
            self.ier = register["ier"] & 0x0F
            self.fcr = register["fcr"] & FCR_KEPT
            self.lcr = register["lcr"] & 0xFF
            self.mcr = register["mcr"] & 0x1F
            self.msr = register["msr"] & 0xFF
            self.scr = register["scr"] & 0xFF
            self.divisor = register["divisor"] & 0xFFFF
            self._rx[:] = rx[: self._capacity()]
            self._rx_errors[:] = bytes(error & LSR_ERRORS for error in rx_errors[: self._capacity()])
            self.lsr = register["lsr"] & LSR_ERRORS | LSR_EMPTY
            self._show_top()
            self._thri = bool(register["thri"])
            self._break = bool(register["break"])
            self._plain = not (self.lcr & LCR_DLAB or self.mcr & MCR_LOOP or self.ier & IER_THRI)
            self._update_irq()

    # ---- receiver

    def _capacity(self) -> int:
        return FIFO_BYTES if self.fcr & FCR_ENABLE else 1

    def _room(self) -> int:
        return self._capacity() - len(self._rx)

    def _push(self, byte: int, errors: int) -> None:
        if self._room() <= 0:
            self.lsr |= LSR_OE
            if self.fcr & FCR_ENABLE:
                return  # the shift register is overwritten, the FIFO is not (8.3)
            self._clear_rx()
        self._rx.append(byte)
        self._rx_errors.append(errors)
        self._show_top()

    def _pop(self) -> int:
        if not self._rx:
            return 0
        self._rx_errors.pop(0)
        byte = self._rx.pop(0)
        self._show_top()
        return byte

    def _clear_rx(self) -> None:
        self._rx.clear()
        self._rx_errors.clear()
        self._show_top()

    def _show_top(self) -> None:
        """Bring LSR in step with the FIFO; an error shows when its byte reaches the top, once."""
        lsr = self.lsr & ~(LSR_DR | LSR_FIFO_ERROR)
        if self._rx:
            lsr |= LSR_DR | self._rx_errors[0]
            self._rx_errors[0] = 0
            if any(self._rx_errors):
                lsr |= LSR_FIFO_ERROR
        self.lsr = lsr

    def _place_break(self) -> None:
        if self._break and self._room() > 0 and not self.mcr & MCR_LOOP:
            self._break = False
            self._push(0, BREAK)

    def _has_news_of_room(self) -> bool:
        """Place a waiting break, and return whether the owner should now be called."""
        self._place_break()
        if self._refused and not self._rx and not self.mcr & MCR_LOOP:
            self._refused = False
            return True
        return False

    # ---- transmitter, interrupts, modem

    def _write_thr(self, byte: int) -> bool:
        """Take a byte; return whether it goes out."""
        if self._thri and not self.fcr & FCR_ENABLE:
            # Writing THR takes the request back until the byte has left (8.7), and a driver without FIFO may
            # rely on the edge that then follows.  One with FIFO has had its edge with the first byte since
            # it read IIR: the other fifteen need not cost two interrupt calls each.
            self._thri = False
            self._update_irq()
        self._thri = True
        if self.mcr & MCR_LOOP:
            self._push(byte, 0)
            return False
        return True

    def _write_ier(self, value: int) -> None:
        # Enabling the interrupt while the transmitter is empty requests one; drivers start sending this way.
        if value & ~self.ier & IER_THRI:
            self._thri = True
        self.ier = value & 0x0F

    def _write_fcr(self, value: int) -> None:
        if (value ^ self.fcr) & FCR_ENABLE or value & FCR_CLEAR_RX:
            self._clear_rx()
        # Without the enable bit the others are not programmed (8.4).
        self.fcr = value & FCR_KEPT if value & FCR_ENABLE else 0

    def _write_mcr(self, value: int) -> None:
        self.mcr = value & 0x1F
        lines = MSR_CONNECTED
        if self.mcr & MCR_LOOP:  # the four outputs drive the four inputs (8.6)
            lines = (
                (MSR_CTS if value & MCR_RTS else 0)
                | (MSR_DSR if value & MCR_DTR else 0)
                | (MSR_RI if value & MCR_OUT1 else 0)
                | (MSR_DCD if value & MCR_OUT2 else 0)
            )
        changed = (self.msr ^ lines) >> 4
        if lines & MSR_RI:
            changed &= ~MSR_TERI
        self.msr = lines | self.msr & MSR_DELTAS | changed

    def _pending(self) -> int:
        """Return the interrupt of the highest priority (8.5)."""
        ier = self.ier
        if ier & IER_RLSI and self.lsr & LSR_ERRORS:
            return IIR_RLSI
        if ier & IER_RDI and self._rx:
            full = not self.fcr & FCR_ENABLE or len(self._rx) >= TRIGGER_LEVELS[self.fcr >> 6]
            return IIR_RDI if full else IIR_TIMEOUT
        if ier & IER_THRI and self._thri:
            return IIR_THRI
        if ier & IER_MSI and self.msr & MSR_DELTAS:
            return IIR_MSI
        return IIR_NONE

    def _read_iir(self) -> int:
        pending = self._pending()
        if pending == IIR_THRI:
            self._thri = False
        return pending | (IIR_FIFO if self.fcr & FCR_ENABLE else 0)

    def _update_irq(self) -> None:
        level = self._pending() != IIR_NONE
        if level != self._level:
            self._level = level
            self._irq(level)
