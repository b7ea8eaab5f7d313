/* clocks: says what time each of its clocks has, once for every line that it is sent.
 *
 *     tsc=N        the time stamp counter
 *     kvmclock=N   the paravirtual clock, in nanoseconds (0: there is none)
 *     pm=N         the ACPI timer, 3579545 a second, 24 bits
 *     beats=N      interrupts of a local APIC timer that is set to 100 a second
 *     rtc=N        seconds of the battery-backed clock since 2000
 *     up=N         what the time stamp counter was when it came up
 *     lost=N       model-specific registers that no longer hold what it wrote when it came up */

#include "guest.h"

enum { MSR_SYSTEM_TIME = 0x4B564D01, KVMCLOCK_ON = 1, VECTOR_BEAT = VECTOR_FREE };

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

/* What a 64-bit kernel sets once and relies on for ever. */
static struct {
    uint32_t msr;
    uint64_t mark;
} marks[] = {
    {0x174, 0x10},                          /* SYSENTER_CS */
    {0x175, 0xFFFFFFFF80175175},            /* SYSENTER_ESP */
    {0x176, 0xFFFFFFFF80176176},            /* SYSENTER_EIP */
    {0x277, 0x0007010600070106},            /* PAT, not as a reset leaves it */
    {0xC0000081, 0x0023001000000000},       /* STAR */
    {0xC0000082, 0xFFFFFFFF81C00082},       /* LSTAR */
    {0xC0000084, 0x47700},                  /* SFMASK */
    {0xC0000102, 0xFFFF8880C0000102},       /* KERNEL_GS_BASE */
};

#define MARKS (sizeof(marks) / sizeof(marks[0]))

static volatile uint32_t lines, beats;
static bool has_kvmclock;

static void on_receive(void)
{
    inb(UART_IIR);
    while (inb(UART_LSR) & LSR_READY)
        lines += inb(UART_DATA) == '\r';
}

static void on_beat(struct frame *frame)
{
    (void)frame;
    lapic_write(LAPIC_EOI, 0);
    beats++;
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

    do {
        uint64_t ticks;

        version = kvmclock.version & ~1u;
        ticks = rdtsc() - kvmclock.tsc;
        ticks = kvmclock.shift >= 0 ? ticks << kvmclock.shift : ticks >> -kvmclock.shift;
        time = kvmclock.system_time + (uint64_t)((unsigned __int128)ticks * kvmclock.multiplier >> 32);
    } while (kvmclock.version != version);
    return time;
}

void guest_main(void)
{
    uint64_t up = rdtsc();

    has_kvmclock = cpuid(0x40000001).eax >> 3 & 1 && try_wrmsr(MSR_SYSTEM_TIME, (uint64_t)&kvmclock | KVMCLOCK_ON);
    marks_set();
    vector_set(VECTOR_BEAT, on_beat);
    lapic_write(LAPIC_DIVIDE, LAPIC_BY_1);
    lapic_write(LAPIC_TIMER, PERIODIC | VECTOR_BEAT);
    lapic_write(LAPIC_INITIAL, BEAT_MS * LAPIC_TICKS_PER_MS);
    irq_enable(IRQ_COM1, on_receive);
    outb(UART_IER, IER_RECEIVE);
    print("clocks: ready\n");
    for (uint32_t seen = 0;;) {
        uint64_t tsc, ns;
        uint32_t pm, beaten;

        while (lines == seen)
            wait_for_interrupt();
        seen = lines;
        tsc = rdtsc();
        ns = has_kvmclock ? kvmclock_ns() : 0;
        pm = pm_ticks();
        beaten = beats;
        print("tsc=%lu kvmclock=%lu pm=%u beats=%u rtc=%u up=%lu lost=%u\n", tsc, ns, pm, beaten, rtc_seconds(), up,
              marks_lost());
    }
}
