"""The serial port: a National PC16550D with its FIFOs.

The line is infinitely fast.  A byte that is written to the transmitter has left at once: LSR always says "empty", and a
guest never has to poll for that.  Received bytes arrive at the same time: a FIFO below its trigger level times out at
once.  Section numbers are those of the PC16550D data sheet.

Unlike vmd, whose ns8250 has no FIFO, because with a FIFO there are 16 times fewer interrupts.
On the board of a PC, OUT2 gates the interrupt.  Here (and in vmd) it does not.
"""

from vmd import threads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

# Registers, by offset.  While LCR.DLAB is set, the divisor latch is in the place of RBR, THR and IER.
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

MSR_TERI = 0x04  # this delta bit shows a trailing edge; the others show any change
MSR_DELTAS = 0x0F
MSR_CTS = 0x10
MSR_DSR = 0x20
MSR_RI = 0x40
MSR_DCD = 0x80
MSR_CONNECTED = MSR_DCD | MSR_DSR | MSR_CTS  # the console is always connected

FIFO_BYTES = 16
TRIGGER_LEVELS = (1, 4, 8, 14)  # 8.4
DIVISOR_115200 = 1
BREAK = LSR_BI | LSR_FE  # a break sets these bits of LSR, and comes with a zero byte (8.3)

ONE_BYTE = tuple(bytes([value]) for value in range(256))


class Uart:
    """One 16550A.  Ports are accessed on vCPU threads.  `receive` and `send_break` run on the event thread.

    `irq(level)` is called for every change of the interrupt line, in order, under this chip's lock.
    `transmit(data)` is called with one byte, on a vCPU thread; two vCPUs may call it at the same time.
    `on_room()` is called on a vCPU thread when the guest has emptied a receiver that had refused input.  It may call
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
        self._rx = bytearray()  # the receiver FIFO; only RBR, while FIFOs are disabled
        self._rx_errors = bytearray()  # for each byte, the bits of LSR that are set when it reaches the top (8.3)
        self._thri = False  # the transmitter's interrupt is pending, enabled or not
        self._level = False
        self._refused = False  # the last input did not fit completely
        self._break = False  # a break waits for room in the receiver
        self._plain = True  # a byte for THR only has to be transmitted, and changes no register or interrupt
        self._irq = irq
        self._transmit = transmit
        self._on_room = on_room
        self._lock = threads.Lock()

    # ---- the guest's side

    def pio_read(self, offset: int, size: int) -> int:
        """Read a register."""
        if offset == LSR:
            lsr = self.lsr
            if not lsr & LSR_ERRORS:  # without the lock: drivers poll this, and the read changes nothing
                return lsr
        room = False
        with self._lock:
            if offset == DATA:
                if self.lcr & LCR_DLAB:
                    value = self.divisor & 0xFF
                else:
                    value = self._pop()
                    room = self._has_room_again()
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
            # Writes to LSR and MSR are ignored: the data sheet reserves them for factory tests.
            self._plain = not (self.lcr & LCR_DLAB or self.mcr & MCR_LOOP or self.ier & IER_THRI)
            room = self._has_room_again()
            self._update_irq()
        if out:
            self._transmit(ONE_BYTE[value])
        if room:
            self._on_room()

    # ---- the line's side

    def receive(self, data: bytes) -> int:
        """Take input, and return how many bytes were accepted.  If not all were, `on_room` is called later."""
        with self._lock:
            accepted = 0
            # Loopback mode disconnects the line: input then waits, so that it is not lost.
            if not self._break and not self.mcr & MCR_LOOP:
                accepted = min(len(data), self._room())
                for byte in data[:accepted]:
                    self._push(byte, 0)
                self._update_irq()
            self._refused = accepted < len(data)
            return accepted

    def send_break(self) -> None:
        """Receive a break, after the input that was accepted before."""
        with self._lock:
            self._break = True
            self._place_break()
            self._update_irq()

    # ---- send and receive

    def state(self) -> dict[str, int | bytes]:
        """Return the state, for `restore`."""
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
        """Continue from a saved state, and drive the interrupt line as it was.

        Raises:
            KeyError, TypeError, ValueError: this is not the state of a UART.
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
                return  # only the shift register is overwritten, not the FIFO (8.3)
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
        """Set LSR for the top of the FIFO.  The errors of a byte are shown once, when it reaches the top."""
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

    def _has_room_again(self) -> bool:
        """Put a waiting break into the receiver.  Return whether `on_room` has to be called now."""
        self._place_break()
        if self._refused and not self._rx and not self.mcr & MCR_LOOP:
            self._refused = False
            return True
        return False

    # ---- transmitter, interrupts, modem

    def _write_thr(self, byte: int) -> bool:
        """Take a byte for the transmitter.  Return whether it has to be transmitted."""
        if self._thri and not self.fcr & FCR_ENABLE:
            # Writing THR clears the interrupt until the byte has left (8.7).  A driver that uses no FIFO may rely on
            # the edge that follows.  A driver that uses the FIFO got its edge with the first byte after it read IIR,
            # so the other fifteen bytes do not lower and raise the line.
            self._thri = False
            self._update_irq()
        self._thri = True
        if self.mcr & MCR_LOOP:
            self._push(byte, 0)
            return False
        return True

    def _write_ier(self, value: int) -> None:
        # If the interrupt is enabled while the transmitter is empty, it is raised: drivers begin to send by this.
        if value & ~self.ier & IER_THRI:
            self._thri = True
        self.ier = value & 0x0F

    def _write_fcr(self, value: int) -> None:
        if (value ^ self.fcr) & FCR_ENABLE or value & FCR_CLEAR_RX:
            self._clear_rx()
        # If the enable bit is 0, the other bits are not programmed (8.4).
        self.fcr = value & FCR_KEPT if value & FCR_ENABLE else 0

    def _write_mcr(self, value: int) -> None:
        self.mcr = value & 0x1F
        lines = MSR_CONNECTED
        if self.mcr & MCR_LOOP:  # in loopback mode the four outputs drive the four inputs (8.6)
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
        """Return the pending interrupt of the highest priority (8.5), or IIR_NONE."""
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
