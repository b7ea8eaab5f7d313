/* Interrupts and exceptions. */

#include "guest.h"

#define GATE_INTERRUPT 0x8E
#define KERNEL_CODE 0x08
#define PIC_READ_ISR 0x0B
#define PIC_EOI 0x20
#define RING 3
#define HLT 0xF4

struct gate {
    uint16_t offset_low, selector;
    uint8_t stack, type;
    uint16_t offset_middle;
    uint32_t offset_high, reserved;
};

struct table_register {
    uint16_t limit;
    uint64_t base;
} __attribute__((packed));

extern const char trap_stubs[VECTORS][16];
void trap(struct frame *frame);

static struct gate idt[VECTORS];
static void (*handlers[VECTORS])(struct frame *);
static void (*irq_handlers[16])(void);

/* Where to continue after a #GP; null if none is expected. */
uint64_t fault_resume;

void vector_set(unsigned vector, void (*handler)(struct frame *))
{
    handlers[vector] = handler;
}

static void general_protection(struct frame *frame)
{
    frame->rip = fault_resume;
    fault_resume = 0;
}

void trap(struct frame *frame)
{
    uint64_t address;

    if (frame->vector == VECTOR_GP && fault_resume) {
        general_protection(frame);
        return;
    }
    if (frame->vector == VECTOR_GP && frame->cs & RING && peek8(frame->rip) == HLT) {
        ((void (*)(void *))frame->rdi)((void *)frame->rsi);
        frame->rip++;
        return;
    }
    if (handlers[frame->vector]) {
        handlers[frame->vector](frame);
        return;
    }
    if (frame->vector == VECTOR_SPURIOUS)
        return; /* a spurious interrupt needs no EOI */
    __asm__ volatile("movq %%cr2, %0" : "=r"(address));
    print("unexpected trap %lu, error %lx, at %lx, cr2 %lx\n", frame->vector, frame->error, frame->rip, address);
    power_off();
}

void in_ring0(void (*function)(void *), void *argument)
{
    if (current_ring() == 0)
        function(argument);
    else
        __asm__ volatile("hlt" : : "D"(function), "S"(argument) : "memory");
}

static void irq_trap(struct frame *frame)
{
    unsigned irq = (unsigned)frame->vector - VECTOR_PIC;

    /* A line that is lowered before the acknowledgement gives a spurious IRQ 7 or 15, which is not in service. */
    if (irq == 7 || irq == 15) {
        uint16_t port = irq == 7 ? PIC_MASTER : PIC_SLAVE;

        outb(port, PIC_READ_ISR);
        if (!(inb(port) & 0x80)) {
            if (irq == 15)
                outb(PIC_MASTER, PIC_EOI);
            return;
        }
    }
    if (irq_handlers[irq])
        irq_handlers[irq]();
    if (irq >= 8)
        outb(PIC_SLAVE, PIC_EOI);
    outb(PIC_MASTER, PIC_EOI);
}

static void pic_init(void)
{
    outb(PIC_MASTER, 0x11); /* ICW1: edge, cascade, ICW4 follows */
    outb(PIC_SLAVE, 0x11);
    outb(PIC_MASTER + 1, VECTOR_PIC);
    outb(PIC_SLAVE + 1, VECTOR_PIC + 8);
    outb(PIC_MASTER + 1, 0x04); /* slave at IRQ 2 */
    outb(PIC_SLAVE + 1, 0x02);
    outb(PIC_MASTER + 1, 0x01); /* ICW4: 8086 */
    outb(PIC_SLAVE + 1, 0x01);
    outb(PIC_MASTER + 1, 0xFB); /* all masked but the cascade */
    outb(PIC_SLAVE + 1, 0xFF);
    /* Firmware would have connected the 8259s, but there may be no firmware. */
    lapic_write(LAPIC_SPURIOUS, LAPIC_ON | 0xFF); /* while it is off, every LVT entry stays masked */
    lapic_write(LAPIC_LINT0, LAPIC_EXTINT);
}

void irq_enable(unsigned irq, void (*handler)(void))
{
    uint16_t port = (irq < 8 ? PIC_MASTER : PIC_SLAVE) + 1;

    irq_handlers[irq] = handler;
    outb(port, (uint8_t)(inb(port) & ~(1u << (irq & 7))));
}

void irq_disable(unsigned irq)
{
    uint16_t port = (irq < 8 ? PIC_MASTER : PIC_SLAVE) + 1;

    outb(port, (uint8_t)(inb(port) | 1u << (irq & 7)));
    irq_handlers[irq] = NULL;
}

void traps_load(void)
{
    struct table_register idtr = {sizeof(idt) - 1, (uint64_t)idt};

    __asm__ volatile("lidt %0" : : "m"(idtr));
}

void traps_init(void)
{
    for (unsigned vector = 0; vector < VECTORS; vector++) {
        uint64_t stub = (uint64_t)trap_stubs[vector];

        idt[vector].offset_low = (uint16_t)stub;
        idt[vector].offset_middle = (uint16_t)(stub >> 16);
        idt[vector].selector = KERNEL_CODE;
        idt[vector].type = GATE_INTERRUPT;
    }
    for (unsigned irq = 0; irq < 16; irq++)
        handlers[VECTOR_PIC + irq] = irq_trap;
    traps_load();
    pic_init();
}

bool try_rdmsr(uint32_t msr, uint64_t *value)
{
    uint32_t low = 0, high = 0;
    bool faulted = true;

    __asm__ volatile("movq $1f, fault_resume\n\t"
                     "rdmsr\n\t"
                     "movb $0, %b2\n"
                     "1:"
                     : "+a"(low), "+d"(high), "+r"(faulted)
                     : "c"(msr)
                     : "memory");
    fault_resume = 0;
    *value = (uint64_t)high << 32 | low;
    return !faulted;
}

bool try_wrmsr(uint32_t msr, uint64_t value)
{
    bool faulted = true;

    __asm__ volatile("movq $1f, fault_resume\n\t"
                     "wrmsr\n\t"
                     "movb $0, %b0\n"
                     "1:"
                     : "+r"(faulted)
                     : "c"(msr), "a"((uint32_t)value), "d"((uint32_t)(value >> 32))
                     : "memory");
    fault_resume = 0;
    return !faulted;
}
