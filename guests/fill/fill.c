/* fill: writes to memory, and then sleeps: a VM with a known amount of memory in use.
 *
 *     mib=N        write N MiB, with a different value in each word
 *     again        then check and rewrite each page, for ever; print the number of passes now and then, and each page
 *                  that does not contain the values stored before
 *     rest=MS      sleep so long between two passes */

#include "guest.h"

#define MIB (1u << 20)
#define PAGE_WORDS 512u
#define TELL_EVERY 16u

static uint64_t number(uint32_t page, uint32_t pass)
{
    return ((uint64_t)page << 32 | pass) * 0x9E3779B97F4A7C15;
}

static void store(uint64_t *page, uint64_t what)
{
    page[0] = page[PAGE_WORDS - 1] = what;
}

static void again(uint64_t *words, uint32_t pages, uint32_t rest)
{
    for (uint32_t page = 0; page < pages; page++)
        store(words + (size_t)page * PAGE_WORDS, number(page, 0));
    for (uint32_t pass = 1;; pass++) {
        for (uint32_t page = 0; page < pages; page++) {
            uint64_t *at = words + (size_t)page * PAGE_WORDS, was = number(page, pass - 1);

            if (at[0] != was || at[PAGE_WORDS - 1] != was)
                print("lost: page %u in pass %u\n", page, pass);
            store(at, number(page, pass));
        }
        if (pass % TELL_EVERY == 0)
            print("pass %u\n", pass);
        if (rest)
            delay(rest);
    }
}

static void fill(void)
{
    uint32_t mib = option_number("mib", 1);
    uint64_t *words = take_pages((size_t)mib * MIB), *word = words;
    uint64_t value = 0x9E3779B97F4A7C15;

    for (uint64_t count = (uint64_t)mib * MIB / sizeof(*word); count; count--) {
        value ^= value << 13;
        value ^= value >> 7;
        value ^= value << 17;
        *word++ = value;
    }
    print("filled %u MiB\n", mib);
    if (option("again"))
        again(words, mib * (MIB / PAGE_WORDS / sizeof(*words)), option_number("rest", 0));
    for (;;)
        delay(4000);
}

void guest_main(void)
{
    run_in_ring3(fill);
}
