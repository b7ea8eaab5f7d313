/* blk: a driver that tests or measures virtio disks.
 *
 *     (nothing)       all checks on the first disk, which the host has filled with pattern 0; they change the disk
 *     readonly        the checks for a read-only disk
 *     reads=N         N reads of 4 KiB, asleep between them, by MSI-X; then off
 *     bench           serve commands on the serial line (bench.c)
 *     churn           keep the disk busy until a command ends that, and report errors (churn.c)
 *     mapped          use no ports, only registers in memory, so legacy registers are not tested
 *     slot=N          use the first disk in PCI slot N or a later one
 *     qemu            run under QEMU, to test this guest; omits checks that only vmd passes
 *
 * Works in ring 3, which runs natively even if ring 0 is interpreted. */

#ifndef BLK_H
#define BLK_H

#include "virtio.h"

#define SECTOR 512u
#define KIB 1024u
#define MIB (1024u * KIB)

enum { T_IN = 0, T_OUT = 1, T_FLUSH = 4, T_GET_ID = 8, T_DISCARD = 11, T_WRITE_ZEROES = 13 };
enum { S_OK = 0, S_IOERR = 1, S_UNSUPP = 2, S_NONE = 0xEE /* ours: no status, or no answer */ };
enum {
    CONFIG_CAPACITY = 0,
    CONFIG_SEG_MAX = 12,
    CONFIG_BLK_SIZE = 20,
    CONFIG_WRITEBACK = 32,
    CONFIG_DISCARD_MAX = 36,
    CONFIG_ZEROES_MAX = 48,
    CONFIG_BYTES = 60,
    ID_BYTES = 20,
    RANGE_UNMAP = 1,
};

#define F_SEG_MAX (1ull << 2)
#define F_READ_ONLY (1ull << 5)
#define F_BLK_SIZE (1ull << 6)
#define F_FLUSH (1ull << 9)
#define F_CONFIG_WCE (1ull << 11)
#define F_DISCARD (1ull << 13)
#define F_WRITE_ZEROES (1ull << 14)
#define F_DISK (F_SEG_MAX | F_READ_ONLY | F_BLK_SIZE | F_FLUSH | F_CONFIG_WCE | F_DISCARD | F_WRITE_ZEROES)

#define PIECES_MAX (QUEUE_MAX - 2)

struct header {
    uint32_t type, reserved;
    uint64_t sector;
};

struct range {
    uint64_t sector;
    uint32_t sectors, flags;
};

struct request {
    struct header header;
    uint8_t status;
    uint32_t written; /* number of bytes, from the device */
};

struct disk {
    struct virtio_device device;
    struct queue queue;
    uint64_t sectors;
    bool indirect; /* whether to use tables */
};

/* The way to drive a disk. */
struct way {
    bool legacy, indirect, event_index;
    bool featureless; /* accept no disk features */
    enum interrupts interrupts;
    unsigned size; /* largest size of the queue; 0: as large as possible */
};

extern struct disk disk;

bool under_qemu(void);

/* disk.c */
unsigned find_disk(void);
bool has_interface(bool legacy);
/* Reset the disk and make it ready.  False, and a failed check, if it does not get ready. */
bool start_disk(const struct way *way);
/* Put a request with its data between header and status into the queue.  False if the queue is full. */
bool submit(struct request *request, uint32_t type, uint64_t sector, const struct segment *data, unsigned count);
void kick(void);
/* Wait for finished requests, like virtio_wait.  Gives up a disk that does not answer for some seconds. */
bool wait_for_disk(unsigned more);
/* Wait for a finished request, and take it.  NULL if none comes. */
struct request *finish(void);
/* Do one request.  Returns its status, and the number of bytes that the device wrote. */
uint8_t carry_out(uint32_t type, uint64_t sector, const struct segment *data, unsigned count, uint32_t *written);
uint8_t read_disk(uint64_t sector, void *to, uint32_t length);
uint8_t write_disk(uint64_t sector, const void *from, uint32_t length);
/* Submit an arbitrary chain in the queue's own descriptors.  Returns the byte at `status` after its return. */
uint8_t run_chain(const struct segment *chain, unsigned count, const volatile uint8_t *status, uint32_t *written);
/* Fill a buffer with the pattern of some sectors, or compare it.  Tests on the host use the same formula. */
void fill_pattern(void *at, uint64_t sector, unsigned sectors, uint8_t generation);
bool is_pattern(const void *at, uint64_t sector, unsigned sectors, uint8_t generation);
bool is_filled_with(const void *at, size_t size, uint8_t byte);
uint32_t random_number(void);

/* The disk's regions, in sectors: one that is never written, one for the last check's result, and scratch space. */
enum { KEPT = 2048, KEPT_END = 4096, FINAL = 0, FINAL_END = 2048, SCRATCH = 4096, SCRATCH_END = 12288 };
enum { PATTERN_HOST = 0, PATTERN_FINAL = 0xAB };

/* rings.c */
void test_rings(const char *name, const struct way *way);
void test_wrap(const char *name, const struct way *way);
/* requests.c */
void test_requests(const char *name, bool legacy);
void test_read_only(const char *name, bool legacy);
void write_final(void);
/* interrupts.c */
void test_interrupts(const char *name, bool legacy);
/* registers.c */
void test_registers(const char *name, bool legacy);

/* churn.c */
void churn(void);

/* bench.c */
void bench(void);
void read_asleep(uint32_t count);

#endif
