#include "virtio.h"

/* struct virtio_pci_cap (4.1.4) */
enum {
    CAP_TYPE = 3,
    CAP_BAR = 4,
    CAP_OFFSET = 8,
    CAP_MULTIPLIER = 16,
    CFG_COMMON = 1,
    CFG_NOTIFY = 2,
    CFG_ISR = 3,
    CFG_DEVICE = 4,
};

enum { ENTRY_CONFIG, ENTRY_QUEUE };

#define PATIENCE_MS 4000
#define PATIENCE_CYCLES 40000000000ull
#define RESET_POLLS 100000

/* ---- finding */

static unsigned type_of(unsigned slot)
{
    static const uint8_t transitional[] = {1, 2, 5, 3, 8, 4}; /* types of device ids 1000h, ... (4.1.2.1) */
    uint16_t id = pci_read16(slot, PCI_DEVICE);

    if (pci_read16(slot, PCI_VENDOR) != VIRTIO_VENDOR)
        return 0;
    if (id >= VIRTIO_MODERN_BASE)
        return id - VIRTIO_MODERN_BASE;
    return id - 0x1000u < sizeof(transitional) ? transitional[id - 0x1000] : 0;
}

unsigned virtio_find(unsigned type, unsigned slot)
{
    while (slot < PCI_SLOTS && type_of(slot) != type)
        slot++;
    return slot;
}

static bool memory_only;

void virtio_use_memory_only(void)
{
    memory_only = true;
}

static bool find_modern(struct virtio_device *device)
{
    struct window *windows[] = {NULL, &device->registers, &device->notify, &device->isr, &device->config};
    struct pci_device *pci = &device->pci;
    unsigned found = 0;

    for (unsigned at = 0; (at = pci_capability(pci, CAP_VENDOR, at));) {
        unsigned type = pci_read8(pci->slot, at + CAP_TYPE), bar = pci_read8(pci->slot, at + CAP_BAR);

        if (type < CFG_COMMON || type > CFG_DEVICE || found >> type & 1 || bar >= PCI_BARS)
            continue;
        if (memory_only && pci->bars[bar].io)
            continue;
        found |= 1u << type;
        *windows[type] = (struct window){
            pci->bars[bar].base + pci_read32(pci->slot, at + CAP_OFFSET),
            pci->bars[bar].io,
        };
        if (type == CFG_NOTIFY)
            device->notify_multiplier = pci_read32(pci->slot, at + CAP_MULTIPLIER);
    }
    return found == 0x1E;
}

bool virtio_open(struct virtio_device *device, unsigned slot, bool legacy)
{
    memset(device, 0, sizeof(*device));
    if (!pci_open(&device->pci, slot))
        return false;
    device->legacy = legacy;
    if (legacy) {
        if (device->pci.device >= VIRTIO_MODERN_BASE || !device->pci.bars[0].io || !device->pci.bars[0].size)
            return false;
        if (memory_only)
            return false;
        device->registers = (struct window){device->pci.bars[0].base, true};
    } else if (!find_modern(device)) {
        return false;
    }
    virtio_reset(device);
    return true;
}

/* ---- registers */

static uint32_t get(const struct virtio_device *device, unsigned offset, unsigned size)
{
    return window_read(&device->registers, offset, size);
}

static void set(const struct virtio_device *device, unsigned offset, unsigned size, uint32_t value)
{
    window_write(&device->registers, offset, size, value);
}

uint8_t virtio_status(const struct virtio_device *device)
{
    return (uint8_t)get(device, device->legacy ? LEGACY_STATUS : COMMON_STATUS, 1);
}

void virtio_set_status(const struct virtio_device *device, uint8_t status)
{
    set(device, device->legacy ? LEGACY_STATUS : COMMON_STATUS, 1, status);
}

void virtio_reset(struct virtio_device *device)
{
    if (device->interrupts == INTX_PIC || device->interrupts == INTX_IOAPIC)
        intx_disable(&device->pci, device->interrupts == INTX_IOAPIC);
    device->interrupts = POLLED;
    virtio_set_status(device, 0);
    for (unsigned polls = 0; virtio_status(device) && polls < RESET_POLLS; polls++)
        cpu_pause();
    if (device->pci.msix_entries)
        msix_enable(&device->pci, false);
    device->msix = false;
    device->features = 0;
}

uint64_t virtio_offered(const struct virtio_device *device)
{
    uint64_t low;

    if (device->legacy)
        return get(device, LEGACY_FEATURES, 4);
    set(device, COMMON_OFFERED_SELECT, 4, 0);
    low = get(device, COMMON_OFFERED, 4);
    set(device, COMMON_OFFERED_SELECT, 4, 1);
    return (uint64_t)get(device, COMMON_OFFERED, 4) << 32 | low;
}

bool virtio_accept(struct virtio_device *device, uint64_t features)
{
    virtio_set_status(device, STATUS_ACKNOWLEDGE);
    virtio_set_status(device, STATUS_ACKNOWLEDGE | STATUS_DRIVER);
    device->features = features;
    if (device->legacy) {
        set(device, LEGACY_ACCEPTED, 4, (uint32_t)features);
        return true;
    }
    device->features |= F_VERSION_1;
    set(device, COMMON_ACCEPTED_SELECT, 4, 0);
    set(device, COMMON_ACCEPTED, 4, (uint32_t)device->features);
    set(device, COMMON_ACCEPTED_SELECT, 4, 1);
    set(device, COMMON_ACCEPTED, 4, (uint32_t)(device->features >> 32));
    virtio_set_status(device, STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK);
    return virtio_status(device) & STATUS_FEATURES_OK;
}

void virtio_ready(struct virtio_device *device)
{
    virtio_set_status(device, (uint8_t)(virtio_status(device) | STATUS_DRIVER_OK));
}

void virtio_notify(const struct virtio_device *device, const struct queue *queue)
{
    if (device->notify.io)
        outw((uint16_t)queue->notify, (uint16_t)queue->index);
    else
        poke16(queue->notify, (uint16_t)queue->index);
}

uint8_t virtio_isr(const struct virtio_device *device)
{
    return (uint8_t)(device->legacy ? get(device, LEGACY_ISR, 1) : window_read(&device->isr, 0, 1));
}

static struct window config_window(const struct virtio_device *device)
{
    if (device->legacy)
        return (struct window){device->registers.base + (device->msix ? LEGACY_CONFIG_MSIX : LEGACY_CONFIG), true};
    return device->config;
}

uint32_t virtio_config(const struct virtio_device *device, unsigned offset, unsigned size)
{
    struct window window = config_window(device);

    return window_read(&window, offset, size);
}

void virtio_set_config(const struct virtio_device *device, unsigned offset, unsigned size, uint32_t value)
{
    struct window window = config_window(device);

    window_write(&window, offset, size, value);
}

/* ---- queues */

/* The same layout for both interfaces, because legacy devices support only this one (2.7.2). */
static void lay_out(struct queue *queue, unsigned size)
{
    size_t table = sizeof(struct descriptor) * QUEUE_MAX, available = 6 + 2 * QUEUE_MAX;
    size_t used = 6 + sizeof(struct used_element) * QUEUE_MAX;
    size_t all = ((table + available + LEGACY_ALIGN - 1) & ~(size_t)(LEGACY_ALIGN - 1)) + used;
    uint8_t *memory = queue->table ? (uint8_t *)queue->table : take_pages(all);

    memset(memory, 0, all);
    queue->size = size;
    queue->table = (volatile struct descriptor *)memory;
    memory += sizeof(struct descriptor) * size;
    queue->available = (volatile struct available *)memory;
    memory = (uint8_t *)(((uint64_t)memory + 6 + 2 * size + LEGACY_ALIGN - 1) & ~(uint64_t)(LEGACY_ALIGN - 1));
    queue->used = (volatile struct used *)memory;
    queue->next_available = queue->next_used = queue->notified = 0;
    queue->first_free = 0;
    queue->free = size;
    for (unsigned i = 0; i < size; i++) {
        queue->table[i].next = (uint16_t)(i + 1);
        queue->tokens[i] = NULL;
    }
}

/* As one access in memory, like drivers that map the registers; in ports as two halves. */
static void set64(const struct virtio_device *device, unsigned offset, uint64_t value)
{
    if (!device->registers.io) {
        poke64(device->registers.base + offset, value);
        return;
    }
    set(device, offset, 4, (uint32_t)value);
    set(device, offset + 4, 4, (uint32_t)(value >> 32));
}

bool virtio_add_queue(struct virtio_device *device, struct queue *queue, unsigned index, unsigned size)
{
    unsigned most;

    set(device, device->legacy ? LEGACY_QUEUE_SELECT : COMMON_QUEUE_SELECT, 2, index);
    most = get(device, device->legacy ? LEGACY_QUEUE_SIZE : COMMON_QUEUE_SIZE, 2);
    if (most == 0)
        return false;
    if (device->legacy || most < size)
        size = most;
    if (size > QUEUE_MAX) {
        print("a queue of %u is too large for this guest\n", size);
        power_off();
    }
    queue->index = index;
    queue->event_index = device->features & F_EVENT_INDEX;
    lay_out(queue, size);
    if (device->legacy) {
        device->notify = device->registers;
        queue->notify = device->registers.base + LEGACY_NOTIFY;
        set(device, LEGACY_QUEUE_PFN, 4, (uint32_t)((uint64_t)queue->table / LEGACY_ALIGN));
        return true;
    }
    queue->notify = device->notify.base + get(device, COMMON_QUEUE_NOTIFY, 2) * device->notify_multiplier;
    set(device, COMMON_QUEUE_SIZE, 2, size);
    set64(device, COMMON_QUEUE_TABLE, (uint64_t)queue->table);
    set64(device, COMMON_QUEUE_AVAILABLE, (uint64_t)queue->available);
    set64(device, COMMON_QUEUE_USED, (uint64_t)queue->used);
    set(device, COMMON_QUEUE_ENABLE, 2, 1);
    return true;
}

/* ---- interrupts */

static struct virtio_device *on_line;

static void on_intx(void)
{
    uint8_t isr = virtio_isr(on_line); /* reading lowers the line */

    on_line->interrupted += isr & ISR_QUEUE;
    on_line->reconfigured += (isr & ISR_CONFIG) != 0;
    on_line->spurious += isr == 0;
}

bool virtio_queue_vector(struct virtio_device *device, const struct queue *queue, unsigned entry)
{
    unsigned at = device->legacy ? LEGACY_QUEUE_VECTOR : COMMON_QUEUE_VECTOR;

    set(device, device->legacy ? LEGACY_QUEUE_SELECT : COMMON_QUEUE_SELECT, 2, queue->index);
    set(device, at, 2, entry);
    return get(device, at, 2) == entry;
}

void virtio_interrupts(struct virtio_device *device, enum interrupts interrupts)
{
    device->interrupts = interrupts;
    device->interrupted = device->reconfigured = device->spurious = 0;
    if (interrupts == INTX_PIC || interrupts == INTX_IOAPIC) {
        on_line = device;
        intx_enable(&device->pci, interrupts == INTX_IOAPIC, on_intx);
    } else if (interrupts == MSIX) {
        msix_route(&device->pci, ENTRY_CONFIG, &device->reconfigured);
        msix_route(&device->pci, ENTRY_QUEUE, &device->interrupted);
        msix_enable(&device->pci, true);
        device->msix = true;
        set(device, device->legacy ? LEGACY_CONFIG_VECTOR : COMMON_CONFIG_VECTOR, 2, ENTRY_CONFIG);
    }
}

bool virtio_wait(struct virtio_device *device, struct queue *queue, unsigned more)
{
    uint64_t begin = rdtsc();

    if (device->interrupts == POLLED) {
        queue_no_interrupt(queue);
        while ((uint16_t)(queue->used->index - queue->next_used) < more) {
            if (rdtsc() - begin > PATIENCE_CYCLES)
                return false;
            cpu_pause();
        }
        return true;
    }
    for (;;) {
        uint32_t before = device->interrupted;

        if (queue_want_interrupt(queue, more)) {
            queue_no_interrupt(queue);
            return true;
        }
        if (!wait_until(&device->interrupted, before + 1, PATIENCE_MS))
            return false;
    }
}
