/* The host's end of the wire in the network benchmark: a packet socket on one interface.
 *
 *     peer INTERFACE flood BYTES      send frames of that length as fast as the interface takes them; frames
 *                                     of more than 1514 bytes are TCP segments, which the guest takes unsegmented
 *     peer INTERFACE echo             answer requests for echoes and beats (guests/net/net.h)
 *
 * Runs until it is killed.  It prints "ready" when it listens. */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <linux/filter.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <linux/virtio_net.h>
#include <net/if.h>
#include <poll.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { LLADDR = 6, PLAIN = 1514, PATTERN_AT = 32, TCP4_HEAD = 54, TCP_HEAD = 20, SEGMENT_BYTES = 1440 };
enum { OP_DATA = 1, OP_ECHO = 2, OP_ECHOED = 3, OP_BEAT = 7 };
enum { TYPE_OURS = 0x88B5 };
enum { PATTERN_WORDS = 16384 + 8192, PATTERN_STEP = 40, PATTERN_STARTS = 65536 };
enum { BATCH = 32, FULL_US = 100, BUFFER_BYTES = 32 << 20 };

struct frame_head {
    uint8_t destination[LLADDR], source[LLADDR];
    uint8_t type[2];
    uint16_t op;
    uint32_t number, argument;
    uint64_t stamp;
} __attribute__((packed));

struct frame {
    struct virtio_net_hdr header;
    uint8_t bytes[PLAIN + 65536];
};

static const uint8_t here[LLADDR] = {2, 0, 0, 0, 0, 1};
static uint64_t pattern[PATTERN_WORDS];
static int wire;

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

static const uint8_t *pattern_of(uint32_t number)
{
    return (const uint8_t *)pattern + number * PATTERN_STEP % PATTERN_STARTS;
}

static uint64_t clock_cycles(void)
{
    return __builtin_ia32_rdtsc();
}

/* Accept only requests: the guest may be sending hundreds of thousands of other frames a second. */
static void filter_requests(void)
{
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_H | BPF_ABS, ETH_HLEN - 2),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, TYPE_OURS, 0, 3),
        BPF_STMT(BPF_LD | BPF_B | BPF_ABS, ETH_HLEN), /* the operation's low byte */
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, OP_ECHO, 2, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, OP_BEAT, 1, 0),
        BPF_STMT(BPF_RET | BPF_K, 0),
        BPF_STMT(BPF_RET | BPF_K, UINT32_MAX),
    };
    struct sock_fprog program = {sizeof(code) / sizeof(code[0]), code};

    if (setsockopt(wire, SOL_SOCKET, SO_ATTACH_FILTER, &program, sizeof(program)))
        fail("SO_ATTACH_FILTER");
}

static void open_wire(const char *name, bool bypass)
{
    int one = 1, buffer = BUFFER_BYTES;
    struct sockaddr_ll address = {
        .sll_family = AF_PACKET, .sll_protocol = htons(ETH_P_ALL), .sll_ifindex = (int)if_nametoindex(name)};

    wire = socket(AF_PACKET, SOCK_RAW | SOCK_CLOEXEC, 0);
    if (wire < 0)
        fail("socket");
    if (setsockopt(wire, SOL_PACKET, PACKET_VNET_HDR, &one, sizeof(one)))
        fail("PACKET_VNET_HDR");
    /* Bypass the queueing discipline: the socket then reports a full queue, and nothing is segmented. */
    if (bypass && setsockopt(wire, SOL_PACKET, PACKET_QDISC_BYPASS, &one, sizeof(one)))
        fail("PACKET_QDISC_BYPASS");
    setsockopt(wire, SOL_SOCKET, SO_SNDBUFFORCE, &buffer, sizeof(buffer));
    setsockopt(wire, SOL_SOCKET, SO_RCVBUFFORCE, &buffer, sizeof(buffer));
    if (bypass)
        address.sll_protocol = 0; /* this socket only sends */
    else
        filter_requests();
    if (!address.sll_ifindex || bind(wire, (struct sockaddr *)&address, sizeof(address)))
        fail(name);
}

/* ---- flood */

static void put16(uint8_t *at, uint32_t value)
{
    at[0] = (uint8_t)(value >> 8);
    at[1] = (uint8_t)value;
}

static void build_data(struct frame *frame)
{
    struct frame_head *head = (struct frame_head *)frame->bytes;

    memset(head, 0, sizeof(*head));
    memset(head->destination, 0xFF, LLADDR);
    memcpy(head->source, here, LLADDR);
    put16(head->type, TYPE_OURS);
    head->op = OP_DATA;
}

static void build_segment(struct frame *frame, uint32_t bytes)
{
    uint8_t *packet = frame->bytes + ETH_HLEN, *tcp = packet + 20;
    uint32_t sum = 0;

    memset(frame->bytes, 0, TCP4_HEAD);
    memset(frame->bytes, 0xFF, LLADDR);
    memcpy(frame->bytes + LLADDR, here, LLADDR);
    put16(packet - 2, ETH_P_IP);
    packet[0] = 0x45;
    put16(packet + 2, bytes - ETH_HLEN);
    packet[8] = 64;
    packet[9] = IPPROTO_TCP;
    memcpy(packet + 12, (uint8_t[]){192, 0, 2, 2, 192, 0, 2, 1}, 8);
    for (unsigned i = 0; i < 20; i += 2)
        sum += (uint32_t)packet[i] << 8 | packet[i + 1];
    put16(packet + 10, ~((sum & 0xFFFF) + (sum >> 16)));
    put16(tcp, 80);
    put16(tcp + 2, 4000);
    tcp[12] = TCP_HEAD / 4 << 4;
    tcp[13] = 0x10;
    put16(tcp + 14, 0xFFFF);
    /* The receiver completes the checksum.  Nobody here checks the partial sum. */
    frame->header = (struct virtio_net_hdr){
        .flags = VIRTIO_NET_HDR_F_NEEDS_CSUM, .gso_type = VIRTIO_NET_HDR_GSO_TCPV4, .hdr_len = TCP4_HEAD,
        .gso_size = SEGMENT_BYTES, .csum_start = TCP4_HEAD - TCP_HEAD, .csum_offset = 16};
}

/* Set the number and the bytes of a frame of our type, or of a segment, whose bytes stay in the pattern. */
static void number_frame(struct frame *frame, struct iovec *parts, uint32_t number, uint32_t bytes)
{
    if (bytes > PLAIN) {
        put16(frame->bytes + TCP4_HEAD - TCP_HEAD + 4, number);
        parts[1] = (struct iovec){(void *)(uintptr_t)pattern_of(number), bytes - TCP4_HEAD};
    } else {
        ((struct frame_head *)frame->bytes)->number = number;
        parts[1] = (struct iovec){(void *)(uintptr_t)pattern_of(number), bytes - PATTERN_AT};
    }
}

_Noreturn static void flood(uint32_t bytes)
{
    static struct frame frames[BATCH];
    static struct iovec parts[BATCH][2];
    static struct mmsghdr messages[BATCH];
    uint32_t number = 0;

    for (unsigned i = 0; i < BATCH; i++) {
        if (bytes > PLAIN)
            build_segment(&frames[i], bytes);
        else
            build_data(&frames[i]);
        parts[i][0] = (struct iovec){&frames[i], sizeof(frames[i].header) + (bytes > PLAIN ? TCP4_HEAD : PATTERN_AT)};
        messages[i].msg_hdr.msg_iov = parts[i];
        messages[i].msg_hdr.msg_iovlen = 2;
    }
    for (;;) {
        int sent;

        for (unsigned i = 0; i < BATCH; i++)
            number_frame(&frames[i], parts[i], number + i, bytes);
        sent = sendmmsg(wire, messages, BATCH, 0);
        if (sent > 0)
            number += (uint32_t)sent;
        /* The interface's queue is full, and takes longer than this to drain. */
        if (sent != BATCH)
            usleep(FULL_US);
        if (sent < 0 && errno != ENOBUFS && errno != EAGAIN && errno != ENETDOWN)
            fail("sendmmsg");
    }
}

/* ---- echo */

static struct frame frame;

static int64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000ll + now.tv_nsec;
}

static void send_back(const struct frame_head *to, size_t bytes)
{
    struct frame_head *head = (struct frame_head *)frame.bytes;

    memmove(head->destination, to->source, LLADDR);
    memcpy(head->source, here, LLADDR);
    memset(&frame.header, 0, sizeof(frame.header));
    head->stamp = clock_cycles();
    if (send(wire, &frame, sizeof(frame.header) + bytes, 0) < 0 && errno != ENOBUFS)
        fail("send");
}

_Noreturn static void echo(void)
{
    struct frame_head *head = (struct frame_head *)frame.bytes, beat = {0};
    int64_t next_ns = 0;

    for (;;) {
        struct pollfd poll_wire = {wire, POLLIN, 0};
        struct sockaddr_ll from;
        socklen_t from_size = sizeof(from);
        struct timespec wait = {0, 0};
        ssize_t size;

        if (beat.number) {
            int64_t left_ns = next_ns - now_ns();

            if (left_ns <= 0) {
                memcpy(head, &beat, sizeof(beat));
                head->op = OP_DATA;
                memcpy(frame.bytes + PATTERN_AT, pattern_of(beat.number), 32);
                send_back(&beat, PATTERN_AT + 32);
                beat.number--;
                next_ns += beat.argument * 1000ll;
                continue;
            }
            wait.tv_nsec = left_ns;
        }
        if (ppoll(&poll_wire, 1, beat.number ? &wait : NULL, NULL) <= 0)
            continue;
        size = recvfrom(wire, &frame, sizeof(frame), MSG_DONTWAIT, (struct sockaddr *)&from, &from_size);
        if (size < (ssize_t)(sizeof(frame.header) + sizeof(*head)) || from.sll_pkttype == PACKET_OUTGOING ||
            head->type[0] != TYPE_OURS >> 8 || head->type[1] != (TYPE_OURS & 0xFF))
            continue;
        if (head->op == OP_ECHO) {
            head->op = OP_ECHOED;
            send_back(head, (size_t)size - sizeof(frame.header));
        } else if (head->op == OP_BEAT) {
            beat = *head;
            next_ns = now_ns() + beat.argument * 1000ll;
        }
    }
}

int main(int count, char **words)
{
    bool flooding = count == 4 && strcmp(words[2], "flood") == 0;

    if (!flooding && !(count == 3 && strcmp(words[2], "echo") == 0)) {
        fprintf(stderr, "usage: peer INTERFACE flood BYTES | peer INTERFACE echo\n");
        return 2;
    }
    for (uint64_t i = 0; i < PATTERN_WORDS; i++)
        pattern[i] = (i + 1) * 0x9E3779B97F4A7C15ull;
    open_wire(words[1], flooding);
    puts("ready");
    fflush(stdout);
    if (flooding)
        flood((uint32_t)atoi(words[3]));
    echo();
}
