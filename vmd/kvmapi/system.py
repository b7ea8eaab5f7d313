"""/dev/kvm itself: what the host's KVM can do, and the making of virtual machines."""

import errno
import os

from vmd.kvmapi.abi import (
    KVM_API_VERSION,
    KVM_CHECK_EXTENSION,
    KVM_CREATE_VM,
    KVM_GET_API_VERSION,
    KVM_GET_MSR_INDEX_LIST,
    KVM_GET_SUPPORTED_CPUID,
    KVM_GET_VCPU_MMAP_SIZE,
    ioctl,
    kvm_cpuid2,
    kvm_cpuid_entry2,
    kvm_msr_index,
    kvm_msr_list,
    read_list,
)
from vmd.kvmapi.vm import Vm


class System:
    """An open /dev/kvm, owned from here on; its VMs live on when it is closed.

    Raises:
        OSError: the descriptor is not /dev/kvm, or speaks another version of the API; it stays open.
    """

    def __init__(self, fd: int) -> None:
        version = ioctl(fd, KVM_GET_API_VERSION)
        if version != KVM_API_VERSION:
            raise OSError(errno.ENOSYS, f"KVM_GET_API_VERSION: version {version}, not {KVM_API_VERSION}")
        self.fd = fd
        self.vcpu_mmap_bytes = ioctl(fd, KVM_GET_VCPU_MMAP_SIZE)

    def __enter__(self) -> "System":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the descriptor; a second call does nothing."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def check_extension(self, cap: int) -> int:
        """Return 0 where the host lacks a KVM_CAP_*, else 1 or the number it stands for."""
        return ioctl(self.fd, KVM_CHECK_EXTENSION, cap)

    def supported_cpuid(self) -> list[kvm_cpuid_entry2]:
        """Return the CPUID leaves that host and KVM support, ready to edit and to give to a vCPU."""
        return read_list(self.fd, KVM_GET_SUPPORTED_CPUID, kvm_cpuid2, kvm_cpuid_entry2)

    def msr_indices(self) -> list[int]:
        """Return the MSRs that make up a guest's state (without the MCE banks, api.rst 4.3)."""
        return [msr.index for msr in read_list(self.fd, KVM_GET_MSR_INDEX_LIST, kvm_msr_list, kvm_msr_index)]

    def create_vm(self) -> Vm:
        """Make a VM without memory or vCPUs; only this process, not a child of it, may use it."""
        return Vm(ioctl(self.fd, KVM_CREATE_VM), self.vcpu_mmap_bytes)
