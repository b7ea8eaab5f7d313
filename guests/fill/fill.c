/* fill: touches memory, and then has nothing to do: a VM of a known weight.
 *
 *     mib=N        so much of it, each word another one than all before */

#include "guest.h"

#define MIB (1u << 20)

static void fill(void)
{
    uint32_t mib = option_number("mib", 1);
    uint64_t *word = take_pages((size_t)mib * MIB);
    uint64_t value = 0x9E3779B97F4A7C15;

    for (uint64_t count = (uint64_t)mib * MIB / sizeof(*word); count; count--) {
        value ^= value << 13;
        value ^= value >> 7;
        value ^= value << 17;
        *word++ = value;
    }
    print("filled %u MiB\n", mib);
    for (;;)
        delay(4000);
}

void guest_main(void)
{
    run_in_ring3(fill);
}
