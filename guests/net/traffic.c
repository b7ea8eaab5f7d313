/* Traffic in both directions, in every way to drive an interface. */

#include "net.h"

#define ASKED 400u
#define SENT 700u /* more than the number of slots, and than a queue has room for */
#define SENT_STEP 37u
#define STREAM_FRAMES 6u
#define STREAM_BYTES 60000u

static uint32_t serial; /* makes the numbers of each test unique */

uint32_t length_of(uint32_t number)
{
    return FRAME_LEAST + number * SENT_STEP % (FRAME_PLAIN - FRAME_LEAST + 1);
}

bool send(unsigned op, uint32_t number, uint32_t argument, uint32_t length)
{
    struct slot *slot;

    while ((slot = take_slot(false))) {
        build_frame(slot, op, number, argument, length);
        if (send_slot(slot))
            return true;
        if (!flush()) /* more pieces than the queue has room for */
            break;
    }
    return false;
}

const uint8_t *next_frame(unsigned op, uint32_t *length)
{
    static struct arrival arrival;
    const uint8_t *frame;

    do {
        if (!wait_for_frame())
            return NULL;
    } while (!receive(&arrival));
    frame = flatten(&arrival);
    *length = arrival.length;
    give_back(&arrival);
    kick_rx();
    if (arrival.header.gso_type != GSO_NONE || arrival.header.flags & HEADER_NEEDS_CSUM)
        return NULL;
    return ((const struct frame_head *)frame)->op == op ? frame : NULL;
}

bool echo(uint32_t number, uint32_t length)
{
    const struct frame_head *head;
    const uint8_t *frame;
    uint32_t got;

    if (!send(OP_ECHO, number, 0, length))
        return false;
    kick_tx();
    frame = next_frame(OP_ECHOED, &got);
    head = (const struct frame_head *)frame;
    return frame && got == length && head->number == number &&
           same_bytes(frame + FRAME_PATTERN, pattern(number, 0), length - FRAME_PATTERN);
}

bool settle(void)
{
    static struct arrival arrival;
    const struct frame_head *head;

    if (!send(OP_COUNT, 0, 0, FRAME_LEAST))
        return false;
    kick_tx();
    do {
        if (!wait_for_frame() || !receive(&arrival))
            return false;
        head = (const struct frame_head *)flatten(&arrival);
        give_back(&arrival);
        kick_rx();
    } while (head->op != OP_COUNTED);
    return true;
}

static void test_echoes(void)
{
    static const uint32_t lengths[] = {32, 33, 59, 60, 64, 65, 127, 128, 1000, 1500, 1513, 1514};
    unsigned good = 0;

    for (unsigned i = 0; i < sizeof(lengths) / sizeof(lengths[0]); i++)
        good += echo(serial++, lengths[i]);
    check_equal("echoes", good, sizeof(lengths) / sizeof(lengths[0]));
}

/* Ask the peer for its counts, and compare them. */
static void check_count(const char *name, uint32_t want)
{
    const struct frame_head *head;
    uint32_t length;

    send(OP_COUNT, 0, 0, FRAME_LEAST);
    kick_tx();
    head = (const struct frame_head *)next_frame(OP_COUNTED, &length);
    check_equal(name, head ? head->number : 0, want);
    check_equal("none-is-bad", head ? head->argument : 1, 0);
}

static void test_out(void)
{
    uint32_t sent = 0;

    for (; sent < SENT && send(OP_DATA, serial, 0, length_of(serial)); sent++, serial++)
        if (sent % 29 == 0)
            kick_tx();
    check("all-are-sent", flush());
    check_count("all-arrive", SENT);
}

static bool good_asked(uint32_t index)
{
    uint32_t length;
    const uint8_t *frame = next_frame(OP_DATA, &length);

    return frame && is_data(frame, length) && ((const struct frame_head *)frame)->number == index &&
           length == length_of(index);
}

static void test_in(void)
{
    uint32_t good = 0;

    send(OP_ASK, ASKED, ASK_FRAMES, FRAME_LEAST);
    kick_tx();
    while (good < ASKED && good_asked(good))
        good++;
    check_equal("all-come", good, ASKED);
}

static void test_both(void)
{
    uint32_t good = 0, sent = 0;

    send(OP_ASK, ASKED, ASK_FRAMES, FRAME_LEAST);
    for (; sent < ASKED && send(OP_DATA, serial, 0, length_of(serial)); sent++, serial++) {
        kick_tx();
        good += good_asked(good);
    }
    check("all-are-sent-meanwhile", flush());
    check_equal("all-come-meanwhile", good, ASKED);
    check_count("all-arrive-meanwhile", ASKED);
}

static bool send_segments(bool ipv6, uint32_t piece, uint32_t payload)
{
    for (unsigned sent = 0; sent < STREAM_FRAMES;) {
        struct slot *slot = take_slot(true);

        if (!slot)
            return false;
        build_segment(slot, ipv6, serial, payload, piece);
        if (send_slot(slot))
            serial++, sent++;
        else if (!flush())
            return false;
    }
    return flush();
}

static void test_segments_out(void)
{
    for (unsigned ipv6 = 0; ipv6 < 2; ipv6++) {
        check("segments-are-sent", send_segments(ipv6, 4 * KIB, STREAM_BYTES) &&
                                       send_segments(ipv6, 0, STREAM_BYTES - 1) && send_segments(ipv6, 0, 1000));
        check_count("segments-arrive", 3 * STREAM_FRAMES);
    }
}

/* Segments arrive whole, or cut to the size that the peer wants.  No byte is missing. */
static void test_segments_in(bool ipv6)
{
    static struct arrival arrival;
    uint32_t number = 0, from = 0, arrivals = 0;

    send(OP_ASK, STREAM_FRAMES, ipv6 ? ASK_TCP6 : ASK_TCP4, FRAME_LEAST);
    kick_tx();
    while (number < STREAM_FRAMES && wait_for_frame()) {
        uint32_t got;

        if (!receive(&arrival))
            continue;
        got = good_segment(&arrival.header, flatten(&arrival), arrival.length, ipv6, number, from);
        give_back(&arrival);
        kick_rx();
        if (!got)
            break;
        arrivals++;
        from += got;
        if (from == STREAM_BYTES) {
            from = 0;
            number++;
        }
    }
    check_equal("segments-come", number, STREAM_FRAMES);
    if (nic.offloads)
        check_equal("segments-come-whole", arrivals, STREAM_FRAMES);
    else
        check_equal("segments-come-cut", arrivals, STREAM_FRAMES * ((STREAM_BYTES - 1) / SEGMENT_BYTES + 1));
}

void test_traffic(const char *name, const struct way *way)
{
    check_group(name);
    if (!start_nic(way) || !settle())
        return;
    test_echoes();
    test_out();
    test_in();
    test_both();
    if (way->offloads)
        test_segments_out();
    test_segments_in(false);
    test_segments_in(true);
    check_equal("nothing-is-strange", nic.strange, 0);
    /* The line may be raised for buffers that its handler has just taken, but only rarely. */
    check_range("interrupts-have-causes", nic.device.spurious, 0, nic.device.interrupted);
    check_equal("needs-no-reset", virtio_status(&nic.device) & STATUS_NEEDS_RESET, 0);
    stop_nic();
}
