"""A fake of /dev/vhost-net as a device process sees it: it moves the indices of rings as the kernel does."""

import errno
import fcntl
import os
import struct
from collections.abc import Callable
from typing import Any

from vmd.devices.vionet import vhost
from vmd.guestmem import GuestMemory
from vmd.virtio import spec

NAMES = {number: name for name, number in vars(vhost).items() if name.startswith("VHOST_")}
RX, TX = 0, 1
HEADER = spec.NET_HDR_BYTES


class FakeRing:
    """The kernel's state of one ring."""

    def __init__(self) -> None:
        self.size = self.desc = self.used = self.avail = self.next_avail = self.next_used = 0
        self.tap = self.kick = self.call = self.err = vhost.NONE


class FakeVhost:
    """The file, and the kernel behind it; `move` transfers frames.

    Requests with the name `refuses` fail.  With " off" after the name, only those that remove a descriptor fail.
    """

    def __init__(self, memory: GuestMemory) -> None:
        self.memory = memory
        self.fd = os.memfd_create("vhost", os.MFD_CLOEXEC)
        self.rings = FakeRing(), FakeRing()
        self.owned = False
        self.features = 0
        self.offered = vhost.OF_RINGS
        self.regions: list[tuple[int, ...]] = []
        self.asked: list[str] = []
        self.refuses = ""
        self.real = fcntl.ioctl

    def serves(self) -> bool:
        """Whether it serves any ring."""
        return any(ring.tap != vhost.NONE for ring in self.rings)

    def ioctl(self, fd: int, request: int, argument: bytes | int = 0) -> bytes | int:
        """Answer an ioctl on this file; pass others to the kernel."""
        if fd != self.fd:
            return self.real(fd, request, argument)
        name = NAMES[request]
        self.asked.append(name)
        off = isinstance(argument, bytes) and argument[-4:] == b"\xff" * 4  # it removes a descriptor
        if name + " off" * off == self.refuses:
            raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))
        if not self.owned and name not in ("VHOST_SET_OWNER", "VHOST_GET_FEATURES"):
            raise OSError(errno.EPERM, name)
        answer = self.REQUESTS[name](self, argument)
        return argument if answer is None else answer

    def set_owner(self, _argument: int) -> None:
        """Take the caller's address space."""
        assert not self.owned
        self.owned = True

    def get_features(self, _argument: bytes) -> bytes:
        """Return the supported features, virtio headers of its own among them."""
        return vhost.FEATURES.pack(self.offered | 1 << 27)

    def set_features(self, argument: bytes) -> None:
        """Take the negotiated features.  Bit 27 would add headers to those of the tap."""
        (self.features,) = vhost.FEATURES.unpack(argument)
        assert not self.features & ~self.offered
        assert not self.serves()

    def set_mem_table(self, argument: bytes) -> None:
        """Take the regions of guest memory."""
        count, zero = vhost.MEMORY.unpack_from(argument)
        self.regions = list(vhost.REGION.iter_unpack(argument[vhost.MEMORY.size :]))
        assert (len(self.regions), zero) == (count, 0)

    def set_num(self, argument: bytes) -> None:
        """Take the size of a ring."""
        self._idle(argument).size = vhost.STATE.unpack(argument)[1]

    def set_base(self, argument: bytes) -> None:
        """Take the next available index of a ring."""
        self._idle(argument).next_avail = vhost.STATE.unpack(argument)[1]

    def get_base(self, argument: bytes) -> bytes:
        """Return the next available index of a ring."""
        index, _ = vhost.STATE.unpack(argument)
        return vhost.STATE.pack(index, self.rings[index].next_avail)

    def set_addr(self, argument: bytes) -> None:
        """Take the addresses of a ring."""
        index, flags, desc, used, avail, log = vhost.ADDR.unpack(argument)
        ring = self.rings[index]
        ring.desc, ring.used, ring.avail = (place - self.memory.base for place in (desc, used, avail))
        assert (flags, log) == (0, 0)

    def set_backend(self, argument: bytes) -> None:
        """Begin to serve a ring, from the used index in its memory, or stop."""
        index, fd = vhost.FILE.unpack(argument)
        ring = self.rings[index]
        ring.tap = fd
        if fd != vhost.NONE:
            ring.next_used = self._u16(ring.used + 2)

    def _set(name: str) -> "Callable[[FakeVhost, bytes], None]":  # type: ignore[misc] # makes methods
        def take(self: "FakeVhost", argument: bytes) -> None:
            index, fd = vhost.FILE.unpack(argument)
            setattr(self.rings[index], name, fd)

        return take

    REQUESTS: "dict[str, Callable[[FakeVhost, Any], Any]]" = {
        "VHOST_SET_OWNER": set_owner,
        "VHOST_GET_FEATURES": get_features,
        "VHOST_SET_FEATURES": set_features,
        "VHOST_SET_MEM_TABLE": set_mem_table,
        "VHOST_SET_VRING_NUM": set_num,
        "VHOST_SET_VRING_BASE": set_base,
        "VHOST_GET_VRING_BASE": get_base,
        "VHOST_SET_VRING_ADDR": set_addr,
        "VHOST_NET_SET_BACKEND": set_backend,
        "VHOST_SET_VRING_KICK": _set("kick"),
        "VHOST_SET_VRING_CALL": _set("call"),
        "VHOST_SET_VRING_ERR": _set("err"),
    }

    def _idle(self, argument: bytes) -> FakeRing:
        ring = self.rings[vhost.STATE.unpack(argument)[0]]
        if ring.tap != vhost.NONE:
            raise OSError(errno.EBUSY, "it is served")
        return ring

    # --- moving frames ---------------------------------------------------------------------------------------------

    def move(self) -> None:
        """Send all frames of the transmit ring, then fill the guest's receive buffers with frames from the tap."""
        for ring, step in ((self.rings[TX], self._send), (self.rings[RX], self._receive)):
            before = ring.next_used
            while ring.tap != vhost.NONE and self._u16(ring.avail + 2) != ring.next_avail and step(ring):
                ring.next_avail = ring.next_avail + 1 & 0xFFFF
                ring.next_used = ring.next_used + 1 & 0xFFFF
                self._store(ring.used + 2, struct.pack("<H", ring.next_used))
            if ring.next_used != before:
                os.eventfd_write(ring.call, 1)

    def complain(self, number: int) -> None:
        """Report an invalid ring."""
        os.eventfd_write(self.rings[number].err, 1)

    def _send(self, ring: FakeRing) -> bool:
        head, place, length = self._buffer(ring)
        os.write(ring.tap, self.memory.memory[place : place + length])
        self._put(ring, head, 0)
        return True

    def _receive(self, ring: FakeRing) -> bool:
        head, place, length = self._buffer(ring)
        try:
            got = os.readv(ring.tap, [self.memory.memory[place : place + length]])
        except BlockingIOError:
            return False
        self._put(ring, head, got)
        return True

    def _buffer(self, ring: FakeRing) -> tuple[int, int, int]:
        head = self._u16(ring.avail + 4 + 2 * (ring.next_avail % ring.size))
        gpa, length, _, _ = struct.unpack_from("<QIHH", self.memory.memory, ring.desc + 16 * head)
        ((offset, start),) = [
            (hva - self.memory.base, first) for first, size, hva, _ in self.regions if first <= gpa < first + size
        ]
        return head, gpa - start + offset, length

    def _put(self, ring: FakeRing, head: int, written: int) -> None:
        self._store(ring.used + 4 + 8 * (ring.next_used % ring.size), struct.pack("<II", head, written))

    def _u16(self, place: int) -> int:
        return int.from_bytes(self.memory.memory[place : place + 2], "little")

    def _store(self, place: int, data: bytes) -> None:
        self.memory.memory[place : place + len(data)] = data
