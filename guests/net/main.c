/* The commands, and the list of ways to drive the interface. */

#include "net.h"

bool under_qemu(void)
{
    return option("qemu");
}

/* A name such as legacy.msix.merge.offloads.tables.events. */
static const char *name_way(const struct way *way)
{
    static const char *const interrupts[] = {"polled", "intx-pic", "intx-ioapic", "msix"};
    const char *const words[] = {
        way->legacy ? "legacy" : "modern",
        interrupts[way->interrupts],
        way->mergeable ? "merge" : "single",
        way->offloads ? "offloads" : "plain",
        way->indirect ? "tables" : "chains",
        way->event_index ? "events" : "flags",
    };

    return dotted(words, sizeof(words) / sizeof(words[0]));
}

static void test_interface(bool legacy)
{
    struct way way = {.legacy = legacy};

    for (way.interrupts = POLLED; way.interrupts <= MSIX; way.interrupts++)
        for (unsigned i = 0; i < 16; i++) {
            way.mergeable = i & 1;
            way.offloads = i >> 1 & 1;
            way.indirect = i >> 2 & 1;
            way.event_index = i >> 3;
            way.separate = legacy || way.indirect;
            test_traffic(name_way(&way), &way);
        }
    test_controls(legacy ? "legacy.controls" : "modern.controls", legacy);
}

static void print_interfaces(void)
{
    print("interfaces:%s%s\n", has_interface(false) ? " modern" : "", has_interface(true) ? " legacy" : "");
}

static void test(void)
{
    print_interfaces();
    for (unsigned legacy = 0; legacy < 2; legacy++)
        if (has_interface(legacy))
            test_interface(legacy);
    report("net");
}

static void pass_frames(const char *line)
{
    print_interfaces();
    pass_asleep(number_in(line, "count", 1));
}

static void obey(const char *line)
{
    if (word_is(line, "test"))
        test();
    else if (word_is(line, "link"))
        watch_link(line);
    else if (word_is(line, "dhcp"))
        ask_dhcp(line);
    else if (word_is(line, "frames"))
        pass_frames(line);
    else
        bench(line);
}

static void work(void)
{
    char line[COMMAND_MAX];

    commands_init();
    if (find_nic() == PCI_SLOTS)
        print("net: no interface\n");
    for (read_command(line); !word_is(line, "off"); read_command(line))
        obey(line);
    power_off();
}

void guest_main(void)
{
    print("net: begin\n");
    if (option("mapped"))
        virtio_use_memory_only();
    run_in_ring3(work);
}
