/* demo: a command monitor on the serial line, for hosts whose KVM cannot boot a stock kernel.
 *
 *     quiet       no banner
 *     noprompt    no prompt and no echo, for programs that talk to it
 *
 * It sleeps whenever it is idle.  Only input and the power button wake it. */

#include "guest.h"

#define LINE_MAX 120
#define INPUT_MAX 1024 /* a power of two */

enum { CTRL_C = 3, BACKSPACE = 8, CTRL_U = 21, ESCAPE = 27, DELETE = 127 };

static volatile char input[INPUT_MAX];
static volatile unsigned input_head, input_tail;
static volatile bool full; /* UART interrupts are off; further input waits in the UART and at its sender */
static volatile bool running, interrupted, pressed;
static bool interactive;
static uint32_t started;

static void on_receive(void)
{
    inb(UART_IIR);
    while (inb(UART_LSR) & LSR_READY) {
        char c;

        if (input_head - input_tail == INPUT_MAX) { /* after a paste; unread input is not lost */
            full = true;
            outb(UART_IER, 0);
            return;
        }
        c = (char)inb(UART_DATA);
        if (c == CTRL_C && running) { /* ends the command, and discards the input before it */
            interrupted = true;
            input_tail = input_head;
            continue;
        }
        input[input_head++ % INPUT_MAX] = c;
    }
}

static void on_button(void)
{
    pressed = true;
}

static bool should_stop(void)
{
    return interrupted || pressed;
}

static void switch_off(void)
{
    print("power button\n");
    power_off();
}

static char read_char(void)
{
    for (;;) {
        if (pressed)
            switch_off();
        if (full && input_head - input_tail <= INPUT_MAX / 2) {
            full = false;
            outb(UART_IER, IER_RECEIVE); /* interrupts at once if input waits */
        }
        if (input_head != input_tail)
            return input[input_tail++ % INPUT_MAX];
        wait_for_interrupt();
    }
}

/* Whether a ^C came between the end of a line and the start of its command.  Discards the input before it. */
static bool take_ctrl_c(void)
{
    for (unsigned at = input_tail; at != input_head; at++)
        if (input[at % INPUT_MAX] == CTRL_C) {
            input_tail = at + 1;
            return true;
        }
    return false;
}

static void echo(char c)
{
    if (interactive)
        put_char(c);
}

static void rub_out(void)
{
    echo('\b');
    echo(' ');
    echo('\b');
}

/* Discard the rest of the sequence of an arrow or function key: ESC [ parameters letter, or ESC O letter. */
static void skip_key(void)
{
    char c = read_char();

    if (c != '[' && c != 'O')
        return;
    do
        c = read_char();
    while (c >= ' ' && c < '@');
}

/* Return a line without its end.  A line abandoned by ^C is empty. */
static const char *read_line(void)
{
    static char line[LINE_MAX + 1];
    static bool after_cr;
    unsigned length = 0;

    for (;;) {
        char c = read_char();

        if (c == '\n' && after_cr) {
            after_cr = false;
            continue;
        }
        after_cr = c == '\r';
        switch (c) {
        case '\r':
        case '\n':
            echo('\r');
            echo('\n');
            line[length] = '\0';
            return line;
        case CTRL_C:
            if (interactive)
                print("^C\n");
            line[0] = '\0';
            return line;
        case CTRL_U:
            for (; length; length--)
                rub_out();
            break;
        case BACKSPACE:
        case DELETE:
            if (length) {
                length--;
                rub_out();
            }
            break;
        case ESCAPE:
            skip_key();
            break;
        default:
            if (c >= ' ' && length < LINE_MAX) {
                line[length++] = c;
                echo(c);
            }
        }
    }
}

/* ---- commands */

static void show_memory(const char *argument)
{
    uint64_t total = 0;

    (void)argument;
    for (unsigned i = 0; i < memory_range_count(); i++) {
        const struct memory_range *range = memory_range(i);

        if (!range->size)
            continue;
        print("  %012lx-%012lx %10lu KiB  %s\n", range->address, range->address + range->size - 1, range->size >> 10,
              range->type == MEMORY_RAM ? "ram" : "reserved");
        if (range->type == MEMORY_RAM)
            total += range->size;
    }
    print("  %lu MiB of ram\n", (total + (1 << 19)) >> 20);
}

static void show_time(const char *argument)
{
    struct date date = rtc_date();

    (void)argument;
    if (date.month == 0 || date.month > 12) {
        print("  no clock answers\n");
        return;
    }
    print("  %u-%02u-%02u %02u:%02u:%02u UTC\n", date.year, date.month, date.day, date.hour, date.minute, date.second);
}

static void put_register(char *text, uint32_t value)
{
    memcpy(text, &value, 4);
}

static void show_cpu(const char *argument)
{
    struct cpuid r = cpuid(0);
    char text[49] = "";
    unsigned processors = 0;

    (void)argument;
    put_register(text, r.ebx);
    put_register(text + 4, r.edx);
    put_register(text + 8, r.ecx);
    print("  vendor      %s\n", text);
    if (cpuid(0x80000000).eax >= 0x80000004) {
        for (uint32_t i = 0; i < 3; i++) {
            r = cpuid(0x80000002 + i);
            memcpy(text + 16 * i, &r, 16);
        }
        print("  model       %s\n", text);
    }
    if (cpuid(1).ecx >> 31) {
        memset(text, 0, sizeof(text));
        r = cpuid(0x40000000);
        put_register(text, r.ebx);
        put_register(text + 4, r.ecx);
        put_register(text + 8, r.edx);
        print("  hypervisor  %s\n", text);
    }
    for (const uint8_t *entry = NULL; (entry = madt_entry(MADT_LAPIC, entry));)
        processors += entry[4] & 1;
    print("  processors  %u\n", processors);
}

static void show_uptime(const char *argument)
{
    /* From the RTC, because a periodic timer would cost processor time while the VM is idle. */
    uint32_t up = rtc_seconds() - started;

    (void)argument;
    print("  up %u:%02u:%02u\n", up / 3600, up / 60 % 60, up % 60);
}

static const char *pci_name(uint32_t id)
{
    static const struct {
        uint32_t id;
        const char *name;
    } names[] = {
        {0x12378086, "host bridge"},    {0x10001AF4, "virtio network"}, {0x10011AF4, "virtio block"},
        {0x10041AF4, "virtio scsi"},    {0x10051AF4, "virtio entropy"}, {0x10411AF4, "virtio network"},
        {0x10421AF4, "virtio block"},   {0x10441AF4, "virtio entropy"}, {0x10481AF4, "virtio scsi"},
        {0x0777B5D0, "vm control"},     {0x07770B5D, "vm control"},
    };

    for (unsigned i = 0; i < sizeof(names) / sizeof(names[0]); i++)
        if (names[i].id == id)
            return names[i].name;
    return "";
}

static uint32_t pci_read(unsigned slot, unsigned offset)
{
    outl(0xCF8, 0x80000000 | slot << 11 | offset);
    return inl(0xCFC);
}

static void show_pci(const char *argument)
{
    (void)argument;
    for (unsigned slot = 0; slot < 32; slot++) {
        uint32_t id = pci_read(slot, 0), bar = pci_read(slot, 0x10), line = pci_read(slot, 0x3C);

        if (id == 0xFFFFFFFF)
            continue;
        print("  slot %2u  %04x:%04x  class %06x", slot, id & 0xFFFF, id >> 16, pci_read(slot, 8) >> 8);
        if (bar & 1)
            print("  i/o %04x", bar & 0xFFFC);
        if (line >> 8 & 0xFF)
            print("  irq %u", line & 0xFF);
        print("  %s\n", pci_name(id));
    }
}

static void echo_text(const char *argument)
{
    print("%s\n", argument);
}

static void spin(const char *argument)
{
    uint32_t seconds = parse_number(argument, 1), begin = rtc_seconds();

    /* Chunks of about 20 ms if ring 0 is interpreted, and much less elsewhere. */
    while (rtc_seconds() - begin < seconds && !should_stop())
        for (unsigned i = 0; i < 10000; i++)
            __asm__ volatile("");
}

static void fill(const char *argument)
{
    static const char pattern[] = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
    uint32_t lines = parse_number(argument, 1);

    lines = lines > UINT32_MAX / 16 ? UINT32_MAX : lines * 16; /* 16 lines of 64 bytes are 1 KiB */
    for (; lines && !should_stop(); lines--)
        print("%s\n", pattern);
}

static void do_reset(const char *argument)
{
    (void)argument;
    print("resetting\n");
    reset();
}

static void do_off(const char *argument)
{
    (void)argument;
    print("switching off\n");
    power_off();
}

static void do_panic(const char *argument)
{
    (void)argument;
    print("causing a triple fault\n");
    triple_fault();
}

static void help(const char *argument);

static const struct command {
    const char *name, *arguments, *text;
    void (*run)(const char *argument);
} commands[] = {
    {"help", "", "this list", help},
    {"mem", "", "memory map", show_memory},
    {"time", "", "date and time of the real-time clock", show_time},
    {"cpu", "", "processor and hypervisor", show_cpu},
    {"uptime", "", "time since start", show_uptime},
    {"pci", "", "devices", show_pci},
    {"echo", "TEXT", "print a text", echo_text},
    {"spin", "SECONDS", "keep the processor busy (^C stops it)", spin},
    {"fill", "KIB", "print much text (^C stops it)", fill},
    {"reset", "", "restart this machine", do_reset},
    {"off", "", "switch it off", do_off},
    {"panic", "", "crash: a triple fault", do_panic},
};

#define COMMANDS (sizeof(commands) / sizeof(commands[0]))

static void help(const char *argument)
{
    (void)argument;
    for (unsigned i = 0; i < COMMANDS; i++) {
        print("  %s %s", commands[i].name, commands[i].arguments);
        for (size_t used = strlen(commands[i].name) + strlen(commands[i].arguments); used < 14; used++)
            put_char(' ');
        print("  %s\n", commands[i].text);
    }
}

static void run(const char *line)
{
    char name[16];
    unsigned length = 0;

    while (*line == ' ')
        line++;
    if (!*line)
        return;
    while (*line && *line != ' ') {
        if (length < sizeof(name) - 1)
            name[length++] = *line;
        line++;
    }
    name[length] = '\0';
    while (*line == ' ')
        line++;
    for (unsigned i = 0; i < COMMANDS; i++) {
        if (same(commands[i].name, name)) {
            interrupted = take_ctrl_c();
            running = true;
            interrupts_on(); /* so that ^C and the power button end a long command */
            commands[i].run(line);
            interrupts_off();
            running = false;
            if (interrupted && interactive)
                print("^C\n");
            return;
        }
    }
    print("%s: no such command; try help\n", name);
}

static void banner(void)
{
    print("\n"
          "vmd demo guest\n"
          "This is a small monitor that runs inside a virtual machine of vmd.  It is shown\n"
          "where the host's KVM cannot boot a stock kernel; it drives the same virtual\n"
          "hardware.  Type help for a list of commands, off to switch the machine off.\n"
          "\n");
}

void guest_main(void)
{
    interactive = !option("noprompt");
    irq_enable(IRQ_COM1, on_receive);
    outb(UART_IER, IER_RECEIVE);
    power_button_enable(on_button);
    started = rtc_seconds();
    if (!option("quiet"))
        banner();
    for (;;) {
        if (interactive)
            print("vmd-demo> ");
        run(read_line());
    }
}
