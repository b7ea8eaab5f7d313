/* Builds and checks frames.  Tests on the host use the same formulas. */

#include "net.h"

#define PATTERN_WORDS (16384u + 8192u)
#define PATTERN_STEP 40u     /* from one number to the next */
#define PATTERN_STARTS 65536u

static const uint8_t peer[LLADDR] = {2, 0, 0, 0, 0, 1};
static const uint8_t ip4_here[4] = {192, 0, 2, 1}, ip4_there[4] = {192, 0, 2, 2};
static const uint8_t ip6_here[16] = {0x20, 1, 0xd, 0xb8, [15] = 1}, ip6_there[16] = {0x20, 1, 0xd, 0xb8, [15] = 2};

enum { IP_TCP = 6, PORT_HERE = 4000, PORT_THERE = 80, TCP_ACK = 0x10, TCP_HEAD = 20 };
enum { TCP_CHECKSUM = 16 }; /* offset */

const uint8_t *pattern(uint32_t number, uint32_t from)
{
    static uint64_t words[PATTERN_WORDS];

    if (!words[0])
        for (uint32_t i = 0; i < PATTERN_WORDS; i++)
            words[i] = (i + 1) * 0x9E3779B97F4A7C15ull;
    return (const uint8_t *)words + number * PATTERN_STEP % PATTERN_STARTS + from;
}

bool same_bytes(const uint8_t *a, const uint8_t *b, uint32_t length)
{
    while (length >= 8 && *(const uint64_t *)a == *(const uint64_t *)b)
        a += 8, b += 8, length -= 8;
    return length < 8 && memcmp(a, b, length) == 0;
}

void put16(uint8_t *at, uint32_t value)
{
    at[0] = (uint8_t)(value >> 8);
    at[1] = (uint8_t)value;
}

uint32_t get16(const uint8_t *at)
{
    return (uint32_t)at[0] << 8 | at[1];
}

static uint32_t get32(const uint8_t *at)
{
    return get16(at) << 16 | get16(at + 2);
}

void build_frame(struct slot *slot, unsigned op, uint32_t number, uint32_t argument, uint32_t length)
{
    struct frame_head *head = (struct frame_head *)slot->base;

    memcpy(head->destination, peer, LLADDR);
    memcpy(head->source, nic.lladdr, LLADDR);
    put16(head->type, TYPE_OURS);
    head->op = (uint16_t)op;
    head->number = number;
    head->argument = argument;
    head->stamp = 0;
    memcpy(slot->base + FRAME_PATTERN, pattern(number, 0), length - FRAME_PATTERN);
    slot->frame = slot->base;
    slot->length = length;
    slot->piece = 0;
    slot->header = (struct net_header){0};
}

bool is_data(const uint8_t *frame, uint32_t length)
{
    const struct frame_head *head = (const struct frame_head *)frame;

    return length >= FRAME_LEAST && get16(head->type) == TYPE_OURS && head->op == OP_DATA &&
           same_bytes(frame + FRAME_PATTERN, pattern(head->number, 0), length - FRAME_PATTERN);
}

const uint8_t *flatten(const struct arrival *arrival)
{
    static uint8_t frame[FRAME_MAX + 64];
    uint32_t at = 0;

    for (unsigned i = 0; i < arrival->pieces && at + arrival->piece[i].length <= sizeof(frame); i++) {
        memcpy(frame + at, arrival->piece[i].address, arrival->piece[i].length);
        at += arrival->piece[i].length;
    }
    return frame;
}

/* ---- TCP */

/* Continue the sum whose complement is the checksum (RFC 1071). */
static uint32_t add_up(uint32_t sum, const uint8_t *at, uint32_t length)
{
    for (; length > 1; at += 2, length -= 2)
        sum += get16(at);
    if (length)
        sum += (uint32_t)*at << 8;
    while (sum >> 16)
        sum = (sum & 0xFFFF) + (sum >> 16);
    return sum;
}

static uint32_t pseudo_header(const uint8_t *packet, bool ipv6, uint32_t tcp_length)
{
    uint32_t sum = add_up(0, packet + (ipv6 ? 8 : 12), ipv6 ? 32 : 8);

    sum += IP_TCP + (tcp_length >> 16) + (tcp_length & 0xFFFF);
    return add_up(sum, packet, 0);
}

void build_segment(struct slot *slot, bool ipv6, uint32_t number, uint32_t payload, uint32_t piece)
{
    uint8_t *payload_at = slot->base, *tcp = payload_at - TCP_HEAD;
    uint8_t *packet = payload_at - (ipv6 ? TCP6_HEAD : TCP4_HEAD) + ETHERNET;

    memset(packet - ETHERNET, 0, (size_t)(payload_at - packet) + ETHERNET);
    memcpy(packet - ETHERNET, peer, LLADDR);
    memcpy(packet - ETHERNET + LLADDR, nic.lladdr, LLADDR);
    put16(packet - 2, ipv6 ? TYPE_IPV6 : TYPE_IPV4);
    if (ipv6) {
        packet[0] = 0x60;
        put16(packet + 4, TCP_HEAD + payload);
        packet[6] = IP_TCP;
        packet[7] = 64;
        memcpy(packet + 8, ip6_here, 16);
        memcpy(packet + 24, ip6_there, 16);
    } else {
        packet[0] = 0x45;
        put16(packet + 2, 20 + TCP_HEAD + payload);
        packet[8] = 64;
        packet[9] = IP_TCP;
        memcpy(packet + 12, ip4_here, 4);
        memcpy(packet + 16, ip4_there, 4);
        put16(packet + 10, ~add_up(0, packet, 20));
    }
    put16(tcp, PORT_HERE);
    put16(tcp + 2, PORT_THERE);
    put16(tcp + 4, number);
    tcp[12] = TCP_HEAD / 4 << 4;
    tcp[13] = TCP_ACK;
    put16(tcp + 14, 0xFFFF);
    put16(tcp + TCP_CHECKSUM, pseudo_header(packet, ipv6, TCP_HEAD + payload));
    /* `send_slot` sends the pieces in descending order: the last piece in memory is the beginning of the payload. */
    for (uint32_t rest = payload, part; rest; rest -= part) {
        part = !piece ? rest : rest % piece ? rest % piece : piece;
        memcpy(payload_at + rest - part, pattern(number, payload - rest), part);
    }
    slot->head = (uint32_t)(payload_at - packet) + ETHERNET;
    slot->frame = payload_at - slot->head;
    slot->length = slot->head + payload;
    slot->piece = piece;
    slot->header = (struct net_header){
        .flags = HEADER_NEEDS_CSUM,
        .gso_type = payload <= SEGMENT_BYTES ? GSO_NONE : ipv6 ? GSO_TCPV6 : GSO_TCPV4,
        .header_length = (uint16_t)slot->head,
        .segment = payload <= SEGMENT_BYTES ? 0 : SEGMENT_BYTES,
        .sum_start = (uint16_t)(slot->head - TCP_HEAD),
        .sum_offset = TCP_CHECKSUM,
    };
}

static bool good_ip(const uint8_t *packet, bool ipv6, uint32_t length)
{
    if (ipv6)
        return packet[0] >> 4 == 6 && get16(packet + 4) == length - 40 && packet[6] == IP_TCP;
    return packet[0] == 0x45 && get16(packet + 2) == length && packet[9] == IP_TCP && add_up(0, packet, 20) == 0xFFFF;
}

uint32_t good_segment(const struct net_header *header, const uint8_t *frame, uint32_t length, bool ipv6,
                      uint32_t number, uint32_t from)
{
    uint32_t head = ipv6 ? TCP6_HEAD : TCP4_HEAD, payload = length - head, sum;
    const uint8_t *packet = frame + ETHERNET, *tcp = frame + head - TCP_HEAD;

    if (length <= head || get16(packet - 2) != (ipv6 ? TYPE_IPV6 : TYPE_IPV4) ||
        !good_ip(packet, ipv6, length - ETHERNET) || get32(tcp + 4) != (number << 16) + from)
        return 0;
    sum = pseudo_header(packet, ipv6, length - head + TCP_HEAD);
    if (header->flags & HEADER_NEEDS_CSUM) {
        if (!nic.offloads || header->sum_start != head - TCP_HEAD || header->sum_offset != TCP_CHECKSUM ||
            get16(tcp + TCP_CHECKSUM) != sum)
            return 0;
    } else if (add_up(sum, tcp, TCP_HEAD + payload) != 0xFFFF) {
        return 0;
    }
    if (length > FRAME_PLAIN) {
        if (!nic.offloads || (header->gso_type & ~GSO_ECN) != (ipv6 ? GSO_TCPV6 : GSO_TCPV4) ||
            header->segment != SEGMENT_BYTES || !(header->flags & HEADER_NEEDS_CSUM))
            return 0;
    } else if (header->gso_type != GSO_NONE && payload > header->segment) {
        return 0;
    }
    return same_bytes(tcp + TCP_HEAD, pattern(number, from), payload) ? payload : 0;
}
