/* The interface: its rings, and what lies in them. */

#include "net.h"

#define PAGE 4096u
#define FRAME_PLACE 64u                     /* offset of the frame in a buffer with a separate header */
#define SMALL_BYTES 2048u                   /* a buffer for frames that are not large */
#define BIG_BYTES (FRAME_PLACE + 17 * PAGE) /* a buffer for any frame */
#define BIG_BUFFERS 48u
#define PATIENCE_MS 4000
#define PATIENCE_CYCLES 40000000000ull

enum { ENTRY_RX = 1, ENTRY_TX = 2 };

struct nic nic;

static unsigned pci_slot;
static bool dead; /* it has not answered once, so nothing waits for it any more */
static struct slot slots[SLOTS + SLOTS_LARGE], *free_slots[2];
static uint8_t *buffers;

unsigned find_nic(void)
{
    pci_slot = virtio_find(VIRTIO_TYPE_NET, option_number("slot", 0));
    return pci_slot;
}

bool has_interface(bool legacy)
{
    if (nic.device.registers.base)
        stop_nic(); /* only this lowers its interrupt line */
    return virtio_open(&nic.device, pci_slot, legacy);
}

void stop_nic(void)
{
    virtio_reset(&nic.device);
}

static void make_slots(void)
{
    static uint8_t *memory[2];

    free_slots[false] = free_slots[true] = NULL;
    if (!memory[0]) {
        memory[0] = take_pages(SLOTS * PAGE);
        memory[1] = take_pages(SLOTS_LARGE * 18 * PAGE);
    }
    for (unsigned i = 0; i < SLOTS + SLOTS_LARGE; i++) {
        struct slot *slot = &slots[i];

        slot->large = i >= SLOTS;
        slot->base = slot->large ? memory[1] + (i - SLOTS) * 18 * PAGE + PAGE : memory[0] + i * PAGE + FRAME_PLACE;
        slot->kept = 0;
        slot->next = free_slots[slot->large];
        free_slots[slot->large] = slot;
    }
}

static void post(uint8_t *buffer)
{
    struct segment pieces[1 + 17] = {{buffer, nic.header, true}};
    unsigned count = 1;

    if (nic.mergeable) {
        pieces[0].length = nic.merge_bytes;
    } else if (!nic.offloads) {
        pieces[count++] = (struct segment){buffer + FRAME_PLACE, FRAME_PLAIN, true};
    } else {
        for (; count < 1 + 17; count++)
            pieces[count] = (struct segment){buffer + FRAME_PLACE + (count - 1) * PAGE, PAGE, true};
    }
    queue_add(&nic.rx, pieces, count, buffer, nic.indirect && count > 1);
}

static void post_all(void)
{
    unsigned count = nic.rx.size, bytes = SMALL_BYTES;

    if (!buffers)
        buffers = take_pages(BIG_BUFFERS * BIG_BYTES); /* the same number of small ones fits in there */
    if (nic.mergeable) {
        bytes = nic.merge_bytes;
    } else if (nic.offloads) {
        count = nic.indirect ? BIG_BUFFERS : count / 18;
        bytes = BIG_BYTES;
    } else if (!nic.indirect) {
        count /= 2;
    }
    for (unsigned i = 0; i < count; i++)
        post(buffers + i * bytes);
}

static bool prepare(const struct way *way)
{
    uint64_t wanted = F_MAC | F_STATUS | F_MTU | F_ANY_LAYOUT;

    if (way->mergeable)
        wanted |= F_MRG_RXBUF;
    if (way->offloads)
        wanted |= F_OFFLOADS;
    if (way->indirect)
        wanted |= F_INDIRECT;
    if (way->event_index)
        wanted |= F_EVENT_INDEX;
    dead = false;
    nic.under_way = nic.strange = 0;
    nic.indirect = way->indirect;
    nic.separate = way->separate;
    nic.merge_bytes = way->merge_bytes ? way->merge_bytes : SMALL_BYTES;
    if (!has_interface(way->legacy))
        return false;
    wanted &= virtio_offered(&nic.device);
    nic.mergeable = wanted & F_MRG_RXBUF;
    nic.offloads = (wanted & F_OFFLOADS) == F_OFFLOADS;
    if (!nic.offloads)
        wanted &= ~F_OFFLOADS;
    nic.header = sizeof(struct net_header) - (way->legacy && !nic.mergeable ? sizeof(uint16_t) : 0);
    return virtio_accept(&nic.device, wanted) && virtio_add_queue(&nic.device, &nic.rx, QUEUE_RX, QUEUE_MAX) &&
           virtio_add_queue(&nic.device, &nic.tx, QUEUE_TX, QUEUE_MAX);
}

bool start_nic(const struct way *way)
{
    bool good = prepare(way) && nic.mergeable == way->mergeable && nic.offloads == way->offloads;

    if (good) {
        virtio_interrupts(&nic.device, way->interrupts);
        if (way->interrupts == MSIX) {
            msix_route(&nic.device.pci, ENTRY_TX, &nic.device.interrupted);
            good = virtio_queue_vector(&nic.device, &nic.rx, ENTRY_RX) &&
                   virtio_queue_vector(&nic.device, &nic.tx, ENTRY_TX);
        }
        for (unsigned i = 0; i < LLADDR; i++)
            nic.lladdr[i] = (uint8_t)virtio_config(&nic.device, CONFIG_MAC + i, 1);
        make_slots();
        post_all();
        queue_no_interrupt(&nic.rx);
        queue_no_interrupt(&nic.tx);
        virtio_ready(&nic.device);
        good = good && virtio_status(&nic.device) & STATUS_DRIVER_OK;
        kick_rx();
    }
    if (!good)
        check("starts", false);
    return good;
}

/* ---- sending */

void kick_tx(void)
{
    if (queue_publish(&nic.tx))
        virtio_notify(&nic.device, &nic.tx);
}

unsigned reclaim(void)
{
    struct slot *slot;
    unsigned count = 0;

    for (; (slot = queue_take(&nic.tx, NULL)); count++) {
        slot->next = free_slots[slot->large];
        free_slots[slot->large] = slot;
    }
    nic.under_way -= count;
    return count;
}

/* Wait for one queue only.  The other one does not interrupt. */
static bool wait_for(struct queue *queue, unsigned more)
{
    if (!dead)
        dead = !virtio_wait(&nic.device, queue, more);
    return !dead;
}

struct slot *take_slot(bool large)
{
    struct slot *slot;

    while (reclaim(), !(slot = free_slots[large])) {
        kick_tx();
        if (!wait_for(&nic.tx, 1))
            return NULL;
    }
    free_slots[large] = slot->next;
    return slot;
}

bool send_slot(struct slot *slot)
{
    struct segment pieces[2 + 17];
    uint8_t *header = slot->frame - nic.header;
    uint32_t first = slot->piece ? slot->head : slot->length;
    uint32_t whole = slot->piece ? (slot->length - first) / slot->piece : 0;
    unsigned count = 0;

    memcpy(header, &slot->header, nic.header);
    if (nic.separate) {
        pieces[count++] = (struct segment){header, nic.header, false};
        pieces[count++] = (struct segment){slot->frame, first, false};
    } else {
        pieces[count++] = (struct segment){header, nic.header + first, false};
    }
    /* In descending order, so that no two are contiguous, like the pages of a file or a program. */
    if (first + whole * slot->piece < slot->length)
        pieces[count++] = (struct segment){
            slot->frame + first + whole * slot->piece, slot->length - first - whole * slot->piece, false};
    while (whole--)
        pieces[count++] = (struct segment){slot->frame + first + whole * slot->piece, slot->piece, false};
    if (!queue_add(&nic.tx, pieces, count, slot, nic.indirect && count > 1)) {
        slot->next = free_slots[slot->large];
        free_slots[slot->large] = slot;
        return false;
    }
    nic.under_way++;
    return true;
}

bool flush(void)
{
    kick_tx();
    while (reclaim(), nic.under_way)
        if (!wait_for(&nic.tx, 1))
            return false;
    return true;
}

/* ---- receiving */

void kick_rx(void)
{
    if (queue_publish(&nic.rx))
        virtio_notify(&nic.device, &nic.rx);
}

bool receive(struct arrival *arrival)
{
    uint32_t written;
    uint8_t *buffer = queue_take(&nic.rx, &written);
    unsigned count = 1;

    if (!buffer)
        return false;
    arrival->header = (struct net_header){0};
    memcpy(&arrival->header, buffer, nic.header);
    arrival->length = written - nic.header;
    arrival->buffers[0] = buffer;
    arrival->piece[0] = (struct segment){
        buffer + (nic.mergeable ? nic.header : FRAME_PLACE), written - nic.header, true};
    arrival->pieces = 1;
    if (nic.mergeable)
        count = arrival->header.buffers;
    if (written < nic.header || count == 0 || count > ARRIVAL_PIECES)
        nic.strange++;
    while (arrival->pieces < count && arrival->pieces < ARRIVAL_PIECES) {
        /* The device publishes all buffers of a frame at once (5.1.6.4.1). */
        buffer = queue_take(&nic.rx, &written);
        if (!buffer) {
            nic.strange++;
            break;
        }
        arrival->buffers[arrival->pieces] = buffer;
        arrival->piece[arrival->pieces++] = (struct segment){buffer, written, true};
        arrival->length += written;
    }
    return true;
}

void give_back(const struct arrival *arrival)
{
    for (unsigned i = 0; i < arrival->pieces; i++)
        post(arrival->buffers[i]);
}

bool wait_for_frame(void)
{
    return queue_has_used(&nic.rx) || wait_for(&nic.rx, 1);
}

bool sleep_for_either(unsigned sent)
{
    uint32_t before = nic.device.interrupted;
    bool already = queue_want_interrupt(&nic.rx, 1);

    if (sent)
        already |= queue_want_interrupt(&nic.tx, sent);
    if (!already && !dead)
        dead = !wait_until(&nic.device.interrupted, before + 1, PATIENCE_MS);
    queue_no_interrupt(&nic.rx);
    queue_no_interrupt(&nic.tx);
    return already || !dead;
}
