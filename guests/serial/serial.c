/* serial: what a byte on COM1 costs.
 *
 *     kib=N       how much to write, default 64
 *     nopoll      write without asking LSR first whether there is room
 *
 * Runs in ring 3 with IOPL 3, where a KVM without hardware executes natively: what is measured is then the way
 * from OUT to the VMM and back.  Between the lines "serial: begin" and "serial: end" there are exactly N KiB.
 * The last line tells the time stamp counter's cycles per byte, so that no reader's speed is measured. */

#include "guest.h"

static uint32_t bytes;
static bool poll;

static void write_bytes(void)
{
    uint64_t began, cycles;

    print("serial: begin\n");
    began = rdtsc();
    for (uint32_t i = 0; i < bytes; i++) {
        /* Lines of 64 columns, so that consoles and backlogs see ordinary text. */
        uint8_t byte = (i & 63) == 63 ? '\n' : (uint8_t)('0' + (i & 63));

        if (poll)
            while (!(inb(UART_LSR) & LSR_THRE))
                cpu_pause();
        outb(UART_DATA, byte);
    }
    cycles = rdtsc() - began;
    print("serial: end, %u KiB %s, %u cycles per byte\n", bytes / 1024, poll ? "polled" : "not polled",
          (unsigned)(cycles / bytes));
    power_off();
}

void guest_main(void)
{
    uint32_t kib = option_number("kib", 64);

    bytes = (kib < 1 << 20 ? kib : 1 << 20) * 1024;
    poll = !option("nopoll");
    run_in_ring3(write_bytes);
}
