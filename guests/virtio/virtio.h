/* The driver's side of virtio: registers over PCI, legacy or virtio 1.x, and split queues (virtio 1.2, 2.7 and 4.1).
 *
 * Order of calls: virtio_open; then virtio_accept, virtio_add_queue for each queue, virtio_interrupts, virtio_ready,
 * and requests; virtio_reset, and again.  All of it works from ring 3, where it is fast. */

#ifndef VIRTIO_H
#define VIRTIO_H

#include "pci.h"

enum {
    VIRTIO_VENDOR = 0x1AF4,
    VIRTIO_MODERN_BASE = 0x1040,
    VIRTIO_TYPE_NET = 1,
    VIRTIO_TYPE_BLOCK = 2,

    STATUS_ACKNOWLEDGE = 1,
    STATUS_DRIVER = 2,
    STATUS_DRIVER_OK = 4,
    STATUS_FEATURES_OK = 8,
    STATUS_NEEDS_RESET = 64,

    ISR_QUEUE = 1,
    ISR_CONFIG = 2,
    NO_VECTOR = 0xFFFF,
};

#define F_NOTIFY_ON_EMPTY (1ull << 24)
#define F_ANY_LAYOUT (1ull << 27)
#define F_INDIRECT (1ull << 28)
#define F_EVENT_INDEX (1ull << 29)
#define F_VERSION_1 (1ull << 32)

/* The legacy register block (4.1.4.10) */
enum {
    LEGACY_FEATURES = 0,
    LEGACY_ACCEPTED = 4,
    LEGACY_QUEUE_PFN = 8,
    LEGACY_QUEUE_SIZE = 12,
    LEGACY_QUEUE_SELECT = 14,
    LEGACY_NOTIFY = 16,
    LEGACY_STATUS = 18,
    LEGACY_ISR = 19,
    LEGACY_CONFIG = 20,
    LEGACY_CONFIG_VECTOR = 20, /* these two while MSI-X is enabled; device configuration is behind them then */
    LEGACY_QUEUE_VECTOR = 22,
    LEGACY_CONFIG_MSIX = 24,
    LEGACY_ALIGN = 4096,
};

/* The common configuration of virtio 1.x (4.1.4.3) */
enum {
    COMMON_OFFERED_SELECT = 0,
    COMMON_OFFERED = 4,
    COMMON_ACCEPTED_SELECT = 8,
    COMMON_ACCEPTED = 12,
    COMMON_CONFIG_VECTOR = 16,
    COMMON_STATUS = 20,
    COMMON_GENERATION = 21,
    COMMON_QUEUE_SELECT = 22,
    COMMON_QUEUE_SIZE = 24,
    COMMON_QUEUE_VECTOR = 26,
    COMMON_QUEUE_ENABLE = 28,
    COMMON_QUEUE_NOTIFY = 30,
    COMMON_QUEUE_TABLE = 32,
    COMMON_QUEUE_AVAILABLE = 40,
    COMMON_QUEUE_USED = 48,
};

enum interrupts { POLLED, INTX_PIC, INTX_IOAPIC, MSIX };

/* ---- queues */

#define QUEUE_MAX 256

enum { DESC_NEXT = 1, DESC_WRITE = 2, DESC_INDIRECT = 4, AVAIL_NO_INTERRUPT = 1, USED_NO_NOTIFY = 1 };

struct descriptor {
    uint64_t address;
    uint32_t length;
    uint16_t flags, next;
};

struct available {
    uint16_t flags, index, ring[];
};

struct used_element {
    uint32_t id, length;
};

struct used {
    uint16_t flags, index;
    struct used_element ring[];
};

/* One piece of a buffer.  Pieces that the device writes come last. */
struct segment {
    const void *address;
    uint32_t length;
    bool write;
};

struct queue {
    unsigned index, size;
    bool event_index;
    uint64_t notify; /* port or address */
    volatile struct descriptor *table;
    volatile struct available *available;
    volatile struct used *used;
    /* These counters are not reduced.  Only a position in a ring is taken modulo the ring's size. */
    uint16_t next_available, next_used, notified;
    uint16_t first_free;
    unsigned free;
    void *tokens[QUEUE_MAX];
    struct descriptor *indirect[QUEUE_MAX]; /* a table for each head, made at its first use */
};

/* Add a buffer; the device sees it at queue_publish.  False if too few descriptors are free.  `token` is what
 * queue_take will return.  Descriptors of the queue itself, or of a table of its own where `indirect` is set. */
bool queue_add(struct queue *queue, const struct segment *segments, unsigned count, void *token, bool indirect);
/* Make the added buffers visible to the device.  True if it wants a notification. */
bool queue_publish(struct queue *queue);
/* Return the token of a used buffer, and how much the device wrote; NULL if there is none. */
void *queue_take(struct queue *queue, uint32_t *length);
bool queue_has_used(const struct queue *queue);
/* Request an interrupt after so many more used buffers or, without the event index, after any.  True if that has
 * happened already. */
bool queue_want_interrupt(struct queue *queue, unsigned more);
void queue_no_interrupt(struct queue *queue);

/* ---- devices */

struct virtio_device {
    struct pci_device pci;
    bool legacy;
    struct window registers; /* the legacy block, or the common configuration */
    struct window notify, isr, config;
    uint32_t notify_multiplier;
    uint64_t features; /* negotiated */
    enum interrupts interrupts;
    bool msix;
    /* How many interrupts there were: of queues, of configuration changes, and INTx ones that were neither. */
    volatile uint32_t interrupted, reconfigured, spurious;
};

/* The first virtio device of a type whose slot is at least `slot`; returns its slot, or PCI_SLOTS. */
unsigned virtio_find(unsigned type, unsigned slot);
/* From now on use no ports: of the structures of virtio 1.x only those in memory BARs are used. */
void virtio_use_memory_only(void);
/* Open a device by one of its two interfaces, and reset it.  False if it does not have that one.  A device that was
 * open before must have been reset. */
bool virtio_open(struct virtio_device *device, unsigned slot, bool legacy);
void virtio_reset(struct virtio_device *device);
uint64_t virtio_offered(const struct virtio_device *device);
/* Negotiate features.  False if the device does not accept them. */
bool virtio_accept(struct virtio_device *device, uint64_t features);
/* Set up a queue of at most the given size (legacy queues have a fixed size).  False if the device has none there. */
bool virtio_add_queue(struct virtio_device *device, struct queue *queue, unsigned index, unsigned size);
/* Choose the kind of interrupts.  With MSI-X all queues use entry 1, and configuration changes use entry 0. */
void virtio_interrupts(struct virtio_device *device, enum interrupts interrupts);
/* Set the MSI-X entry of a queue; false if the device refuses. */
bool virtio_queue_vector(struct virtio_device *device, const struct queue *queue, unsigned entry);
void virtio_ready(struct virtio_device *device);
void virtio_notify(const struct virtio_device *device, const struct queue *queue);
uint8_t virtio_status(const struct virtio_device *device);
void virtio_set_status(const struct virtio_device *device, uint8_t status);
uint8_t virtio_isr(const struct virtio_device *device);
/* Fields of 1, 2 or 4 bytes in the device configuration. */
uint32_t virtio_config(const struct virtio_device *device, unsigned offset, unsigned size);
void virtio_set_config(const struct virtio_device *device, unsigned offset, unsigned size, uint32_t value);
/* Wait, asleep or polling, until a queue has used buffers: `more` of them with the event index.  False after some
 * seconds. */
bool virtio_wait(struct virtio_device *device, struct queue *queue, unsigned more);

#endif
