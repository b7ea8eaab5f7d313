/* ACPI tables and the power management block. */

#include "selftest.h"

unsigned madt_processors(void)
{
    unsigned count = 0;

    for (const uint8_t *entry = NULL; (entry = madt_entry(MADT_LAPIC, entry));)
        count += entry[4] & 1;
    return count;
}

static bool table_is_whole(const void *table)
{
    const struct acpi_header *header = table;

    return header && acpi_sum_is_zero(header, header->length);
}

static uint32_t entry32(const uint8_t *entry, unsigned offset)
{
    uint32_t value;

    memcpy(&value, entry + offset, sizeof(value));
    return value;
}

static const uint8_t *madt_override(uint8_t irq)
{
    for (const uint8_t *entry = NULL; (entry = madt_entry(MADT_OVERRIDE, entry));)
        if (entry[3] == irq)
            return entry;
    return NULL;
}

static void test_madt(void)
{
    const uint8_t *ioapic = madt_entry(MADT_IOAPIC, NULL), *timer = madt_override(0), *sci = madt_override(power.sci);
    uint32_t cpus = option_number("cpus", madt_processors());
    const uint8_t *entry = NULL;
    unsigned wrong = 0;

    check_equal("madt.processors", madt_processors(), cpus);
    for (unsigned id = 0; (entry = madt_entry(MADT_LAPIC, entry)); id++)
        wrong += entry[3] != id;
    check_equal("madt.apic-ids-ascend", wrong, 0);
    check("madt.has-ioapic", ioapic);
    if (ioapic) {
        check_equal("madt.ioapic-id", ioapic[2], ioapic_read(0) >> 24);
        check_equal("madt.ioapic-address", entry32(ioapic, 4), IOAPIC_BASE);
        check_equal("madt.ioapic-first-gsi", entry32(ioapic, 8), 0);
    }
    check_equal("madt.irq0-at-pin-2", timer ? entry32(timer, 4) : 0, 2);
    check_equal("madt.sci-level-triggered", sci ? sci[8] >> 2 & 3 : 0, 3);
}

static void test_pm(void)
{
    uint16_t enabled = (uint16_t)(power.event + 2), was;
    uint32_t first, second;

    acpi_enable();
    check_equal("pm.sci-enabled", inw(power.control) & PM_SCI_EN, PM_SCI_EN);
    was = inw(enabled);
    outw(enabled, PM_BUTTON);
    check_equal("pm.enable-register-holds", inw(enabled) & PM_BUTTON, PM_BUTTON);
    outw(enabled, was);
    outw(power.event, PM_BUTTON);
    check_equal("pm.button-not-pressed", inw(power.event) & PM_BUTTON, 0);
    first = pm_ticks();
    second = pm_ticks();
    /* An access takes well under a second: a step back would be one of nearly 2^24. */
    check_range("pm.timer-ascends", (second - first) & PM_TIMER_MASK, 0, PM_TIMER_HZ);
    delay(1);
    check("pm.timer-runs", pm_ticks() != first);
}

void test_acpi(void)
{
    const struct acpi_rsdp *rsdp = acpi_rsdp();
    const struct acpi_fadt *fadt = acpi_table("FACP");

    check("acpi.rsdp-from-start-info", start_info->rsdp);
    check("acpi.rsdp-by-scanning", acpi_scan_rsdp());
    check_equal("acpi.rsdp-same", (uint64_t)acpi_scan_rsdp(), start_info->rsdp);
    if (!rsdp || !fadt) {
        check("acpi.fadt-present", false);
        return;
    }
    check("acpi.rsdp-sum", acpi_sum_is_zero(rsdp, 20));
    if (rsdp->revision >= 2) {
        check("acpi.rsdp-extended-sum", acpi_sum_is_zero(rsdp, rsdp->length));
        check("acpi.xsdt-sum", table_is_whole((const void *)rsdp->xsdt));
    } else if (under_qemu()) {
        skip("acpi.xsdt-sum");
    } else {
        check_equal("acpi.rsdp-revision", rsdp->revision, 2);
    }
    check("acpi.rsdt-sum", table_is_whole((const void *)(uint64_t)rsdp->rsdt));
    check("acpi.fadt-sum", table_is_whole(fadt));
    check("acpi.madt-sum", table_is_whole(acpi_table("APIC")));
    check("acpi.dsdt-sum", table_is_whole((const void *)(uint64_t)fadt->dsdt));
    check_equal("acpi.sci", fadt->sci, 9);
    if (under_qemu())
        skip("acpi.pm-ports");
    else
        check("acpi.pm-ports", power.event == 0x600 && power.control == 0x604 && power.timer == 0x608);
    test_madt();
    test_pm();
}
