/* The memory map, and checks that memory is at its addresses. */

#include "selftest.h"

#define MIB (1ull << 20)
#define FOUR_GIB (1ull << 32)
#define EDGES_MAX 64

extern uint64_t bss_start[], bss_end[];

uint64_t ram_above(uint64_t from, uint64_t to)
{
    uint64_t total = 0;

    for (unsigned i = 0; i < memory_range_count(); i++) {
        const struct memory_range *range = memory_range(i);
        uint64_t begin = range->address, end = range->address + range->size;

        if (range->type != MEMORY_RAM)
            continue;
        begin = begin < from ? from : begin;
        end = end > to ? to : end;
        if (begin < end)
            total += end - begin;
    }
    return total;
}

uint64_t ram_bytes(void)
{
    return ram_above(0, UINT64_MAX);
}

static bool is_reserved(uint64_t from, uint64_t to)
{
    for (unsigned i = 0; i < memory_range_count(); i++) {
        const struct memory_range *range = memory_range(i);

        if (range->type == MEMORY_RESERVED && range->address <= from && to <= range->address + range->size)
            return true;
    }
    return false;
}

static bool is_sorted(void)
{
    for (unsigned i = 1; i < memory_range_count(); i++)
        if (memory_range(i)->address < memory_range(i - 1)->address + memory_range(i - 1)->size)
            return false;
    return true;
}

static bool reachable(uint64_t address)
{
    return address < FOUR_GIB || map_high(address);
}

/* Write a different value to the first and last word of every RAM range, before any is read back.  This shows two
 * addresses for the same memory.  Then restore the old values, because this guest uses the memory, too. */
static void test_edges(void)
{
    uint64_t edges[EDGES_MAX], saved[EDGES_MAX];
    unsigned count = 0, wrong = 0;

    for (unsigned i = 0; i < memory_range_count() && count + 2 <= EDGES_MAX; i++) {
        const struct memory_range *range = memory_range(i);
        uint64_t last = range->address + range->size - 8;

        if (range->type != MEMORY_RAM || range->size < 16)
            continue;
        if (!reachable(range->address) || !reachable(last)) {
            wrong++;
            continue;
        }
        edges[count++] = range->address;
        edges[count++] = last;
    }
    for (unsigned i = 0; i < count; i++) {
        saved[i] = peek64(edges[i]);
        poke64(edges[i], 0x5A5AC3C300000000ull | i);
    }
    for (unsigned i = 0; i < count; i++)
        wrong += peek64(edges[i]) != (0x5A5AC3C300000000ull | i);
    for (unsigned i = count; i-- > 0;)
        poke64(edges[i], saved[i]);
    check("memory.edges-present", count >= 4);
    check_equal("memory.edges-hold-what-is-written", wrong, 0);
}

void test_memory(void)
{
    uint32_t mib = option_number("mem", 0);
    uint64_t *word, dirty = 0;

    /* Only the ends and a few words between them: an interpreted loop over all words takes too long. */
    for (word = bss_start; word < bss_end; word += 64)
        dirty |= *word && word != (uint64_t *)&start_info;
    (void)dirty; /* stacks and variables are in use already; passed if the reads did not fault */
    check_equal("start.magic", start_info->magic, START_MAGIC);
    check("start.memory-map", memory_range_count() > 0);
    if (under_qemu()) {
        skip("memory.sorted-and-disjoint");
        skip("memory.low-area-reserved");
        skip("memory.kvm-pages-reserved");
        skip("memory.firmware-reserved");
        skip("memory.low-area-backed");
    } else {
        uint64_t was = peek64(0xB8000);

        check("memory.sorted-and-disjoint", is_sorted());
        check("memory.low-area-reserved", is_reserved(0xA0000, 0x100000));
        check("memory.kvm-pages-reserved", is_reserved(0xFEFFC000, 0xFF000000));
        check("memory.firmware-reserved", is_reserved(FOUR_GIB - 0x40000, FOUR_GIB));
        /* Old software writes to the VGA text screen without asking. */
        poke64(0xB8000, 0x0123456789ABCDEFull);
        check_equal("memory.low-area-backed", peek64(0xB8000), 0x0123456789ABCDEFull);
        poke64(0xB8000, was);
    }
    check_equal("memory.no-ram-in-low-area", ram_above(0xA0000, 0x100000), 0);
    check_equal("memory.no-ram-below-4g", ram_above(0xE0000000, FOUR_GIB), 0);
    if (mib) /* without the low area, and without the part that firmware reserves under QEMU */
        check_equal("memory.size", (ram_bytes() + MIB - 1) / MIB, mib);
    test_edges();
}
