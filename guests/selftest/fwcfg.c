/* fw_cfg by port and by DMA. */

#include "selftest.h"

enum { SELECT = 0x510, DATA = 0x511, DMA_HIGH = 0x514, DMA_LOW = 0x518 };
enum { ITEM_SIGNATURE = 0, ITEM_ID = 1, ITEM_CPUS = 5, ITEM_DIRECTORY = 0x19, ITEM_NONE = 0x3FFF };
enum { DMA_ERROR = 1, DMA_READ = 2, DMA_SKIP = 4, DMA_SELECT = 8, DMA_WRITE = 16 };

#define FILES_MAX 32
#define NO_MEMORY 0x700000000000ull

struct file {
    uint32_t size;
    uint16_t select, reserved;
    char name[56];
};

struct dma {
    uint32_t control, length;
    uint64_t address;
};

static volatile struct dma dma __attribute__((aligned(16)));
static uint8_t by_port[4 + FILES_MAX * sizeof(struct file)], by_dma[sizeof(by_port)];

static uint32_t swap32(uint32_t value)
{
    return __builtin_bswap32(value);
}

static void read_by_port(uint16_t item, void *to, uint64_t count)
{
    outw(SELECT, item);
    __asm__ volatile("rep insb" : "+D"(to), "+c"(count) : "d"((uint16_t)DATA) : "memory");
}

/* Return the final control word: 0, or the error bit. */
static uint32_t run_dma(uint32_t control, uint64_t address, uint32_t length)
{
    uint64_t at = (uint64_t)&dma;

    dma.control = swap32(control);
    dma.length = swap32(length);
    dma.address = __builtin_bswap64(address);
    outl(DMA_HIGH, swap32((uint32_t)(at >> 32)));
    outl(DMA_LOW, swap32((uint32_t)at));
    for (unsigned polls = 0; swap32(dma.control) & ~DMA_ERROR && polls < 10000; polls++)
        cpu_pause();
    return swap32(dma.control);
}

static const struct file *find_file(const char *name)
{
    const struct file *files = (const struct file *)(by_port + 4);
    uint32_t count = swap32(*(uint32_t *)by_port);

    for (uint32_t i = 0; i < count && i < FILES_MAX; i++)
        if (same(files[i].name, name))
            return &files[i];
    return NULL;
}

static void test_e820(void)
{
    const struct file *file = find_file("etc/e820");
    uint8_t entries[16 * 20];
    unsigned wrong = 0, count;

    check("fwcfg.has-e820", file);
    if (!file)
        return;
    if (under_qemu()) { /* whose firmware adds to it */
        skip("fwcfg.e820-is-memory-map");
        return;
    }
    count = swap32(file->size) / 20;
    check_equal("fwcfg.e820-count", count, memory_range_count());
    if (count > 16 || count != memory_range_count())
        return;
    read_by_port(__builtin_bswap16(file->select), entries, count * 20);
    for (unsigned i = 0; i < count; i++) /* address, size and type have the same offsets in both */
        wrong += memcmp(entries + 20 * i, memory_range(i), 20) != 0;
    check_equal("fwcfg.e820-is-memory-map", wrong, 0);
}

void test_fwcfg(void)
{
    uint32_t word = 0, size;
    uint16_t cpus = 0;

    read_by_port(ITEM_SIGNATURE, &word, 4);
    if (under_qemu() && word == 0xFFFFFFFF) {
        skip("fwcfg");
        return;
    }
    check_equal("fwcfg.signature", word, 0x554D4551); /* "QEMU" */
    read_by_port(ITEM_ID, &word, 4);
    check_equal("fwcfg.id", word, 3);
    check_equal("fwcfg.dma-signature-high", inl(DMA_HIGH), 0x554D4551);
    check_equal("fwcfg.dma-signature-low", inl(DMA_LOW), 0x47464320); /* " CFG" */

    read_by_port(ITEM_DIRECTORY, by_port, 4);
    size = swap32(*(uint32_t *)by_port);
    check_range("fwcfg.file-count", size, 1, FILES_MAX);
    size = 4 + (size < FILES_MAX ? size : FILES_MAX) * sizeof(struct file);
    read_by_port(ITEM_DIRECTORY, by_port, size);
    check_equal("fwcfg.dma-reads", run_dma(ITEM_DIRECTORY << 16 | DMA_SELECT | DMA_READ, (uint64_t)by_dma, size), 0);
    check_equal("fwcfg.dma-same-as-port", memcmp(by_port, by_dma, size), 0);
    check_equal("fwcfg.dma-skips", run_dma(ITEM_DIRECTORY << 16 | DMA_SELECT | DMA_SKIP, 0, 4), 0);
    run_dma(DMA_READ, (uint64_t)by_dma, 8);
    check_equal("fwcfg.dma-skip-took-effect", memcmp(by_port + 4, by_dma, 8), 0);
    check_equal("fwcfg.dma-to-nowhere", run_dma(ITEM_ID << 16 | DMA_SELECT | DMA_READ, NO_MEMORY, 4), DMA_ERROR);
    check_equal("fwcfg.dma-write-refused", run_dma(ITEM_ID << 16 | DMA_SELECT | DMA_WRITE, (uint64_t)by_dma, 4),
                DMA_ERROR);

    read_by_port(ITEM_CPUS, &cpus, 2);
    check_equal("fwcfg.cpus", cpus, madt_processors());
    word = 0xFFFFFFFF;
    read_by_port(ITEM_NONE, &word, 4);
    check_equal("fwcfg.unknown-item-reads-zeros", word, 0);
    outw(SELECT, ITEM_ID);
    inl(DATA); /* only vmd has wide reads of this port; the next selection starts at offset 0 in any case */
    read_by_port(ITEM_SIGNATURE, by_dma, 8);
    check_equal("fwcfg.zeros-after-the-end", *(uint32_t *)(by_dma + 4), 0);
    test_e820();
}
