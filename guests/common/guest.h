/* The common parts of our guests: a PVH start in long mode, a console, interrupts, ACPI.
 *
 * A KVM without hardware interprets ring 0, at about a million instructions a second.  It lacks some instructions:
 * LOCK CMPXCHG16B, XSAVE, CLAC and STAC, POPCNT, INT3, FWAIT, IRET in 32-bit code.  So nothing here uses
 * floating point or SSE, loops are short, and an idle processor halts. */

#ifndef GUEST_H
#define GUEST_H

#include "io.h"

/* boot.c: information from the loader (Xen's hvm_start_info, version 1) */

struct memory_range {
    uint64_t address;
    uint64_t size;
    uint32_t type;
    uint32_t reserved;
};

enum { MEMORY_RAM = 1, MEMORY_RESERVED = 2 };

struct start_info {
    uint32_t magic;
    uint32_t version;
    uint32_t flags;
    uint32_t module_count;
    uint64_t modules;
    uint64_t cmdline;
    uint64_t rsdp;
    uint64_t memory_map;
    uint32_t memory_map_entries;
    uint32_t reserved;
};

#define START_MAGIC 0x336ec578

extern const struct start_info *start_info;

/* The main function of each guest.  When it returns, the machine is switched off. */
void guest_main(void);

unsigned memory_range_count(void);
const struct memory_range *memory_range(unsigned index);
const char *cmdline(void);
/* Whether the command line contains a word. */
bool option(const char *name);
/* The number in NAME=NUMBER on the command line. */
uint32_t option_number(const char *name, uint32_t otherwise);

/* memory.c */

void *memcpy(void *to, const void *from, size_t count);
void *memset(void *to, int byte, size_t count);
int memcmp(const void *a, const void *b, size_t count);
size_t strlen(const char *text);
bool same(const char *a, const char *b);
/* Parse a decimal number up to a space or the end.  Return `otherwise` if there are other characters. */
uint32_t parse_number(const char *text, uint32_t otherwise);
/* Allocate whole pages, not cleared.  Ends the guest if there is no memory left. */
void *take_pages(size_t size);
/* Map the page at an address above 4 GiB.  False if no page tables are left. */
bool map_high(uint64_t address);

/* console.c: COM1 at 115200 baud; output is polled */

enum {
    COM1 = 0x3F8,
    UART_DATA = COM1,
    UART_IER = COM1 + 1,
    UART_IIR = COM1 + 2,
    UART_FCR = COM1 + 2,
    UART_LCR = COM1 + 3,
    UART_MCR = COM1 + 4,
    UART_LSR = COM1 + 5,
    UART_MSR = COM1 + 6,
    UART_SCRATCH = COM1 + 7,
    IER_RECEIVE = 0x01,
    IER_TRANSMIT = 0x02,
    FCR_ON_AND_CLEAR = 0x07,
    LCR_8N1 = 0x03,
    LCR_DIVISOR = 0x80,
    MCR_LINES = 0x0B, /* DTR, RTS, and OUT2, which enables the interrupt output of the chip */
    MCR_LOOPBACK = 0x10,
    LSR_READY = 0x01,
    LSR_OVERRUN = 0x02,
    LSR_THRE = 0x20,
    LSR_EMPTY = 0x40,
    IRQ_COM1 = 4,
};

void console_init(void);
void put_char(char c);
/* %s %c %u %x, with a width, a leading 0, and l for 64 bits; \n becomes CR LF. */
__attribute__((format(printf, 1, 2))) void print(const char *format, ...);

/* trap.c: interrupts and exceptions; the two 8259s deliver interrupts until they are masked */

struct frame {
    uint64_t r15, r14, r13, r12, r11, r10, r9, r8, rbp, rdi, rsi, rdx, rcx, rbx, rax;
    uint64_t vector, error;
    uint64_t rip, cs, rflags, rsp, ss;
};

enum {
    VECTOR_GP = 13,
    VECTOR_PIC = 0x20,  /* IRQ 0-15 */
    VECTOR_FREE = 0x30, /* from here on free for the guest */
    VECTOR_ALARM = 0x4E, /* wait_until */
    VECTOR_SPURIOUS = 0x4F,
    VECTORS = 0x50, /* start.S has this many stubs */
    PIC_MASTER = 0x20,
    PIC_SLAVE = 0xA0,
};

void traps_init(void);
void traps_load(void);
void vector_set(unsigned vector, void (*handler)(struct frame *));
/* Call `handler` for an ISA interrupt.  The handler need not acknowledge it at the 8259. */
void irq_enable(unsigned irq, void (*handler)(void));
void irq_disable(unsigned irq);
/* Call a function in ring 0 with interrupts off, from ring 0 or 3.  From ring 3 the fault of a HLT enters ring 0,
 * because a KVM without hardware does not handle SYSCALL and INT as a processor does. */
void in_ring0(void (*function)(void *), void *argument);
/* RDMSR and WRMSR.  They return false if the processor raises #GP. */
bool try_rdmsr(uint32_t msr, uint64_t *value);
bool try_wrmsr(uint32_t msr, uint64_t value);

#define LAPIC_BASE 0xFEE00000u
#define LAPIC_TICKS_PER_MS 1000000u /* under KVM, whose APIC bus runs at 1 GHz */
enum {
    LAPIC_ID = 0x20,
    LAPIC_VERSION = 0x30,
    LAPIC_EOI = 0xB0,
    LAPIC_SPURIOUS = 0xF0,
    LAPIC_ICR_LOW = 0x300,
    LAPIC_ICR_HIGH = 0x310,
    LAPIC_TIMER = 0x320,
    LAPIC_LINT0 = 0x350,
    LAPIC_INITIAL = 0x380,
    LAPIC_CURRENT = 0x390,
    LAPIC_DIVIDE = 0x3E0,
    LAPIC_BY_1 = 0x0B,
    LAPIC_MASKED = 0x10000,
    LAPIC_EXTINT = 0x700,
    LAPIC_ON = 0x100,
};

static inline uint32_t lapic_read(unsigned reg)
{
    return peek32(LAPIC_BASE + reg);
}

static inline void lapic_write(unsigned reg, uint32_t value)
{
    poke32(LAPIC_BASE + reg, value);
}

static inline uint8_t lapic_id(void)
{
    return (uint8_t)(lapic_read(LAPIC_ID) >> 24);
}

#define IOAPIC_BASE 0xFEC00000u
enum { IOAPIC_VERSION = 0x01, IOAPIC_PIN = 0x10, IOAPIC_LEVEL = 0x8000, IOAPIC_MASKED = 0x10000 };

static inline uint32_t ioapic_read(unsigned reg)
{
    poke32(IOAPIC_BASE, reg);
    return peek32(IOAPIC_BASE + 0x10);
}

static inline void ioapic_write(unsigned reg, uint32_t value)
{
    poke32(IOAPIC_BASE, reg);
    poke32(IOAPIC_BASE + 0x10, value);
}

/* Route an I/O APIC's pin to a vector of this processor. */
static inline void ioapic_route(unsigned pin, uint32_t how)
{
    ioapic_write(IOAPIC_PIN + 2 * pin + 1, (uint32_t)lapic_id() << 24);
    ioapic_write(IOAPIC_PIN + 2 * pin, how);
}

/* report.c: checks by name */

/* Set the prefix of the names of the following checks.  A dot follows it. */
void check_group(const char *name);
/* Join words by dots, to at most 80 bytes with the final 0.  The next call overwrites the result. */
const char *dotted(const char *const *words, unsigned count);
/* Wait until something happens.  False if that takes too long. */
bool soon(bool (*happened)(void));
void check(const char *name, bool good);
void check_equal(const char *name, uint64_t got, uint64_t want);
void check_range(const char *name, uint64_t got, uint64_t least, uint64_t most);
void skip(const char *name);
/* Print the numbers of passed and failed checks since the last report. */
void report(const char *title);

/* command.c: lines of at most COMMAND_MAX bytes from the serial line, of words and NAME=NUMBER */

#define COMMAND_MAX 128

void commands_init(void);
/* Print "ready", sleep until a line comes, and copy it.  The host sends one line at a time, and can read its clocks
 * while the guest sleeps. */
void read_command(char *line);
/* Whether a text begins with a word. */
bool word_is(const char *text, const char *word);
/* Whether a line contains a word after its first one. */
bool has_word(const char *line, const char *word);
/* The number after NAME= in a line. */
uint32_t number_in(const char *line, const char *name, uint32_t otherwise);

/* acpi.c */

struct acpi_header {
    char signature[4];
    uint32_t length;
    uint8_t revision, checksum;
    char oem_id[6], oem_table_id[8];
    uint32_t oem_revision;
    char creator_id[4];
    uint32_t creator_revision;
} __attribute__((packed));

struct acpi_rsdp {
    char signature[8];
    uint8_t checksum;
    char oem_id[6];
    uint8_t revision;
    uint32_t rsdt;
    uint32_t length;
    uint64_t xsdt;
    uint8_t extended_checksum;
    uint8_t reserved[3];
} __attribute__((packed));

struct acpi_fadt {
    struct acpi_header header;
    uint32_t facs, dsdt;
    uint8_t reserved0, profile;
    uint16_t sci;
    uint32_t smi_command;
    uint8_t acpi_enable, acpi_disable, s4bios, pstate;
    uint32_t pm1a_event, pm1b_event, pm1a_control, pm1b_control, pm2_control, pm_timer;
    uint8_t reserved1[32];
    uint32_t flags;
} __attribute__((packed));

enum {
    PM_BUTTON = 0x100, /* PWRBTN_STS and PWRBTN_EN */
    PM_SCI_EN = 0x001,
    PM_SLEEP = 0x2000,
    PM_TIMER_HZ = 3579545,
    PM_TIMER_MASK = 0xFFFFFF,
    FADT_TIMER_32 = 0x100,
};

struct power {
    uint16_t event, control, timer; /* ports */
    uint32_t timer_half; /* half of the timer's range */
    uint8_t sci;
};

extern struct power power;

void acpi_init(void);
const struct acpi_rsdp *acpi_rsdp(void);
const struct acpi_rsdp *acpi_scan_rsdp(void);
const void *acpi_table(const char *signature);
bool acpi_sum_is_zero(const void *table, size_t size);
/* The next MADT entry of a type after `previous` (NULL: the first), or NULL. */
const uint8_t *madt_entry(uint8_t type, const uint8_t *previous);
void acpi_enable(void);
void power_button_enable(void (*pressed)(void));
_Noreturn void power_off(void);
_Noreturn void reset(void);
_Noreturn void triple_fault(void);

enum { MADT_LAPIC = 0, MADT_IOAPIC = 1, MADT_OVERRIDE = 2 };

/* clock.c: the ACPI timer, and the battery-backed clock */

uint32_t pm_ticks(void);
/* Take interrupts until *what is at least `least`, or the time is up (at most 4 s).  Return whether the value was
 * reached.  Callers are in ring 0 with interrupts off, as they are afterwards, or, for wait_until only, in ring 3.
 * wait_until sleeps, with the local APIC's timer as alarm: a guest that reads a clock in a loop keeps its VMM so busy
 * that the awaited event comes late.  spin_until is for tests of that timer. */
bool wait_until(const volatile uint32_t *what, uint32_t least, uint32_t milliseconds);
bool spin_until(const volatile uint32_t *what, uint32_t least, uint32_t milliseconds);
void delay(uint32_t milliseconds);

enum { RTC_A = 0x0A, RTC_B = 0x0B, RTC_C = 0x0C, RTC_D = 0x0D, RTC_CENTURY = 0x32, IRQ_RTC = 8 };
enum { RTC_UPDATING = 0x80, RTC_PERIODIC = 0x40, RTC_BINARY = 0x04, RTC_24H = 0x02 };

struct date {
    uint16_t year;
    uint8_t month, day, hour, minute, second;
};

uint8_t cmos_read(uint8_t index);
void cmos_write(uint8_t index, uint8_t value);
struct date rtc_date(void);
/* Seconds since the start of the year 2000. */
uint32_t rtc_seconds(void);

/* smp.c: other processors.  They share one stack, so each must have ended its work before the next one starts. */

/* The next processor after an entry of the MADT (NULL: the first), except this one.  False if there is none. */
bool next_processor(const uint8_t **entry, uint8_t *id);
/* Start a processor.  It calls a function in ring 0 with interrupts off, and halts afterwards.  False if it does not
 * start. */
bool processor_start(uint8_t id, void (*work)(void));
void processor_interrupt(uint8_t id, uint8_t vector);
/* The number of processors that have executed their first instruction. */
uint32_t processors_in_real_mode(void);

/* start.S */

/* Continue in ring 3, which even a KVM without hardware runs natively, and with IOPL 3, so that port I/O works. */
_Noreturn void run_in_ring3(void (*function)(void));

#endif
