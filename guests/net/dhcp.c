/* One question to the host's DHCP server (RFC 2131):
 *
 *     dhcp [legacy]    send DISCOVER; the answer is "offer A servers B ...", with the address and the name servers */

#include "net.h"

enum {
    IP_AT = ETHERNET, UDP_AT = IP_AT + 20, BODY_AT = UDP_AT + 8, OPTIONS_AT = BODY_AT + 240,
    QUESTION = OPTIONS_AT + 4, IP_SUM = IP_AT + 10, OFFERED_AT = BODY_AT + 16,
    PORT_SERVER = 67, PORT_CLIENT = 68, IP_UDP = 17, TRANSACTION = 0x4711,
    OPTION_SERVERS = 6, OPTION_END = 255,
};

static const uint8_t options[] = {53, 1, 1, OPTION_END}; /* DISCOVER */

static uint16_t sum_of(const uint8_t *packet)
{
    uint32_t sum = 0;

    for (unsigned at = 0; at < 20; at += 2)
        sum += get16(packet + at);
    while (sum >> 16)
        sum = (sum & 0xFFFF) + (sum >> 16);
    return (uint16_t)~sum;
}

static void build_question(struct slot *slot)
{
    static const uint8_t cookie[] = {0x63, 0x82, 0x53, 0x63};
    uint8_t *frame = slot->base;

    memset(frame, 0, QUESTION);
    memset(frame, 0xFF, LLADDR);
    memcpy(frame + LLADDR, nic.lladdr, LLADDR);
    put16(frame + 12, TYPE_IPV4);
    frame[IP_AT] = 0x45;
    put16(frame + IP_AT + 2, QUESTION - IP_AT);
    frame[IP_AT + 8] = 64;
    frame[IP_AT + 9] = IP_UDP;
    memset(frame + IP_AT + 16, 0xFF, 4);
    put16(frame + IP_SUM, sum_of(frame + IP_AT));
    put16(frame + UDP_AT, PORT_CLIENT);
    put16(frame + UDP_AT + 2, PORT_SERVER);
    put16(frame + UDP_AT + 4, QUESTION - UDP_AT);
    frame[BODY_AT] = 1; /* a request, of Ethernet, whose addresses have six bytes */
    frame[BODY_AT + 1] = 1;
    frame[BODY_AT + 2] = LLADDR;
    put16(frame + BODY_AT + 6, TRANSACTION);
    memcpy(frame + BODY_AT + 28, nic.lladdr, LLADDR);
    memcpy(frame + BODY_AT + 236, cookie, sizeof(cookie));
    memcpy(frame + OPTIONS_AT, options, sizeof(options));
    slot->frame = slot->base;
    slot->length = QUESTION;
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

static void print_answer(const uint8_t *frame, uint32_t length)
{
    print("offer");
    print_address(frame + OFFERED_AT);
    print(" servers");
    for (uint32_t at = OPTIONS_AT; at + 2 <= length && frame[at] != OPTION_END; at += 2u + frame[at + 1])
        if (frame[at] == OPTION_SERVERS)
            for (uint32_t i = 0; i + 4 <= frame[at + 1] && at + 2 + i + 4 <= length; i += 4)
                print_address(frame + at + 2 + i);
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
    build_question(slot);
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
