/* ACPI: finding tables, the power button, switching off (ACPI 5.0). */

#include "guest.h"

/* Defaults if the tables cannot be found, so that a guest can still switch the machine off. */
struct power power = {.event = 0x600, .control = 0x604, .timer = 0x608, .sci = 9};

#define SLEEP_TYPE_DEFAULT 5
#define BIOS_AREA 0xE0000
#define BIOS_AREA_END 0x100000
#define ELCR 0x4D0
#define PORT_RESET 0xCF9
#define PORT_KEYBOARD 0x64
#define KEYBOARD_RESET 0xFE
#define OFF_MS 3000

static void (*button_pressed)(void);

bool acpi_sum_is_zero(const void *table, size_t size)
{
    const uint8_t *bytes = table;
    uint8_t sum = 0;

    for (size_t i = 0; i < size; i++)
        sum = (uint8_t)(sum + bytes[i]);
    return sum == 0;
}

const struct acpi_rsdp *acpi_scan_rsdp(void)
{
    for (uint64_t at = BIOS_AREA; at < BIOS_AREA_END; at += 16) {
        /* "RSD PTR ": eight bytes, always at a 16-byte boundary (5.2.5.1) */
        if (peek64(at) == 0x2052545020445352ull && acpi_sum_is_zero((const void *)at, 20))
            return (const struct acpi_rsdp *)at;
    }
    return NULL;
}

const struct acpi_rsdp *acpi_rsdp(void)
{
    if (start_info->rsdp)
        return (const struct acpi_rsdp *)start_info->rsdp;
    return acpi_scan_rsdp();
}

const void *acpi_table(const char *signature)
{
    const struct acpi_rsdp *rsdp = acpi_rsdp();
    const struct acpi_header *root, *table;
    bool wide;
    unsigned step;

    if (!rsdp)
        return NULL;
    wide = rsdp->revision >= 2 && rsdp->xsdt;
    step = wide ? 8 : 4;
    root = (const struct acpi_header *)(wide ? rsdp->xsdt : rsdp->rsdt);
    for (unsigned at = sizeof(*root); at + step <= root->length; at += step) {
        uint64_t entry = (uint64_t)root + at;

        table = (const struct acpi_header *)(wide ? peek64(entry) : peek32(entry));
        if (memcmp(table->signature, signature, 4) == 0)
            return table;
    }
    return NULL;
}

void acpi_init(void)
{
    const struct acpi_fadt *fadt = acpi_table("FACP");

    if (!fadt || !fadt->pm1a_control)
        return;
    power.event = (uint16_t)fadt->pm1a_event;
    power.control = (uint16_t)fadt->pm1a_control;
    power.timer = (uint16_t)fadt->pm_timer;
    power.timer_half = fadt->flags & FADT_TIMER_32 ? UINT32_MAX / 2 : PM_TIMER_MASK / 2;
    power.sci = (uint8_t)fadt->sci;
}

const uint8_t *madt_entry(uint8_t type, const uint8_t *previous)
{
    const struct acpi_header *madt = acpi_table("APIC");
    const uint8_t *at, *end;

    if (!madt)
        return NULL;
    end = (const uint8_t *)madt + madt->length;
    at = previous ? previous + previous[1] : (const uint8_t *)(madt + 1) + 8;
    for (; at + 2 <= end && at[1] >= 2; at += at[1])
        if (at[0] == type)
            return at;
    return NULL;
}

/* Return SLP_TYP for S5: the first element of the package \_S5 in the DSDT.  There is no AML interpreter here;
 * compilers write this object as NameOp, "_S5_", PackageOp, length, count, and integers of at most a byte. */
static unsigned sleep_type(void)
{
    const struct acpi_fadt *fadt = acpi_table("FACP");
    const struct acpi_header *dsdt;
    uint64_t at, end;

    if (!fadt || !fadt->dsdt)
        return SLEEP_TYPE_DEFAULT;
    dsdt = (const struct acpi_header *)(uint64_t)fadt->dsdt;
    end = (uint64_t)dsdt + dsdt->length - 12;
    for (at = (uint64_t)(dsdt + 1); at < end; at++) {
        if (peek32(at) != 0x5F35535F || peek8(at + 4) != 0x12)
            continue;
        at += 5;
        at += 1 + (peek8(at) >> 6); /* the length: one byte, and as many more as its top bits say */
        at += 1;                    /* the count */
        return peek8(at) == 0x0A ? peek8(at + 1) : peek8(at) & 7;
    }
    return SLEEP_TYPE_DEFAULT;
}

void acpi_enable(void)
{
    const struct acpi_fadt *fadt = acpi_table("FACP");

    if (!fadt || !fadt->smi_command || inw(power.control) & PM_SCI_EN)
        return;
    outb((uint16_t)fadt->smi_command, fadt->acpi_enable);
}

static void sci(void)
{
    if (!(inw(power.event) & PM_BUTTON))
        return;
    outw(power.event, PM_BUTTON); /* writing 1 clears */
    if (button_pressed)
        button_pressed();
}

void power_button_enable(void (*pressed)(void))
{
    uint16_t elcr = (uint16_t)(ELCR + power.sci / 8);

    button_pressed = pressed;
    acpi_enable();
    outb(elcr, (uint8_t)(inb(elcr) | 1u << (power.sci & 7))); /* the SCI is level triggered */
    outw(power.event, PM_BUTTON);
    outw((uint16_t)(power.event + 2), PM_BUTTON);
    irq_enable(power.sci, sci);
}

void power_off(void)
{
    acpi_enable();
    outw(power.control, (uint16_t)(sleep_type() << 10 | PM_SLEEP));
    delay(OFF_MS); /* a VMM may take a moment to stop its processors */
    print("this machine cannot be switched off\n");
    for (;;)
        delay(OFF_MS);
}

void triple_fault(void)
{
    struct {
        uint16_t limit;
        uint64_t base;
    } __attribute__((packed)) none = {0, 0};

    /* The fault of UD2 finds no gate, nor does the double fault that follows. */
    __asm__ volatile("lidt %0; ud2" : : "m"(none));
    halt();
}

static void settle(void)
{
    for (unsigned i = 0; i < 1000; i++)
        cpu_pause();
}

void reset(void)
{
    outb(PORT_RESET, 0x02); /* a hard reset ... */
    outb(PORT_RESET, 0x06); /* ... on the rising edge of bit 2 */
    settle();
    outb(PORT_KEYBOARD, KEYBOARD_RESET);
    settle();
    triple_fault();
}
