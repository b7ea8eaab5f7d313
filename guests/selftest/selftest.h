/* selftest: checks the machine from inside and reports each check by name.
 *
 *     cpus=N mem=MIB      what the VM was configured with, checked where given
 *     qemu                run under QEMU, for testing this guest: leaves out what is ours alone
 *
 * Each part is one file; nothing may take long where ring 0 is interpreted, and nothing may wait for ever. */

#ifndef SELFTEST_H
#define SELFTEST_H

#include "guest.h"

void check(const char *name, bool good);
void check_equal(const char *name, uint64_t got, uint64_t want);
void check_range(const char *name, uint64_t got, uint64_t least, uint64_t most);
void skip(const char *name);
bool under_qemu(void);

void test_memory(void);
void test_ports(void);
void test_mmio(void);
void test_cpu(void);
void test_pit(void);
void test_lapic(void);
void test_clock(void);
void test_uart(void);
void test_keyboard(void);
void test_fwcfg(void);
void test_pci(void);
void test_acpi(void);
void test_smp(void);

/* memory.c */
uint64_t ram_bytes(void);
uint64_t ram_above(uint64_t from, uint64_t to);

/* acpi.c */
unsigned madt_processors(void);

/* timers.c */
#define IOAPIC_BASE 0xFEC00000u
uint32_t ioapic_read(unsigned reg);
void ioapic_write(unsigned reg, uint32_t value);
uint8_t lapic_id(void);

#endif
