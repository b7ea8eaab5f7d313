/* Registers: configuration, features, resets, BARs that move, and a driver that breaks its ring. */

#include "blk.h"

enum { CFG_PCI = 5, CAP_TYPE = 3, CAP_BAR = 4, CAP_OFFSET = 8, CAP_LENGTH = 12, CAP_DATA = 16 };

#define POLLS 100000
#define WAIT_MS 4000
#define IN_FLIGHT 64
#define NOWHERE 0x4000 /* the index of a queue or descriptor that does not exist */

static uint8_t *data;
static struct request requests[IN_FLIGHT];

static bool works(void)
{
    memset(data, 0xFF, SECTOR);
    return read_disk(KEPT, data, SECTOR) == S_OK && is_pattern(data, KEPT, 1, PATTERN_HOST);
}

static void test_configuration(bool legacy)
{
    const struct virtio_device *device = &disk.device;
    uint64_t bytewise = 0;

    for (unsigned i = 0; i < 8; i++)
        bytewise |= (uint64_t)virtio_config(device, CONFIG_CAPACITY + i, 1) << 8 * i;
    check_equal("capacity-by-bytes", bytewise, disk.sectors);
    check_equal("capacity-by-words",
                virtio_config(device, CONFIG_CAPACITY, 2) | virtio_config(device, CONFIG_CAPACITY + 2, 2) << 16,
                disk.sectors & 0xFFFFFFFF);
    check_equal("block-size", virtio_config(device, CONFIG_BLK_SIZE, 4), SECTOR);
    check_equal("segments", virtio_config(device, CONFIG_SEG_MAX, 4), QUEUE_MAX - 2);
    if (device->features & F_CONFIG_WCE) {
        virtio_set_config(device, CONFIG_WRITEBACK, 1, 0);
        check_equal("write-through", virtio_config(device, CONFIG_WRITEBACK, 1), 0);
        check("works-while-written-through", works());
        virtio_set_config(device, CONFIG_WRITEBACK, 1, 1);
        check_equal("write-back", virtio_config(device, CONFIG_WRITEBACK, 1), 1);
    }
    virtio_set_config(device, CONFIG_CAPACITY, 4, 1);
    check_equal("capacity-is-read-only", virtio_config(device, CONFIG_CAPACITY, 4), disk.sectors);
    if (!under_qemu())
        check_equal("nothing-behind-the-end", virtio_config(device, CONFIG_BYTES, 4), 0);
    if (!start_disk(&(struct way){.legacy = legacy, .interrupts = MSIX}))
        return;
    check_equal("capacity-with-msix", virtio_config(device, CONFIG_CAPACITY, 4), disk.sectors);
    check("works-with-msix", works());
}

static void test_features(bool legacy)
{
    const struct virtio_device *device = &disk.device;
    uint64_t offered;

    virtio_reset(&disk.device);
    offered = virtio_offered(device);
    check("offers-rings", (offered & (F_INDIRECT | F_EVENT_INDEX)) == (F_INDIRECT | F_EVENT_INDEX));
    check_equal("offers-version-1", (offered & F_VERSION_1) != 0, !legacy);
    if (legacy)
        return;
    if (!under_qemu())
        check("refuses-what-it-does-not-offer", !virtio_accept(&disk.device, offered | 1ull << 50));
    virtio_reset(&disk.device);
    check_equal("status-after-reset", virtio_status(device), 0);
    check("accepts-nothing-but-version-1", virtio_accept(&disk.device, 0));
}

/* The device is reset with outstanding requests.  They may be done or not, but nothing happens afterwards. */
static void test_reset_in_flight(bool legacy)
{
    struct way way = {.legacy = legacy, .indirect = true, .event_index = true};
    unsigned moved = 0;
    uint16_t index;

    if (!start_disk(&way))
        return;
    for (unsigned i = 0; i < IN_FLIGHT; i++)
        submit(&requests[i], T_IN, KEPT, &(struct segment){data, 16 * KIB, true}, 1);
    kick();
    virtio_reset(&disk.device);
    check_equal("reset-in-flight", virtio_status(&disk.device), 0);
    index = disk.queue.used->index;
    memset(data, 0x77, 16 * KIB);
    for (unsigned i = 0; i < POLLS; i++) {
        moved += disk.queue.used->index != index;
        cpu_pause();
    }
    check_equal("rings-are-let-go", moved, 0);
    check("buffers-are-let-go", is_filled_with(data, 16 * KIB, 0x77));
    check("works-after-reset", start_disk(&way) && works());
}

/* After a head outside of the table the device needs a reset (virtio 1.2, 2.1.2). */
static void test_broken_ring(bool legacy)
{
    struct way way = {.legacy = legacy, .interrupts = MSIX};
    uint32_t before;

    if (!start_disk(&way))
        return;
    before = disk.device.reconfigured;
    disk.queue.available->ring[disk.queue.next_available++ % disk.queue.size] = NOWHERE;
    kick();
    if (legacy && under_qemu()) { /* QEMU has that status only for virtio 1.x */
        skip("broken-ring");
    } else {
        check("broken-ring-interrupts", wait_until(&disk.device.reconfigured, before + 1, WAIT_MS));
        check("broken-ring-needs-reset", virtio_status(&disk.device) & STATUS_NEEDS_RESET);
    }
    check("works-after-broken-ring", start_disk(&way) && works());
}

/* The size and place of an active queue cannot be changed. */
static void test_late_writes(bool legacy)
{
    const struct window *registers = &disk.device.registers;
    uint32_t place;

    if (!start_disk(&(struct way){.legacy = legacy}))
        return;
    place = (uint32_t)(uint64_t)disk.queue.table;
    window_write(registers, legacy ? LEGACY_QUEUE_SELECT : COMMON_QUEUE_SELECT, 2, NOWHERE);
    check_equal("no-such-queue", window_read(registers, legacy ? LEGACY_QUEUE_SIZE : COMMON_QUEUE_SIZE, 2), 0);
    window_write(registers, legacy ? LEGACY_QUEUE_SELECT : COMMON_QUEUE_SELECT, 2, 0);
    if (legacy) {
        window_write(registers, LEGACY_QUEUE_PFN, 4, 1);
        check_equal("place-stays", window_read(registers, LEGACY_QUEUE_PFN, 4), place / LEGACY_ALIGN);
    } else {
        window_write(registers, COMMON_QUEUE_SIZE, 2, 4);
        window_write(registers, COMMON_QUEUE_TABLE, 4, 0x1000);
        check_equal("size-stays", window_read(registers, COMMON_QUEUE_SIZE, 2), disk.queue.size);
        check_equal("place-stays", window_read(registers, COMMON_QUEUE_TABLE, 4), place);
    }
    check("works-after-late-writes", works());
}

static void test_strange_notifications(bool legacy)
{
    const struct queue *queue = &disk.queue;
    struct queue other = {.index = NOWHERE, .notify = queue->notify};

    if (!start_disk(&(struct way){.legacy = legacy}))
        return;
    virtio_notify(&disk.device, &other);
    if (disk.device.notify.io) {
        outb((uint16_t)queue->notify, 0);
        outl((uint16_t)queue->notify, 0);
    }
    virtio_notify(&disk.device, queue); /* without new buffers */
    check("works-after-strange-notifications", works());
    check_equal("none-needs-a-reset", virtio_status(&disk.device) & STATUS_NEEDS_RESET, 0);
}

/* The window that gives access to BARs without mapping them (4.1.4.9). */
static void test_window(void)
{
    const struct pci_device *pci = &disk.device.pci;
    unsigned at = 0, bar = 0;

    while ((at = pci_capability(pci, CAP_VENDOR, at)) && pci_read8(pci->slot, at + CAP_TYPE) != CFG_PCI)
        ;
    check("has-a-window", at);
    if (!at)
        return;
    while (bar < PCI_BARS && (!pci->bars[bar].size || disk.device.config.base < pci->bars[bar].base ||
                              disk.device.config.base >= pci->bars[bar].base + pci->bars[bar].size))
        bar++;
    pci_write8(pci->slot, at + CAP_BAR, (uint8_t)bar);
    pci_write32(pci->slot, at + CAP_OFFSET, (uint32_t)(disk.device.config.base - pci->bars[bar].base));
    pci_write32(pci->slot, at + CAP_LENGTH, 4);
    check_equal("window-reads", pci_read32(pci->slot, at + CAP_DATA), disk.sectors & 0xFFFFFFFF);
    pci_write32(pci->slot, at + CAP_OFFSET, (uint32_t)(disk.device.config.base - pci->bars[bar].base) + 0x7FFFFFF0);
    pci_write32(pci->slot, at + CAP_DATA, 0);
    check("works-after-a-window-to-nowhere", works());
}

/* The notification address moves with its BAR while the queue is active. */
static void test_moved_bar(bool legacy)
{
    struct pci_device *pci = &disk.device.pci;
    bool io = disk.device.notify.io;
    uint64_t old, new;
    unsigned bar = 0;

    while (bar < PCI_BARS && !(pci->bars[bar].io == io && disk.queue.notify >= pci->bars[bar].base &&
                               disk.queue.notify < pci->bars[bar].base + pci->bars[bar].size))
        bar++;
    if (bar == PCI_BARS) {
        skip("moved-bar");
        return;
    }
    old = pci->bars[bar].base;
    new = io ? pci_free_ports(pci->bars[bar].size) : pci_free_memory(pci->bars[bar].size);
    pci_move_bar(pci, bar, new);
    disk.queue.notify += new - old;
    disk.device.registers.base += new - old;
    check("works-at-another-place", works());
    pci_write16(pci->slot, PCI_COMMAND, (uint16_t)((io ? COMMAND_MEMORY : COMMAND_IO) | COMMAND_MASTER));
    if (io || !under_qemu()) /* on QEMU missing memory reads as zeroes */
        check_equal("switched-off", window_read(&disk.device.registers, 0, 1), 0xFF);
    pci_write16(pci->slot, PCI_COMMAND, COMMAND_IO | COMMAND_MEMORY | COMMAND_MASTER);
    check("works-after-switching-on", works());
    pci_move_bar(pci, bar, old);
    disk.device.registers.base -= new - old;
    check("works-back-at-its-place", start_disk(&(struct way){.legacy = legacy}) && works());
}

void test_registers(const char *name, bool legacy)
{
    check_group(name);
    if (!data)
        data = take_pages(16 * KIB);
    if (!start_disk(&(struct way){.legacy = legacy}))
        return;
    test_configuration(legacy);
    test_features(legacy);
    test_reset_in_flight(legacy);
    test_broken_ring(legacy);
    if (!under_qemu())
        test_late_writes(legacy);
    test_strange_notifications(legacy);
    if (!legacy)
        test_window();
    test_moved_bar(legacy);
}
