/* serial: measures the cost of a byte on COM1.
 *
 *     kib=N       KiB to write, default 64
 *     nopoll      write without polling LSR for room
 *
 * It runs in ring 3 with IOPL 3, which a KVM without hardware executes natively.  So the time is that from OUT to the
 * VMM and back.  Between the lines "serial: begin" and "serial: end" there are exactly N KiB.  The last line is the
 * number of time stamp counter cycles per byte, so the speed of the reader does not matter. */

#include "guest.h"

static uint32_t bytes;
static bool poll;

static void write_bytes(void)
{
    uint64_t began, cycles;

    print("serial: begin\n");
    began = rdtsc();
    for (uint32_t i = 0; i < bytes; i++) {
        /* Lines of 64 columns, so that the output is ordinary text for consoles and backlogs. */
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
