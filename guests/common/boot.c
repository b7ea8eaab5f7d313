/* Reads the loader's information, and calls guest_main. */

#include "guest.h"

const struct start_info *start_info;

_Noreturn void guest_start(const struct start_info *info);

void guest_start(const struct start_info *info)
{
    start_info = info;
    console_init();
    traps_init();
    acpi_init();
    guest_main();
    power_off();
}

unsigned memory_range_count(void)
{
    return start_info->version >= 1 && start_info->memory_map ? start_info->memory_map_entries : 0;
}

const struct memory_range *memory_range(unsigned index)
{
    return (const struct memory_range *)start_info->memory_map + index;
}

const char *cmdline(void)
{
    return start_info->cmdline ? (const char *)start_info->cmdline : "";
}

/* Return the text after `name` if a word of the command line begins with it. */
static const char *find_word(const char *name)
{
    size_t length = strlen(name);
    const char *at = cmdline();

    while (*at) {
        size_t matching = 0;

        while (*at == ' ')
            at++;
        while (matching < length && at[matching] == name[matching])
            matching++;
        if (matching == length)
            return at + length;
        while (*at && *at != ' ')
            at++;
    }
    return NULL;
}

bool option(const char *name)
{
    const char *rest = find_word(name);

    return rest && (*rest == '\0' || *rest == ' ');
}

uint32_t option_number(const char *name, uint32_t otherwise)
{
    const char *rest = find_word(name);

    return rest && *rest == '=' ? parse_number(rest + 1, otherwise) : otherwise;
}
