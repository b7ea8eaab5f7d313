/* Starting other processors. */

#include "guest.h"

#define TRAMPOLINE 0x80000 /* a page of conventional memory that boot loaders leave alone */
#define WAIT_MS 2000

enum {
    ICR_INIT = 0x4500,    /* assert */
    ICR_STARTUP = 0x4600, /* the low byte is the page */
    ICR_FIXED = 0x4000,
};

extern const uint8_t trampoline_start[], trampoline_end[];
extern volatile uint32_t trampoline_counter; /* used in the copy; only its offset matters here */
_Noreturn void ap_main(void);

static volatile uint32_t online;
static void (*volatile ap_work)(void);

void ap_main(void)
{
    void (*work)(void) = ap_work;

    traps_load();
    lapic_write(LAPIC_SPURIOUS, LAPIC_ON | VECTOR_SPURIOUS);
    online++;
    work();
    halt();
}

static void send(uint8_t to, uint32_t command)
{
    lapic_write(LAPIC_ICR_HIGH, (uint32_t)to << 24);
    lapic_write(LAPIC_ICR_LOW, command);
}

void processor_interrupt(uint8_t id, uint8_t vector)
{
    send(id, ICR_FIXED | vector);
}

uint32_t processors_in_real_mode(void)
{
    return peek32(TRAMPOLINE + (uint64_t)((const uint8_t *)&trampoline_counter - trampoline_start));
}

bool processor_start(uint8_t id, void (*work)(void))
{
    static bool copied;
    uint32_t before = online;

    if (!copied)
        memcpy((void *)TRAMPOLINE, trampoline_start, (size_t)(trampoline_end - trampoline_start));
    copied = true;
    ap_work = work;
    send(id, ICR_INIT);
    delay(10);
    for (unsigned tries = 0; tries < 2; tries++) { /* a second try, because the first may get lost (Intel MP, B.4) */
        send(id, ICR_STARTUP | TRAMPOLINE >> 12);
        if (wait_until(&online, before + 1, tries ? WAIT_MS : WAIT_MS / 4))
            return true;
    }
    return false;
}

bool next_processor(const uint8_t **entry, uint8_t *id)
{
    while ((*entry = madt_entry(MADT_LAPIC, *entry))) {
        *id = (*entry)[3];
        if ((*entry)[4] & 1 && *id != lapic_id())
            return true;
    }
    return false;
}
