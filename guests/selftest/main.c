/* The list of parts. */

#include "selftest.h"

bool under_qemu(void)
{
    return option("qemu");
}

void guest_main(void)
{
    print("selftest: begin\n");
    test_memory();
    test_lapic(); /* early: everything that waits relies on its timer */
    test_ports();
    test_mmio();
    test_cpu();
    test_acpi();
    test_pci();
    test_fwcfg();
    test_keyboard();
    test_uart();
    test_clock();
    test_pit();
    test_smp();
    report("selftest");
}
