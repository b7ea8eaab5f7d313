/* Benchmark: the host sends commands, one per line, and this guest answers with the time that each took.
 *
 *     WHAT bytes=B depth=D count=N [piece=P] [asleep]
 *
 * WHAT is read, write (both sequential), randread or randwrite.  Each request moves B bytes, in pieces of P bytes in
 * memory.  D requests are outstanding at any time, until N are done.  Meanwhile the guest polls, or with `asleep`
 * sleeps until an interrupt by MSI-X.  The answer is "done N requests in C cycles".  Before each command the guest
 * prints "ready" and sleeps, so that the host can read its clocks meanwhile. */

#include "blk.h"

#define DEPTH_MAX 64
#define BYTES_MAX (1 * MIB)
#define READS_DEPTH 8
#define READS_BYTES (4 * KIB)

struct load {
    bool write, random, asleep;
    uint32_t bytes, depth, count, piece;
};

static uint64_t place(const struct load *load, uint64_t number)
{
    uint64_t slots = disk.sectors * SECTOR / load->bytes;

    return (load->random ? random_number() : number) % slots * (load->bytes / SECTOR);
}

/* Run a load.  Return the cycles that it took, or 0 if a request failed. */
static uint64_t run(const struct load *load)
{
    static uint8_t *buffers;
    static struct request requests[DEPTH_MAX];
    static struct segment pieces[DEPTH_MAX][PIECES_MAX];
    uint32_t made = 0, done = 0, wrong = 0, count = (load->bytes + load->piece - 1) / load->piece;
    uint32_t type = load->write ? T_OUT : T_IN;
    uint64_t begin;

    if (!buffers)
        buffers = take_pages((size_t)DEPTH_MAX * BYTES_MAX / 4);
    /* In descending order, so that no two pieces are contiguous: a driver would merge contiguous ones. */
    for (unsigned i = 0; i < load->depth; i++)
        for (uint32_t at = 0; at < load->bytes; at += load->piece)
            pieces[i][count - 1 - at / load->piece] = (struct segment){
                buffers + (size_t)i * load->bytes + at,
                load->bytes - at < load->piece ? load->bytes - at : load->piece,
                !load->write,
            };
    begin = rdtsc();
    for (; made < load->depth && made < load->count; made++)
        submit(&requests[made], type, place(load, made), pieces[made], count);
    kick();
    while (done < load->count) {
        struct request *request = finish();

        if (!request)
            return 0;
        /* Replace all finished requests, then notify the device once. */
        for (; request; request = queue_take(&disk.queue, NULL)) {
            size_t which = (size_t)(request - requests);

            wrong += request->status != S_OK;
            done++;
            if (made < load->count)
                submit(request, type, place(load, made++), pieces[which], count);
        }
        kick();
    }
    return wrong ? 0 : rdtsc() - begin;
}

static bool start(bool asleep)
{
    return start_disk(&(struct way){
        .legacy = !has_interface(false), .indirect = true, .event_index = true, .interrupts = asleep ? MSIX : POLLED});
}

static bool parse(const char *line, struct load *load)
{
    load->random = memcmp(line, "rand", 4) == 0;
    if (load->random)
        line += 4;
    load->write = word_is(line, "write");
    load->asleep = has_word(line, "asleep");
    load->bytes = number_in(line, "bytes", 4 * KIB);
    load->depth = number_in(line, "depth", 1);
    load->count = number_in(line, "count", 1);
    load->piece = number_in(line, "piece", load->bytes);
    return (load->write || word_is(line, "read")) && load->bytes && load->bytes <= BYTES_MAX &&
           load->bytes % SECTOR == 0 && load->depth && load->depth <= DEPTH_MAX &&
           (uint64_t)load->depth * load->bytes <= (uint64_t)DEPTH_MAX * BYTES_MAX / 4 && load->piece &&
           (load->bytes - 1) / load->piece < PIECES_MAX && load->count;
}

void bench(void)
{
    commands_init();
    for (;;) {
        struct load load;
        char line[COMMAND_MAX];
        uint64_t cycles;

        read_command(line);
        if (word_is(line, "off"))
            return;
        if (!parse(line, &load)) {
            print("not understood: %s\n", line);
            continue;
        }
        cycles = start(load.asleep) ? run(&load) : 0;
        virtio_reset(&disk.device);
        if (cycles)
            print("done %u requests in %lu cycles\n", load.count, cycles);
        else
            print("failed\n");
    }
}

void read_asleep(uint32_t count)
{
    struct load load = {
        .random = true, .asleep = true, .bytes = READS_BYTES, .piece = READS_BYTES, .depth = READS_DEPTH, .count = count};

    print("blk: %s\n", start(true) && run(&load) ? "reads are done" : "reads have failed");
}
