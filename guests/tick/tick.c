/* tick: a nearly idle VM, of which a host should be able to run many.  It wakes up twice a second, the slowest rate of
 * an RTC, and switches off when the power button is pressed.
 *
 *     idle        never wake up, so that the remaining cost is only the VMM's */

#include "guest.h"

#define SLOWEST_RATE 0x2F /* 32768 Hz divider chain, periodic rate 15: 2 Hz */

static volatile uint32_t pressed;

static void tick(void)
{
    cmos_read(RTC_C); /* lowers the line; without this there is no second interrupt */
}

static void button(void)
{
    pressed = 1;
}

void guest_main(void)
{
    if (!option("idle")) {
        cmos_write(RTC_A, SLOWEST_RATE);
        irq_enable(IRQ_RTC, tick);
        cmos_write(RTC_B, RTC_24H | RTC_PERIODIC);
        cmos_read(RTC_C); /* a pending interrupt would keep the line high, and no edge would follow */
    }
    power_button_enable(button);
    print("READY\n");
    while (!pressed)
        wait_for_interrupt();
}
