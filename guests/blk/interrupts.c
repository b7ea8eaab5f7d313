/* Interrupts: requested, suppressed, masked and moved. */

#include "blk.h"

#define WAIT_MS 4000
#define MANY 8

static uint8_t *data;
static struct request requests[MANY];

/* Submit reads without waiting for them. */
static void send(unsigned count)
{
    for (unsigned i = 0; i < count; i++)
        submit(&requests[i], T_IN, KEPT + i, &(struct segment){data + i * SECTOR, SECTOR, true}, 1);
    kick();
}

/* Take the reads back without requesting an interrupt. */
static bool collect(unsigned count)
{
    enum interrupts how = disk.device.interrupts;
    bool good = true;

    disk.device.interrupts = POLLED; /* only for virtio_wait; the device continues to interrupt */
    for (unsigned i = 0; i < count && good; i++) {
        const struct request *request = finish();

        good = request && request->status == S_OK;
    }
    disk.device.interrupts = how;
    return good;
}

static bool is_done(void)
{
    return queue_has_used(&disk.queue);
}

static bool half_is_done(void)
{
    return (uint16_t)(disk.queue.used->index - disk.queue.next_used) >= MANY / 2;
}

static bool is_pending(void)
{
    return msix_pending(&disk.device.pci, 1);
}

static bool line_is_raised(void)
{
    return pci_read16(disk.device.pci.slot, PCI_STATUS) & STATUS_INTX;
}

static bool device_caught_up(void)
{
    const volatile uint16_t *event = (const volatile uint16_t *)&disk.queue.used->ring[disk.queue.size];

    return *event == disk.queue.next_available;
}

static void test_suppressed(void)
{
    uint32_t before = disk.device.interrupted;

    queue_want_interrupt(&disk.queue, 1);
    send(1);
    check("first-comes", wait_until(&disk.device.interrupted, before + 1, WAIT_MS));
    check("first-has-data", collect(1));
    queue_no_interrupt(&disk.queue);
    before = disk.device.interrupted;
    send(MANY);
    check("suppressed-comes-back", collect(MANY));
    send(1); /* the device has passed the point of an interrupt for the others */
    collect(1);
    check_equal("suppressed-is-silent", disk.device.interrupted, before);
    queue_want_interrupt(&disk.queue, 1);
    send(1);
    check("wanted-comes", wait_until(&disk.device.interrupted, before + 1, WAIT_MS));
    check("wanted-has-data", collect(1));
}

static void test_masked(void)
{
    uint32_t before = disk.device.interrupted;

    msix_mask(&disk.device.pci, 1, true);
    queue_want_interrupt(&disk.queue, 1);
    send(1);
    check("masked-is-done", soon(is_done));
    check("masked-is-pending", soon(is_pending));
    check_equal("masked-is-silent", disk.device.interrupted, before);
    msix_mask(&disk.device.pci, 1, false);
    check("unmasked-comes", wait_until(&disk.device.interrupted, before + 1, WAIT_MS));
    check("unmasked-is-not-pending", !is_pending());
    check_equal("unmasked-comes-once", disk.device.interrupted, before + 1);
    collect(1);
}

static void test_moved(void)
{
    uint32_t before = disk.device.reconfigured;

    check("no-such-entry", !virtio_queue_vector(&disk.device, &disk.queue, disk.device.pci.msix_entries));
    send(1);
    check("without-entry-comes-back", collect(1));
    check("entry-of-configuration", virtio_queue_vector(&disk.device, &disk.queue, 0));
    queue_want_interrupt(&disk.queue, 1);
    send(1);
    check("comes-there", wait_until(&disk.device.reconfigured, before + 1, WAIT_MS));
    collect(1);
    check("entry-of-its-own", virtio_queue_vector(&disk.device, &disk.queue, 1));
    before = disk.device.interrupted;
    queue_want_interrupt(&disk.queue, 1);
    send(1);
    check("comes-here-again", wait_until(&disk.device.interrupted, before + 1, WAIT_MS));
    collect(1);
}

static void test_event_index(void)
{
    uint32_t before = disk.device.interrupted;

    check("device-asks-for-the-next", soon(device_caught_up));
    queue_want_interrupt(&disk.queue, MANY);
    send(MANY / 2);
    check("half-is-done", soon(half_is_done));
    check("device-asks-for-the-next-again", soon(device_caught_up)); /* its interrupt would come before that */
    check_equal("not-before-the-event", disk.device.interrupted, before);
    for (unsigned i = MANY / 2; i < MANY; i++)
        submit(&requests[i], T_IN, KEPT + i, &(struct segment){data + i * SECTOR, SECTOR, true}, 1);
    kick();
    check("at-the-event", wait_until(&disk.device.interrupted, before + 1, WAIT_MS));
    check("all-at-the-event", collect(MANY));
    check_equal("once-for-all", disk.device.interrupted, before + 1);
}

static void test_line(void)
{
    unsigned slot = disk.device.pci.slot;
    uint16_t command = pci_read16(slot, PCI_COMMAND);
    uint32_t before = disk.device.interrupted;

    pci_write16(slot, PCI_COMMAND, command | COMMAND_NO_INTX);
    queue_want_interrupt(&disk.queue, 1);
    send(1);
    check("line-disabled-is-done", soon(is_done));
    check("line-status", soon(line_is_raised));
    check_equal("line-disabled-is-silent", disk.device.interrupted, before);
    pci_write16(slot, PCI_COMMAND, command);
    check("line-enabled-comes", wait_until(&disk.device.interrupted, before + 1, WAIT_MS));
    check("line-falls", !line_is_raised());
    check_equal("isr-is-cleared", virtio_isr(&disk.device), 0);
    collect(1);
}

void test_interrupts(const char *name, bool legacy)
{
    check_group(name);
    if (!data)
        data = take_pages(MANY * SECTOR);
    if (!start_disk(&(struct way){.legacy = legacy, .interrupts = MSIX}))
        return;
    test_suppressed();
    test_masked();
    if (!under_qemu()) /* QEMU reads the vector only when the driver becomes ready */
        test_moved();
    if (!start_disk(&(struct way){.legacy = legacy, .interrupts = MSIX, .event_index = true}))
        return;
    test_suppressed();
    test_masked();
    test_event_index();
    if (!start_disk(&(struct way){.legacy = legacy, .interrupts = INTX_PIC}))
        return;
    test_suppressed();
    test_line();
    if (!start_disk(&(struct way){.legacy = legacy, .interrupts = INTX_IOAPIC, .event_index = true}))
        return;
    test_suppressed();
    test_line();
    test_event_index();
}
