"""Which pages of a machine that runs were changed since they were last looked at (arch. 15).

What its processors store is in KVM's log; what its devices and this process store is in the marks of `guestmem`.

    a writer    stores, then marks, and only then publishes
    we          take KVM's log and look at the marks; clear those that we saw set; fence; then copy

So a store that comes after a page was copied is in the log, or its mark is set, when we look again: x86 keeps stores in
order, and without the fence the copy could be read before the mark is seen to be cleared, and what is stored and
marked in between would be lost.  A mark that we did not see set is not cleared: nobody would copy its page.
"""

from vmd.errors import PeerError
from vmd.guestmem import PAGE
from vmd.ipc import devmsg
from vmd.kvmapi import abi
from vmd.virtio.fence import full_fence

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmd.vm.machine import Machine

BITS = [bytes(byte >> bit & 1 for bit in range(8)) for byte in range(256)]  # of KVM's log: 8 pages
SET = b"\0" + b"\1" * 255  # a process that marks may be anybody's: whatever is not 0 is 1


class DirtyLog:
    """Looks at a machine from `begin` to `end`.  All of it runs on one thread, but `begin` and `end` ask devices.

    Pages are those of the memory's file, as a byte each, 1 or 0.
    """

    def __init__(self, machine: "Machine") -> None:
        self._memory = machine.memory
        self._kvm = machine.kvm
        self._devices = [function.process for function in machine.virtio]

    def begin(self) -> None:
        """Note from now on what is changed.  Raises OSError or PeerError."""
        self._log(abi.KVM_MEM_LOG_DIRTY_PAGES)
        self._memory.marking = True
        for device in self._devices:
            device.command(devmsg.MARK)
        self.take()  # of an earlier time

    def end(self) -> None:
        """Note nothing any more.  Raises OSError."""
        self._memory.marking = False
        for device in self._devices:
            try:
                device.command(devmsg.UNMARK)
            except PeerError:
                continue  # its end is the end of the machine
        self._log(0)

    def take(self) -> bytes:
        """Return which pages were changed since the last call; what is copied after that is as new as that."""
        memory = self._memory
        changed = bytearray(len(memory.marks))
        for (slot, _, size, _, _), region in zip(memory.kvm_slots(), memory.regions, strict=True):
            if not region.read_only:
                bits = self._kvm.get_dirty_log(slot, size)
                first, pages = region.offset // PAGE, size // PAGE
                changed[first : first + pages] = b"".join([BITS[byte] for byte in bits])[:pages]
        seen = bytes(memory.marks).translate(SET)
        for first, pages in runs(seen):
            memory.marks[first : first + pages] = bytes(pages)
        full_fence()
        return either(seen, changed)

    def touched(self) -> bytes:
        """Return which pages there are; all others read as zeroes."""
        found = bytearray(len(self._memory.marks))
        for region in self._memory.regions:
            for _, offset, length in self._memory.touched_runs(region):
                found[offset // PAGE : (offset + length) // PAGE] = b"\1" * (length // PAGE)
        return bytes(found)

    def _log(self, flag: int) -> None:
        memory = self._memory
        for (slot, gpa, size, hva, flags), region in zip(memory.kvm_slots(), memory.regions, strict=True):
            if not region.read_only:
                self._kvm.set_memory_region(slot, gpa, size, hva, flags | flag)


def either(one: bytes, other: bytes | bytearray) -> bytes:
    """Return which pages are in one of two sets."""
    return (int.from_bytes(one, "little") | int.from_bytes(other, "little")).to_bytes(len(one), "little")


def runs(pages: bytes) -> "Iterator[tuple[int, int]]":
    """Yield first page and number of each run of pages that are set."""
    end = 0
    while (first := pages.find(1, end)) >= 0:
        end = pages.find(0, first)
        if end < 0:
            end = len(pages)
        yield first, end - first
