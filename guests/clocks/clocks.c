/* clocks: prints the time of each of its clocks for every line of input.
 *
 *     tsc=N tsc_to=N     the time stamp counter, before and after the reading of kvmclock
 *     kvmclock=N         the paravirtual clock, in nanoseconds (0: not available)
 *     pm=N               24 bits of the ACPI timer, at 3579545 Hz
 *     timer=N            all bits of the ACPI timer, read
 *     timer_from=N timer_to=N   between these times of the paravirtual clock
 *     left=N             rest of the local APIC timer's period, in nanoseconds, read
 *     left_from=N left_to=N     between these times of the paravirtual clock
 *     beats=N            interrupts of that timer, 100 a second
 *     pit=N              interrupts of the 8254, 100 a second
 *     periodic=N         interrupts of the battery-backed clock, 2 a second
 *     rtc=N              seconds of that clock since 2000
 *     began=N            the paravirtual clock at the start of these three counts
 *     held=N             how long that clock was stopped the last time, in nanoseconds of the paravirtual clock
 *     up=N               the time stamp counter when the guest started
 *     lost=N             model-specific registers that have lost the values written at the start
 *     skew=N             readings of another processor's time stamp counter that were not between two of this one
 *
 * A line with an s first stops the battery-backed clock by its SET bit, as if to set it.  A line with a c writes the
 * seconds that were read before, and lets the clock run again. */

#include "guest.h"

enum {
    MSR_SYSTEM_TIME = 0x4B564D01,
    KVMCLOCK_ON = 1,
    VECTOR_BEAT = VECTOR_FREE,
    VECTOR_ASK = VECTOR_FREE + 1,
    RTC_SET = 0x80,
    RTC_2_HZ = 0x2F, /* of a 32.768 kHz oscillator */
    RTC_SECONDS = 0,
    IRQ_PIT = 0,
    PIT_COUNTER_0 = 0x40,
    PIT_CONTROL = 0x43,
    PIT_MODE_2 = 0x34,
    PIT_100_HZ = 11932,
};

#define BEAT_MS 10
#define PERIODIC (1u << 17)

/* struct pvclock_vcpu_time_info */
static volatile struct {
    uint32_t version, pad;
    uint64_t tsc, system_time;
    uint32_t multiplier;
    int8_t shift;
    uint8_t flags, pad2[2];
} kvmclock __attribute__((aligned(64)));

/* Registers that a 64-bit kernel sets once, and relies on from then on. */
static struct {
    uint32_t msr;
    uint64_t mark;
} marks[] = {
    {0x174, 0x10},                          /* SYSENTER_CS */
    {0x175, 0xFFFFFFFF80175175},            /* SYSENTER_ESP */
    {0x176, 0xFFFFFFFF80176176},            /* SYSENTER_EIP */
    {0x277, 0x0007010600070106},            /* PAT, different from its value after a reset */
    {0xC0000081, 0x0023001000000000},       /* STAR */
    {0xC0000082, 0xFFFFFFFF81C00082},       /* LSTAR */
    {0xC0000084, 0x47700},                  /* SFMASK */
    {0xC0000102, 0xFFFF8880C0000102},       /* KERNEL_GS_BASE */
};

#define MARKS (sizeof(marks) / sizeof(marks[0]))

static volatile uint32_t lines, beats, pit_ticks, periodic_ticks, answers;
static volatile uint64_t answer;
static volatile bool wants_hold, wants_release;
static uint64_t began;
static bool has_kvmclock, has_other;
static uint8_t other;

static void on_receive(void)
{
    inb(UART_IIR);
    while (inb(UART_LSR) & LSR_READY) {
        char c = (char)inb(UART_DATA);

        wants_hold |= c == 's';
        wants_release |= c == 'c';
        lines += c == '\r';
    }
}

static void on_beat(struct frame *frame)
{
    (void)frame;
    lapic_write(LAPIC_EOI, 0);
    beats++;
}

static void on_pit(void)
{
    pit_ticks++;
}

static void on_rtc(void)
{
    cmos_read(RTC_C);
    periodic_ticks++;
}

/* On the other processor. */
static void on_ask(struct frame *frame)
{
    (void)frame;
    lapic_write(LAPIC_EOI, 0);
    answer = rdtsc();
    answers++;
}

static void be_asked(void)
{
    for (;;)
        wait_for_interrupt();
}

static void marks_set(void)
{
    for (unsigned i = 0; i < MARKS; i++)
        if (!try_wrmsr(marks[i].msr, marks[i].mark))
            print("clocks: no msr %x\n", marks[i].msr);
}

static unsigned marks_lost(void)
{
    unsigned lost = 0;
    uint64_t value;

    for (unsigned i = 0; i < MARKS; i++)
        lost += !try_rdmsr(marks[i].msr, &value) || value != marks[i].mark;
    return lost;
}

static uint64_t kvmclock_ns(void)
{
    uint32_t version;
    uint64_t time;

    if (!has_kvmclock)
        return 0;
    do {
        uint64_t ticks;

        version = kvmclock.version & ~1u;
        ticks = rdtsc() - kvmclock.tsc;
        ticks = kvmclock.shift >= 0 ? ticks << kvmclock.shift : ticks >> -kvmclock.shift;
        time = kvmclock.system_time + (uint64_t)((unsigned __int128)ticks * kvmclock.multiplier >> 32);
    } while (kvmclock.version != version);
    return time;
}

/* Have the other processor read its counter.  The result must be between two readings of ours. */
static bool in_step(void)
{
    uint32_t before = answers;
    uint64_t sent = rdtsc();

    if (!has_other)
        return true;
    processor_interrupt(other, VECTOR_ASK);
    while (answers == before)
        cpu_pause();
    return answer >= sent && answer <= rdtsc();
}

/* Do the same as a system that sets the clock.  It writes the seconds that it has read before. */
static uint64_t hold_or_release(void)
{
    static uint64_t since, held;
    static uint8_t seconds, control;

    if (wants_hold) {
        control = cmos_read(RTC_B);
        cmos_write(RTC_B, control | RTC_SET);
        since = kvmclock_ns();
        seconds = cmos_read(RTC_SECONDS);
    }
    if (wants_release) {
        cmos_write(RTC_SECONDS, seconds);
        held = kvmclock_ns() - since;
        cmos_write(RTC_B, control);
    }
    wants_hold = wants_release = false;
    return held;
}

static void start_timers(void)
{
    began = kvmclock_ns();
    vector_set(VECTOR_BEAT, on_beat);
    lapic_write(LAPIC_DIVIDE, LAPIC_BY_1);
    lapic_write(LAPIC_TIMER, PERIODIC | VECTOR_BEAT);
    lapic_write(LAPIC_INITIAL, BEAT_MS * LAPIC_TICKS_PER_MS);
    irq_enable(IRQ_PIT, on_pit);
    outb(PIT_CONTROL, PIT_MODE_2);
    outb(PIT_COUNTER_0, PIT_100_HZ & 0xFF);
    outb(PIT_COUNTER_0, PIT_100_HZ >> 8);
    irq_enable(IRQ_RTC, on_rtc);
    cmos_write(RTC_A, RTC_2_HZ);
    cmos_write(RTC_B, cmos_read(RTC_B) | RTC_PERIODIC);
    cmos_read(RTC_C);
}

void guest_main(void)
{
    uint64_t up = rdtsc();
    const uint8_t *entry = NULL;
    unsigned skewed = 0;

    has_kvmclock = cpuid(0x40000001).eax >> 3 & 1 && try_wrmsr(MSR_SYSTEM_TIME, (uint64_t)&kvmclock | KVMCLOCK_ON);
    vector_set(VECTOR_ASK, on_ask);
    has_other = next_processor(&entry, &other) && processor_start(other, be_asked);
    marks_set();
    start_timers();
    irq_enable(IRQ_COM1, on_receive);
    outb(UART_IER, IER_RECEIVE);
    print("clocks: ready\n");
    for (uint32_t seen = 0;;) {
        uint64_t tsc, tsc_to, ns, timer_from, timer_to, left_from, left_to, held;
        uint32_t timer, left, seconds, beaten, pit_beaten, rtc_beaten;

        while (lines == seen)
            wait_for_interrupt();
        seen = lines;
        held = hold_or_release();
        skewed += !in_step();
        beaten = beats;
        pit_beaten = pit_ticks;
        rtc_beaten = periodic_ticks;
        tsc = rdtsc();
        ns = kvmclock_ns();
        tsc_to = rdtsc();
        timer_from = kvmclock_ns();
        timer = inl(power.timer);
        timer_to = kvmclock_ns();
        left_from = kvmclock_ns();
        left = lapic_read(LAPIC_CURRENT);
        left_to = kvmclock_ns();
        seconds = rtc_seconds();
        interrupts_on(); /* so that no interrupt is lost while the serial line is slow */
        print("tsc=%lu tsc_to=%lu kvmclock=%lu pm=%u ", tsc, tsc_to, ns, timer & PM_TIMER_MASK);
        print("timer=%u timer_from=%lu timer_to=%lu ", timer, timer_from, timer_to);
        print("left=%u left_from=%lu left_to=%lu ", left, left_from, left_to);
        print("beats=%u pit=%u periodic=%u rtc=%u ", beaten, pit_beaten, rtc_beaten, seconds);
        print("began=%lu held=%lu up=%lu lost=%u skew=%u\n", began, held, up, marks_lost(), skewed);
        interrupts_off();
    }
}
