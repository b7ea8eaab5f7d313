/* The modes, and the list of ways to drive the disk. */

#include "blk.h"

bool under_qemu(void)
{
    return option("qemu");
}

/* A name such as legacy.msix.tables.events. */
static const char *name_way(const char *part, const struct way *way)
{
    static const char *const interrupts[] = {"polled", "intx-pic", "intx-ioapic", "msix"};
    const char *const words[] = {
        way->legacy ? "legacy" : "modern", part, interrupts[way->interrupts], way->indirect ? "tables" : "chains",
        way->event_index ? "events" : "flags",
    };

    return dotted(words, sizeof(words) / sizeof(words[0]));
}

static void test_interface(bool legacy)
{
    struct way way = {.legacy = legacy};

    for (way.interrupts = POLLED; way.interrupts <= MSIX; way.interrupts++)
        for (unsigned i = 0; i < 4; i++) {
            way.indirect = i & 1;
            way.event_index = i >> 1;
            test_rings(name_way("rings", &way), &way);
        }
    way = (struct way){.legacy = legacy};
    test_wrap(name_way("wrap", &way), &way);
    way.event_index = true;
    way.indirect = true;
    test_wrap(name_way("wrap", &way), &way);
    way.interrupts = MSIX;
    way.indirect = false;
    test_wrap(name_way("wrap", &way), &way);
    if (!legacy) {
        way.size = 32;
        test_rings("modern.small-queue", &way);
    }
    test_requests(legacy ? "legacy.requests" : "modern.requests", legacy);
    test_interrupts(legacy ? "legacy.interrupts" : "modern.interrupts", legacy);
    test_registers(legacy ? "legacy.registers" : "modern.registers", legacy);
}

static void test(void)
{
    bool has[] = {has_interface(false), has_interface(true)};

    print("interfaces:%s%s\n", has[0] ? " modern" : "", has[1] ? " legacy" : "");
    for (unsigned legacy = 0; legacy < 2; legacy++) {
        if (!has[legacy])
            continue;
        if (option("readonly"))
            test_read_only(legacy ? "legacy" : "modern", legacy);
        else
            test_interface(legacy);
    }
    if (!option("readonly"))
        write_final();
    report("blk");
}

static void work(void)
{
    uint32_t reads = option_number("reads", 0);

    if (find_disk() == PCI_SLOTS)
        print("blk: no disk\n");
    else if (option("bench"))
        bench();
    else if (option("churn"))
        churn();
    else if (reads)
        read_asleep(reads);
    else
        test();
    power_off();
}

void guest_main(void)
{
    print("blk: begin\n");
    if (option("mapped"))
        virtio_use_memory_only();
    run_in_ring3(work);
}
