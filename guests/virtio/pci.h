/* PCI for a driver: configuration mechanism 1 on bus 0, BARs, capabilities, MSI-X and INTx (PCI 3.0). */

#ifndef PCI_H
#define PCI_H

#include "guest.h"

enum {
    PCI_SLOTS = 32,
    PCI_BARS = 6,
    PCI_VENDOR = 0x00,
    PCI_DEVICE = 0x02,
    PCI_COMMAND = 0x04,
    PCI_STATUS = 0x06,
    PCI_BAR0 = 0x10,
    PCI_CAPABILITIES = 0x34,
    PCI_INTERRUPT_LINE = 0x3C,
    PCI_INTERRUPT_PIN = 0x3D,
    COMMAND_IO = 0x001,
    COMMAND_MEMORY = 0x002,
    COMMAND_MASTER = 0x004,
    COMMAND_NO_INTX = 0x400,
    STATUS_INTX = 0x08,
    STATUS_CAPABILITIES = 0x10,
    CAP_VENDOR = 0x09,
    CAP_MSIX = 0x11,
};

/* A block of registers in ports or in memory. */
struct window {
    uint64_t base;
    bool io;
};

struct pci_bar {
    uint64_t base, size; /* a size of 0: there is none */
    bool io, wide;
};

struct pci_device {
    unsigned slot;
    uint16_t vendor, device;
    struct pci_bar bars[PCI_BARS];
    unsigned msix_entries, msix_capability;
    struct window msix_table, msix_pending;
};

uint8_t pci_read8(unsigned slot, unsigned offset);
uint16_t pci_read16(unsigned slot, unsigned offset);
uint32_t pci_read32(unsigned slot, unsigned offset);
void pci_write8(unsigned slot, unsigned offset, uint8_t value);
void pci_write16(unsigned slot, unsigned offset, uint16_t value);
void pci_write32(unsigned slot, unsigned offset, uint32_t value);

/* Size the BARs of the device in a slot, place those that firmware has not placed, and enable decoding and DMA.
 * False if there is no device. */
bool pci_open(struct pci_device *device, unsigned slot);
/* Move a BAR while the device decodes. */
void pci_move_bar(struct pci_device *device, unsigned index, uint64_t base);
/* A free, aligned address for so many bytes. */
uint64_t pci_free_ports(uint64_t size);
uint64_t pci_free_memory(uint64_t size);
/* The offset of the next capability of a kind after another (0: the first), or 0. */
unsigned pci_capability(const struct pci_device *device, unsigned kind, unsigned previous);

uint32_t window_read(const struct window *window, unsigned offset, unsigned size);
void window_write(const struct window *window, unsigned offset, unsigned size, uint32_t value);

/* Unmask an entry.  Each of its interrupts adds 1 to *count. */
void msix_route(struct pci_device *device, unsigned entry, volatile uint32_t *count);
void msix_mask(struct pci_device *device, unsigned entry, bool masked);
bool msix_pending(const struct pci_device *device, unsigned entry);
void msix_enable(struct pci_device *device, bool enabled);

/* Call `handler` for a device's INTx, through the 8259s or the I/O APIC.  One device at a time. */
void intx_enable(const struct pci_device *device, bool by_ioapic, void (*handler)(void));
void intx_disable(const struct pci_device *device, bool by_ioapic);

#endif
