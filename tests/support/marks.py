"""Checks that a device process marks every page that it changes in guest memory (`vmd.guestmem`)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tests.support.fakedriver import Device, Ring
from vmd.ipc import devmsg
from vmd.units import PAGE


@contextmanager
def all_marked(device: Device, rings: Sequence[Ring]) -> Iterator[None]:
    """Pause the device when the context ends; raise AssertionError unless every page that it changed is marked.

    Stores of the driver also go to a copy of guest memory, so every difference at the end is a change by the device.
    """
    memory = device.memory
    memory.marks[:] = bytes(len(memory.marks))
    device.command(devmsg.MARK)
    copy = bytearray(memory.memory)
    load = memory.load

    def load_twice(gpa: int, data: bytes) -> None:
        offset = memory.offset(gpa, len(data))
        copy[offset : offset + len(data)] = data
        load(gpa, data)

    memory.load = load_twice  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        memory.load = load  # type: ignore[method-assign]
    device.command(devmsg.PAUSE)
    for ring in rings:
        index = memory.offset(ring.avail + 2, 2)
        copy[index : index + 2] = memory.memory[index : index + 2]
    changed = pages_that_differ(memory.memory, copy)
    marked = {page for page, mark in enumerate(memory.marks) if mark}
    device.command(devmsg.UNMARK)
    device.command(devmsg.RESUME)
    print(f"{len(changed)} pages changed, {len(marked)} marked")
    assert changed
    assert changed - marked == set()
    assert len(marked) < len(memory.marks) // 2


def pages_that_differ(one: memoryview, other: bytearray) -> set[int]:
    """Return the numbers of the pages that differ."""
    whole = memoryview(other)
    return {at // PAGE for at in range(0, len(one), PAGE) if one[at : at + PAGE] != whole[at : at + PAGE]}
