"""Guest memory, without a guest: the bounds check, the sealed file, sparse runs."""

import fcntl
import mmap
import os
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmd.errors import GuestError, HostError
from vmd.guestmem import GuestMemory, Region, RegionSpec, marks_bytes, memory_bytes
from vmd.units import PAGE

MIB = 1 << 20
LAYOUT = [
    RegionSpec(gpa=0, size=MIB, name="low"),
    RegionSpec(gpa=MIB, size=MIB, name="next"),  # adjacent to the first
    RegionSpec(gpa=1 << 32, size=MIB, name="high"),
    RegionSpec(gpa=(1 << 32) - 0x40000, size=0x40000, name="firmware", read_only=True),
]


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    """Memory of four regions: two are adjacent, and the read-only one is adjacent to the third."""
    with GuestMemory.create(LAYOUT) as created:
        yield created


def test_offsets_follow_the_order_of_the_layout(memory: GuestMemory) -> None:
    """The regions follow each other in the file, with the firmware last although it is not the highest."""
    assert [region.offset for region in memory.regions] == [0, MIB, 2 * MIB, 3 * MIB]
    assert memory.mapped_bytes == 3 * MIB + 0x40000
    assert os.fstat(memory.fd).st_size == 3 * MIB + 0x40000 + PAGE  # for the marks


def test_write_is_read_back_through_every_accessor(memory: GuestMemory) -> None:
    """read, view, slices and the file itself have the written bytes."""
    memory.write(0x1234, b"guest")

    assert memory.read(0x1234, 5) == b"guest"
    assert bytes(memory.view(0x1234, 5)) == b"guest"
    assert [bytes(part) for part in memory.slices(0x1234, 5)] == [b"guest"]
    assert os.pread(memory.fd, 5, memory.offset(0x1234, 5)) == b"guest"


def test_an_access_may_span_adjacent_regions_but_a_view_may_not(memory: GuestMemory) -> None:
    """A range across the border is two slices.  As one view it is refused."""
    memory.write(MIB - 2, b"abcd")

    assert memory.read(MIB - 2, 4) == b"abcd"
    assert [bytes(part) for part in memory.slices(MIB - 2, 4)] == [b"ab", b"cd"]
    with pytest.raises(GuestError, match="0xffffe"):
        memory.view(MIB - 2, 4)


@pytest.mark.parametrize(
    ("gpa", "size"),
    [
        (2 * MIB, 1),  # right behind memory
        (2 * MIB - 1, 2),  # ends behind memory
        (2 * MIB - 1, 1 << 64),
        (0, -1),
        (-1, 1),
        (1 << 63, 8),
        ((1 << 64) - 1, 8),
        (2 * MIB, 0),  # even zero bytes need a valid address
    ],
)
def test_an_address_without_memory_is_refused_by_every_accessor(
    memory: GuestMemory, gpa: int, size: int
) -> None:
    """The refusal is a GuestError that names the address."""
    for access in (memory.read, memory.view, memory.slices, memory.offset, memory.hva):
        with pytest.raises(GuestError, match=r"guest address -?0x[0-9a-f]+: no memory"):
            access(gpa, size)


def test_a_write_that_does_not_fit_changes_nothing(memory: GuestMemory) -> None:
    """The part before the end of memory stays as it was."""
    with pytest.raises(GuestError, match="0x200000"):
        memory.write(2 * MIB - 2, b"abcd")

    assert memory.read(2 * MIB - 2, 2) == b"\0\0"


def test_read_only_memory_takes_load_but_no_write(memory: GuestMemory) -> None:
    """We fill the firmware.  A guest's DMA and views cannot write to it."""
    firmware = (1 << 32) - 0x40000
    memory.load(firmware, b"bios")

    assert memory.read(firmware, 4) == b"bios"
    assert memory.view(firmware, 4).readonly
    assert not memory.view(0, 4).readonly
    with pytest.raises(GuestError, match="read-only"):
        memory.write(firmware, b"evil")
    with pytest.raises(GuestError, match="read-only"):
        memory.view(firmware, 4, write=True)
    with pytest.raises(GuestError, match="read-only"):
        memory.offset(firmware, 4, write=True)
    assert memory.read(firmware, 4) == b"bios"


def test_fill_reaches_exactly_the_memory_of_the_file(memory: GuestMemory) -> None:
    """It also fills read-only regions, across borders.  Beyond the end of the memory it fails."""
    size = memory.mapped_bytes
    memory.fill(1, b"x" * (size - 1))
    assert bytes(memory.memory) == b"\0" + b"x" * (size - 1)
    for offset in (size, size - 1):
        with pytest.raises(HostError, match="2 bytes of guest memory: "):
            memory.fill(offset, b"yy")
    assert bytes(memory.memory[-1:]) == b"x"
    assert not any(memory.marks)


def test_a_copy_allocates_no_page(memory: GuestMemory) -> None:
    """Untouched memory is read as zeros and stays unallocated.  Beyond the end there is nothing."""
    memory.load(PAGE, b"some")
    before = memory.resident_bytes()
    copy = memoryview(bytearray(b"x" * 3 * PAGE))
    memory.copy_into(copy, 0)
    assert copy == bytes(PAGE) + b"some".ljust(2 * PAGE, b"\0")
    assert memory.resident_bytes() == before
    with pytest.raises(HostError, match="1 bytes of guest memory at 0x"):
        memory.copy_into(memoryview(bytearray(PAGE + 1)), memory.mapped_bytes)


@given(st.integers(min_value=1, max_value=1 << 40))
def test_the_length_of_a_file_gives_the_size_of_its_memory(pages: int) -> None:
    """The file has a mark byte for each page of memory, rounded up to whole pages."""
    size = pages * PAGE
    marks = marks_bytes(size)
    assert pages <= marks < pages + PAGE
    assert marks % PAGE == 0
    assert memory_bytes(size + marks) == size


def marked(memory: GuestMemory) -> list[int]:
    """Return the numbers of the marked pages."""
    return [page for page, mark in enumerate(memory.marks) if mark]


def test_written_pages_are_marked_while_marking(memory: GuestMemory) -> None:
    """Each page of a range is marked, also across adjacent regions.  Other processes with the file see the marks."""
    memory.write(0, b"x")
    assert marked(memory) == []

    memory.marking = True
    memory.write(5 * PAGE + 100, bytes(PAGE))
    memory.write(MIB - 1, b"ab")
    memory.write(1 << 32, b"x")
    memory.write(7 * PAGE, b"")
    assert marked(memory) == [5, 6, 255, 256, 512]
    with GuestMemory.attach(os.dup(memory.fd), memory.regions[:3]) as other:
        assert marked(other) == [5, 6, 255, 256, 512]
        other.mark(3 * PAGE, PAGE)
    assert 3 in marked(memory)


def test_a_mark_is_made_as_far_as_there_is_memory(memory: GuestMemory) -> None:
    """A device has marked the pages that it wrote, even if its guest's request is longer than memory."""
    memory.mark(2 * MIB - 1, 1 << 40)
    assert marked(memory) == [511, *range(512, 832)]
    memory.mark(1 << 50, 1)
    memory.mark(0, 0)
    memory.mark(PAGE + 5, 0)
    assert marked(memory) == [511, *range(512, 832)]


def test_a_write_that_runs_into_memory_from_read_only_memory_is_refused_whole(memory: GuestMemory) -> None:
    """Firmware ends where RAM above 4 GiB starts, and neither of them changes."""
    with pytest.raises(GuestError, match="read-only"):
        memory.write((1 << 32) - 2, b"abcd")

    assert memory.read((1 << 32) - 2, 4) == b"\0\0\0\0"


@given(gpa=st.integers(-8, 2 * MIB + 8) | st.integers(0, 1 << 64), size=st.integers(-8, 3 * MIB))
@settings(max_examples=300)
def test_slices_agree_with_a_byte_by_byte_model(gpa: int, size: int) -> None:
    """A range is allowed exactly if each of its bytes is in a region."""
    with GuestMemory.create(LAYOUT) as memory:
        inside = any(r.gpa <= gpa < r.end for r in LAYOUT) and size >= 0
        end = gpa
        while inside and end < gpa + size:
            region = next((r for r in LAYOUT if r.gpa <= end < r.end), None)
            if region is None:
                break
            end = region.end
        allowed = inside and end >= gpa + size
        try:
            windows = memory.slices(gpa, size)
        except GuestError:
            assert not allowed
        else:
            assert allowed
            assert sum(map(len, windows)) == size
            for window in windows:
                window.release()


def test_the_file_can_be_neither_shrunk_nor_grown_nor_unsealed(memory: GuestMemory) -> None:
    """A process with the descriptor cannot end other processes by SIGBUS."""
    for size in (0, 64 * MIB):
        with pytest.raises(PermissionError):
            os.ftruncate(memory.fd, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(memory.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


def test_attached_memory_is_the_same_memory(memory: GuestMemory) -> None:
    """Each process reads what the other has written."""
    with GuestMemory.attach(os.dup(memory.fd), memory.regions) as other:
        memory.write(0x5000, b"there")
        other.write(1 << 32, b"back")

        assert other.read(0x5000, 5) == b"there"
        assert memory.read(1 << 32, 4) == b"back"


def test_a_region_that_is_not_handed_over_is_not_there(memory: GuestMemory) -> None:
    """A device with only the RAM can neither read the firmware nor reach it in its mapping."""
    with GuestMemory.attach(os.dup(memory.fd), memory.regions[:3]) as other:
        with pytest.raises(GuestError, match="0xfffc0000"):
            other.read((1 << 32) - 0x40000, 1)
        assert len(other.memory) == 3 * MIB


def test_attach_refuses_a_file_that_could_shrink() -> None:
    """An unsealed or short memfd would cause SIGBUS later."""
    fd = os.memfd_create("loose", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, MIB + PAGE)  # for the marks
    region = Region(gpa=0, size=MIB, name="low", offset=0)

    with pytest.raises(ValueError, match="not sealed"):
        GuestMemory.attach(fd, [region])
    with pytest.raises(ValueError, match="region low: outside a file of 1048576 bytes"):
        GuestMemory.attach(fd, [region.replace(offset=PAGE)])
    os.close(fd)


@pytest.mark.parametrize("offset", [-PAGE, 1, PAGE // 2, 3 * MIB + 0x40000])
def test_attach_refuses_a_region_that_is_not_in_the_file(memory: GuestMemory, offset: int) -> None:
    """A region has whole pages of the file, and none of the marks."""
    region = Region(gpa=0, size=PAGE, name="odd", offset=offset)
    with pytest.raises(ValueError, match="region odd: outside a file of 3407872 bytes"):
        GuestMemory.attach(memory.fd, [region])


def test_attach_refuses_regions_that_overlap(memory: GuestMemory) -> None:
    """An address would have two places in the file."""
    first, second = (Region(gpa=0, size=PAGE, name=name, offset=0) for name in ("one", "two"))
    with pytest.raises(ValueError, match="one and two overlap at 0x0"):
        GuestMemory.attach(memory.fd, [first, second])


@pytest.mark.parametrize(
    ("layout", "what"),
    [
        ([], "without a region"),
        ([LAYOUT[0], RegionSpec(gpa=MIB - PAGE, size=PAGE, name="odd")], "low and odd overlap at 0xff000"),
    ],
)
def test_an_impossible_layout_is_refused(layout: list[RegionSpec], what: str) -> None:
    """The refusal names the regions."""
    with pytest.raises(ValueError, match=what):
        GuestMemory.create(layout)


@pytest.mark.parametrize(("gpa", "size"), [(0, 0), (0, -PAGE), (1, PAGE), (0, 1), (-PAGE, PAGE)])
def test_a_region_that_is_not_whole_pages_is_refused(gpa: int, size: int) -> None:
    """KVM would refuse it later with a worse message."""
    with pytest.raises(ValueError, match="memory region odd"):
        RegionSpec(gpa=gpa, size=size, name="odd")


def test_sixty_four_gigabytes_take_only_touched_pages() -> None:
    """The last page of a huge guest works, and only touched pages take memory."""
    size = 64 << 30
    with GuestMemory.create([RegionSpec(gpa=0, size=size, name="ram")]) as memory:
        before = memory.resident_bytes()
        memory.write(size - 4, b"last")

        assert memory.read(size - 4, 4) == b"last"
        assert before == 0
        assert PAGE <= memory.resident_bytes() <= 2 * MIB


def test_touched_runs_are_the_written_pages(memory: GuestMemory) -> None:
    """Runs end at region ends, and have guest address, file offset and length."""
    low, nxt, high, firmware = memory.regions
    memory.write(0x3000, bytes(2 * PAGE))
    memory.write(0x9000, b"x")
    memory.write(MIB - PAGE, bytes(2 * PAGE))
    memory.write(high.gpa, b"x")
    memory.load(firmware.gpa, b"x")

    assert list(memory.touched_runs(low)) == [
        (0x3000, 0x3000, 2 * PAGE),
        (0x9000, 0x9000, PAGE),
        (MIB - PAGE, MIB - PAGE, PAGE),
    ]
    assert list(memory.touched_runs(nxt)) == [(MIB, MIB, PAGE)]
    assert list(memory.touched_runs(high)) == [(high.gpa, 2 * MIB, PAGE)]
    assert list(memory.touched_runs(firmware)) == [(firmware.gpa, 3 * MIB, PAGE)]


def test_a_touched_run_can_be_sent_from_the_file(memory: GuestMemory) -> None:
    """The offset of a run is an offset for sendfile."""
    memory.write((1 << 32) + 0x2000, b"payload".ljust(PAGE, b"."))
    reader, writer = os.pipe()

    for _, offset, length in memory.touched_runs(memory.regions[2]):
        os.sendfile(writer, memory.fd, offset, length)

    assert os.read(reader, PAGE + 1) == b"payload".ljust(PAGE, b".")
    os.close(reader)
    os.close(writer)


def test_kvm_slots_describe_every_region(memory: GuestMemory) -> None:
    """Slots are numbered in order, read-only ones are flagged, and addresses are those of the mapping."""
    slots = list(memory.kvm_slots())

    assert [(slot, gpa, size, flags) for slot, gpa, size, _, flags in slots] == [
        (index, spec.gpa, spec.size, 2 if spec.read_only else 0) for index, spec in enumerate(LAYOUT)
    ]
    assert [hva for _, _, _, hva, _ in slots] == [memory.hva(spec.gpa) for spec in LAYOUT]
    assert all(hva % mmap.PAGESIZE == 0 for _, _, _, hva, _ in slots)


def test_close_releases_the_descriptor_once() -> None:
    """A second close is harmless.  A view that is still in use keeps the memory open."""
    memory = GuestMemory.create(LAYOUT)
    held, fd = memory.view(0, 4), memory.fd
    with pytest.raises(BufferError):
        memory.close()
    held.release()
    memory.close()
    memory.close()

    assert memory.fd == -1
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
