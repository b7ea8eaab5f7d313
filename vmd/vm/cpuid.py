"""The CPUID table of each vCPU: KVM's table, with the place of the vCPU in the topology (arch. 4).

The topology is one package, one thread per core, and the APIC id is the number of the vCPU.  KVM's table has the
hypervisor leaves with the signature `KVMKVMKVM`, so guests find kvmclock.
"""

import struct

from vmd.kvmapi.abi import KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2

TOPOLOGY_LEAVES = (0xB, 0x1F)  # extended topology, and its second version

ECX_X2APIC = 1 << 21
ECX_TSC_DEADLINE = 1 << 24
ECX_HYPERVISOR = 1 << 31
EDX_HTT = 1 << 28  # leaf 1: EBX[23:16] counts logical processors
ECX_CMP_LEGACY = 1 << 1  # leaf 80000001h, AMD's counterpart

BRAND_LEAVES = (0x80000002, 0x80000003, 0x80000004)
BRAND = b"vmd virtual processor"  # used if KVM does not pass on the brand string of the host

LEVEL_SMT = 1
LEVEL_CORE = 2


def entry(function: int, index: int, eax: int, ebx: int, ecx: int, edx: int) -> kvm_cpuid_entry2:
    """Return one sub-leaf."""
    return kvm_cpuid_entry2(function, index, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, eax, ebx, ecx, edx)


def topology(leaf: int, apic_id: int, vcpus: int) -> list[kvm_cpuid_entry2]:
    """Return the sub-leaves of an extended topology leaf (Intel SDM 2A, CPUID 0Bh)."""
    bits = (vcpus - 1).bit_length()
    return [
        entry(leaf, 0, 0, 1, LEVEL_SMT << 8 | 0, apic_id),
        entry(leaf, 1, bits, vcpus, LEVEL_CORE << 8 | 1, apic_id),
        entry(leaf, 2, 0, 0, 2, apic_id),
    ]


def for_vcpu(
    supported: list[kvm_cpuid_entry2], apic_id: int, vcpus: int, *, tsc_deadline: bool
) -> list[kvm_cpuid_entry2]:
    """Return the table of one vCPU, made from `supported`, the table of KVM_GET_SUPPORTED_CPUID."""
    leaves = [
        kvm_cpuid_entry2.from_buffer_copy(each) for each in supported if each.function not in TOPOLOGY_LEAVES
    ]
    highest = max((each.eax for each in leaves if each.function == 0), default=0)
    for leaf in leaves:
        if leaf.function == 0x1:
            leaf.ebx = leaf.ebx & 0xFFFF | vcpus << 16 | apic_id << 24
            # KVM emulates x2APIC on every host.  It reports the deadline timer as a capability, not in this table.
            leaf.ecx |= ECX_HYPERVISOR | ECX_X2APIC | (ECX_TSC_DEADLINE if tsc_deadline else 0)
            leaf.edx = leaf.edx | EDX_HTT if vcpus > 1 else leaf.edx & ~EDX_HTT
        elif leaf.function == 0x4 and leaf.eax & 0x1F:
            # The number of cores in the package.  Each core has its caches for itself.
            leaf.eax = leaf.eax & 0x3FFF | (vcpus - 1) << 26
        elif leaf.function == 0x8000001D and leaf.eax & 0x1F:
            leaf.eax &= ~(0xFFF << 14)
        elif leaf.function == 0x80000001:
            leaf.ecx = leaf.ecx | ECX_CMP_LEGACY if vcpus > 1 else leaf.ecx & ~ECX_CMP_LEGACY
        elif leaf.function == 0x80000008:
            leaf.ecx = leaf.ecx & ~0xF0FF | (vcpus - 1).bit_length() << 12 | vcpus - 1
        elif leaf.function == 0x8000001E:
            leaf.eax, leaf.ebx, leaf.ecx = apic_id, apic_id & 0xFF, 0
    name_processor(leaves)
    for number in TOPOLOGY_LEAVES:
        if highest >= number:
            leaves += topology(number, apic_id, vcpus)
    return leaves


def name_processor(leaves: list[kvm_cpuid_entry2]) -> None:
    """Fill in the brand string if it is empty.  Without it, guests show family and model numbers."""
    brand = [leaf for leaf in leaves if leaf.function in BRAND_LEAVES]
    empty = not any(leaf.eax or leaf.ebx or leaf.ecx or leaf.edx for leaf in brand)
    if len(brand) == len(BRAND_LEAVES) and empty:
        for leaf in brand:
            start = (leaf.function - BRAND_LEAVES[0]) * 16
            text = BRAND.ljust(48, b"\0")[start : start + 16]
            leaf.eax, leaf.ebx, leaf.ecx, leaf.edx = struct.unpack("<4I", text)
