/* Starting the other processors, one after the other. */

#include "selftest.h"

#define TRAMPOLINE 0x80000 /* a page of conventional memory that boot loaders leave alone */
#define WAIT_MS 2000

enum {
    ICR_INIT = 0x4500,    /* assert */
    ICR_STARTUP = 0x4600, /* the low byte is the page */
    VECTOR_WAKE = VECTOR_FREE + 8,
};

extern const uint8_t trampoline_start[], trampoline_end[];
extern volatile uint32_t trampoline_counter; /* in the copy; its offset is what we need */
_Noreturn void ap_main(void);

static volatile uint32_t online, woken, ap_lapic_id, ap_cpuid_id;

static void on_wake(struct frame *frame)
{
    (void)frame;
    lapic_write(LAPIC_EOI, 0);
    woken++;
}

/* What a new processor does.  All use one stack, each until it has been woken: they come one at a time. */
void ap_main(void)
{
    uint32_t before;

    traps_load();
    lapic_write(LAPIC_SPURIOUS, LAPIC_ON | VECTOR_SPURIOUS);
    ap_lapic_id = lapic_read(LAPIC_ID) >> 24;
    ap_cpuid_id = cpuid(1).ebx >> 24;
    before = woken;
    online++;
    while (woken == before)
        wait_for_interrupt();
    halt();
}

static void send(uint8_t to, uint32_t command)
{
    lapic_write(LAPIC_ICR_HIGH, (uint32_t)to << 24);
    lapic_write(LAPIC_ICR_LOW, command);
}

static void start(uint8_t id)
{
    send(id, ICR_INIT);
    delay(10);
    for (unsigned tries = 0; tries < 2; tries++) { /* the second one is for lost first ones (Intel MP, B.4) */
        send(id, ICR_STARTUP | TRAMPOLINE >> 12);
        if (wait_until(&online, online + 1, tries ? WAIT_MS : WAIT_MS / 4))
            return;
    }
}

void test_smp(void)
{
    uint64_t counter = TRAMPOLINE + (uint64_t)((const uint8_t *)&trampoline_counter - trampoline_start);
    unsigned others = 0, wrong = 0;
    uint8_t self = lapic_id();

    if (madt_processors() == 1) {
        skip("smp");
        return;
    }
    memcpy((void *)TRAMPOLINE, trampoline_start, (size_t)(trampoline_end - trampoline_start));
    vector_set(VECTOR_WAKE, on_wake);
    for (const uint8_t *entry = NULL; (entry = madt_entry(MADT_LAPIC, entry));) {
        uint32_t before = online;

        if (entry[3] == self || !(entry[4] & 1))
            continue;
        others++;
        start(entry[3]);
        if (online == before)
            continue;
        wrong += ap_lapic_id != entry[3] || ap_cpuid_id != entry[3];
        send(entry[3], 0x4000 | VECTOR_WAKE);
        wait_until(&woken, others, WAIT_MS);
    }
    check_equal("smp.real-mode-entered", peek32(counter), others);
    check_equal("smp.long-mode-entered", online, others);
    check_equal("smp.apic-ids", wrong, 0);
    check_equal("smp.ipi-wakes", woken, others);
}
