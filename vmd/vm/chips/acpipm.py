"""ACPI fixed hardware: power button, sleep control and the power management timer (ACPI 6.4, 4.8).

One block of twelve ports, which the FADT describes:

     0  PM1_STS  u16   write 1 to clear
     2  PM1_EN   u16
     4  PM1_CNT  u16
     8  PM_TMR   u32   3.579545 MHz

There is no general-purpose event block (FADT GPE0_BLK_LEN 0) and no SMI command: ACPI mode is always on.
Upstream's vmd has no ACPI, and asks its guests to shut down by vmmci only.
"""

import time

from vmd import threads
from vmd.vm.chips.wakeup import Wakeup

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmd.vm.chips.wakeup import Schedule

PM1_STS, PM1_EN, PM1_CNT, PM_TMR = 0, 2, 4, 8  # offsets; the FADT has them, too
TIMER_BITS = 32  # FADT: TMR_VAL_EXT set
TIMER_HZ = 3579545

STS_TMR = 1 << 0  # the timer's top bit changed
STS_PWRBTN = 1 << 8
STS_WAK = 1 << 15
STS_CLEARABLE = STS_TMR | STS_PWRBTN | STS_WAK
EN_MASK = STS_TMR | 1 << 5 | STS_PWRBTN | 1 << 9 | 1 << 10  # GBL, SLPBTN and RTC never happen here

CNT_SCI_EN = 1 << 0
CNT_BM_RLD = 1 << 1
CNT_SLP_TYP = 7 << 10
CNT_SLP_EN = 1 << 13
CNT_KEPT = CNT_BM_RLD | CNT_SLP_TYP  # GBL_RLS and SLP_EN read as 0

# The sleep types that switch off.  5 is the value in \_S5.  The APM power-off of SeaBIOS writes 0, as in QEMU's \_S5.
SLP_TYP_OFF = (5 << 10, 0 << 10)

TIMER_MASK = (1 << TIMER_BITS) - 1
TIMER_HALF = 1 << TIMER_BITS - 1  # ticks from one change of the top bit to the next
WAIT_MAX_S = 60.0  # cancelled timers stay in the event loop until they are due: this bounds their number


class AcpiPm:
    """The PM block of one VM.  Ports are accessed on vCPU threads, and `power_button` runs on the event thread.

    `irq(level)` is called for every change of the SCI, which is level-triggered, under this chip's lock.
    `monotonic()` is the machine's time, which stops while it is paused.
    `power_off` and `on_button_acknowledged` run on a vCPU thread.  Without `schedule`, a timer overflow sets its bit in
    PM1_STS when the guest accesses a port, and raises no SCI before.
    """

    PORTS = 12

    def __init__(
        self,
        irq: "Callable[[bool], None]",
        power_off: "Callable[[], None]",
        on_button_acknowledged: "Callable[[], None]" = lambda: None,
        monotonic: "Callable[[], float]" = time.monotonic,
        schedule: "Schedule | None" = None,
    ) -> None:
        self.on_button_acknowledged = on_button_acknowledged
        self._irq = irq
        self._power_off = power_off
        self._monotonic = monotonic
        self._lock = threads.Lock()
        self._status = 0
        self._enable = 0
        self._control = CNT_SCI_EN
        self._level = False
        self._start_s = monotonic()
        self._halves = 0  # changes of the timer's top bit that PM1_STS has shown
        self._wakeup = Wakeup(schedule, monotonic, self._lock, self._on_timer) if schedule is not None else None

    # ---- the host's side

    @property
    def power_button_enabled(self) -> bool:
        """Whether the guest has enabled the button, so that it will notice that the button is pressed."""
        return bool(self._enable & STS_PWRBTN)

    def power_button(self) -> None:
        """Press the button once.  `on_button_acknowledged` is called when the guest has noticed it."""
        with self._lock:
            self._status |= STS_PWRBTN
            self._update_sci()

    # ---- the guest's side

    def pio_read(self, offset: int, size: int) -> int:
        """Read one or more registers."""
        if offset == PM_TMR:  # first, because guests use it as a clock source, and read it often
            return int((self._monotonic() - self._start_s) * TIMER_HZ) & TIMER_MASK & (1 << 8 * size) - 1
        with self._lock:
            self._look_at_timer()
            self._update_sci()
            value = self._status | self._enable << 16 | self._control << 32 | self._ticks() << 64
        return value >> 8 * offset & (1 << 8 * size) - 1

    def pio_write(self, offset: int, size: int, value: int) -> None:
        """Write one or more registers, or some bytes of a register."""
        acknowledged = power_off = False
        with self._lock:
            self._look_at_timer()
            for index in range(offset, offset + size):
                byte = value & 0xFF
                value >>= 8
                register, shift = index & ~1, (index & 1) * 8
                if register == PM1_STS:
                    cleared = self._status & byte << shift & STS_CLEARABLE
                    self._status &= ~cleared
                    # Only if the button is enabled: at boot, a guest clears all bits, and has not noticed the button.
                    acknowledged |= bool(cleared & self._enable & STS_PWRBTN)
                elif register == PM1_EN:
                    self._enable = (self._enable & ~(0xFF << shift) | byte << shift) & EN_MASK
                elif register == PM1_CNT:
                    written = self._control & ~(0xFF << shift) | byte << shift
                    self._control = written & CNT_KEPT | CNT_SCI_EN
                    # The DSDT has no other sleep state: a guest that tries one stays awake.
                    power_off |= bool(written & CNT_SLP_EN) and written & CNT_SLP_TYP in SLP_TYP_OFF
            self._update_sci()
            self._arm_timer()
        if acknowledged:
            self.on_button_acknowledged()
        if power_off:
            self._power_off()

    # ---- send and receive

    def state(self) -> dict[str, int]:
        """Return the state, for `restore`.  It includes the timer, so the guest's clock does not jump."""
        with self._lock:
            self._look_at_timer()
            return {
                "status": self._status,
                "enable": self._enable,
                "control": self._control,
                "ticks": self._ticks(),
            }

    def restore(self, state: dict[str, int]) -> None:
        """Continue from a saved state, and drive the SCI as it was.

        Raises:
            KeyError, TypeError: this is not the state of a PM block.
        """
        with self._lock:
            self._status = state["status"] & STS_CLEARABLE
            self._enable = state["enable"] & EN_MASK
            self._control = state["control"] & CNT_KEPT | CNT_SCI_EN
            ticks = state["ticks"] & TIMER_MASK
            self._start_s = self._monotonic() - (ticks + 0.5) / TIMER_HZ  # the fraction of the tick is arbitrary
            self._halves = ticks // TIMER_HALF
            self._update_sci()
            self._arm_timer()

    # ---- inside

    def _elapsed_ticks(self) -> int:
        return int((self._monotonic() - self._start_s) * TIMER_HZ)

    def _ticks(self) -> int:
        return self._elapsed_ticks() & TIMER_MASK

    def _look_at_timer(self) -> None:
        halves = self._elapsed_ticks() // TIMER_HALF
        if halves != self._halves:
            self._halves = halves
            self._status |= STS_TMR

    def _update_sci(self) -> None:
        level = self._status & self._enable != 0
        if level != self._level:
            self._level = level
            self._irq(level)

    def _arm_timer(self) -> None:
        """Arrange a look at the time when the top bit changes, if that interrupts and its bit is not set yet."""
        if self._wakeup is not None and self._enable & STS_TMR and not self._status & STS_TMR:
            due_s = self._start_s + (self._halves + 1) * TIMER_HALF / TIMER_HZ
            self._wakeup.within(min(due_s - self._monotonic(), WAIT_MAX_S))

    def _on_timer(self) -> None:
        self._look_at_timer()
        self._update_sci()
        self._arm_timer()
