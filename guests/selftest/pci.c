/* PCI configuration mechanism 1. */

#include "selftest.h"

enum { ADDRESS = 0xCF8, DATA = 0xCFC };

#define ENABLE 0x80000000u
#define HOST_BRIDGE 0x12378086u

static uint32_t config(unsigned slot, unsigned function, unsigned offset)
{
    outl(ADDRESS, ENABLE | slot << 11 | function << 8 | offset);
    return inl(DATA);
}

void test_pci(void)
{
    unsigned absent = 0, wrong = 0;
    uint32_t id = config(0, 0, 0), subsystem;

    if (under_qemu() && id == 0xFFFFFFFF) {
        skip("pci");
        return;
    }
    check_equal("pci.host-bridge", id, HOST_BRIDGE);
    check_equal("pci.host-bridge-class", config(0, 0, 8) >> 16, 0x0600);
    subsystem = config(0, 0, 0x2C);
    check_equal("pci.host-bridge-subsystem", subsystem, 0x11001AF4);
    outl(ADDRESS, ENABLE);
    check_equal("pci.address-reads-back", inl(ADDRESS), ENABLE);
    for (unsigned lane = 0; lane < 4; lane++)
        wrong += inb((uint16_t)(DATA + lane)) != (uint8_t)(HOST_BRIDGE >> 8 * lane);
    check_equal("pci.byte-lanes", wrong, 0);
    check_equal("pci.word-lanes", (uint32_t)inw(DATA + 2) << 16 | inw(DATA), HOST_BRIDGE);
    outl(DATA, 0);
    outb(DATA, 0);
    check_equal("pci.ids-are-read-only", config(0, 0, 0), HOST_BRIDGE);
    outl(ADDRESS, 0);
    check_equal("pci.disabled-reads-ones", inl(DATA), 0xFFFFFFFF);

    wrong = 0;
    for (unsigned slot = 1; slot < 32; slot++) {
        if (config(slot, 0, 0) != 0xFFFFFFFF)
            continue;
        absent++;
        wrong += config(slot, 0, 8) != 0xFFFFFFFF || config(slot, 0, 0x3C) != 0xFFFFFFFF;
    }
    check("pci.has-absent-slots", absent > 0);
    check_equal("pci.absent-slots-read-ones", wrong, 0);
    check_equal("pci.absent-function-reads-ones", config(0, 1, 0), 0xFFFFFFFF);
    check_equal("pci.absent-bus-reads-ones", config(32 * 8, 0, 0), 0xFFFFFFFF); /* slot 256 is bus 8 */
    outl(ADDRESS, 0);
}
