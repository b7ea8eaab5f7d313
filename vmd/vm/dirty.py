"""Finds the pages of a running machine that have changed since the last look (arch. 15).

KVM's log has the stores of vCPUs.  The marks of `guestmem` have the stores of devices and of this process.

    a writer    stores, then marks, and only then publishes
    we          take KVM's log, read the marks, clear the marks that we saw set, fence, then copy

So a store that comes after the copy of its page is in the log, or its mark is set, at the next look.  x86 keeps stores
in order.  Without the fence, the copy could be read before other processors see the cleared mark, and a store and its
mark that come in between would be lost.  A mark that we did not see set is not cleared: its page would not be copied.
"""

from vmd.errors import PeerError
from vmd.ipc import devmsg
from vmd.kvmapi import abi
from vmd.units import PAGE
from vmd.virtio.fence import full_fence

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmd.vm.machine import Machine

BITS = [bytes(byte >> bit & 1 for bit in range(8)) for byte in range(256)]  # a byte of KVM's log as 8 pages
SET = b"\0" + b"\1" * 255  # any value that is not 0 counts as 1: a device that was taken over may store any byte


class DirtyLog:
    """The log of changed pages, from `begin` to `end`.  `begin` and `end` wait for answers of devices.

    A set of pages is a `bytes` with one byte, 1 or 0, for each page of the memory's file.
    """

    def __init__(self, machine: "Machine") -> None:
        self._memory = machine.memory
        self._kvm = machine.kvm
        self._devices = [function.server for function in machine.virtio]

    def begin(self) -> None:
        """Begin to log changes.  Raises OSError or PeerError."""
        self._log(abi.KVM_MEM_LOG_DIRTY_PAGES)
        self._memory.marking = True
        for device in self._devices:
            device.command(devmsg.MARK)
        self.take()  # drop changes of an earlier transfer

    def end(self) -> None:
        """Log no changes any more.  Raises OSError."""
        self._memory.marking = False
        for device in self._devices:
            try:
                device.command(devmsg.UNMARK)
            except PeerError:
                continue  # the device has ended, which ends the VM
        self._log(0)

    def take(self) -> bytes:
        """Return the pages that have changed since the last call.  A copy made afterwards has all these changes."""
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
        """Return the pages that were ever touched.  All other pages read as zeroes."""
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
    """Return the union of two sets of pages."""
    return (int.from_bytes(one, "little") | int.from_bytes(other, "little")).to_bytes(len(one), "little")


def runs(pages: bytes) -> "Iterator[tuple[int, int]]":
    """Yield the first page and the number of pages of each run in a set."""
    end = 0
    while (first := pages.find(1, end)) >= 0:
        end = pages.find(0, first)
        if end < 0:
            end = len(pages)
        yield first, end - first
