"""One virtual CPU: runs it, kicks it out of the guest, and reads and writes its registers.

A vCPU belongs to the thread that runs it.  Only that thread calls its methods, except `kick`.  A vCPU request from
another thread waits until KVM_RUN returns.

**Unfinished I/O.**  A PioIn or MmioRead is finished inside the *next* KVM_RUN: only then the reply reaches the guest's
register, and RIP the next instruction.  A string or split access may exit once more.  Registers that are read before
that belong to a guest in the middle of an instruction.  Two rules follow:

* When a run returns Interrupted, no I/O is unfinished: KVM finishes pending I/O before it looks at `immediate_exit` or
  at signals.  So a pause only has to kick and to wait for Interrupted.
* Code that stops after any other exit, for example to read registers, has to answer the exit and to call `complete`.

**Kicks.**  `kick` sets the byte `immediate_exit`, then signals the thread.  A vCPU in the guest leaves it because
of the signal.  A vCPU that is about to enter returns at once because of the byte.  There is no gap between the two.
The byte stays set, and every run returns Interrupted, until `clear_kick`.  So a thread that stops a vCPU first stores
the reason, then kicks.  The vCPU's thread first clears the kick, then looks at the reason.
"""

import _thread
import errno
import fcntl
import mmap
import os

from vmd import native
from vmd import signals as signal
from vmd.kvmapi import abi
from vmd.kvmapi.abi import ioctl, read_struct, write_struct
from vmd.kvmapi.exits import (
    INTERRUPTED,
    MMIO_DATA,
    REASON_IO,
    RETRY,
    Exit,
    MmioRead,
    PioIn,
    decode,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import FrameType

KICK_SIGNAL = signal.SIGUSR1

_EXIT_IO = abi.KVM_EXIT_IO
_IMMEDIATE_EXIT = abi.kvm_run.immediate_exit.offset
_PIO_DATA = abi.KVM_PIO_PAGE_OFFSET * mmap.PAGESIZE
_MSRS_AT_ONCE = 128  # the kernel's limit is less than 256


def _nothing(signum: int, frame: "FrameType | None") -> None:
    """Ignore a kick that arrived outside the guest."""


def install_kick_handler() -> None:
    """Make KICK_SIGNAL interrupt KVM_RUN and do nothing else.  Called once per process, on its main thread.

    Without a handler the first kick would end the process.  A wakeup fd of the signal module gets every kick.
    """
    signal.signal(KICK_SIGNAL, _nothing)


class Vcpu:
    """A vCPU, its descriptor and the page that it shares with the kernel.

    Raises:
        OSError: from every method, if the kernel refuses.  The message names the request.
    """

    __slots__ = ("_fd", "_page", "_pending", "_pio", "_thread", "_thread_lock", "exits", "xsave_bytes")

    def __init__(self, fd: int, mmap_bytes: int, xsave_bytes: int = 0) -> None:
        self._fd = fd
        self._page = mmap.mmap(fd, mmap_bytes)
        data = memoryview(self._page)[_PIO_DATA : _PIO_DATA + mmap.PAGESIZE]
        # The data of port I/O, by the size of an item; index 0 is the first item.
        self._pio = {1: data, 2: data.cast("H"), 4: data.cast("I")}
        self._pending = (0, 0)  # offset and length of the answer to the last exit
        self._thread: int | None = None
        self._thread_lock = _thread.allocate_lock()
        self.exits = 0  # how often KVM_RUN has returned with an exit, which is the cost of a guest
        self.xsave_bytes = xsave_bytes

    def __enter__(self) -> "Vcpu":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def fd(self) -> int:
        """The vCPU's descriptor; -1 after `close`."""
        return self._fd

    def close(self) -> None:
        """Unmap and close.  The thread must have ended.  A second call does nothing."""
        if self._fd >= 0:
            for view in self._pio.values():
                view.release()
            self._page.close()
            os.close(self._fd)
            self._fd = -1

    # ---- running

    def run(self) -> Exit:
        """Enter the guest.  Return the exit.

        Raises:
            OSError: KVM cannot run this vCPU at all, for example EFAULT for missing memory.
        """
        self._pending = (0, 0)
        try:
            # Without a third argument, for speed: fcntl would first try twice to take 0 for a buffer.
            fcntl.ioctl(self._fd, abi.KVM_RUN)
        except OSError as error:
            return self._not_run(error)
        self.exits += 1
        return self._decode()

    @staticmethod
    def _not_run(error: OSError) -> Exit:
        """Return the exit for EINTR and EAGAIN, which are part of running.  Raises OSError for other errors."""
        if error.errno == errno.EINTR:
            return INTERRUPTED
        if error.errno == errno.EAGAIN:
            return RETRY
        raise abi.refused(abi.KVM_RUN, error.errno or errno.EIO) from None

    def _decode(self) -> Exit:
        """Return the exit object, and remember the place for its answer."""
        exit_ = decode(self._page)
        if isinstance(exit_, PioIn):
            self._pending = (_PIO_DATA, exit_.size * exit_.count)
        elif isinstance(exit_, MmioRead):
            self._pending = (MMIO_DATA, exit_.size)
        return exit_

    def run_pio(
        self, pio_read: "Callable[[int, int], int]", pio_write: "Callable[[int, int, int], object]"
    ) -> Exit:
        """Run as `run` does, but answer single port accesses here.  Return the first other exit.

        `pio_read(port, size)` returns the value, of which the low `size` bytes count.  `pio_write(port, size, value)`
        takes a value.  An exception of theirs is passed on.  The guest is then in the same state as after `run`.

        This is the hot loop of a VM: one call and no object per exit.  String accesses (with a count above 1) are
        returned, so that a device can handle them as a whole.
        """
        fd, page, pio, run = self._fd, self._page, self._pio, int(abi.KVM_RUN)
        ioctl_, unpack, answer = fcntl.ioctl, REASON_IO.unpack_from, self._pio[4]
        self._pending = (0, 0)
        while True:
            try:
                ioctl_(fd, run)
            except OSError as error:  # only that of the ioctl: an OSError of a device is passed on
                return self._not_run(error)
            self.exits += 1
            reason, direction, size, port, count, _ = unpack(page)
            if reason != _EXIT_IO or count != 1:
                return self._decode()
            if direction:  # KVM_EXIT_IO_OUT
                pio_write(port, size, pio[size][0])
            else:
                # KVM takes the low bytes.  Storing all four is faster than choosing a view.
                answer[0] = pio_read(port, size) & 0xFFFFFFFF

    def answer(self, data: bytes) -> None:
        """Give the bytes for the PioIn or MmioRead that was returned last.

        Raises:
            ValueError: the last exit asks for another number of bytes, or for no bytes.
        """
        start, size = self._pending
        if len(data) != size or not size:
            raise ValueError(f"answer of {len(data)} bytes to an exit that asks for {size}")
        self._page[start : start + size] = data
        self._pending = (0, 0)

    def complete(self) -> Exit:
        """Finish the I/O of the last exit, and do not run the guest any further.

        Returns Interrupted if the guest is between two instructions.  Any other exit is the next piece of the same
        instruction: answer it and call this again.  The kick stays set until `clear_kick`.
        """
        self._page[_IMMEDIATE_EXIT] = 1
        return self.run()

    # ---- kicking

    def bind_thread(self) -> None:
        """Direct kicks to the calling thread.  The vCPU's thread calls this first."""
        with self._thread_lock:
            self._thread = _thread.get_ident()

    def unbind_thread(self) -> None:
        """Send no more signals.  The thread calls this last, because its id may be reused afterwards."""
        with self._thread_lock:
            self._thread = None

    def kick(self) -> None:
        """Make the vCPU leave the guest, now or as soon as it enters.  May be called from any thread."""
        self._page[_IMMEDIATE_EXIT] = 1
        with self._thread_lock:
            if self._thread is not None:
                signal.pthread_kill(self._thread, KICK_SIGNAL)

    def clear_kick(self) -> None:
        """Let the vCPU enter the guest again."""
        self._page[_IMMEDIATE_EXIT] = 0

    # ---- registers

    def get_regs(self) -> abi.kvm_regs:
        """Return the general purpose registers."""
        return read_struct(self._fd, abi.KVM_GET_REGS, abi.kvm_regs)

    def set_regs(self, state: abi.kvm_regs | bytes) -> None:
        """Load the general purpose registers.  This cancels a pending exception."""
        write_struct(self._fd, abi.KVM_SET_REGS, abi.kvm_regs, state)

    def get_sregs(self) -> abi.kvm_sregs:
        """Return segment, table and control registers."""
        return read_struct(self._fd, abi.KVM_GET_SREGS, abi.kvm_sregs)

    def set_sregs(self, state: abi.kvm_sregs | bytes) -> None:
        """Load segment, table and control registers."""
        write_struct(self._fd, abi.KVM_SET_SREGS, abi.kvm_sregs, state)

    def get_xsave(self) -> bytes:
        """Return the whole XSAVE area, whose length depends on the host (api.rst 4.134)."""
        area = bytearray(max(self.xsave_bytes, 4096))
        ioctl(self._fd, abi.KVM_GET_XSAVE2 if self.xsave_bytes else abi.KVM_GET_XSAVE, area)
        return bytes(area)

    def set_xsave(self, area: bytes) -> None:
        """Load the XSAVE area.

        Raises:
            ValueError: its length is not that of this host, so it belongs to other processor features.
        """
        if len(area) != max(self.xsave_bytes, 4096):
            raise ValueError(f"xsave area of {len(area)} bytes, not {max(self.xsave_bytes, 4096)}")
        ioctl(self._fd, abi.KVM_SET_XSAVE, bytearray(area))

    def get_xcrs(self) -> abi.kvm_xcrs:
        """Return the extended control registers."""
        return read_struct(self._fd, abi.KVM_GET_XCRS, abi.kvm_xcrs)

    def set_xcrs(self, state: abi.kvm_xcrs | bytes) -> None:
        """Load the extended control registers.  This comes after CPUID and before the XSAVE area."""
        write_struct(self._fd, abi.KVM_SET_XCRS, abi.kvm_xcrs, state)

    def set_cpuid2(self, entries: list[abi.kvm_cpuid_entry2]) -> None:
        """Set the CPUID leaves.  This comes before the vCPU runs for the first time."""
        ioctl(self._fd, abi.KVM_SET_CPUID2, abi.counted(abi.kvm_cpuid2, entries))

    def get_msrs(self, indices: "Iterable[int]") -> dict[int, int]:
        """Return the values of MSRs, without those that cannot be read: with this CPUID an MSR may not exist."""
        values: dict[int, int] = {}
        todo = list(indices)
        while todo:
            chunk = [abi.kvm_msr_entry(index=index) for index in todo[:_MSRS_AT_ONCE]]
            buffer = abi.counted(abi.kvm_msrs, chunk)
            done = ioctl(self._fd, abi.KVM_GET_MSRS, buffer)
            for position in range(done):
                entry = abi.kvm_msr_entry.from_buffer_copy(buffer, 8 + 16 * position)
                values[entry.index] = entry.data
            # The kernel stops at the first MSR that it refuses: go on after it.
            todo = todo[done + 1 if done < len(chunk) else done :]
        return values

    def set_msrs(self, values: dict[int, int]) -> list[int]:
        """Write MSRs in the given order.  Return the indices of the MSRs that the kernel refused."""
        refused: list[int] = []
        todo = list(values.items())
        while todo:
            chunk = [abi.kvm_msr_entry(index=index, data=data) for index, data in todo[:_MSRS_AT_ONCE]]
            done = ioctl(self._fd, abi.KVM_SET_MSRS, abi.counted(abi.kvm_msrs, chunk))
            if done < len(chunk):
                refused.append(todo[done][0])
                done += 1
            todo = todo[done:]
        return refused

    def get_lapic(self) -> bytes:
        """Return the local APIC's registers."""
        return bytes(read_struct(self._fd, abi.KVM_GET_LAPIC, abi.kvm_lapic_state))

    def set_lapic(self, state: bytes) -> None:
        """Load the local APIC's registers.  This comes after sregs, which have its base and mode."""
        write_struct(self._fd, abi.KVM_SET_LAPIC, abi.kvm_lapic_state, state)

    def get_mp_state(self) -> int:
        """Return KVM_MP_STATE_*.  KVM first delivers a pending INIT or SIPI."""
        return int(read_struct(self._fd, abi.KVM_GET_MP_STATE, abi.kvm_mp_state).mp_state)

    def set_mp_state(self, mp_state: int) -> None:
        """Set KVM_MP_STATE_*."""
        ioctl(self._fd, abi.KVM_SET_MP_STATE, abi.kvm_mp_state(mp_state))

    def get_vcpu_events(self) -> abi.kvm_vcpu_events:
        """Return exceptions, interrupts and NMIs under way."""
        return read_struct(self._fd, abi.KVM_GET_VCPU_EVENTS, abi.kvm_vcpu_events)

    def set_vcpu_events(self, state: abi.kvm_vcpu_events | bytes) -> None:
        """Load exceptions, interrupts and NMIs.  KVM_VCPUEVENT_VALID_* in `flags` select the optional fields."""
        write_struct(self._fd, abi.KVM_SET_VCPU_EVENTS, abi.kvm_vcpu_events, state)

    def get_debugregs(self) -> abi.kvm_debugregs:
        """Return the debug registers."""
        return read_struct(self._fd, abi.KVM_GET_DEBUGREGS, abi.kvm_debugregs)

    def set_debugregs(self, state: abi.kvm_debugregs | bytes) -> None:
        """Load the debug registers."""
        write_struct(self._fd, abi.KVM_SET_DEBUGREGS, abi.kvm_debugregs, state)

    def get_tsc_khz(self) -> int:
        """Return the guest's TSC frequency."""
        return ioctl(self._fd, abi.KVM_GET_TSC_KHZ)

    @property
    def has_tsc_offset(self) -> bool:
        """Whether the kernel can read and set the offset of the TSC (since Linux 5.16)."""
        try:
            ioctl(self._fd, abi.KVM_HAS_DEVICE_ATTR, self._tsc_offset_attr(abi.u64()))
        except OSError:
            return False
        return True

    def get_tsc_offset(self) -> int:
        """Return the guest's TSC minus the host's, modulo 2^64 (devices/vcpu.rst, 4.1)."""
        value = abi.u64()
        ioctl(self._fd, abi.KVM_GET_DEVICE_ATTR, self._tsc_offset_attr(value))
        return int(value.value)

    def set_tsc_offset(self, offset: int) -> None:
        """Set the offset of the guest's TSC.  It is set exactly, unlike a value that is written to the MSR."""
        value = abi.u64(offset)  # it has to exist until the kernel has read it
        ioctl(self._fd, abi.KVM_SET_DEVICE_ATTR, self._tsc_offset_attr(value))

    @staticmethod
    def _tsc_offset_attr(value: native.c_uint64) -> abi.kvm_device_attr:
        return abi.kvm_device_attr(
            group=abi.KVM_VCPU_TSC_CTRL, attr=abi.KVM_VCPU_TSC_OFFSET, addr=native.addressof(value)
        )

    def translate(self, linear: int) -> int | None:
        """Return the guest-physical address of a linear address, or None if that is not mapped."""
        translation = abi.kvm_translation(linear_address=linear)
        ioctl(self._fd, abi.KVM_TRANSLATE, translation)
        return int(translation.physical_address) if translation.valid else None

