#include "pci.h"

enum { ADDRESS = 0xCF8, DATA = 0xCFC };
enum { BAR_IO = 0x1, BAR_WIDE = 0x4 };
enum {
    MSIX_CONTROL = 2,
    MSIX_TABLE = 4,
    MSIX_PENDING = 8,
    MSIX_ENABLE = 0x8000,
    MSIX_FUNCTION_MASK = 0x4000,
    MSIX_ENTRY = 16,
    MSIX_ENTRY_DATA = 8,
    MSIX_ENTRY_MASK = 12,
};

#define ENABLE 0x80000000u
#define CAPABILITIES_MAX 48

/* Addresses for BARs that firmware has not placed: outside of its own range, and in the hole below 4 GiB. */
#define FREE_PORTS 0xE000
#define FREE_PORTS_END 0xFFFF
#define FREE_MEMORY 0xF8000000

/* The PIIX3, which QEMU has and vmd does not, has registers for the IRQs of the four INTx lines. */
#define PIIX3 0x70008086u
#define PIIX3_SLOT 1
#define PIIX3_ROUTE 0x60
#define ELCR 0x4D0

#define VECTOR_MSIX VECTOR_FREE
#define VECTOR_INTX (VECTOR_ALARM - 1)

static const uint8_t irqs[4] = {10, 10, 11, 11};

/* ---- configuration space */

static uint16_t select(unsigned slot, unsigned offset)
{
    outl(ADDRESS, ENABLE | slot << 11 | (offset & 0xFC));
    return (uint16_t)(DATA + (offset & 3));
}

uint8_t pci_read8(unsigned slot, unsigned offset)
{
    return inb(select(slot, offset));
}

uint16_t pci_read16(unsigned slot, unsigned offset)
{
    return inw(select(slot, offset));
}

uint32_t pci_read32(unsigned slot, unsigned offset)
{
    return inl(select(slot, offset));
}

void pci_write8(unsigned slot, unsigned offset, uint8_t value)
{
    outb(select(slot, offset), value);
}

void pci_write16(unsigned slot, unsigned offset, uint16_t value)
{
    outw(select(slot, offset), value);
}

void pci_write32(unsigned slot, unsigned offset, uint32_t value)
{
    outl(select(slot, offset), value);
}

unsigned pci_capability(const struct pci_device *device, unsigned kind, unsigned previous)
{
    unsigned at = previous ? pci_read8(device->slot, previous + 1) : 0;

    if (!previous && pci_read16(device->slot, PCI_STATUS) & STATUS_CAPABILITIES)
        at = pci_read8(device->slot, PCI_CAPABILITIES);
    for (unsigned seen = 0; at && seen < CAPABILITIES_MAX; seen++) {
        if (pci_read8(device->slot, at) == kind)
            return at;
        at = pci_read8(device->slot, at + 1);
    }
    return 0;
}

/* ---- BARs */

uint64_t pci_free_ports(uint64_t size)
{
    static uint64_t next = FREE_PORTS;
    uint64_t base = (next + size - 1) & ~(size - 1);

    next = base + size;
    if (next > FREE_PORTS_END) {
        print("no ports left for PCI\n");
        power_off();
    }
    return base;
}

uint64_t pci_free_memory(uint64_t size)
{
    static uint64_t next = FREE_MEMORY;
    uint64_t base = (next + size - 1) & ~(size - 1);

    next = base + size;
    if (next > IOAPIC_BASE) {
        print("no addresses left for PCI\n");
        power_off();
    }
    return base;
}

static void size_bar(struct pci_device *device, unsigned index)
{
    unsigned at = PCI_BAR0 + 4 * index;
    struct pci_bar *bar = &device->bars[index];
    uint32_t low = pci_read32(device->slot, at), mask;

    pci_write32(device->slot, at, 0xFFFFFFFF);
    mask = pci_read32(device->slot, at);
    pci_write32(device->slot, at, low);
    bar->io = low & BAR_IO;
    bar->wide = !bar->io && low & BAR_WIDE;
    bar->base = low & (bar->io ? ~3u : ~15u);
    mask &= bar->io ? ~3u : ~15u;
    bar->size = bar->io ? -mask & 0xFFFF : -mask;
    if (bar->wide)
        bar->base |= (uint64_t)pci_read32(device->slot, at + 4) << 32;
}

void pci_move_bar(struct pci_device *device, unsigned index, uint64_t base)
{
    unsigned at = PCI_BAR0 + 4 * index;

    device->bars[index].base = base;
    pci_write32(device->slot, at, (uint32_t)base);
    if (device->bars[index].wide)
        pci_write32(device->slot, at + 4, (uint32_t)(base >> 32));
}

static void place_bars(struct pci_device *device)
{
    pci_write16(device->slot, PCI_COMMAND, 0); /* while a BAR is sized, its address is invalid */
    for (unsigned index = 0; index < PCI_BARS; index++) {
        struct pci_bar *bar = &device->bars[index];

        size_bar(device, index);
        if (bar->size && !bar->base)
            pci_move_bar(device, index, bar->io ? pci_free_ports(bar->size) : pci_free_memory(bar->size));
        index += bar->wide; /* the next register is its upper half */
    }
    pci_write16(device->slot, PCI_COMMAND, COMMAND_IO | COMMAND_MEMORY | COMMAND_MASTER);
}

uint32_t window_read(const struct window *window, unsigned offset, unsigned size)
{
    uint64_t at = window->base + offset;

    if (window->io)
        return size == 1 ? inb((uint16_t)at) : size == 2 ? inw((uint16_t)at) : inl((uint16_t)at);
    return size == 1 ? peek8(at) : size == 2 ? peek16(at) : peek32(at);
}

void window_write(const struct window *window, unsigned offset, unsigned size, uint32_t value)
{
    uint64_t at = window->base + offset;

    if (window->io && size == 1)
        outb((uint16_t)at, (uint8_t)value);
    else if (window->io && size == 2)
        outw((uint16_t)at, (uint16_t)value);
    else if (window->io)
        outl((uint16_t)at, value);
    else if (size == 1)
        poke8(at, (uint8_t)value);
    else if (size == 2)
        poke16(at, (uint16_t)value);
    else
        poke32(at, value);
}

/* ---- MSI-X */

static volatile uint32_t *counts[VECTORS];

static void on_message(struct frame *frame)
{
    ++*counts[frame->vector];
    lapic_write(LAPIC_EOI, 0);
}

static void find_msix(struct pci_device *device)
{
    unsigned at = pci_capability(device, CAP_MSIX, 0);
    uint32_t table, pending;

    device->msix_entries = 0;
    device->msix_capability = at;
    if (!at)
        return;
    device->msix_entries = (pci_read16(device->slot, at + MSIX_CONTROL) & 0x7FFu) + 1;
    table = pci_read32(device->slot, at + MSIX_TABLE);
    pending = pci_read32(device->slot, at + MSIX_PENDING);
    device->msix_table = (struct window){device->bars[table & 7].base + (table & ~7u), false};
    device->msix_pending = (struct window){device->bars[pending & 7].base + (pending & ~7u), false};
}

void msix_route(struct pci_device *device, unsigned entry, volatile uint32_t *count)
{
    unsigned vector = VECTOR_MSIX, at = MSIX_ENTRY * entry;

    while (counts[vector] && counts[vector] != count)
        vector++;
    if (vector >= VECTOR_INTX) {
        print("no interrupt vectors left\n");
        power_off();
    }
    counts[vector] = count;
    vector_set(vector, on_message);
    msix_mask(device, entry, true);
    window_write(&device->msix_table, at, 4, LAPIC_BASE | (uint32_t)lapic_id() << 12);
    window_write(&device->msix_table, at + 4, 4, 0);
    window_write(&device->msix_table, at + MSIX_ENTRY_DATA, 4, vector); /* fixed, edge */
    msix_mask(device, entry, false);
}

void msix_mask(struct pci_device *device, unsigned entry, bool masked)
{
    window_write(&device->msix_table, MSIX_ENTRY * entry + MSIX_ENTRY_MASK, 4, masked);
}

bool msix_pending(const struct pci_device *device, unsigned entry)
{
    return window_read(&device->msix_pending, entry / 32 * 4, 4) >> entry % 32 & 1;
}

void msix_enable(struct pci_device *device, bool enabled)
{
    unsigned at = device->msix_capability + MSIX_CONTROL;
    uint16_t control = pci_read16(device->slot, at) & 0x3FFF;

    pci_write16(device->slot, at, (uint16_t)(control | (enabled ? MSIX_ENABLE : 0)));
}

/* ---- INTx */

static void (*intx_handler)(void);

static void on_intx(struct frame *frame)
{
    (void)frame;
    intx_handler();
    lapic_write(LAPIC_EOI, 0);
}

/* The INTx line of a slot's INTA, as wired with an i440FX. */
static unsigned intx_line(const struct pci_device *device)
{
    return (pci_read8(device->slot, PCI_INTERRUPT_PIN) - 1u + device->slot - 1u) & 3;
}

static unsigned intx_irq(const struct pci_device *device)
{
    unsigned line = intx_line(device);

    if (pci_read32(PIIX3_SLOT, PCI_VENDOR) != PIIX3)
        return pci_read8(device->slot, PCI_INTERRUPT_LINE);
    /* There firmware has set the interrupt line register, and not always correctly. */
    pci_write8(PIIX3_SLOT, PIIX3_ROUTE + line, irqs[line]);
    return irqs[line];
}

void intx_enable(const struct pci_device *device, bool by_ioapic, void (*handler)(void))
{
    unsigned irq = intx_irq(device);
    uint16_t elcr = (uint16_t)(ELCR + irq / 8);

    outb(elcr, (uint8_t)(inb(elcr) | 1u << (irq & 7))); /* level triggered */
    intx_handler = handler;
    if (by_ioapic) {
        vector_set(VECTOR_INTX, on_intx);
        ioapic_route(irq, VECTOR_INTX | IOAPIC_LEVEL);
    } else {
        irq_enable(irq, handler);
    }
}

void intx_disable(const struct pci_device *device, bool by_ioapic)
{
    unsigned irq = intx_irq(device);

    if (by_ioapic)
        ioapic_route(irq, IOAPIC_MASKED);
    else
        irq_disable(irq);
}

bool pci_open(struct pci_device *device, unsigned slot)
{
    device->slot = slot;
    device->vendor = pci_read16(slot, PCI_VENDOR);
    device->device = pci_read16(slot, PCI_DEVICE);
    if (device->vendor == 0xFFFF)
        return false;
    place_bars(device);
    find_msix(device);
    return true;
}
