/* net: a driver that tests or measures virtio network interfaces.  Commands on its serial line:
 *
 *     test                   all checks, with the tests' peer at the other end
 *     link [legacy] [intx]   report each change of the link, until it was down twice
 *     frames count=N         N frames to the peer and back, asleep between them, by MSI-X
 *     pass, ping, beat       measure (bench.c)
 *     dhcp                   ask for addresses (dhcp.c)
 *     off                    switch the machine off
 *
 * On the command line:
 *
 *     mapped                 use no ports, only registers in memory, so legacy registers are not tested
 *     slot=N                 use the first interface in PCI slot N or a later one
 *     qemu                   run under QEMU, to test this guest; omits checks that only vmd passes
 *
 * Works in ring 3, which runs natively even if ring 0 is interpreted. */

#ifndef NET_H
#define NET_H

#include "virtio.h"

#define KIB 1024u

enum { QUEUE_RX, QUEUE_TX };
enum {
    CONFIG_MAC = 0,
    CONFIG_STATUS = 6,
    CONFIG_PAIRS = 8,
    CONFIG_MTU = 10,
    CONFIG_BYTES = 12,
    STATUS_LINK_UP = 1,
};

#define F_CSUM (1ull << 0)
#define F_GUEST_CSUM (1ull << 1)
#define F_MTU (1ull << 3)
#define F_MAC (1ull << 5)
#define F_GUEST_TSO4 (1ull << 7)
#define F_GUEST_TSO6 (1ull << 8)
#define F_HOST_TSO4 (1ull << 11)
#define F_HOST_TSO6 (1ull << 12)
#define F_MRG_RXBUF (1ull << 15)
#define F_STATUS (1ull << 16)
#define F_OFFLOADS (F_CSUM | F_GUEST_CSUM | F_GUEST_TSO4 | F_GUEST_TSO6 | F_HOST_TSO4 | F_HOST_TSO6)

enum { HEADER_NEEDS_CSUM = 1, HEADER_DATA_VALID = 2 };
enum { GSO_NONE = 0, GSO_TCPV4 = 1, GSO_TCPV6 = 4, GSO_ECN = 0x80 };

/* struct virtio_net_hdr (virtio 1.2, 5.1.6); legacy ones without mergeable buffers end before `buffers` */
struct net_header {
    uint8_t flags, gso_type;
    uint16_t header_length, segment, sum_start, sum_offset, buffers;
};

enum { LLADDR = 6, ETHERNET = 14, MTU = 1500, FRAME_PLAIN = ETHERNET + MTU, FRAME_MAX = ETHERNET + 40 + 65535 };

#define SLOTS 256u       /* most frames of up to 1514 bytes that can be in transmission */
#define SLOTS_LARGE 32u  /* the same for larger frames */
#define ARRIVAL_PIECES 64u

/* A frame to be sent.  A large one has `head` bytes up to the end of a page, so its payload can be cut into pages. */
struct slot {
    struct slot *next;
    uint8_t *base; /* where a frame of our own type, or the payload of a segment, begins */
    uint8_t *frame;
    uint32_t length, head, piece; /* piece: contiguous bytes; 0: all */
    struct net_header header;
    uint32_t kept; /* frame length for which the benchmark has prepared this slot */
    bool large;
};

/* A received frame, still in the buffers of its queue. */
struct arrival {
    struct net_header header;
    uint32_t length; /* of the frame */
    unsigned pieces;
    struct segment piece[ARRIVAL_PIECES];
    void *buffers[ARRIVAL_PIECES];
};

struct nic {
    struct virtio_device device;
    struct queue rx, tx;
    unsigned header; /* bytes before each frame */
    bool mergeable, offloads, indirect, separate;
    unsigned merge_bytes;
    uint8_t lladdr[LLADDR];
    unsigned under_way; /* frames being sent */
    uint32_t strange;   /* arrivals that the device described wrongly */
};

/* The way to drive an interface. */
struct way {
    bool legacy, mergeable, offloads, indirect, event_index;
    bool separate;       /* the header of a frame to be sent is a descriptor of its own */
    unsigned merge_bytes; /* of a buffer that can be merged; 0: 2048 */
    enum interrupts interrupts;
};

extern struct nic nic;

bool under_qemu(void);

/* nic.c */
unsigned find_nic(void);
bool has_interface(bool legacy);
/* start_nic resets the interface, makes it ready, and gives it buffers.  False, and a failed check, if it does not
 * get ready.  stop_nic only resets it. */
bool start_nic(const struct way *way);
void stop_nic(void);
/* A free slot for a frame.  Waits if all are in use.  NULL if the device is stuck. */
struct slot *take_slot(bool large);
/* Put a frame into the queue.  False if the queue is full.  The device sends it after kick_tx. */
bool send_slot(struct slot *slot);
void kick_tx(void);
void kick_rx(void);
/* Take back the slots of sent frames.  Returns their number. */
unsigned reclaim(void);
/* Wait until all has been sent; false if it takes too long. */
bool flush(void);
/* The next received frame, or false.  give_back returns its buffers, which the device sees after kick_rx. */
bool receive(struct arrival *arrival);
void give_back(const struct arrival *arrival);
/* Wait for a frame; false if none comes for some seconds. */
bool wait_for_frame(void);
/* Sleep until a frame has come, or `sent` frames have been sent (0: never mind); false after some seconds. */
bool sleep_for_either(unsigned sent);

/* frames.c: the frames
 *
 * Frames of our own Ethernet type carry a number and, from byte FRAME_PATTERN on, the pattern of this number.  TCP
 * segments carry the pattern, too.  Their sequence number is the number times 65536, plus the place in the pattern. */

enum { TYPE_OURS = 0x88B5, TYPE_IPV4 = 0x0800, TYPE_IPV6 = 0x86DD };
enum {
    OP_DATA = 1,
    OP_ECHO = 2,   /* the peer sends it back, as OP_ECHOED, with its own time stamp counter as `stamp` */
    OP_ECHOED = 3,
    OP_ASK = 4,    /* for `number` frames, OP_DATA or segments, see `argument` */
    OP_COUNT = 5,  /* the peer says in OP_COUNTED how many good (`number`) and bad (`argument`) frames it has seen */
    OP_COUNTED = 6,
    OP_BEAT = 7,   /* for `number` frames OP_DATA, one each `argument` microseconds, with time stamps */
};
enum { ASK_FRAMES = 0, ASK_TCP4 = 4, ASK_TCP6 = 6 };
enum { FRAME_PATTERN = 32, FRAME_LEAST = 32, TCP4_HEAD = 54, TCP6_HEAD = 74, SEGMENT_BYTES = 1440 };

struct frame_head {
    uint8_t destination[LLADDR], source[LLADDR];
    uint8_t type[2];
    uint16_t op;
    uint32_t number, argument;
    uint64_t stamp;
} __attribute__((packed));

/* Numbers in network byte order. */
void put16(uint8_t *at, uint32_t value);
uint32_t get16(const uint8_t *at);
/* The payload of a frame with this number, from an offset on. */
const uint8_t *pattern(uint32_t number, uint32_t from);
bool same_bytes(const uint8_t *a, const uint8_t *b, uint32_t length);
/* Build a frame of our own type. */
void build_frame(struct slot *slot, unsigned op, uint32_t number, uint32_t argument, uint32_t length);
/* Build a TCP segment with a payload of so many bytes, to be sent in pieces of `piece` bytes (0: as one).  The device
 * segments it and adds the checksums. */
void build_segment(struct slot *slot, bool ipv6, uint32_t number, uint32_t payload, uint32_t piece);
/* Copy an arrival; returns its frame. */
const uint8_t *flatten(const struct arrival *arrival);
/* Whether this is a correct OP_DATA frame. */
bool is_data(const uint8_t *frame, uint32_t length);
/* The payload length of a TCP segment of `number`, or 0 if a header, a checksum or the payload is wrong. */
uint32_t good_segment(const struct net_header *header, const uint8_t *frame, uint32_t length, bool ipv6,
                      uint32_t number, uint32_t from);

/* dhcp.c */
void ask_dhcp(const char *line);

/* traffic.c */
void test_traffic(const char *name, const struct way *way);
/* Put a frame of our own type into the queue, waiting for room. */
bool send(unsigned op, uint32_t number, uint32_t argument, uint32_t length);
/* Wait for a frame of our own type, and copy it.  NULL if none comes, or a different one. */
const uint8_t *next_frame(unsigned op, uint32_t *length);
/* Drop the frames that were on the wire when the interface was reset, and reset the peer's counts.  False if the peer
 * does not answer. */
bool settle(void);
/* Send one frame to the peer and back.  False if it does not come back unchanged. */
bool echo(uint32_t number, uint32_t length);
/* The length of the frames that the peer sends on request. */
uint32_t length_of(uint32_t number);
/* controls.c */
void test_controls(const char *name, bool legacy);
void watch_link(const char *line);

/* bench.c */
void bench(const char *line);
void pass_asleep(uint32_t count);

#endif
