/* PIT, local APIC, I/O APIC and real-time clock. */

#include "selftest.h"

enum {
    PIT_0 = 0x40,
    PIT_2 = 0x42,
    PIT_MODE = 0x43,
    SYSTEM_PORT = 0x61,
    GATE_2 = 0x01,
    OUT_2 = 0x20,
    IRQ_PIT = 0,
    PIN_PIT = 2,
    VECTOR_IOAPIC = VECTOR_FREE,
    VECTOR_TIMER,
    VECTOR_IPI,
};

#define PIT_HZ 1193182
#define PIT_MS(n) (PIT_HZ / 1000 * (n))
#define WAIT_MS 1000 /* for events that should take about 10 ms; the host may be busy */

static volatile uint32_t events;

static void on_irq(void)
{
    events++;
}

static void on_vector(struct frame *frame)
{
    (void)frame;
    events++;
    lapic_write(LAPIC_EOI, 0);
}

static void pit_start(uint16_t port, uint8_t mode, uint16_t count)
{
    outb(PIT_MODE, mode);
    outb(port, (uint8_t)count);
    outb(port, (uint8_t)(count >> 8));
}

static void test_pit_channel_2(void)
{
    uint8_t was = inb(SYSTEM_PORT), before;
    uint32_t begin, passed;
    unsigned polls = 0;

    outb(SYSTEM_PORT, (uint8_t)(was & ~3u)); /* gate closed, speaker off */
    pit_start(PIT_2, 0xB0, PIT_MS(20));      /* channel 2, both bytes, mode 0 */
    before = inb(SYSTEM_PORT) & OUT_2;
    outb(SYSTEM_PORT, (uint8_t)((was & ~2u) | GATE_2));
    begin = pm_ticks();
    while (!(inb(SYSTEM_PORT) & OUT_2) && polls < 200000)
        polls++;
    passed = (pm_ticks() - begin) & PM_TIMER_MASK;
    outb(SYSTEM_PORT, (uint8_t)(was & ~3u));
    check_equal("pit.channel-2-starts-low", before, 0);
    check("pit.channel-2-ends-high", polls < 200000);
    /* 20 ms are 71 590 ticks.  Nothing shortens the wait, but a busy host lengthens it. */
    check_range("pit.channel-2-agrees-with-pm-timer", passed, 60000, 71590 * 20);
}

void test_pit(void)
{
    uint32_t latched;

    events = 0;
    irq_enable(IRQ_PIT, on_irq);
    pit_start(PIT_0, 0x30, PIT_MS(10)); /* channel 0, both bytes, mode 0: once */
    check("pit.interrupt-by-pic", wait_until(&events, 1, WAIT_MS));
    events = 0;
    pit_start(PIT_0, 0x34, PIT_MS(10)); /* mode 2: again and again */
    check("pit.periodic", wait_until(&events, 3, WAIT_MS));
    outb(PIT_MODE, 0x00); /* latch */
    latched = inb(PIT_0);
    latched |= (uint32_t)inb(PIT_0) << 8;
    check_range("pit.count-in-range", latched, 0, PIT_MS(10));
    irq_disable(IRQ_PIT);
    pit_start(PIT_0, 0x30, PIT_MS(1)); /* end the periodic mode */
    delay(2);

    vector_set(VECTOR_IOAPIC, on_vector);
    lapic_write(LAPIC_SPURIOUS, LAPIC_ON | VECTOR_SPURIOUS);
    ioapic_route(PIN_PIT, VECTOR_IOAPIC); /* fixed, edge, active high */
    events = 0;
    pit_start(PIT_0, 0x30, PIT_MS(10));
    check("pit.interrupt-by-ioapic-pin-2", wait_until(&events, 1, WAIT_MS));
    ioapic_route(PIN_PIT, IOAPIC_MASKED);
    test_pit_channel_2();
}

void test_lapic(void)
{
    uint32_t first;

    check_equal("lapic.id", lapic_id(), 0);
    check_range("lapic.version", lapic_read(LAPIC_VERSION) & 0xFF, 0x10, 0x15);
    check_range("ioapic.pins", (ioapic_read(IOAPIC_VERSION) >> 16 & 0xFF) + 1, 24, 24);

    vector_set(VECTOR_TIMER, on_vector);
    vector_set(VECTOR_IPI, on_vector);
    events = 0;
    lapic_write(LAPIC_DIVIDE, LAPIC_BY_1);
    lapic_write(LAPIC_TIMER, VECTOR_TIMER);
    lapic_write(LAPIC_INITIAL, 20 * LAPIC_TICKS_PER_MS);
    first = lapic_read(LAPIC_CURRENT);
    check("lapic.timer-counts", first > 0 && first <= 20 * LAPIC_TICKS_PER_MS);
    check("lapic.timer-interrupt", spin_until(&events, 1, WAIT_MS));
    check_equal("lapic.timer-only-once", lapic_read(LAPIC_CURRENT), 0);
    lapic_write(LAPIC_TIMER, LAPIC_MASKED);

    events = 0;
    lapic_write(LAPIC_ICR_LOW, 0x40000 | VECTOR_IPI); /* to self */
    check("lapic.ipi-to-self", spin_until(&events, 1, WAIT_MS));
}

/* ---- real-time clock and its memory */

static volatile uint32_t flags_seen;

static void on_clock(void)
{
    flags_seen |= cmos_read(RTC_C);
    events++;
}

static void test_date(void)
{
    struct date date = rtc_date();
    unsigned polls = 0;

    for (; cmos_read(RTC_A) & RTC_UPDATING && polls < 100; polls++)
        delay(1); /* an update takes 2 ms */
    check("rtc.update-ends", polls < 100);
    check_range("rtc.year", date.year, 2024, 2100);
    check_range("rtc.month", date.month, 1, 12);
    check_range("rtc.day", date.day, 1, 31);
    check_range("rtc.hour", date.hour, 0, 23);
    check_range("rtc.minute", date.minute, 0, 59);
    check_range("rtc.second", date.second, 0, 59);
    check_equal("rtc.starts-as-bcd-24h", cmos_read(RTC_B) & (RTC_BINARY | RTC_24H), RTC_24H);
    check_equal("rtc.battery-good", cmos_read(RTC_D) & 0x80, 0x80);
}

static void test_periodic(void)
{
    uint8_t rate = cmos_read(RTC_A) & 0x7F, mode = cmos_read(RTC_B);
    uint32_t begin, passed;

    cmos_write(RTC_A, 0x29); /* 128 Hz */
    irq_enable(IRQ_RTC, on_clock);
    events = flags_seen = 0;
    cmos_write(RTC_B, mode | RTC_PERIODIC);
    cmos_read(RTC_C);
    begin = pm_ticks();
    check("rtc.periodic-interrupt", wait_until(&events, 8, 2 * WAIT_MS));
    passed = (pm_ticks() - begin) & PM_TIMER_MASK;
    cmos_write(RTC_B, mode);
    cmos_write(RTC_A, 0x20); /* no rate at all: the periodic flag rises whether its interrupt is enabled or not */
    irq_disable(IRQ_RTC);
    check_equal("rtc.flags-say-periodic", flags_seen & 0xC0, 0xC0);
    cmos_read(RTC_C);
    check_equal("rtc.reading-flags-clears-them", cmos_read(RTC_C) & ~0x10u, 0); /* the clock may just have ticked */
    cmos_write(RTC_A, rate);
    /* 8 periods are 62 ms, 224 000 ticks.  An interrupt may be late, and the next one then early. */
    check_range("rtc.rate", passed, 110000, 224000 * 20);
}

static void test_cmos(void)
{
    uint64_t middle = ram_above(16ull << 20, 1ull << 32) >> 16, high = ram_above(1ull << 32, UINT64_MAX) >> 16;

    check_equal("cmos.memory-above-16m", cmos_read(0x34) | (uint32_t)cmos_read(0x35) << 8, middle);
    check_equal("cmos.memory-above-4g",
                cmos_read(0x5B) | (uint32_t)cmos_read(0x5C) << 8 | (uint32_t)cmos_read(0x5D) << 16, high);
    check_equal("cmos.further-cpus", cmos_read(0x5F), madt_processors() - 1);
}

void test_clock(void)
{
    if (under_qemu() && cmos_read(RTC_A) == 0xFF) {
        skip("rtc");
        return;
    }
    test_date();
    test_periodic();
    test_cmos();
}
