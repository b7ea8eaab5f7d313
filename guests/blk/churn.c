/* Churn: keep the queue busy with patterns that are written, read back and compared.  Each job has its own region of
 * the disk and its own number.  For each line of input, this guest prints
 *
 *     churn: rounds=N errors=E lost=L silent=S interrupts=I spurious=P beats=B backwards=W
 *
 * `errors` counts failed requests and wrong data.  `lost` counts interrupts that did not come although the used ring
 * had buffers.  `silent` counts waits of half a minute without any used buffer.  A line with a q ends the guest.
 *
 * With `smp` another processor reads the ACPI timer meanwhile, which must not run backwards.  `beats` counts the reads.
 *
 * The guest sleeps for interrupts: MSI-X, or INTx with intx-pic or intx-ioapic.  With `polled` it polls. */

#include "blk.h"

#define DEPTH 16
#define REGION ((SCRATCH_END - SCRATCH) / DEPTH)
#define SECTORS_MAX 64u
#define ALARM_MS 4000
#define ALARMS 8
#define FLUSH_EVERY 16
#define REST_PAUSES 1000

enum state { WRITING, FLUSHING, READING };

static struct job {
    struct request request;
    enum state state;
    uint64_t first, sector;
    unsigned sectors;
    uint8_t *data, number;
} jobs[DEPTH];

static volatile uint32_t lines, quits, beats, backwards;
static uint32_t rounds, errors, lost, silent, under_way;

static void on_receive(void)
{
    inb(UART_IIR);
    while (inb(UART_LSR) & LSR_READY) {
        char c = (char)inb(UART_DATA);

        lines += c == '\r';
        quits += c == 'q';
    }
}

/* The work of the other processor.  A 24-bit timer seems to run backwards if the host does not run this processor for
 * 2.4 s.  For half the range of a 32-bit timer no host stops it. */
static void watch_time(void)
{
    uint32_t mask = power.timer_half * 2 + 1;

    for (uint32_t last = inl(power.timer);;) {
        uint32_t now = inl(power.timer);

        backwards += ((now - last) & mask) > power.timer_half;
        last = now;
        beats++;
        for (unsigned i = 0; i < REST_PAUSES; i++)
            cpu_pause();
    }
}

static void tell(void)
{
    print("churn: rounds=%u errors=%u lost=%u silent=%u interrupts=%u spurious=%u beats=%u backwards=%u\n", rounds,
          errors, lost, silent, disk.device.interrupted, disk.device.spurious, beats, backwards);
}

static void send_off(struct job *job)
{
    static const uint32_t types[] = {T_OUT, T_FLUSH, T_IN};
    struct segment data = {job->data, job->sectors * SECTOR, job->state == READING};

    submit(&job->request, types[job->state], job->state == FLUSHING ? 0 : job->sector, &data, job->state != FLUSHING);
    under_way++;
}

static void begin(struct job *job)
{
    job->state = WRITING;
    job->number++;
    job->sectors = 1 + random_number() % SECTORS_MAX;
    job->sector = job->first + random_number() % (REGION - job->sectors);
    fill_pattern(job->data, job->sector, job->sectors, job->number);
    send_off(job);
}

static void go_on(struct job *job)
{
    under_way--;
    errors += *(volatile uint8_t *)&job->request.status != S_OK;
    if (job->state == WRITING && disk.device.features & F_FLUSH && random_number() % FLUSH_EVERY == 0) {
        job->state = FLUSHING;
        send_off(job);
    } else if (job->state != READING) {
        job->state = READING;
        memset(job->data, 0, job->sectors * SECTOR);
        send_off(job);
    } else {
        errors += !is_pattern(job->data, job->sector, job->sectors, job->number);
        rounds++;
        if (!quits)
            begin(job);
    }
}

/* Sleep until there are used buffers.  After a pause of the machine the alarm may come before the interrupt, but only
 * once.  So the first alarm does not count as a lost interrupt. */
static void sleep(void)
{
    uint32_t before = disk.device.interrupted;

    if (queue_want_interrupt(&disk.queue, 1))
        return;
    for (unsigned alarms = 0; alarms < ALARMS; alarms++) {
        if (wait_until(&disk.device.interrupted, before + 1, ALARM_MS))
            return;
        if (alarms && queue_has_used(&disk.queue)) {
            lost++;
            return;
        }
    }
    silent++;
}

static enum interrupts chosen(void)
{
    if (option("polled"))
        return POLLED;
    if (option("intx-pic"))
        return INTX_PIC;
    return option("intx-ioapic") ? INTX_IOAPIC : MSIX;
}

void churn(void)
{
    const struct way way = {
        .legacy = !has_interface(false) || option("legacy"),
        .indirect = true,
        .event_index = !option("flags"),
        .interrupts = chosen(),
    };
    const uint8_t *entry = NULL;
    uint32_t seen = 0;
    uint8_t id;

    if (option("smp") && (!next_processor(&entry, &id) || !processor_start(id, watch_time)))
        print("churn: no other processor\n");
    irq_enable(IRQ_COM1, on_receive);
    outb(UART_IER, IER_RECEIVE);
    if (!start_disk(&way))
        return;
    print("churn: begin\n");
    for (unsigned i = 0; i < DEPTH; i++) {
        jobs[i].first = SCRATCH + i * REGION;
        jobs[i].data = take_pages(SECTORS_MAX * SECTOR);
        begin(&jobs[i]);
    }
    kick();
    while (under_way) {
        struct job *job;

        while ((job = queue_take(&disk.queue, NULL)))
            go_on(job);
        kick();
        if (lines != seen) {
            seen = lines;
            tell();
        }
        if (virtio_status(&disk.device) & STATUS_NEEDS_RESET) {
            print("churn: the device wants a reset\n");
            return;
        }
        if (way.interrupts == POLLED)
            cpu_pause();
        else if (under_way)
            sleep();
    }
    tell();
    print("churn: end\n");
}
