"""Names of interface groups of the host, as `ip link` reads them."""

import os

PLACES = ("/usr/share/iproute2", "/usr/lib/iproute2", "/etc/iproute2")  # a later one overrides an earlier one
GROUP_MAX = (1 << 31) - 1


def number(name: str) -> int | None:
    """Return the number of a group, or None if the host has no group of this name."""
    if name.isascii() and name.isdigit():
        return int(name) if int(name) <= GROUP_MAX else None
    found = None
    for place in PLACES:
        for path in files(place):
            found = lookup(path, name, found)
    return found


def files(place: str) -> list[str]:
    """Return the files of a directory that may define groups."""
    directory = f"{place}/group.d"
    try:
        more = sorted(entry for entry in os.listdir(directory) if entry.endswith(".conf"))
    except OSError:
        more = []
    return [f"{place}/group", *(f"{directory}/{entry}" for entry in more)]


def lookup(path: str, name: str, default: int | None) -> int | None:
    """Return the number that a file gives a name, or the default."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = file.read().splitlines()
    except OSError:
        return default
    for line in lines:
        words = line.partition("#")[0].split()
        if len(words) == 2 and words[1] == name:
            try:
                default = int(words[0], 0)
            except ValueError:
                continue
    return default
