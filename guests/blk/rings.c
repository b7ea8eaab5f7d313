/* Requests in every form that a queue allows. */

#include "blk.h"

#define LARGE (128 * KIB)
#define SINGLE_ROUNDS 100
#define WAIT_MS 4000
#define WRAP_REQUESTS 66000u /* more than 16 bits count */
#define BATCH 61             /* so that batches end everywhere in the ring */

static struct request requests[QUEUE_MAX];
static uint8_t *data, *copy;

static void take_buffers(void)
{
    if (!data) {
        data = take_pages(LARGE + 4096);
        copy = take_pages(LARGE + 4096);
    }
}

static void test_transfers(void)
{
    uint32_t written = 0;

    memset(data, 0xFF, LARGE);
    check_equal("read", read_disk(KEPT, data, LARGE), S_OK);
    check("reads-what-the-host-wrote", is_pattern(data, KEPT, LARGE / SECTOR, PATTERN_HOST));
    fill_pattern(data, SCRATCH, LARGE / SECTOR, 1);
    check_equal("write",
                carry_out(T_OUT, SCRATCH, &(struct segment){data, LARGE, false}, 1, &written), S_OK);
    check_equal("write-used-length", written, 1);
    check_equal("read-back",
                carry_out(T_IN, SCRATCH, &(struct segment){copy, LARGE, true}, 1, &written), S_OK);
    check_equal("read-used-length", written, LARGE + 1);
    check("reads-what-was-written", memcmp(data, copy, LARGE) == 0);
}

/* Cut a buffer into pieces of odd lengths, so that pieces begin at odd addresses.  Return their number. */
static unsigned cut(struct segment *pieces, uint8_t *at, uint32_t length, bool write)
{
    static const uint16_t lengths[] = {1, 511, 513, 7, 1023, 2, 4093, 64, 129};
    unsigned count = 0;

    while (length) {
        uint32_t piece = lengths[count % (sizeof(lengths) / sizeof(lengths[0]))];

        if (piece > length)
            piece = length;
        pieces[count++] = (struct segment){at, piece, write};
        at += piece;
        length -= piece;
    }
    return count;
}

static void test_pieces(void)
{
    static struct segment pieces[PIECES_MAX];
    const uint32_t length = 24 * SECTOR;
    uint8_t *odd = copy + 3;
    uint32_t written = 0;
    unsigned count;

    fill_pattern(data, SCRATCH + 512, length / SECTOR, 2);
    memcpy(odd, data, length);
    count = cut(pieces, odd, length, false);
    check_equal("write-odd-pieces", carry_out(T_OUT, SCRATCH + 512, pieces, count, NULL), S_OK);
    memset(copy, 0xFF, length + 64);
    cut(pieces, odd, length, true);
    check_equal("read-odd-pieces", carry_out(T_IN, SCRATCH + 512, pieces, count, &written), S_OK);
    check_equal("odd-pieces-used-length", written, length + 1);
    check("odd-pieces-in-order", memcmp(data, odd, length) == 0);
    check("odd-pieces-and-no-more", is_filled_with(copy, 3, 0xFF) && is_filled_with(odd + length, 61, 0xFF));
}

/* A driver may cut a request where it likes (virtio 1.2, 2.7.4.3). */
static void test_layouts(void)
{
    struct {
        struct header header;
        uint8_t data[SECTOR];
    } __attribute__((packed)) whole = {.header = {T_OUT, 0, SCRATCH + 1024}};
    struct header header = {T_IN, 0, SCRATCH + 1024};
    struct {
        uint8_t data[SECTOR];
        volatile uint8_t status;
    } answer = {.status = S_NONE};
    volatile uint8_t status = S_NONE;
    const uint8_t *first = (const uint8_t *)&header;
    uint32_t written = 0;

    if (!(disk.device.features & (F_ANY_LAYOUT | F_VERSION_1))) {
        skip("layouts");
        return;
    }
    fill_pattern(whole.data, SCRATCH + 1024, 1, 3);
    check_equal("header-and-data-in-one",
                run_chain((struct segment[]){{&whole, sizeof(whole), false}, {(const void *)&status, 1, true}}, 2,
                          &status, NULL), S_OK);
    check_equal("header-in-pieces-status-with-data",
                run_chain((struct segment[]){{first, 5, false}, {first + 5, 10, false}, {first + 15, 1, false},
                                             {&answer, SECTOR + 1, true}}, 4, &answer.status, &written), S_OK);
    check_equal("status-with-data-used-length", written, SECTOR + 1);
    check("layouts-carry-the-same", memcmp(whole.data, answer.data, SECTOR) == 0);
}

/* Make as many requests as fit available at once. */
static void test_full_queue(void)
{
    uint64_t sectors[QUEUE_MAX];
    unsigned made = 0, wrong = 0, lost = 0;

    memset(data, 0xFF, QUEUE_MAX * SECTOR);
    for (; made < QUEUE_MAX; made++) {
        sectors[made] = KEPT + random_number() % (KEPT_END - KEPT);
        if (!submit(&requests[made], T_IN, sectors[made], &(struct segment){data + made * SECTOR, SECTOR, true}, 1))
            break;
    }
    check_equal("queue-takes", made, disk.indirect ? disk.queue.size : disk.queue.size / 3);
    kick();
    for (unsigned i = 0; i < made; i++) {
        struct request *request = finish();

        if (!request) {
            lost = made - i;
            break;
        }
        wrong += request->status != S_OK || request->written != SECTOR + 1;
        request->status = S_NONE; /* shows a request that comes twice */
    }
    check_equal("full-queue-comes-back", lost, 0);
    check_equal("full-queue-is-good", wrong, 0);
    wrong = 0;
    for (unsigned i = 0; i < made; i++)
        wrong += !is_pattern(data + i * SECTOR, sectors[i], 1, PATTERN_HOST);
    check_equal("full-queue-has-the-data", wrong, 0);
}

/* One request after the other, each with its interrupt.  A lost interrupt or notification stops this test. */
static void test_singles(void)
{
    const struct segment sector = {data, SECTOR, true};
    uint32_t before = disk.device.interrupted;
    unsigned good = 0;

    for (; good < SINGLE_ROUNDS; good++) {
        const struct request *request;

        memset(data, 0xFF, SECTOR);
        queue_want_interrupt(&disk.queue, 1);
        submit(&requests[0], T_IN, KEPT + good, &sector, 1);
        kick();
        if (disk.device.interrupts != POLLED && !wait_until(&disk.device.interrupted, before + good + 1, WAIT_MS))
            break;
        request = finish();
        if (!request || request->status != S_OK || !is_pattern(data, KEPT + good, 1, PATTERN_HOST))
            break;
    }
    check_equal("one-after-the-other", good, SINGLE_ROUNDS);
    if (disk.device.interrupts != POLLED) {
        check_equal("one-interrupt-each", disk.device.interrupted - before, SINGLE_ROUNDS);
        if (disk.device.interrupts != INTX_IOAPIC) /* a KVM without hardware delivers its level interrupts twice */
            check_range("few-spurious", disk.device.spurious, 0, SINGLE_ROUNDS / 10);
    }
}

void test_rings(const char *name, const struct way *way)
{
    check_group(name);
    take_buffers();
    if (!start_disk(way))
        return;
    test_transfers();
    test_pieces();
    test_layouts();
    test_full_queue();
    test_singles();
    check_equal("no-reset-needed", virtio_status(&disk.device) & STATUS_NEEDS_RESET, 0);
}

/* So many requests that every 16-bit index wraps: those of both rings, and the event indices. */
void test_wrap(const char *name, const struct way *way)
{
    uint32_t done = 0, wrong = 0;
    unsigned least = BATCH;

    check_group(name);
    take_buffers();
    if (!start_disk(way))
        return;
    if (least > disk.queue.size / 3)
        least = disk.queue.size / 3;
    while (done < WRAP_REQUESTS) {
        unsigned made = 0;

        for (; made < least; made++)
            if (!submit(&requests[made], T_IN, KEPT + (done + made) % (KEPT_END - KEPT),
                        &(struct segment){data + made * SECTOR, SECTOR, true}, 1))
                break;
        kick();
        if (!wait_for_disk(made))
            break;
        for (unsigned i = 0; i < made; i++) {
            struct request *request = finish();

            if (!request)
                goto lost;
            wrong += request->status != S_OK || request->written != SECTOR + 1;
            request->status = S_NONE;
        }
        for (unsigned i = 0; i < made; i++)
            wrong += !is_pattern(data + i * SECTOR, KEPT + (done + i) % (KEPT_END - KEPT), 1, PATTERN_HOST);
        done += made;
    }
lost:
    check_range("indices-come-round", done, WRAP_REQUESTS, WRAP_REQUESTS + QUEUE_MAX);
    check_equal("all-good", wrong, 0);
}
