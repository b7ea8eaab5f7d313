#include "virtio.h"

#define TABLE_MAX QUEUE_MAX /* a chain may not be longer than the queue (virtio 1.2, 2.7.5.3.1) */

static volatile uint16_t *used_event(const struct queue *queue)
{
    return &queue->available->ring[queue->size];
}

static volatile uint16_t *available_event(const struct queue *queue)
{
    return (volatile uint16_t *)&queue->used->ring[queue->size];
}

static void put(volatile struct descriptor *descriptor, const struct segment *segment)
{
    descriptor->address = (uint64_t)segment->address;
    descriptor->length = segment->length;
    descriptor->flags = segment->write ? DESC_WRITE : 0;
}

static void offer(struct queue *queue, uint16_t head, void *token)
{
    queue->tokens[head] = token;
    queue->available->ring[queue->next_available % queue->size] = head;
    queue->next_available++;
}

static bool add_chain(struct queue *queue, const struct segment *segments, unsigned count, void *token)
{
    uint16_t head = queue->first_free, at = head;

    if (queue->free < count)
        return false;
    for (unsigned i = 0; i < count; i++) {
        volatile struct descriptor *descriptor = &queue->table[at];

        put(descriptor, &segments[i]); /* `next` also links the free descriptors */
        if (i + 1 < count)
            descriptor->flags |= DESC_NEXT;
        at = descriptor->next;
    }
    queue->first_free = at;
    queue->free -= count;
    offer(queue, head, token);
    return true;
}

static bool add_table(struct queue *queue, const struct segment *segments, unsigned count, void *token)
{
    uint16_t head = queue->first_free;
    struct descriptor *table;

    if (queue->free < 1)
        return false;
    if (!queue->indirect[head])
        queue->indirect[head] = take_pages(TABLE_MAX * sizeof(*table));
    table = queue->indirect[head];
    for (unsigned i = 0; i < count; i++) {
        put(&table[i], &segments[i]);
        table[i].next = (uint16_t)(i + 1);
        if (i + 1 < count)
            table[i].flags |= DESC_NEXT;
    }
    queue->first_free = queue->table[head].next;
    queue->free--;
    queue->table[head].address = (uint64_t)table;
    queue->table[head].length = count * (uint32_t)sizeof(*table);
    queue->table[head].flags = DESC_INDIRECT;
    offer(queue, head, token);
    return true;
}

bool queue_add(struct queue *queue, const struct segment *segments, unsigned count, void *token, bool indirect)
{
    if (count == 0 || count > TABLE_MAX)
        return false;
    return (indirect ? add_table : add_chain)(queue, segments, count, token);
}

bool queue_publish(struct queue *queue)
{
    uint16_t old = queue->notified, new = queue->next_available;

    /* x86 keeps stores in order, so descriptors and ring are visible before the index. */
    queue->available->index = new;
    queue->notified = new;
    full_fence(); /* the index must be visible before we read whether the device wants a notification */
    if (queue->event_index)
        return (uint16_t)(new - *available_event(queue) - 1) < (uint16_t)(new - old);
    return new != old && !(queue->used->flags & USED_NO_NOTIFY);
}

bool queue_has_used(const struct queue *queue)
{
    return queue->used->index != queue->next_used;
}

void *queue_take(struct queue *queue, uint32_t *length)
{
    volatile struct used_element *element = &queue->used->ring[queue->next_used % queue->size];
    uint32_t head, last;
    unsigned count = 1;
    void *token;

    if (!queue_has_used(queue))
        return NULL;
    head = last = element->id;
    if (length)
        *length = element->length;
    if (head >= queue->size || !queue->tokens[head]) {
        print("the device returns descriptor %u, which it does not have\n", head);
        power_off();
    }
    for (; queue->table[last].flags & DESC_NEXT; count++)
        last = queue->table[last].next;
    queue->table[last].next = queue->first_free;
    queue->first_free = (uint16_t)head;
    queue->free += count;
    token = queue->tokens[head];
    queue->tokens[head] = NULL;
    queue->next_used++;
    return token;
}

bool queue_want_interrupt(struct queue *queue, unsigned more)
{
    if (queue->event_index)
        *used_event(queue) = (uint16_t)(queue->next_used + more - 1);
    else
        queue->available->flags = 0;
    full_fence(); /* the device must see this before we check for missed buffers */
    return (uint16_t)(queue->used->index - queue->next_used) >= (queue->event_index ? more : 1);
}

void queue_no_interrupt(struct queue *queue)
{
    /* The event index cannot be switched off.  This value is as far away as possible in both directions. */
    if (queue->event_index)
        *used_event(queue) = (uint16_t)(queue->next_used + 0x8000);
    else
        queue->available->flags = AVAIL_NO_INTERRUPT;
}
