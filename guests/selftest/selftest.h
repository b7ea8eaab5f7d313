/* selftest: checks the machine from inside and reports each check by name.
 *
 *     cpus=N mem=MIB      the configuration of the VM, which is checked if given
 *     qemu                run under QEMU, to test this guest; omits checks that only vmd passes
 *
 * Each part is one file.  No check may take long if ring 0 is interpreted, and none may wait for ever. */

#ifndef SELFTEST_H
#define SELFTEST_H

#include "guest.h"

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

#endif
