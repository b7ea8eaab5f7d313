"""The pages of a running machine that have changed, from KVM's log and from marks.  No store is missed."""

import os
import random
import select
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmd.errors import PeerError
from vmd.guestmem import KVM_MEM_READONLY, GuestMemory, RegionSpec
from vmd.ipc import devmsg
from vmd.kvmapi import abi
from vmd.units import PAGE
from vmd.vm import dirty
from vmd.vm.dirty import DirtyLog, either, runs

HIGH = 1 << 32
REGIONS = (
    RegionSpec(gpa=0, size=20 * PAGE, name="ram"),
    RegionSpec(gpa=HIGH, size=9 * PAGE, name="high ram"),
    RegionSpec(gpa=HIGH - PAGE, size=PAGE, name="firmware", read_only=True),
)
PAGES = 30
MANY = 4096
WRITERS = 3
LOOKS = 15


class Kvm:
    """A KVM with dirty logs of two memory slots."""

    def __init__(self) -> None:
        self.logs = {0: 0, 1: 0}
        self.flags: dict[int, int] = {}

    def set_memory_region(self, slot: int, _gpa: int, _size: int, _hva: int, flags: int) -> None:
        """Record the flags."""
        self.flags[slot] = flags

    def get_dirty_log(self, slot: int, size: int) -> bytes:
        """Return a log in whole words, and clear it."""
        log, self.logs[slot] = self.logs[slot], 0
        return log.to_bytes(-(-size // PAGE // 64) * 8, "little")


class Device:
    """A device process that records its commands.  The one named "gone" ends before UNMARK."""

    def __init__(self, name: str, said: list[tuple[str, int]]) -> None:
        self.name = name
        self.said = said

    def command(self, kind: int) -> None:
        """Record a command."""
        self.said.append((self.name, kind))
        if (self.name, kind) == ("gone", devmsg.UNMARK):
            raise PeerError("gone", "was killed")


class Made(NamedTuple):
    """A dirty log, its memory and KVM, and the commands that the devices got."""

    log: DirtyLog
    memory: GuestMemory
    kvm: Kvm
    said: list[tuple[str, int]]


@pytest.fixture
def made() -> Iterator[Made]:
    """Yield the memory of a machine and its dirty log."""
    with GuestMemory.create(REGIONS) as memory:
        kvm, said = Kvm(), list[tuple[str, int]]()
        devices = [SimpleNamespace(server=Device(name, said)) for name in ("gone", "disk")]
        machine: Any = SimpleNamespace(memory=memory, kvm=kvm, virtio=devices)
        yield Made(DirtyLog(machine), memory, kvm, said)


def numbers(pages: bytes) -> list[int]:
    """Return the numbers of pages that are set; every other byte is 0."""
    assert set(pages) <= {0, 1}
    assert len(pages) == PAGES
    return [number for number, page in enumerate(pages) if page]


def test_kvm_the_devices_and_this_process_log_changes(made: Made) -> None:
    """KVM logs the writable regions, the devices mark their pages, and so do we.  A device may be gone at the end."""
    made.memory.marks[3] = 1
    made.kvm.logs[0] = 1
    made.log.begin()
    assert made.kvm.flags == {0: abi.KVM_MEM_LOG_DIRTY_PAGES, 1: abi.KVM_MEM_LOG_DIRTY_PAGES}
    marking = [made.memory.marking]
    assert numbers(made.log.take()) == []  # earlier changes do not count

    made.log.end()
    assert made.kvm.flags == {0: 0, 1: 0}
    assert [*marking, made.memory.marking] == [True, False]
    assert made.said == [(name, kind) for kind in (devmsg.MARK, devmsg.UNMARK) for name in ("gone", "disk")]
    assert KVM_MEM_READONLY not in made.kvm.flags.values()


def test_logged_and_marked_pages_are_found_once(made: Made) -> None:
    """KVM's bits are found by slot, and marks by their place in the file.  Every mark that is not 0 counts."""
    made.log.begin()
    made.kvm.logs = {0: 1 << 0 | 1 << 19, 1: 1 << 8}
    made.memory.write(HIGH - 0 + PAGE, b"x")  # a write of this process
    made.memory.mark(19 * PAGE - 1, 2)
    made.memory.marks[7] = 255
    assert numbers(made.log.take()) == [0, 7, 18, 19, 21, 28]
    assert numbers(made.log.take()) == []


def test_marks_are_cleared_before_a_page_is_copied(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other processors see that before the copy is read.  Else a store in between would be lost."""
    made.log.begin()
    at_fence: list[list[int]] = []
    monkeypatch.setattr(dirty, "full_fence", lambda: at_fence.append(numbers(bytes(made.memory.marks))))
    made.memory.marks[7] = made.memory.marks[29] = 1
    assert numbers(made.log.take()) == [7, 29]
    assert at_fence == [[]]


def test_touched_pages(made: Made) -> None:
    """Touched pages of every region are found, also of a read-only one."""
    for gpa in (2 * PAGE, 3 * PAGE, HIGH + 8 * PAGE, HIGH - PAGE):
        made.memory.load(gpa, b"x")
    assert numbers(made.log.touched()) == [2, 3, 28, 29]


@given(st.binary(max_size=70), st.binary(max_size=70))
def test_union_and_runs_of_sets(one: bytes, other: bytes) -> None:
    """`either` returns the union of two sets, and `runs` the runs of one."""
    first = bytes(byte & 1 for byte in one.ljust(70, b"\0"))
    second = bytes(byte & 1 for byte in other.ljust(70, b"\0"))
    assert either(first, second) == bytes(a | b for a, b in zip(first, second, strict=True))
    found = bytearray(70)
    last = -1
    for begin, count in runs(first):
        assert begin > last
        found[begin : begin + count] = b"\1" * count
        last = begin + count
    assert found == first


# --- no store is missed -----------------------------------------------------------------------------------------------


def in_child(work: Callable[[], None]) -> int:
    """Run `work` in a new process.  Return its pidfd."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.pidfd_open(pid)


def write_once(memory: GuestMemory, pages: list[int], value: int) -> None:
    """Store into each page and mark it, as a device does."""
    words = memory.memory.cast("Q")
    for page in pages:
        words[page * PAGE // 8] = value
        memory.mark_file(page * PAGE, 8)


def test_no_store_is_missed() -> None:
    """Processes store into each page once, while changed pages are copied.  At the end the copy equals the memory."""
    with GuestMemory.create((RegionSpec(gpa=0, size=MANY * PAGE, name="ram"),)) as memory:
        machine: Any = SimpleNamespace(memory=memory, kvm=Kvm(), virtio=())
        log = DirtyLog(machine)
        copy = memoryview(bytearray(MANY * PAGE))
        looks = value = 0  # looks: how many found changes while the writers ran

        def look() -> bool:
            found = log.take()
            for first, count in runs(found):
                here = slice(first * PAGE, (first + count) * PAGE)
                copy[here] = memory.memory[here]
            return any(found)

        log.begin()
        while looks < LOOKS:
            value += 1
            pages = list(range(MANY))
            random.Random(value).shuffle(pages)
            shares = [pages[number::WRITERS] for number in range(WRITERS)]
            ends = select.poll()
            writers = [in_child(partial(write_once, memory, share, value)) for share in shares]
            for writer in writers:
                ends.register(writer, select.POLLIN)
            while len(ends.poll(0)) < WRITERS:
                looks += look()
            for writer in writers:
                assert os.waitid(os.P_PIDFD, writer, os.WEXITED).si_status == 0  # type: ignore[union-attr]
                os.close(writer)
            look()
            assert copy == memory.memory
