"""What has changed in the memory of a machine that runs: KVM's log, the marks, and that no store is missed."""

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
    """Logs of two slots."""

    def __init__(self) -> None:
        self.logs = {0: 0, 1: 0}
        self.flags: dict[int, int] = {}

    def set_memory_region(self, slot: int, _gpa: int, _size: int, _hva: int, flags: int) -> None:
        """Note the flags."""
        self.flags[slot] = flags

    def get_dirty_log(self, slot: int, size: int) -> bytes:
        """Return and clear a log, in whole words."""
        log, self.logs[slot] = self.logs[slot], 0
        return log.to_bytes(-(-size // PAGE // 64) * 8, "little")


class Device:
    """A device's process."""

    def __init__(self, name: str, said: list[tuple[str, int]]) -> None:
        self.name = name
        self.said = said

    def command(self, kind: int) -> None:
        """Note what it is told."""
        self.said.append((self.name, kind))
        if (self.name, kind) == ("gone", devmsg.UNMARK):
            raise PeerError("gone", "was killed")


class Made(NamedTuple):
    """A log, and what it looks at."""

    log: DirtyLog
    memory: GuestMemory
    kvm: Kvm
    said: list[tuple[str, int]]


@pytest.fixture
def made() -> Iterator[Made]:
    """Give a machine's memory and its log."""
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


def test_everybody_is_told(made: Made) -> None:
    """KVM for what can be written, the devices, this process; a device that is gone does not matter at the end."""
    made.memory.marks[3] = 1
    made.kvm.logs[0] = 1
    made.log.begin()
    assert made.kvm.flags == {0: abi.KVM_MEM_LOG_DIRTY_PAGES, 1: abi.KVM_MEM_LOG_DIRTY_PAGES}
    marking = [made.memory.marking]
    assert numbers(made.log.take()) == []  # what was before is known

    made.log.end()
    assert made.kvm.flags == {0: 0, 1: 0}
    assert [*marking, made.memory.marking] == [True, False]
    assert made.said == [(name, kind) for kind in (devmsg.MARK, devmsg.UNMARK) for name in ("gone", "disk")]
    assert KVM_MEM_READONLY not in made.kvm.flags.values()


def test_both_halves_are_seen_once(made: Made) -> None:
    """KVM's bits by slot, marks by their place in the file; whatever a mark is, it is one."""
    made.log.begin()
    made.kvm.logs = {0: 1 << 0 | 1 << 19, 1: 1 << 8}
    made.memory.write(HIGH - 0 + PAGE, b"x")  # by this process
    made.memory.mark(19 * PAGE - 1, 2)
    made.memory.marks[7] = 255
    assert numbers(made.log.take()) == [0, 7, 18, 19, 21, 28]
    assert numbers(made.log.take()) == []


def test_what_there_is(made: Made) -> None:
    """Of every region; a page that is only read is none."""
    for gpa in (2 * PAGE, 3 * PAGE, HIGH + 8 * PAGE, HIGH - PAGE):
        made.memory.load(gpa, b"x")
    assert numbers(made.log.touched()) == [2, 3, 28, 29]


@given(st.binary(max_size=70), st.binary(max_size=70))
def test_sets(one: bytes, other: bytes) -> None:
    """As runs, and together."""
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
    """Run something in a process of its own; returns its pidfd."""
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
    """Processes store into each page once, while what has changed is copied: in the end the copy is the same."""
    with GuestMemory.create((RegionSpec(gpa=0, size=MANY * PAGE, name="ram"),)) as memory:
        machine: Any = SimpleNamespace(memory=memory, kvm=Kvm(), virtio=())
        log = DirtyLog(machine)
        copy = memoryview(bytearray(MANY * PAGE))
        looks = value = 0  # looks that have found something while there were writers

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
