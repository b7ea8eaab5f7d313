/* Memory and string functions that gcc needs, and page tables above 4 GiB. */

#include "guest.h"

/* String instructions process a whole block in one step, even if a KVM interprets instructions. */

void *memcpy(void *to, const void *from, size_t count)
{
    void *at = to;
    __asm__ volatile("rep movsb" : "+D"(at), "+S"(from), "+c"(count) : : "memory");
    return to;
}

void *memset(void *to, int byte, size_t count)
{
    void *at = to;
    __asm__ volatile("rep stosb" : "+D"(at), "+c"(count) : "a"(byte) : "memory");
    return to;
}

int memcmp(const void *a, const void *b, size_t count)
{
    const uint8_t *left = a, *right = b;

    for (size_t i = 0; i < count; i++)
        if (left[i] != right[i])
            return left[i] - right[i];
    return 0;
}

size_t strlen(const char *text)
{
    size_t length = 0;

    while (text[length])
        length++;
    return length;
}

bool same(const char *a, const char *b)
{
    while (*a && *a == *b)
        a++, b++;
    return *a == *b;
}

uint32_t parse_number(const char *text, uint32_t otherwise)
{
    uint32_t value = 0;

    if (*text < '0' || *text > '9')
        return otherwise;
    for (; *text >= '0' && *text <= '9'; text++) {
        if (value > (UINT32_MAX - 9) / 10)
            return otherwise;
        value = value * 10 + (uint32_t)(*text - '0');
    }
    return *text == '\0' || *text == ' ' ? value : otherwise;
}

#define PAGE 4096ull
/* Do not touch data of loaders and firmware at the end of memory. */
#define TOP_RESERVE (1ull << 20)

extern const uint8_t bss_end[];

void *take_pages(size_t size)
{
    static uint64_t next, end;
    uint64_t first;

    if (!next) {
        next = ((uint64_t)bss_end + PAGE - 1) & ~(PAGE - 1);
        for (unsigned i = 0; i < memory_range_count(); i++) {
            const struct memory_range *range = memory_range(i);

            if (range->type == MEMORY_RAM && range->address <= next && next < range->address + range->size)
                end = range->address + range->size - TOP_RESERVE;
        }
    }
    first = next;
    next += (size + PAGE - 1) & ~(PAGE - 1);
    if (next > end) {
        print("this guest needs more memory\n");
        power_off();
    }
    return (void *)first;
}

#define PTE_TABLE 0x07
#define PTE_2M 0x87
#define PAGE_2M 0x200000ull
#define PDPT_REACH (512ull << 30)

extern uint64_t pdpt[512];

bool map_high(uint64_t address)
{
    /* One page directory per GiB.  Few are needed, because the tests touch only the ends of a few ranges. */
    static uint64_t spare[8][512] __attribute__((aligned(4096)));
    static unsigned used;
    uint64_t *directory;

    if (address >= PDPT_REACH)
        return false;
    if (!pdpt[address >> 30]) {
        if (used == sizeof(spare) / sizeof(spare[0]))
            return false;
        pdpt[address >> 30] = (uint64_t)spare[used++] | PTE_TABLE;
    }
    directory = (uint64_t *)(pdpt[address >> 30] & ~0xFFFull);
    /* The TLB does not cache entries that are not present, so no flush is necessary. */
    directory[address >> 21 & 511] = (address & ~(PAGE_2M - 1)) | PTE_2M;
    return true;
}
