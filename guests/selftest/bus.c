/* Accesses to addresses without a device. */

#include "selftest.h"

#define NOBODY_PORT 0xE00
#define NOBODY_MMIO 0xFE000000u /* in the PCI window; BARs are allocated from its other end */

static void read_string(uint16_t port, unsigned size, void *to, uint64_t count)
{
    if (size == 1)
        __asm__ volatile("rep insb" : "+D"(to), "+c"(count) : "d"(port) : "memory");
    else if (size == 2)
        __asm__ volatile("rep insw" : "+D"(to), "+c"(count) : "d"(port) : "memory");
    else
        __asm__ volatile("rep insl" : "+D"(to), "+c"(count) : "d"(port) : "memory");
}

static void write_string(uint16_t port, unsigned size, const void *from, uint64_t count)
{
    if (size == 1)
        __asm__ volatile("rep outsb" : "+S"(from), "+c"(count) : "d"(port) : "memory");
    else if (size == 2)
        __asm__ volatile("rep outsw" : "+S"(from), "+c"(count) : "d"(port) : "memory");
    else
        __asm__ volatile("rep outsl" : "+S"(from), "+c"(count) : "d"(port) : "memory");
}

static bool all_ones(const uint8_t *bytes, unsigned count)
{
    for (unsigned i = 0; i < count; i++)
        if (bytes[i] != 0xFF)
            return false;
    return true;
}

void test_ports(void)
{
    static uint8_t buffer[64];

    check_equal("port.unclaimed-byte", inb(NOBODY_PORT), 0xFF);
    check_equal("port.unclaimed-word", inw(NOBODY_PORT), 0xFFFF);
    check_equal("port.unclaimed-dword", inl(NOBODY_PORT), 0xFFFFFFFF);
    outb(NOBODY_PORT, 0);
    outw(NOBODY_PORT, 0);
    outl(NOBODY_PORT, 0);
    check_equal("port.unclaimed-write-dropped", inl(NOBODY_PORT), 0xFFFFFFFF);
    check_equal("port.last", inb(0xFFFF), 0xFF);
    for (unsigned size = 1; size <= 4; size *= 2) {
        memset(buffer, 0, sizeof(buffer));
        read_string(NOBODY_PORT, size, buffer, 8);
        check(size == 1 ? "port.rep-insb" : size == 2 ? "port.rep-insw" : "port.rep-insl",
              all_ones(buffer, 8 * size) && buffer[8 * size] == 0);
        write_string(NOBODY_PORT, size, buffer, 8);
    }
    check("port.rep-outs", true); /* passed if the guest still runs */
}

void test_mmio(void)
{
    uint64_t beyond = 0;

    for (unsigned i = 0; i < memory_range_count(); i++) {
        uint64_t end = memory_range(i)->address + memory_range(i)->size;

        if (memory_range(i)->type == MEMORY_RAM && end > beyond)
            beyond = end;
    }
    beyond = beyond < 1ull << 32 ? 1ull << 32 : beyond;
    if (under_qemu()) { /* which reads zeros there */
        skip("mmio.unmapped");
        return;
    }
    check_equal("mmio.unmapped-byte", peek8(NOBODY_MMIO), 0xFF);
    check_equal("mmio.unmapped-word", peek16(NOBODY_MMIO + 2), 0xFFFF);
    check_equal("mmio.unmapped-dword", peek32(NOBODY_MMIO + 4), 0xFFFFFFFF);
    check_equal("mmio.unmapped-qword", peek64(NOBODY_MMIO + 8), UINT64_MAX);
    poke32(NOBODY_MMIO, 0);
    poke64(NOBODY_MMIO, 0);
    check_equal("mmio.unmapped-write-dropped", peek64(NOBODY_MMIO), UINT64_MAX);
    check("mmio.beyond-ram-mapped", map_high(beyond));
    check_equal("mmio.beyond-ram", peek64(beyond), UINT64_MAX);
}

enum { KBD_DATA = 0x60, KBD_STATUS = 0x64, KBD_FULL = 0x01, KBD_BUSY = 0x02 };

void test_keyboard(void)
{
    unsigned polls = 0;
    uint8_t status = inb(KBD_STATUS);

    if (status == 0xFF && under_qemu()) {
        skip("keyboard");
        return;
    }
    while (inb(KBD_STATUS) & KBD_FULL && polls++ < 100)
        inb(KBD_DATA);
    check_equal("keyboard.not-busy", inb(KBD_STATUS) & (KBD_FULL | KBD_BUSY), 0);
    outb(KBD_STATUS, 0xAA);
    for (polls = 0; !(inb(KBD_STATUS) & KBD_FULL) && polls < 100; polls++)
        cpu_pause();
    check("keyboard.answers-soon", polls < 100);
    check_equal("keyboard.self-test", inb(KBD_DATA), 0x55);
    check_equal("keyboard.empty-again", inb(KBD_STATUS) & KBD_FULL, 0);
}
