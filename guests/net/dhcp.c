/* One question to the host's DHCP server (RFC 2131):
 *
 *     dhcp [legacy]          send DISCOVER; print "offer A servers B ...", with the address and the name servers
 *     dhcp [legacy] lease    send REQUEST, as a host called guest-of-net; print "ack A servers B ..."
 *
 * In either case a further line is "called NAME DOMAIN", with the names that the answer contains. */

#include "net.h"

enum {
    IP_AT = ETHERNET, UDP_AT = IP_AT + 20, BODY_AT = UDP_AT + 8, OPTIONS_AT = BODY_AT + 240,
    IP_SUM = IP_AT + 10, OFFERED_AT = BODY_AT + 16,
    PORT_SERVER = 67, PORT_CLIENT = 68, IP_UDP = 17, TRANSACTION = 0x4711,
    OPTION_SERVERS = 6, OPTION_HOST = 12, OPTION_DOMAIN = 15, OPTION_TYPE = 53, OPTION_END = 255, ACK = 5,
};

static const uint8_t discover[] = {OPTION_TYPE, 1, 1, OPTION_END};
static const uint8_t request[] = {
    OPTION_TYPE, 1, 3, OPTION_HOST, 12, 'g', 'u', 'e', 's', 't', '-', 'o', 'f', '-', 'n', 'e', 't', OPTION_END,
};

static uint16_t sum_of(const uint8_t *packet)
{
    uint32_t sum = 0;

    for (unsigned at = 0; at < 20; at += 2)
        sum += get16(packet + at);
    while (sum >> 16)
        sum = (sum & 0xFFFF) + (sum >> 16);
    return (uint16_t)~sum;
}

static void build_question(struct slot *slot, const uint8_t *options, uint32_t length)
{
    const uint32_t question = OPTIONS_AT + length;
    static const uint8_t cookie[] = {0x63, 0x82, 0x53, 0x63};
    uint8_t *frame = slot->base;

    memset(frame, 0, question);
    memset(frame, 0xFF, LLADDR);
    memcpy(frame + LLADDR, nic.lladdr, LLADDR);
    put16(frame + 12, TYPE_IPV4);
    frame[IP_AT] = 0x45;
    put16(frame + IP_AT + 2, question - IP_AT);
    frame[IP_AT + 8] = 64;
    frame[IP_AT + 9] = IP_UDP;
    memset(frame + IP_AT + 16, 0xFF, 4);
    put16(frame + IP_SUM, sum_of(frame + IP_AT));
    put16(frame + UDP_AT, PORT_CLIENT);
    put16(frame + UDP_AT + 2, PORT_SERVER);
    put16(frame + UDP_AT + 4, question - UDP_AT);
    frame[BODY_AT] = 1; /* a request, for Ethernet with its addresses of six bytes */
    frame[BODY_AT + 1] = 1;
    frame[BODY_AT + 2] = LLADDR;
    put16(frame + BODY_AT + 6, TRANSACTION);
    memcpy(frame + BODY_AT + 28, nic.lladdr, LLADDR);
    memcpy(frame + BODY_AT + 236, cookie, sizeof(cookie));
    memcpy(frame + OPTIONS_AT, options, length);
    slot->frame = slot->base;
    slot->length = question;
    slot->piece = 0;
    slot->header = (struct net_header){0};
}

static bool is_answer(const uint8_t *frame, uint32_t length)
{
    return length > OPTIONS_AT && get16(frame + 12) == TYPE_IPV4 && frame[IP_AT + 9] == IP_UDP &&
           get16(frame + UDP_AT) == PORT_SERVER && get16(frame + BODY_AT + 6) == TRANSACTION;
}

static void print_address(const uint8_t *at)
{
    print(" %u.%u.%u.%u", at[0], at[1], at[2], at[3]);
}

/* Return the data of an option, which follows its length byte; NULL if the option is missing. */
static const uint8_t *find_option(const uint8_t *frame, uint32_t length, uint8_t code)
{
    for (uint32_t at = OPTIONS_AT; at + 2 <= length && frame[at] != OPTION_END; at += 2u + frame[at + 1])
        if (frame[at] == code && at + 2 + frame[at + 1] <= length)
            return frame + at + 1;
    return NULL;
}

static void print_text(const uint8_t *option)
{
    print(" ");
    for (uint32_t i = 1; i <= option[0]; i++)
        print("%c", option[i]);
}

static void print_answer(const uint8_t *frame, uint32_t length)
{
    const uint8_t *type = find_option(frame, length, OPTION_TYPE);
    const uint8_t *servers = find_option(frame, length, OPTION_SERVERS);
    const uint8_t *host = find_option(frame, length, OPTION_HOST);
    const uint8_t *domain = find_option(frame, length, OPTION_DOMAIN);

    print(type && type[1] == ACK ? "ack" : "offer");
    print_address(frame + OFFERED_AT);
    print(" servers");
    for (uint32_t i = 1; servers && i + 3 <= servers[0]; i += 4)
        print_address(servers + i);
    print("\ncalled");
    if (host)
        print_text(host);
    if (domain)
        print_text(domain);
    print("\n");
}

void ask_dhcp(const char *line)
{
    struct way way = {.legacy = has_word(line, "legacy"), .separate = true, .interrupts = MSIX};
    struct arrival arrival;
    struct slot *slot;
    bool answered = false;

    if (!start_nic(&way) || !(slot = take_slot(false)))
        return;
    if (has_word(line, "lease"))
        build_question(slot, request, sizeof(request));
    else
        build_question(slot, discover, sizeof(discover));
    send_slot(slot);
    kick_tx();
    while (!answered && wait_for_frame())
        while (receive(&arrival)) {
            const uint8_t *frame = flatten(&arrival);

            if (!answered && is_answer(frame, arrival.length)) {
                print_answer(frame, arrival.length);
                answered = true;
            }
            give_back(&arrival);
        }
    if (!answered)
        print("no answer\n");
    stop_nic();
}
