/* The serial console, COM1. */

#include <stdarg.h>

#include "guest.h"

#define POLLS_MAX 100000

void console_init(void)
{
    outb(UART_IER, 0);
    outb(UART_LCR, LCR_DIVISOR | LCR_8N1);
    outb(UART_DATA, 1); /* 115200 baud */
    outb(UART_IER, 0);
    outb(UART_LCR, LCR_8N1);
    outb(UART_FCR, FCR_ON_AND_CLEAR);
    outb(UART_MCR, MCR_LINES);
}

void put_char(char c)
{
    /* The loop is bounded, so that a transmitter that never gets ready does not block a report. */
    for (unsigned polls = 0; !(inb(UART_LSR) & LSR_THRE) && polls < POLLS_MAX; polls++)
        cpu_pause();
    outb(UART_DATA, (uint8_t)c);
}

static void put_padded(const char *text, unsigned width, char pad)
{
    for (size_t length = strlen(text); length < width; length++)
        put_char(pad);
    while (*text)
        put_char(*text++);
}

static void put_number(uint64_t value, unsigned base, unsigned width, char pad)
{
    char digits[21], *at = digits + sizeof(digits) - 1;

    *at = '\0';
    do {
        *--at = "0123456789abcdef"[value % base];
        value /= base;
    } while (value);
    put_padded(at, width, pad);
}

void print(const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    for (; *format; format++) {
        unsigned width = 0;
        bool wide;
        char pad;

        if (*format == '\n')
            put_char('\r');
        if (*format != '%') {
            put_char(*format);
            continue;
        }
        format++;
        pad = *format == '0' ? '0' : ' ';
        for (; *format >= '0' && *format <= '9'; format++)
            width = width * 10 + (unsigned)(*format - '0');
        wide = *format == 'l';
        if (wide)
            format++;
        switch (*format) {
        case 's':
            put_padded(va_arg(arguments, const char *), width, ' ');
            break;
        case 'c':
            put_char((char)va_arg(arguments, int));
            break;
        case 'u':
        case 'x':
            put_number(wide ? va_arg(arguments, uint64_t) : va_arg(arguments, uint32_t), *format == 'u' ? 10 : 16,
                       width, pad);
            break;
        default:
            put_char(*format);
        }
    }
    va_end(arguments);
}
