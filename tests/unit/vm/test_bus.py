"""The bus: which device answers an access.  No access of a guest is an error (hostile 51)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmd.errors import GuestError
from vmd.log import log
from vmd.vm.bus import Bus, all_ones


class Recorder:
    """A device that records its accesses and answers with its own pattern of bytes."""

    def __init__(self, mark: int) -> None:
        self.mark = mark
        self.reads: list[tuple[int, int]] = []
        self.writes: list[tuple[int, int, int]] = []

    def pio_read(self, offset: int, size: int) -> int:
        """Return the bytes mark+offset, mark+offset+1, ..."""
        self.reads.append((offset, size))
        return int.from_bytes(bytes(self.mark + offset + i & 0xFF for i in range(size)), "little")

    def pio_write(self, offset: int, size: int, value: int) -> None:
        """Record the access."""
        self.writes.append((offset, size, value))

    mmio_read = pio_read
    mmio_write = pio_write


class ByteRecorder(Recorder):
    """A recorder whose ports are 8 bits wide."""

    pio_width = 1


class Refuser:
    """A device that raises GuestError for every access."""

    def pio_read(self, offset: int, size: int) -> int:
        """Raise GuestError."""
        raise GuestError("no")

    def pio_write(self, offset: int, size: int, value: int) -> None:
        """Raise GuestError."""
        raise GuestError("no")

    mmio_read = pio_read
    mmio_write = pio_write


class Broken(Recorder):
    """A device with a bug in our code."""

    def pio_read(self, offset: int, size: int) -> int:
        """Raise an exception that is not for guests."""
        raise ZeroDivisionError


@pytest.fixture
def bus() -> Bus:
    """Return an empty bus."""
    return Bus()


@pytest.mark.parametrize(("size", "ones"), [(1, 0xFF), (2, 0xFFFF), (4, 0xFFFFFFFF)])
def test_unclaimed_port_reads_as_all_ones_and_swallows_writes(bus: Bus, size: int, ones: int) -> None:
    """Hostile input 51: without a device, every bit of a port reads as 1."""
    assert bus.pio_read(0x80, size) == ones
    bus.pio_write(0x80, size, 0)
    assert bus.unclaimed == 2 * size


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 7, 8])
def test_unclaimed_memory_reads_as_all_ones_and_swallows_writes(bus: Bus, size: int) -> None:
    """Hostile input 51: without a device, every bit of memory reads as 1, in every size that KVM may pass."""
    assert bus.mmio_read(0xF0000000, size) == (1 << 8 * size) - 1
    bus.mmio_write(0xF0000000, size, 0)
    assert bus.unclaimed == 2 * size


def test_access_reaches_the_device_at_its_offset(bus: Bus) -> None:
    """The device gets the offset from its first port, and the full width of the access."""
    device = Recorder(0x10)
    bus.add_pio(0x100, 8, device)

    assert bus.pio_read(0x104, 4) == 0x17161514
    bus.pio_write(0x102, 2, 0xABCD)

    assert device.reads == [(4, 4)]
    assert device.writes == [(2, 2, 0xABCD)]
    assert bus.unclaimed == 0


def test_wide_access_to_an_8_bit_chip_is_cut_into_bytes(bus: Bus) -> None:
    """The chip gets one byte after another, the lowest port first, as from an ISA bridge."""
    device = ByteRecorder(0x20)
    bus.add_pio(0x70, 4, device)

    assert bus.pio_read(0x70, 2) == 0x2120
    bus.pio_write(0x70, 4, 0x44332211)

    assert device.reads == [(0, 1), (1, 1)]
    assert device.writes == [(0, 1, 0x11), (1, 1, 0x22), (2, 1, 0x33), (3, 1, 0x44)]


def test_access_that_straddles_devices_is_shared_between_them(bus: Bus) -> None:
    """Each byte goes to the device of its port.  Bytes of unclaimed ports read as all ones."""
    low, high = Recorder(0x10), Recorder(0x50)
    bus.add_pio(0x100, 2, low)
    bus.add_pio(0x103, 1, high)

    assert bus.pio_read(0x101, 4) == 0xFF50FF11
    bus.pio_write(0x101, 4, 0x44332211)

    assert low.writes == [(1, 1, 0x11)]
    assert high.writes == [(0, 1, 0x33)]


def test_access_that_begins_before_a_device_still_reaches_it(bus: Bus) -> None:
    """A word is read at the port before the device.  Its upper byte comes from the device."""
    bus.add_pio(0x101, 1, Recorder(0x10))

    assert bus.pio_read(0x100, 2) == 0x10FF


def test_access_past_the_last_port_is_harmless(bus: Bus) -> None:
    """Port FFFFh is the last one; there is no port 10000h."""
    device = Recorder(0x10)
    bus.add_pio(0xFFFE, 2, device)

    assert bus.pio_read(0xFFFE, 4) == 0xFFFF1110
    bus.pio_write(0xFFFF, 4, 0x01020304)
    assert device.writes == [(1, 1, 0x04)]


def test_bar_beyond_the_port_space_answers_no_access(bus: Bus) -> None:
    """A guest may write any address into an I/O BAR."""
    bus.add_pio(0xFFFFFF00, 0x100, Recorder(0))
    assert bus.pio_read(0xFF00, 1) == 0xFF
    bus.remove_pio(0xFFFFFF00, 0x100)


def test_a_moved_device_answers_only_at_its_new_place(bus: Bus) -> None:
    """To remove a device and add it elsewhere moves it."""
    device = Recorder(0x10)
    bus.add_pio(0xC000, 0x20, device)
    bus.remove_pio(0xC000, 0x20)
    bus.add_pio(0xD000, 0x20, device)

    assert bus.pio_read(0xC000, 1) == 0xFF
    assert bus.pio_read(0xD000, 1) == 0x10


def test_first_claim_wins_until_it_is_removed(bus: Bus) -> None:
    """A BAR at a chip's ports does not hide the chip."""
    chip, bar = Recorder(0x10), Recorder(0x50)
    bus.add_pio(0x3F8, 8, chip)
    bus.add_pio(0x3F0, 0x20, bar)

    assert bus.pio_read(0x3F8, 1) == 0x10
    assert bus.pio_read(0x3F7, 1) == 0x57
    bus.remove_pio(0x3F8, 8)
    assert bus.pio_read(0x3F8, 1) == 0x58


def test_removing_an_absent_device_is_an_error(bus: Bus) -> None:
    """The error is ours, not the guest's: it is a ValueError."""
    with pytest.raises(ValueError, match="no device at 0x10-0x13"):
        bus.remove_pio(0x10, 4)
    with pytest.raises(ValueError, match="no device at 0x1000-0x1fff"):
        bus.remove_mmio(0x1000, 0x1000)


def test_memory_device_is_found_moved_and_cut(bus: Bus) -> None:
    """An aligned access of a usual size stays whole.  Accesses of odd sizes, and across the end, are cut into bytes."""
    device = Recorder(0)
    bus.add_mmio(0xFEB00000, 0x1000, device)

    assert bus.mmio_read(0xFEB00010, 8) == 0x1716151413121110
    assert bus.mmio_read(0xFEB00010, 3) == 0x121110
    assert bus.mmio_read(0xFEB00FFE, 4) == 0xFFFFFFFE
    bus.mmio_write(0xFEB00FFF, 2, 0xBEEF)
    bus.mmio_write(0xFEB00FFF, 1, 0x55)
    assert device.reads == [(0x10, 8), (0x10, 1), (0x11, 1), (0x12, 1), (0xFFE, 1), (0xFFF, 1)]
    assert device.writes == [(0xFFF, 1, 0xEF), (0xFFF, 1, 0x55)]

    bus.remove_mmio(0xFEB00000, 0x1000)
    assert bus.mmio_read(0xFEB00010, 4) == 0xFFFFFFFF


def test_first_claim_of_memory_wins(bus: Bus) -> None:
    """The rule is the same as for ports."""
    bus.add_mmio(0x1000, 0x1000, Recorder(0x10))
    bus.add_mmio(0x1000, 0x1000, Recorder(0x50))
    assert bus.mmio_read(0x1000, 1) == 0x10
    bus.remove_mmio(0x1000, 0x1000)  # removes the later claim
    assert bus.mmio_read(0x1000, 1) == 0x10


def test_strings_are_repeated_accesses_to_one_port(bus: Bus) -> None:
    """Hostile input 51: REP INS and REP OUTS access the same port again and again, in all sizes."""
    device = Recorder(0x41)
    bus.add_pio(0x10, 4, device)

    assert bus.pio_read_string(0x10, 1, 3) == b"AAA"
    assert bus.pio_read_string(0x10, 4, 2) == b"ABCDABCD"
    bus.pio_write_string(0x11, 1, b"xy")
    bus.pio_write_string(0x10, 2, memoryview(b"\x01\x02\x03\x04"))

    assert device.writes == [(1, 1, 0x78), (1, 1, 0x79), (0, 2, 0x0201), (0, 2, 0x0403)]


def test_strings_on_unclaimed_ports_are_harmless(bus: Bus) -> None:
    """Hostile input 51: string accesses to unclaimed ports end no VM, unlike in OpenBSD's vmd."""
    assert bus.pio_read_string(0x500, 2, 4) == b"\xff" * 8
    bus.pio_write_string(0x500, 4, bytes(16))


def test_guest_error_becomes_all_ones_and_a_limited_warning(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a device refuses accesses, the VM continues and the log stays small."""
    lines: list[str] = []
    monkeypatch.setattr(log, "write", lambda _severity, text: lines.append(text))
    bus.add_pio(0x100, 4, Refuser())
    bus.add_mmio(0x1000, 16, Refuser())

    for _ in range(100):
        assert bus.pio_read(0x100, 4) == 0xFFFFFFFF
        assert bus.mmio_read(0x1000, 8) == 0xFFFFFFFFFFFFFFFF
        bus.pio_write(0x100, 1, 0)
        bus.mmio_write(0x1000, 8, 0)

    assert lines[0] == "guest read from port 0x100: no"
    assert 1 <= len(lines) <= 10


def test_unclaimed_accesses_are_logged_rarely_and_in_debug_mode_only(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest that probes ports must not fill the host's disk."""
    lines: list[str] = []
    monkeypatch.setattr(log, "write", lambda _severity, text: lines.append(text))
    for _ in range(50):
        bus.pio_read(0x80, 1)
    assert lines == []
    monkeypatch.setattr(log, "verbosity", 2)
    for _ in range(50):
        bus.pio_read(0x80, 1)
    assert lines[0] == "guest read from unclaimed port 0x80"
    assert len(lines) <= 10


def test_our_own_bugs_are_not_hidden(bus: Bus) -> None:
    """The bus catches GuestError only."""
    bus.add_pio(0x100, 4, Broken(0))
    with pytest.raises(ZeroDivisionError):
        bus.pio_read(0x100, 1)


RANGES = st.lists(st.tuples(st.integers(0, 48), st.integers(1, 16), st.booleans()), max_size=6)


@given(ranges=RANGES, removed=st.integers(0, 5), port=st.integers(0, 70), size=st.sampled_from([1, 2, 4]))
def test_accesses_go_where_a_slow_search_sends_them(
    ranges: list[tuple[int, int, bool]], removed: int, port: int, size: int
) -> None:
    """A slow search gives the same results, for ports and memory, with any overlap."""
    bus = Bus()
    placed = []
    devices = []
    for index, (first, count, byte_wide) in enumerate(ranges):
        device = (ByteRecorder if byte_wide else Recorder)(index * 40)
        bus.add_pio(first, count, device)
        bus.add_mmio(first, count, device)
        placed.append((first, count, index * 40, byte_wide))
        devices.append((first, device))
    if removed < len(placed):
        first, count, _, _ = placed[removed]
        bus.remove_pio(first, count)
        bus.remove_mmio(first, count)
        del placed[max(i for i, p in enumerate(placed) if p[:2] == (first, count))]

    def expected(address: int, size: int, byte_wide_matters: bool) -> bytes:
        for first, count, mark, byte_wide in placed:
            if first <= address < first + count:
                whole = address + size <= first + count and not (byte_wide and byte_wide_matters)
                if size > 1 and not whole:
                    break
                return bytes(mark + address - first + i & 0xFF for i in range(size))
        if size == 1:
            return b"\xff"
        return b"".join(expected(address + i, 1, byte_wide_matters) for i in range(size))

    assert bus.pio_read(port, size).to_bytes(size, "little") == expected(port, size, True)
    assert bus.mmio_read(port, size).to_bytes(size, "little") == expected(port, size, False)
    written = 0x44332211 & all_ones(size)
    bus.pio_write(port, size, written)
    bus.mmio_write(port, size, written)
    for first, device in devices:  # a write goes to the same devices as a read, in the same pieces
        assert device.writes == [
            (offset, width, written >> 8 * (first + offset - port) & all_ones(width)) for offset, width in device.reads
        ]
