/* Requests to a disk, and patterns. */

#include "blk.h"

struct disk disk;

static unsigned slot;
static bool dead; /* it has not answered once, so nothing waits for it any more */

unsigned find_disk(void)
{
    slot = virtio_find(VIRTIO_TYPE_BLOCK, option_number("slot", 0));
    return slot;
}

bool has_interface(bool legacy)
{
    if (disk.device.registers.base)
        virtio_reset(&disk.device); /* only this lowers its interrupt line */
    return virtio_open(&disk.device, slot, legacy);
}

static bool prepare(const struct way *way)
{
    uint64_t wanted = way->featureless ? F_ANY_LAYOUT : F_DISK | F_ANY_LAYOUT;

    if (way->indirect)
        wanted |= F_INDIRECT;
    if (way->event_index)
        wanted |= F_EVENT_INDEX;
    disk.indirect = way->indirect;
    dead = false;
    return has_interface(way->legacy) &&
           virtio_accept(&disk.device, wanted & virtio_offered(&disk.device)) &&
           virtio_add_queue(&disk.device, &disk.queue, 0, way->size ? way->size : QUEUE_MAX);
}

bool start_disk(const struct way *way)
{
    bool good = prepare(way);

    if (good) {
        virtio_interrupts(&disk.device, way->interrupts);
        if (way->interrupts == MSIX)
            good = virtio_queue_vector(&disk.device, &disk.queue, 1);
        disk.sectors = virtio_config(&disk.device, CONFIG_CAPACITY, 4);
        disk.sectors |= (uint64_t)virtio_config(&disk.device, CONFIG_CAPACITY + 4, 4) << 32;
        virtio_ready(&disk.device);
        good = good && virtio_status(&disk.device) & STATUS_DRIVER_OK;
    }
    if (!good)
        check("starts", false);
    return good;
}

bool submit(struct request *request, uint32_t type, uint64_t sector, const struct segment *data, unsigned count)
{
    struct segment chain[PIECES_MAX + 2];

    request->header = (struct header){type, 0, sector};
    request->status = S_NONE;
    chain[0] = (struct segment){&request->header, sizeof(request->header), false};
    for (unsigned i = 0; i < count; i++)
        chain[1 + i] = data[i];
    chain[1 + count] = (struct segment){&request->status, 1, true};
    return queue_add(&disk.queue, chain, count + 2, request, disk.indirect);
}

void kick(void)
{
    if (queue_publish(&disk.queue))
        virtio_notify(&disk.device, &disk.queue);
}

bool wait_for_disk(unsigned more)
{
    if (!dead)
        dead = !virtio_wait(&disk.device, &disk.queue, more);
    return !dead;
}

struct request *finish(void)
{
    struct request *request;
    uint32_t written;

    if (!queue_has_used(&disk.queue) && !wait_for_disk(1))
        return NULL;
    request = queue_take(&disk.queue, &written);
    if (request)
        request->written = written;
    return request;
}

uint8_t carry_out(uint32_t type, uint64_t sector, const struct segment *data, unsigned count, uint32_t *written)
{
    static struct request request;

    if (dead || !submit(&request, type, sector, data, count))
        return S_NONE;
    kick();
    if (finish() != &request)
        return S_NONE;
    if (written)
        *written = request.written;
    return *(volatile uint8_t *)&request.status;
}

uint8_t read_disk(uint64_t sector, void *to, uint32_t length)
{
    return carry_out(T_IN, sector, &(struct segment){to, length, true}, 1, NULL);
}

uint8_t write_disk(uint64_t sector, const void *from, uint32_t length)
{
    return carry_out(T_OUT, sector, &(struct segment){from, length, false}, 1, NULL);
}

uint8_t run_chain(const struct segment *chain, unsigned count, const volatile uint8_t *status, uint32_t *written)
{
    static uint8_t token;

    if (!queue_add(&disk.queue, chain, count, &token, disk.indirect))
        return S_NONE;
    kick();
    if (!wait_for_disk(1) || queue_take(&disk.queue, written) != &token)
        return S_NONE;
    return *status;
}

/* ---- patterns */

static uint64_t word(uint64_t sector, unsigned index, uint8_t generation)
{
    return (sector << 16 | (uint64_t)generation << 8 | index) * 0x9E3779B97F4A7C15ull;
}

void fill_pattern(void *at, uint64_t sector, unsigned sectors, uint8_t generation)
{
    uint64_t *words = at;

    for (; sectors; sectors--, sector++)
        for (unsigned i = 0; i < SECTOR / 8; i++)
            *words++ = word(sector, i, generation);
}

bool is_pattern(const void *at, uint64_t sector, unsigned sectors, uint8_t generation)
{
    const uint64_t *words = at;

    for (; sectors; sectors--, sector++)
        for (unsigned i = 0; i < SECTOR / 8; i++)
            if (*words++ != word(sector, i, generation))
                return false;
    return true;
}

bool is_filled_with(const void *at, size_t size, uint8_t byte)
{
    const uint8_t *bytes = at;

    while (size && *bytes == byte)
        bytes++, size--;
    return size == 0;
}

uint32_t random_number(void)
{
    static uint64_t state = 0x243F6A8885A308D3;

    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (uint32_t)(state >> 16);
}
