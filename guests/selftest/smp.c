/* Starting the other processors, one after the other. */

#include "selftest.h"

#define WAIT_MS 2000

enum { VECTOR_WAKE = VECTOR_FREE + 8 };

static volatile uint32_t online, woken, ap_lapic_id, ap_cpuid_id;

static void on_wake(struct frame *frame)
{
    (void)frame;
    lapic_write(LAPIC_EOI, 0);
    woken++;
}

/* The work of a new processor.  All share one stack, so they start one at a time. */
static void look_around(void)
{
    uint32_t before = woken;

    ap_lapic_id = lapic_read(LAPIC_ID) >> 24;
    ap_cpuid_id = cpuid(1).ebx >> 24;
    online++;
    while (woken == before)
        wait_for_interrupt();
}

void test_smp(void)
{
    unsigned others = 0, wrong = 0;
    const uint8_t *entry = NULL;
    uint8_t id;

    if (madt_processors() == 1) {
        skip("smp");
        return;
    }
    vector_set(VECTOR_WAKE, on_wake);
    while (next_processor(&entry, &id)) {
        others++;
        if (!processor_start(id, look_around) || !wait_until(&online, others, WAIT_MS))
            continue;
        wrong += ap_lapic_id != id || ap_cpuid_id != id;
        processor_interrupt(id, VECTOR_WAKE);
        wait_until(&woken, others, WAIT_MS);
    }
    check_equal("smp.real-mode-entered", processors_in_real_mode(), others);
    check_equal("smp.long-mode-entered", online, others);
    check_equal("smp.apic-ids", wrong, 0);
    check_equal("smp.ipi-wakes", woken, others);
}
