/* Named checks, and the report about them, for guests that test something. */

#include "guest.h"

#define SOON_CYCLES 10000000000ull /* some seconds; on an idle host the events come within microseconds */
#define NAME_MAX 80u

static unsigned good_count, bad_count;
static const char *group = "", *separator = "";

static void passed(const char *name)
{
    good_count++;
    print("ok %s%s%s\n", group, separator, name);
}

void check_group(const char *name)
{
    group = name;
    separator = *name ? "." : "";
}

const char *dotted(const char *const *words, unsigned count)
{
    static char name[NAME_MAX];
    char *at = name;

    for (unsigned i = 0; i < count; i++) {
        size_t length = strlen(words[i]);

        if (i)
            *at++ = '.';
        memcpy(at, words[i], length);
        at += length;
    }
    *at = '\0';
    return name;
}

bool soon(bool (*happened)(void))
{
    uint64_t begin = rdtsc();

    while (!happened())
        if (rdtsc() - begin > SOON_CYCLES)
            return false;
    return true;
}

void check(const char *name, bool good)
{
    check_equal(name, good, true);
}

void check_equal(const char *name, uint64_t got, uint64_t want)
{
    if (got == want) {
        passed(name);
        return;
    }
    bad_count++;
    print("FAIL %s%s%s: got %lx want %lx\n", group, separator, name, got, want);
}

void check_range(const char *name, uint64_t got, uint64_t least, uint64_t most)
{
    if (least <= got && got <= most) {
        passed(name);
        return;
    }
    bad_count++;
    print("FAIL %s%s%s: got %lu want %lu to %lu\n", group, separator, name, got, least, most);
}

void skip(const char *name)
{
    print("skip %s%s%s\n", group, separator, name);
}

void report(const char *title)
{
    print("%s: %u ok, %u failed\n", title, good_count, bad_count);
    good_count = bad_count = 0;
}
