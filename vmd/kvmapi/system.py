"""/dev/kvm: asks for the capabilities of the host's KVM, and creates virtual machines."""

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
    """An open /dev/kvm, which this object owns.  Its VMs stay when it is closed.

    Raises:
        OSError: the descriptor is not /dev/kvm, or has another version of the API.  The descriptor stays open.
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
        """Close the descriptor.  A second call does nothing."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def check_extension(self, cap: int) -> int:
        """Return 0 if the host lacks a KVM_CAP_*, else 1 or the value of the capability."""
        return ioctl(self.fd, KVM_CHECK_EXTENSION, cap)

    def supported_cpuid(self) -> list[kvm_cpuid_entry2]:
        """Return the CPUID leaves that host and KVM support.  They can be edited and given to a vCPU."""
        return read_list(self.fd, KVM_GET_SUPPORTED_CPUID, kvm_cpuid2, kvm_cpuid_entry2)

    def msr_indices(self) -> list[int]:
        """Return the indices of the MSRs that belong to a guest's state (without the MCE banks, api.rst 4.3)."""
        return [msr.index for msr in read_list(self.fd, KVM_GET_MSR_INDEX_LIST, kvm_msr_list, kvm_msr_index)]

    def create_vm(self) -> Vm:
        """Create a VM without memory or vCPUs.  Only this process may use it, and none of its children."""
        return Vm(ioctl(self.fd, KVM_CREATE_VM), self.vcpu_mmap_bytes)
