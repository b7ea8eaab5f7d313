/* Benchmark commands:
 *
 *     pass [send=B] [receive] [piece=P] [depth=D] [buffers=Q] kcycles=K [asleep]
 *         for K thousand cycles send frames of B bytes as fast as the device takes them, with D in transmission, and
 *         receive frames into buffers of Q bytes.  If B is larger than a frame, they are TCP segments of 64 KiB with
 *         P contiguous bytes in memory.  The answer is "done S sent R received W wrong in C cycles".
 *     ping count=N [asleep]
 *         N frames of 64 bytes to the peer and back, one at a time.  The answer is "done N median M high H cycles",
 *         where H is the 90th percentile.
 *     beat count=N us=U [send=B] [asleep]
 *         receive N frames, of which the peer sends one each U microseconds, while sending as above.  The answer is
 *         "done N median M high H cycles", the time from the peer's sending to this guest's receiving.
 *
 * Meanwhile the guest polls, or with `asleep` sleeps for interrupts by MSI-X, with one entry per queue. */

#include "net.h"

#define SMALL 64u
#define SAMPLES_MAX 4096u
#define FIRST_PINGS 500u
#define PAGE 4096u
#define TCP4_NUMBER 38 /* offset of the sequence number's high half */
#define SEND_MAX (TCP4_HEAD + 64u * KIB - 100)

struct load {
    uint32_t send, piece, depth, buffers, count, interval_us;
    uint64_t cycles;
    bool receive, asleep;
};

static const uint8_t ours[2] = {TYPE_OURS >> 8, TYPE_OURS & 0xFF};
static uint32_t samples[SAMPLES_MAX], number;

static bool start(bool asleep, unsigned merge_bytes)
{
    bool legacy = !has_interface(false);

    return start_nic(&(struct way){
        .legacy = legacy, .separate = legacy, .mergeable = true, .offloads = true, .indirect = true,
        .event_index = true, .merge_bytes = merge_bytes, .interrupts = asleep ? MSIX : POLLED});
}

/* The content of a slot is built once, because a real driver adds only descriptors and numbers. */
static void build(struct slot *slot, const struct load *load)
{
    if (load->send <= FRAME_PLAIN)
        build_frame(slot, OP_DATA, number, 0, load->send);
    else if (slot->kept != load->send)
        build_segment(slot, false, number, load->send - TCP4_HEAD, load->piece);
    slot->kept = load->send;
    slot->piece = load->piece;
    number++;
}

/* Keep as many frames in transmission as the load says.  Return how many were sent, and whether any was added. */
static uint32_t fill(const struct load *load, bool *added)
{
    uint32_t sent = reclaim();

    for (*added = false; nic.under_way < load->depth; *added = true) {
        struct slot *slot = take_slot(load->send > FRAME_PLAIN);

        build(slot, load);
        if (!send_slot(slot))
            break;
    }
    if (*added)
        kick_tx();
    return sent;
}

/* If there was nothing to do, sleep, or poll again at once.  A sender is woken when it can send many frames. */
static bool rest(const struct load *load)
{
    if (load->asleep)
        return sleep_for_either(load->send ? (nic.under_way * 3 + 3) / 4 : 0);
    cpu_pause();
    return true;
}

struct taken {
    uint32_t frames, wrong;
};

/* Check a frame of the peer: its bytes must match its number.  Of a large one only the first buffer is checked. */
static void judge(const struct arrival *arrival, struct taken *taken)
{
    const uint8_t *frame = arrival->piece[0].address;
    uint32_t have = arrival->piece[0].length, found = ((const struct frame_head *)frame)->number, first = FRAME_PATTERN;

    if (arrival->length > FRAME_PLAIN) {
        first = TCP4_HEAD;
        found = (uint32_t)frame[TCP4_NUMBER] << 8 | frame[TCP4_NUMBER + 1];
    }
    taken->wrong += have < first || !same_bytes(frame + first, pattern(found, 0), have - first);
    taken->frames++;
}

static bool take(struct taken *taken)
{
    static struct arrival arrival;
    bool any = false;

    while (receive(&arrival)) {
        judge(&arrival, taken);
        give_back(&arrival);
        any = true;
    }
    if (any)
        kick_rx();
    return any;
}

static void pass(const struct load *load)
{
    struct taken taken = {0};
    uint32_t sent = 0;
    uint64_t begin = rdtsc(), spent;

    while ((spent = rdtsc() - begin) < load->cycles) {
        bool busy = false;

        if (load->send)
            sent += fill(load, &busy);
        if (load->receive)
            busy |= take(&taken);
        if (!busy && !rest(load)) {
            print("failed: nothing happens\n");
            return;
        }
    }
    if (!flush())
        print("failed: frames stay where they are\n");
    else
        print("done %u sent %u received %u wrong in %lu cycles\n", sent, taken.frames, taken.wrong + nic.strange,
              spent);
}

/* ---- times */

static void sort(uint32_t *at, unsigned count)
{
    for (unsigned gap = count / 2; gap; gap /= 2)
        for (unsigned i = gap; i < count; i++) {
            uint32_t value = at[i];
            unsigned j = i;

            for (; j >= gap && at[j - gap] > value; j -= gap)
                at[j] = at[j - gap];
            at[j] = value;
        }
}

static void tell_samples(unsigned count)
{
    sort(samples, count);
    print("done %u median %u high %u cycles\n", count, samples[count / 2], samples[count * 9 / 10]);
}

/* Wait for a frame of the peer, and drop all others, which are left from earlier measurements.  Meanwhile send the
 * frames of the load.  False if the frame does not come. */
static bool await(const struct load *load, unsigned op, uint32_t wanted, struct frame_head *head)
{
    static struct arrival arrival;

    for (;;) {
        bool busy = false;

        while (receive(&arrival)) {
            memcpy(head, arrival.piece[0].address, sizeof(*head));
            give_back(&arrival);
            kick_rx();
            if (same_bytes(head->type, ours, sizeof(ours)) && head->op == op && head->number == wanted)
                return true;
        }
        if (load->send)
            fill(load, &busy);
        if (!busy && !rest(load))
            return false;
    }
}

/* Send one frame to the peer and back.  Returns the cycles that this took, or 0, and the peer's clock half-way. */
static uint32_t ping(const struct load *load, uint64_t *stamp, uint64_t *middle)
{
    struct frame_head head;
    uint64_t begin = rdtsc(), end;

    if (!send(OP_ECHO, ++number, 0, SMALL))
        return 0;
    kick_tx();
    if (!await(load, OP_ECHOED, number, &head))
        return 0;
    end = rdtsc();
    *stamp = head.stamp;
    *middle = begin + (end - begin) / 2;
    reclaim();
    return (uint32_t)(end - begin);
}

static void pings(const struct load *load)
{
    uint64_t stamp, middle;

    for (unsigned i = 0; i < load->count; i++) {
        samples[i] = ping(load, &stamp, &middle);
        if (!samples[i]) {
            print("failed: no answer\n");
            return;
        }
    }
    tell_samples(load->count);
}

/* The difference between the peer's time stamp counter and ours, from the fastest of many pings. */
static bool compare_clocks(int64_t *ahead)
{
    static const struct load idle = {0};
    uint32_t best = UINT32_MAX;

    for (unsigned i = 0; i < FIRST_PINGS; i++) {
        uint64_t stamp, middle;
        uint32_t cycles = ping(&idle, &stamp, &middle);

        if (!cycles)
            return false;
        if (cycles < best) {
            best = cycles;
            *ahead = (int64_t)(stamp - middle);
        }
    }
    return true;
}

static void beats(const struct load *load)
{
    struct frame_head head;
    int64_t ahead = 0;

    if (!compare_clocks(&ahead) || !send(OP_BEAT, load->count, load->interval_us, SMALL)) {
        print("failed: no answer\n");
        return;
    }
    kick_tx();
    for (unsigned i = 0; i < load->count; i++) {
        int64_t delay;

        if (!await(load, OP_DATA, load->count - i, &head)) {
            print("failed: beats stay out\n");
            return;
        }
        delay = (int64_t)(rdtsc() - head.stamp) + ahead;
        samples[i] = delay > 0 ? (uint32_t)delay : 0;
    }
    if (flush())
        tell_samples(load->count);
    else
        print("failed: frames stay where they are\n");
}

/* ---- commands */

static bool parse(const char *line, struct load *load)
{
    load->asleep = has_word(line, "asleep");
    load->receive = has_word(line, "receive");
    load->send = number_in(line, "send", 0);
    load->piece = number_in(line, "piece", 0);
    load->depth = number_in(line, "depth", load->send > FRAME_PLAIN ? SLOTS_LARGE : SLOTS);
    load->buffers = number_in(line, "buffers", 0);
    load->count = number_in(line, "count", 1);
    load->interval_us = number_in(line, "us", 1000);
    load->cycles = number_in(line, "kcycles", 1000) * 1000ull;
    return (!load->send || (load->send >= SMALL && load->send <= SEND_MAX)) && load->count &&
           load->count <= SAMPLES_MAX && load->depth && (load->send <= FRAME_PLAIN || load->piece % PAGE == 0) &&
           load->depth <= (load->send > FRAME_PLAIN ? SLOTS_LARGE : SLOTS) &&
           (!load->buffers || (load->buffers > FRAME_PLAIN && load->buffers <= 2 * PAGE));
}

void bench(const char *line)
{
    struct load load;

    if (!parse(line, &load)) {
        print("not understood: %s\n", line);
        return;
    }
    if (!start(load.asleep, load.buffers)) {
        print("failed: the interface does not start\n");
        return;
    }
    if (word_is(line, "ping"))
        pings(&load);
    else if (word_is(line, "beat"))
        beats(&load);
    else
        pass(&load);
    stop_nic();
}

void pass_asleep(uint32_t count)
{
    uint32_t good = 0, at = 0, length;
    const uint8_t *frame;

    if (!start(true, 0))
        return;
    for (; at < count; at++, good++) {
        send(OP_ECHO, at, 0, SMALL);
        kick_tx();
        frame = next_frame(OP_ECHOED, &length);
        if (!frame || ((const struct frame_head *)frame)->number != at)
            break;
    }
    print("net: %s\n", good == count ? "frames are through" : "frames are missing");
}
