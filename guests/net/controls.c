/* Configuration, interrupts, resets, and rings that are empty or broken. */

#include "net.h"

#define WAIT_MS 4000
#define POLLS 100000
#define MANY 8
#define STARVED 600u /* frames: more than there are buffers, and fewer than a tap queues */
#define NOWHERE 0x4000 /* the index of a queue or descriptor that does not exist */
#define LINK_CHANGES 4
#define BEAT_MS 20

static bool all_are_there(void)
{
    return (uint16_t)(nic.rx.used->index - nic.rx.next_used) >= MANY;
}

static bool half_is_there(void)
{
    return (uint16_t)(nic.rx.used->index - nic.rx.next_used) >= MANY / 2;
}

static bool is_sent(void)
{
    return queue_has_used(&nic.tx);
}

static bool is_pending(void)
{
    return msix_pending(&nic.device.pci, 1);
}

static bool ask(uint32_t count)
{
    bool good = send(OP_ASK, count, ASK_FRAMES, FRAME_LEAST);

    kick_tx();
    return good;
}

/* Receive requested frames without waiting for interrupts. */
static bool collect(uint32_t count)
{
    enum interrupts how = nic.device.interrupts;
    uint32_t good = 0, length;
    const uint8_t *frame;

    nic.device.interrupts = POLLED; /* only for virtio_wait; the device continues to interrupt */
    while (good < count && (frame = next_frame(OP_DATA, &length)) && is_data(frame, length))
        good++;
    nic.device.interrupts = how;
    return good == count;
}

static bool works(void)
{
    return echo(1, 60) && echo(2, FRAME_PLAIN);
}

static void test_configuration(bool legacy)
{
    const struct virtio_device *device = &nic.device;
    uint32_t low = virtio_config(device, CONFIG_MAC, 4), high = virtio_config(device, CONFIG_MAC + 4, 2);

    check_equal("address-by-words", low | (uint64_t)high << 32,
                *(uint32_t *)nic.lladdr | (uint64_t)nic.lladdr[4] << 32 | (uint64_t)nic.lladdr[5] << 40);
    check("address-is-of-one", low && !(low & 1));
    print("address %02x:%02x:%02x:%02x:%02x:%02x\n", nic.lladdr[0], nic.lladdr[1], nic.lladdr[2], nic.lladdr[3],
          nic.lladdr[4], nic.lladdr[5]);
    check_equal("link-is-up", virtio_config(device, CONFIG_STATUS, 2), STATUS_LINK_UP);
    if (!under_qemu()) {
        check_equal("one-pair", virtio_config(device, CONFIG_PAIRS, 2), 1);
        check_equal("mtu", virtio_config(device, CONFIG_MTU, 2), MTU);
        check_equal("nothing-behind-the-end", virtio_config(device, CONFIG_BYTES, 4), 0);
        virtio_set_config(device, CONFIG_MAC, 1, 0xAA);
        check_equal("address-is-read-only", virtio_config(device, CONFIG_MAC, 1), nic.lladdr[0]);
    }
    if (!start_nic(&(struct way){.legacy = legacy, .separate = true, .interrupts = MSIX}))
        return;
    check_equal("address-with-msix", virtio_config(device, CONFIG_MAC, 4), low);
    check("works-with-msix", works());
}

static void test_suppressed(void)
{
    uint32_t before = nic.device.interrupted;

    check("works", works());
    before = nic.device.interrupted;
    ask(MANY);
    check("unasked-come", soon(all_are_there));
    check("unasked-are-good", collect(MANY));
    check_equal("unasked-are-silent", nic.device.interrupted, before);
    queue_want_interrupt(&nic.rx, 1);
    ask(1);
    check("wanted-comes", wait_until(&nic.device.interrupted, before + 1, WAIT_MS));
    queue_no_interrupt(&nic.rx);
    check("wanted-is-good", collect(1));
}

static void test_masked(void)
{
    uint32_t before = nic.device.interrupted;

    msix_mask(&nic.device.pci, 1, true);
    queue_want_interrupt(&nic.rx, 1);
    ask(MANY);
    check("masked-come", soon(all_are_there));
    check("masked-is-pending", soon(is_pending));
    check_equal("masked-is-silent", nic.device.interrupted, before);
    msix_mask(&nic.device.pci, 1, false);
    check("unmasked-comes", wait_until(&nic.device.interrupted, before + 1, WAIT_MS));
    check("unmasked-is-not-pending", !is_pending());
    queue_no_interrupt(&nic.rx);
    check("masked-are-good", collect(MANY));
}

static void test_event_index(void)
{
    uint32_t before = nic.device.interrupted;

    queue_want_interrupt(&nic.rx, MANY);
    ask(MANY / 2);
    check("half-comes", soon(half_is_there));
    check("half-is-sent-for", soon(is_sent)); /* its interrupt would come before that */
    check_equal("not-before-the-event", nic.device.interrupted, before);
    ask(MANY / 2);
    check("at-the-event", wait_until(&nic.device.interrupted, before + 1, WAIT_MS));
    check("all-at-the-event", collect(MANY));
    check_equal("once-for-all", nic.device.interrupted, before + 1);
    flush();
}

static void test_sent(void)
{
    uint32_t before;

    flush();
    before = nic.device.interrupted;
    queue_want_interrupt(&nic.tx, 1);
    send(OP_DATA, 1, 0, 60);
    kick_tx();
    check("sent-interrupts", wait_until(&nic.device.interrupted, before + 1, WAIT_MS));
    queue_no_interrupt(&nic.tx);
    flush();
}

/* A driver that returns no buffers gets the first frames, and the others when it returns buffers. */
static void test_starved(void)
{
    static struct arrival arrivals[QUEUE_MAX];
    uint32_t count = 0, good = 0, length;
    const uint8_t *frame;

    ask(STARVED);
    while (nic.rx.free < nic.rx.size && wait_for_frame() && receive(&arrivals[count]))
        count++;
    for (uint32_t i = 0; i < count; i++) {
        frame = flatten(&arrivals[i]);
        good += is_data(frame, arrivals[i].length) && ((const struct frame_head *)frame)->number == good;
    }
    check("starved-has-the-first", good == count && count >= MANY);
    for (uint32_t i = 0; i < count; i++)
        give_back(&arrivals[i]);
    kick_rx();
    while (good < STARVED && (frame = next_frame(OP_DATA, &length)) && is_data(frame, length) &&
           ((const struct frame_head *)frame)->number == good && length == length_of(good))
        good++;
    check_equal("starved-goes-on", good, STARVED);
    check("works-after-starving", works());
}

/* The interface is reset while frames pass in both directions.  Nothing may move afterwards. */
static void test_reset_in_flight(const struct way *way)
{
    unsigned moved = 0;
    uint16_t index[2];

    if (!start_nic(way))
        return;
    ask(STARVED);
    for (uint32_t i = 0; i < SLOTS / 2; i++)
        send(OP_DATA, i, 0, 1000);
    kick_tx();
    stop_nic();
    check_equal("reset-in-flight", virtio_status(&nic.device), 0);
    index[0] = nic.rx.used->index;
    index[1] = nic.tx.used->index;
    for (unsigned i = 0; i < POLLS; i++) {
        moved += nic.rx.used->index != index[0] || nic.tx.used->index != index[1];
        cpu_pause();
    }
    check_equal("rings-are-let-go", moved, 0);
}

/* After a head outside of the table the device needs a reset (virtio 1.2, 2.1.2). */
static void test_broken_ring(const struct way *way, bool tx)
{
    struct queue *queue = tx ? &nic.tx : &nic.rx;
    uint32_t before;

    if (!start_nic(way) || !settle())
        return;
    before = nic.device.reconfigured;
    if (!tx) {
        ask(queue->size + 1); /* so that the device looks for one more buffer */
        while (queue->free < queue->size && wait_for_frame() && queue_take(queue, NULL))
            ;
        check_equal("buffers-are-used-up", queue->free, queue->size);
    }
    queue->available->ring[queue->next_available++ % queue->size] = NOWHERE;
    (tx ? kick_tx : kick_rx)();
    if (way->legacy && under_qemu()) { /* QEMU has that status only for virtio 1.x */
        skip("broken-ring");
    } else {
        check("broken-ring-interrupts", wait_until(&nic.device.reconfigured, before + 1, WAIT_MS));
        check("broken-ring-needs-reset", virtio_status(&nic.device) & STATUS_NEEDS_RESET);
    }
    check("works-after-broken-ring", start_nic(way) && settle() && works());
}

static void test_strange_notifications(const struct way *way)
{
    struct queue other = {.index = NOWHERE, .notify = nic.tx.notify};

    if (!start_nic(way) || !settle())
        return;
    virtio_notify(&nic.device, &other);
    if (nic.device.notify.io) {
        outb((uint16_t)nic.tx.notify, 0);
        outl((uint16_t)nic.tx.notify, 0);
    }
    virtio_notify(&nic.device, &nic.tx); /* without new buffers */
    virtio_notify(&nic.device, &nic.rx);
    check("works-after-strange-notifications", works());
    check_equal("none-needs-a-reset", virtio_status(&nic.device) & STATUS_NEEDS_RESET, 0);
}

void test_controls(const char *name, bool legacy)
{
    struct way way = {.legacy = legacy, .mergeable = true, .separate = legacy, .interrupts = MSIX};

    check_group(name);
    if (!start_nic(&(struct way){.legacy = legacy, .separate = true}))
        return;
    test_configuration(legacy);
    for (unsigned events = 0; events < 2; events++) {
        way.event_index = events;
        if (!start_nic(&way))
            return;
        test_suppressed();
        test_masked();
        test_sent();
        if (events)
            test_event_index();
        test_starved();
        test_reset_in_flight(&way);
        check("works-after-reset", start_nic(&way) && settle() && works());
        test_broken_ring(&way, false);
        test_broken_ring(&way, true);
        test_strange_notifications(&way);
    }
    stop_nic();
}

void watch_link(const char *line)
{
    struct way way = {
        .legacy = has_word(line, "legacy"), .separate = true,
        .interrupts = has_word(line, "intx") ? INTX_IOAPIC : MSIX};
    bool up = false;

    if (!start_nic(&way))
        return;
    for (unsigned changes = 0; changes <= LINK_CHANGES;) {
        uint32_t seen = nic.device.reconfigured;
        bool now = virtio_config(&nic.device, CONFIG_STATUS, 2) & STATUS_LINK_UP;

        if (now == up) {
            /* The host does not report that a tap is down until something is sent through it. */
            while (!wait_until(&nic.device.reconfigured, seen + 1, BEAT_MS))
                if (up && send(OP_DATA, changes, 0, FRAME_LEAST))
                    kick_tx();
            continue;
        }
        up = now;
        changes++;
        print("link %s\n", !up ? "down" : works() ? "up, and works" : "up, but does not work");
    }
    stop_nic();
}
