/* openbsd: a kernel for OpenBSD's boot protocol that prints what the loader has told it, and switches off.
 *
 * Built for both architectures, i386 and amd64.  It runs at its load address instead of its linked address, so all
 * code is position independent, and no table contains a pointer.  It takes no interrupts, because a KVM that
 * interprets lacks IRET in 32-bit code. */

#include "../common/io.h"

#define UART 0x3F8
#define UART_LSR (UART + 5)
#define LSR_THRE 0x20
#define PM_CONTROL 0x604
#define PM_SLEEP_S5 (5 << 10 | 0x2000)

/* The arguments on the stack above the return address (sys/arch/amd64/amd64/locore.S) */
struct arguments {
    uint32_t howto, bootdev, api_version, end, extended_memory, base_memory, size, address;
};

enum { BOOTARG_MEMMAP = 0, BOOTARG_CONSDEV = 5, BOOTARG_BOOTMAC = 7 };

struct bootarg {
    uint32_t type, size, next;
};

struct memory_entry {
    uint64_t address, size;
    uint32_t type;
} __attribute__((packed));

/* The parts of an ELF header and of a section header that matter here, at their native width. */
struct elf_header {
    uint8_t ident[16];
    uint16_t type, machine;
    uint32_t version;
    uintptr_t entry, phoff, shoff;
    uint32_t flags;
    uint16_t ehsize, phentsize, phnum, shentsize, shnum, shstrndx;
};

struct section_header {
    uint32_t name, type;
    uintptr_t flags, address, offset, size;
    uint32_t link, info;
    uintptr_t align, entry_size;
};

enum { SHT_SYMTAB = 2 };

#define HIDDEN __attribute__((visibility("hidden")))

extern char kernel_end[] HIDDEN;
_Noreturn void kernel_main(const struct arguments *arguments) HIDDEN;

/* A name that must be in the loaded symbols. */
const char symbol_to_find[] HIDDEN __attribute__((used)) = "symbol_to_find";
static volatile uint8_t random_bytes[64] __attribute__((section(".openbsd.randomdata")));

static void put(const char *text)
{
    for (; *text; text++) {
        while (!(inb(UART_LSR) & LSR_THRE))
            cpu_pause();
        outb(UART, (uint8_t)*text);
    }
}

static void put_digit(unsigned digit)
{
    char text[2] = {(char)(digit < 10 ? '0' + digit : 'a' + digit - 10), '\0'};

    put(text);
}

static void put_hex(uint64_t value)
{
    int shift = 60;

    while (shift && !(value >> shift))
        shift -= 4;
    for (; shift >= 0; shift -= 4)
        put_digit(value >> shift & 15);
}

static void put_field(const char *name, uint64_t value)
{
    put(name);
    put_hex(value);
}

static void show_memory_map(const struct bootarg *argument)
{
    const struct memory_entry *entry = (const void *)(argument + 1);
    const struct memory_entry *end = (const void *)((const char *)argument + argument->size);

    for (; entry + 1 <= end; entry++) {
        if (entry->type == 0) {
            put("memmap end\r\n");
            return;
        }
        put_field("memmap address=", entry->address);
        put_field(" size=", entry->size);
        put_field(" type=", entry->type);
        put("\r\n");
    }
    put("memmap without an end\r\n");
}

static void show_console(const struct bootarg *argument)
{
    const uint32_t *words = (const uint32_t *)(argument + 1);

    put_field("consdev dev=", words[0]);
    put_field(" speed=", words[1]);
    put_field(" address=", words[2]);
    put("\r\n");
}

static void show_mac(const struct bootarg *argument)
{
    const uint8_t *mac = (const uint8_t *)(argument + 1);

    put("bootmac ");
    for (unsigned i = 0; i < 6; i++) {
        if (i)
            put(":");
        put_digit(mac[i] >> 4);
        put_digit(mac[i] & 15);
    }
    put("\r\n");
}

static void show_arguments(const struct arguments *arguments)
{
    uint32_t at = arguments->address, end = at + arguments->size;

    while (at + sizeof(struct bootarg) <= end) {
        const struct bootarg *argument = (const struct bootarg *)(uintptr_t)at;

        if (argument->type == 0xFFFFFFFF || argument->size < sizeof(*argument))
            break;
        if (argument->type == BOOTARG_MEMMAP)
            show_memory_map(argument);
        else if (argument->type == BOOTARG_CONSDEV)
            show_console(argument);
        else if (argument->type == BOOTARG_BOOTMAC)
            show_mac(argument);
        else {
            put_field("bootarg type=", argument->type);
            put("\r\n");
        }
        at += argument->size;
    }
    if (at + 4 <= end && *(const uint32_t *)(uintptr_t)at == 0xFFFFFFFF)
        put("bootargs end\r\n");
    else
        put("bootargs without an end\r\n");
}

static bool has_name(const char *name)
{
    const char *wanted = symbol_to_find;

    while (*wanted && *wanted == *name)
        wanted++, name++;
    return *wanted == *name;
}

/* Return the linked address that the loaded symbols give for `symbol_to_find`, or 0. */
static uintptr_t find_symbol(const char *base, const struct section_header *sections,
                             const struct section_header *symbols)
{
    const char *names = base + sections[symbols->link].offset;
    const char *at = base + symbols->offset, *end = at + symbols->size;

    for (; at + symbols->entry_size <= end; at += symbols->entry_size) {
        if (!has_name(names + *(const uint32_t *)at))
            continue;
        /* The value follows the name in 32-bit symbols; in 64-bit ones there are 4 bytes more between them. */
        return *(const uintptr_t *)(at + sizeof(uintptr_t));
    }
    return 0;
}

static void show_symbols(uint32_t end)
{
    uintptr_t unit = sizeof(uintptr_t);
    uintptr_t base = ((uintptr_t)kernel_end + unit - 1) & ~(unit - 1);
    const struct elf_header *elf = (const void *)base;
    const struct section_header *sections = (const void *)(base + elf->shoff);

    put_field("kernel end=", (uintptr_t)kernel_end);
    put_field(" esym=", end);
    put("\r\n");
    if (end <= base || *(const uint32_t *)base != 0x464C457F) {
        put("no elf header behind the kernel\r\n");
        return;
    }
    put_field("elf shoff=", elf->shoff);
    put_field(" shnum=", elf->shnum);
    put_field(" phnum=", elf->phnum);
    put("\r\n");
    for (unsigned i = 0; i < elf->shnum; i++) {
        if (sections[i].type != SHT_SYMTAB)
            continue;
        put_field("symtab size=", sections[i].size);
        put_field(" symbol_to_find=", find_symbol((const char *)base, sections, &sections[i]));
        put("\r\n");
    }
}

void kernel_main(const struct arguments *arguments)
{
    uint8_t random = 0;

    put(sizeof(void *) == 8 ? "openbsd boot protocol, amd64\r\n" : "openbsd boot protocol, i386\r\n");
    put_field("howto=", arguments->howto);
    put_field(" bootdev=", arguments->bootdev);
    put_field(" api=", arguments->api_version);
    put_field(" extended=", arguments->extended_memory);
    put_field(" base=", arguments->base_memory);
    put("\r\n");
    put_field("bootargs address=", arguments->address);
    put_field(" size=", arguments->size);
    put("\r\n");
    show_arguments(arguments);
    show_symbols(arguments->end);
    for (unsigned i = 0; i < sizeof(random_bytes); i++)
        random |= random_bytes[i];
    put(random ? "random data filled\r\n" : "random data empty\r\n");
    put("openbsd: done\r\n");
    outw(PM_CONTROL, PM_SLEEP_S5);
    halt();
}
