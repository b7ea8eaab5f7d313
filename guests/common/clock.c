/* Time: the ACPI timer for intervals, the RTC for the date. */

#include "guest.h"

#define RTC_INDEX 0x70
#define RTC_DATA 0x71
#define TICKS_PER_MS (PM_TIMER_HZ / 1000)
#define STUCK_READS 100000

uint32_t pm_ticks(void)
{
    return inl(power.timer) & PM_TIMER_MASK;
}

bool spin_until(const volatile uint32_t *what, uint32_t least, uint32_t milliseconds)
{
    uint32_t last = pm_ticks(), reads = 0;
    uint64_t left = (uint64_t)milliseconds * TICKS_PER_MS;

    interrupts_on();
    while (*what < least) {
        uint32_t now = pm_ticks(), passed = (now - last) & PM_TIMER_MASK;

        last = now;
        if (passed >= left || (passed == 0 && ++reads > STUCK_READS))
            break;
        left -= passed;
    }
    interrupts_off();
    return *what >= least;
}

static volatile bool alarm;

static void on_alarm(struct frame *frame)
{
    (void)frame;
    alarm = true;
    lapic_write(LAPIC_EOI, 0);
}

struct wish {
    const volatile uint32_t *what;
    uint32_t least;
};

static void sleep(void *argument)
{
    const struct wish *wish = argument;

    while (!alarm && *wish->what < wish->least)
        wait_for_interrupt();
}

bool wait_until(const volatile uint32_t *what, uint32_t least, uint32_t milliseconds)
{
    vector_set(VECTOR_ALARM, on_alarm);
    alarm = false;
    lapic_write(LAPIC_DIVIDE, LAPIC_BY_1);
    lapic_write(LAPIC_TIMER, VECTOR_ALARM);
    lapic_write(LAPIC_INITIAL, milliseconds * LAPIC_TICKS_PER_MS);
    in_ring0(sleep, &(struct wish){what, least});
    lapic_write(LAPIC_INITIAL, 0);
    lapic_write(LAPIC_TIMER, LAPIC_MASKED);
    return *what >= least;
}

void delay(uint32_t milliseconds)
{
    static const uint32_t never;

    wait_until(&never, 1, milliseconds);
}

uint8_t cmos_read(uint8_t index)
{
    outb(RTC_INDEX, index);
    return inb(RTC_DATA);
}

void cmos_write(uint8_t index, uint8_t value)
{
    outb(RTC_INDEX, index);
    outb(RTC_DATA, value);
}

static uint8_t decode(uint8_t value, bool binary)
{
    return binary ? value : (uint8_t)((value >> 4) * 10 + (value & 15));
}

static struct date read_once(void)
{
    bool binary = cmos_read(RTC_B) & RTC_BINARY;
    struct date date;
    uint8_t century;

    for (unsigned polls = 0; cmos_read(RTC_A) & RTC_UPDATING && polls < 1000; polls++)
        cpu_pause();
    date.second = decode(cmos_read(0), binary);
    date.minute = decode(cmos_read(2), binary);
    date.hour = decode(cmos_read(4), binary);
    date.day = decode(cmos_read(7), binary);
    date.month = decode(cmos_read(8), binary);
    date.year = decode(cmos_read(9), binary);
    century = decode(cmos_read(RTC_CENTURY), binary);
    date.year = (uint16_t)(date.year + (century == 19 || century == 20 || century == 21 ? century : 20) * 100);
    return date;
}

struct date rtc_date(void)
{
    struct date date = read_once();

    /* The second may have changed during a reading.  Two equal readings are consistent. */
    for (unsigned tries = 0; tries < 3; tries++) {
        struct date again = read_once();

        if (again.second == date.second && again.minute == date.minute)
            break;
        date = again;
    }
    return date;
}

static bool leap(unsigned year)
{
    return year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
}

uint32_t rtc_seconds(void)
{
    static const uint16_t days_before[] = {0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334};
    struct date date = rtc_date();
    uint32_t days = date.day - 1u;

    for (unsigned year = 2000; year < date.year; year++)
        days += leap(year) ? 366 : 365;
    if (date.month >= 1 && date.month <= 12)
        days += days_before[date.month - 1];
    if (date.month > 2 && leap(date.year))
        days++;
    return ((days * 24 + date.hour) * 60 + date.minute) * 60 + date.second;
}
