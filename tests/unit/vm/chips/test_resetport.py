"""The two reset ports, CF9h and 92h."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmd.vm.chips.resetport import ResetPort, SystemControlA


class Count:
    """Counts calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> None:
        """Count a call."""
        self.calls += 1


def test_linux_resets_through_cf9() -> None:
    """Linux writes the kind of reset first, and then sets the reset bit."""
    reset = Count()
    port = ResetPort(reset)
    port.pio_write(0, 1, port.pio_read(0, 1) & ~0x0E | 0x02)
    assert reset.calls == 0
    assert port.pio_read(0, 1) == 0x02
    port.pio_write(0, 1, 0x06)
    assert reset.calls == 1
    assert port.pio_read(0, 1) == 0x02


@pytest.mark.parametrize(("value", "resets"), [(0x00, 0), (0x02, 0), (0x04, 1), (0x0E, 1), (0xFB, 0)])
def test_cf9_resets_on_bit_2(value: int, resets: int) -> None:
    """ACPI's RESET_VALUE is a single write.  A soft reset restarts the VM too."""
    reset = Count()
    port = ResetPort(reset)
    assert port.pio_read(0, 1) == 0
    port.pio_write(0, 1, value)
    assert (reset.calls, port.pio_read(0, 1)) == (resets, value & 0x02)
    port.restore({"control": value})
    assert (reset.calls, port.pio_read(0, 1)) == (resets, value & 0x02)


@pytest.mark.parametrize(("value", "resets", "shown"), [(0x00, 0, 0x00), (0x02, 0, 0x02), (0x03, 1, 0x02)])
def test_port_92(value: int, resets: int, shown: int) -> None:
    """Bit 0 resets.  Bit 1 is the A20 gate, which is open at first."""
    reset = Count()
    port = SystemControlA(reset)
    assert port.pio_read(0, 1) == 0x02
    port.pio_write(0, 1, value)
    assert reset.calls == resets
    assert port.pio_read(0, 1) == shown
    port.restore({"control": value | 0xFC})
    assert (reset.calls, port.pio_read(0, 1)) == (resets, shown)


@given(st.lists(st.integers(0, 255), max_size=20))
def test_state_is_restored(values: list[int]) -> None:
    """The state is restored after any writes."""
    for kind in (ResetPort, SystemControlA):
        port, other = kind(Count()), kind(Count())
        for value in values:
            port.pio_write(0, 1, value)
        other.restore(port.state())
        assert other.pio_read(0, 1) == port.pio_read(0, 1)
