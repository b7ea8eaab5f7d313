/* The list of parts, and the report. */

#include "selftest.h"

static unsigned good_count, bad_count;

bool under_qemu(void)
{
    return option("qemu");
}

static void passed(const char *name)
{
    good_count++;
    print("ok %s\n", name);
}

void check(const char *name, bool good)
{
    check_equal(name, good, true);
}

void check_equal(const char *name, uint64_t got, uint64_t want)
{
    if (got == want) {
        passed(name);
        return;
    }
    bad_count++;
    print("FAIL %s: got %lx want %lx\n", name, got, want);
}

void check_range(const char *name, uint64_t got, uint64_t least, uint64_t most)
{
    if (least <= got && got <= most) {
        passed(name);
        return;
    }
    bad_count++;
    print("FAIL %s: got %lu want %lu to %lu\n", name, got, least, most);
}

void skip(const char *name)
{
    print("skip %s\n", name);
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
    print("selftest: %u ok, %u failed\n", good_count, bad_count);
}
