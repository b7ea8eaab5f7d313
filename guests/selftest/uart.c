/* The UART.  It also carries the report, so results are collected first and reported afterwards. */

#include "selftest.h"

enum {
    IIR_NONE = 0x01,
    IIR_THRE = 0x02,
    IIR_ID = 0x0F,
    IIR_FIFO = 0xC0,
    FIFO_BYTES = 16,
};

static volatile uint32_t interrupts;
static volatile uint8_t last_iir;

static void on_uart(void)
{
    interrupts++;
    last_iir = inb(UART_IIR);
    outb(UART_IER, 0);
}

/* Wait until the transmitter is empty; return all line status bits seen, since reading clears the errors. */
static uint8_t settle(void)
{
    uint8_t seen = inb(UART_LSR);

    for (unsigned polls = 0; !(seen & LSR_EMPTY) && polls < 1000; polls++)
        seen |= inb(UART_LSR);
    return seen;
}

void test_uart(void)
{
    unsigned wrong = 0, received = 0;
    uint8_t overrun, empty, modem, scratch, fifo, early = 0, single;
    bool arrived;

    settle();
    outb(UART_SCRATCH, 0xA5);
    scratch = inb(UART_SCRATCH);
    fifo = inb(UART_IIR) & IIR_FIFO;

    outb(UART_MCR, MCR_LOOPBACK | MCR_LINES);
    modem = inb(UART_MSR);
    outb(UART_FCR, FCR_ON_AND_CLEAR);
    inb(UART_LSR); /* clears error bits */
    empty = inb(UART_LSR) & LSR_READY;
    for (unsigned i = 0; i < FIFO_BYTES; i++) {
        outb(UART_DATA, (uint8_t)(0x30 + i));
        early |= settle() & LSR_OVERRUN;
    }
    outb(UART_DATA, 0x7F);
    overrun = settle() & LSR_OVERRUN;
    for (; inb(UART_LSR) & LSR_READY && received < 64; received++)
        wrong += inb(UART_DATA) != 0x30 + received;
    outb(UART_FCR, 0); /* without FIFO there is room for one byte */
    single = inb(UART_IIR) & IIR_FIFO;
    outb(UART_FCR, FCR_ON_AND_CLEAR);
    outb(UART_MCR, MCR_LINES);

    check_equal("uart.scratch", scratch, 0xA5);
    check_equal("uart.fifo-detected", fifo, IIR_FIFO);
    check_equal("uart.fifo-can-be-off", single, 0);
    check_equal("uart.loopback-modem-lines", modem & 0xF0, 0xB0); /* DCD, DSR, CTS; not RI */
    check_equal("uart.loopback-starts-empty", empty, 0);
    check_equal("uart.loopback-count", received, FIFO_BYTES);
    check_equal("uart.loopback-bytes", wrong, 0);
    check_equal("uart.no-early-overrun", early, 0);
    check_equal("uart.overrun-at-17", overrun, LSR_OVERRUN);

    settle();
    interrupts = 0;
    irq_enable(IRQ_COM1, on_uart);
    outb(UART_IER, IER_TRANSMIT);
    arrived = wait_until(&interrupts, 1, 500);
    outb(UART_IER, 0);
    irq_disable(IRQ_COM1);
    check("uart.thre-interrupt", arrived);
    check_equal("uart.thre-identified", last_iir & IIR_ID, IIR_THRE);
    check_equal("uart.no-interrupt-left", inb(UART_IIR) & IIR_ID, IIR_NONE);
}
