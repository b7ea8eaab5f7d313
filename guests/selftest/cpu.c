/* Processor identification and model-specific registers. */

#include "selftest.h"

enum {
    MSR_APIC_BASE = 0x1B,
    MSR_MTRR_DEFAULT = 0x2FF,
    MSR_NONE = 0xC0FFEE00,
    APIC_BSP = 1 << 8,
    APIC_ENABLED = 1 << 11,
    MTRR_ENABLED = 0x800,
    MTRR_WRITE_BACK = 6,
};

void test_cpu(void)
{
    struct cpuid leaf = cpuid(1);
    uint64_t value;

    check("cpuid.hypervisor-bit", leaf.ecx >> 31);
    leaf = cpuid(0x40000000);
    check("cpuid.signature-leaves", leaf.eax >= 0x40000001);
    check_equal("cpuid.signature-ebx", leaf.ebx, 0x4B4D564B); /* "KVMK" */
    check_equal("cpuid.signature-ecx", leaf.ecx, 0x564B4D56); /* "VMKV" */
    check_equal("cpuid.signature-edx", leaf.edx, 0x4D);       /* "M" */
    check_equal("cpuid.apic-id", cpuid(1).ebx >> 24, lapic_id());
    if (cpuid(0).eax >= 0xB)
        check_equal("cpuid.x2apic-id", cpuid(0xB).edx, lapic_id());
    else
        skip("cpuid.x2apic-id");
    check("msr.apic-base-reads", try_rdmsr(MSR_APIC_BASE, &value));
    check_equal("msr.apic-base", value, LAPIC_BASE | APIC_ENABLED | APIC_BSP);
    if (under_qemu())
        skip("msr.mtrr-default");
    else
        check_equal("msr.mtrr-default", rdmsr(MSR_MTRR_DEFAULT), MTRR_ENABLED | MTRR_WRITE_BACK);
    /* KVM may be set to ignore such accesses; either way the guest goes on. */
    try_rdmsr(MSR_NONE, &value);
    check("msr.unknown-read-survived", true);
    try_wrmsr(MSR_NONE, 1);
    check("msr.unknown-write-survived", true);
}
