/* vmmci: a driver of the VM control device, like OpenBSD's, and variants that behave differently.
 *
 *     (nothing)    acknowledges a shutdown request, and resets the machine
 *     slow         acknowledges, and takes two seconds for it
 *     linger       acknowledges, and never ends
 *     ignore       ignores the request
 *     crash        crashes instead: a triple fault
 *     off          acknowledges, and switches itself off
 *     silent       does not acknowledge; resets the machine
 *     flood        acknowledges again and again
 *     announce     announces its own end, and waits for it
 *     announce-flood   announces it again and again
 *     announce-reset   announces it, and resets the machine
 *
 * Requests to read the clock again are always obeyed.  The guest prints each request. */

#include "virtio.h"

enum { VENDOR = 0x0B5D, DEVICE = 0x0777 };
enum { CONFIG_COMMAND = 0, CONFIG_SECONDS = 4, CONFIG_MICROSECONDS = 12 };
enum { NONE, SHUTDOWN, REBOOT, SYNCRTC };

#define F_TIMESYNC (1ull << 0)
#define F_ACK (1ull << 1)
#define F_SYNCRTC (1ull << 2)

#define SLOW_MS 2000
#define WAIT_MS 4000

static struct virtio_device vmmci;

static void answer(uint32_t command)
{
    virtio_set_config(&vmmci, CONFIG_COMMAND, 4, command);
}

static uint64_t clock_of_host(void)
{
    uint64_t low = virtio_config(&vmmci, CONFIG_SECONDS, 4);

    return (uint64_t)virtio_config(&vmmci, CONFIG_SECONDS + 4, 4) << 32 | low;
}

static _Noreturn void wait_for_ever(void)
{
    for (;;)
        delay(WAIT_MS);
}

static void end(uint32_t command)
{
    if (option("ignore"))
        return;
    if (option("crash"))
        triple_fault();
    if (option("silent"))
        triple_fault();
    answer(command);
    print("acknowledged\n");
    if (option("linger"))
        wait_for_ever();
    while (option("flood"))
        answer(command);
    if (option("slow"))
        delay(SLOW_MS);
    if (option("off"))
        power_off();
    triple_fault(); /* as OpenBSD resets a machine */
}

static void announce(void)
{
    print("announcing\n");
    do
        answer(SHUTDOWN);
    while (option("announce-flood"));
    if (option("announce-reset"))
        triple_fault();
    wait_for_ever();
}

static bool start(void)
{
    unsigned slot = 0;

    while (slot < PCI_SLOTS && (pci_read16(slot, PCI_VENDOR) != VENDOR || pci_read16(slot, PCI_DEVICE) != DEVICE))
        slot++;
    if (slot == PCI_SLOTS || !virtio_open(&vmmci, slot, true))
        return false;
    virtio_accept(&vmmci, virtio_offered(&vmmci) & (F_TIMESYNC | F_SYNCRTC | (option("silent") ? 0 : F_ACK)));
    virtio_interrupts(&vmmci, INTX_PIC);
    virtio_ready(&vmmci);
    return true;
}

void guest_main(void)
{
    uint32_t seen = 0;

    if (!start()) {
        print("vmmci: there is none\n");
        return;
    }
    print("vmmci: ready, features %lx, clock %lu, rtc %u\n", vmmci.features, clock_of_host(), rtc_seconds());
    if (option("announce") || option("announce-flood") || option("announce-reset"))
        announce();
    for (;;) {
        uint32_t command;

        if (!wait_until(&vmmci.reconfigured, seen + 1, WAIT_MS))
            continue;
        seen = vmmci.reconfigured;
        command = virtio_config(&vmmci, CONFIG_COMMAND, 4);
        print("asked for %u, spurious %u\n", command, vmmci.spurious);
        if (command == SYNCRTC) {
            print("clock %lu, rtc %u\n", clock_of_host(), rtc_seconds());
            answer(SYNCRTC);
            print("then asked for %u\n", virtio_config(&vmmci, CONFIG_COMMAND, 4));
        } else if (command != NONE) {
            end(command);
        }
    }
}
