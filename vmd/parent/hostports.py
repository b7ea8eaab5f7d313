"""Which ports programs of this host listen at, by proc(5): none of them can be forwarded to a guest as well.

A program that listens at the loopback interface only is in nobody's way: what is for that is not forwarded.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.config.model import Forward

TABLES = {False: ("/proc/net/tcp", "/proc/net/tcp6"), True: ("/proc/net/udp", "/proc/net/udp6")}  # by `Forward.udp`
READ_MAX = 4 << 20  # bytes
LISTENS = {False: "0A", True: "07"}  # the state of a socket that waits for others, as the kernel writes it
# What the kernel writes of an address, as numbers of this machine: those of 127.0.0.0/8 and ::1.
LOOPBACK4, LOOPBACK6 = "7F", "00000000000000000000000001000000"
MAPPED = "0000000000000000FFFF0000"  # an IPv4 address, for a socket of IPv6


def in_the_way(forward: "Forward") -> str:
    """Return a sentence about a program of this host that listens at a port of a forward; "" if there is none."""
    for path in TABLES[forward.udp]:
        for port in listening(path, LISTENS[forward.udp]):
            if port in forward.ports:
                shows = f"`ss -l{'u' if forward.udp else 't'}np` shows it"
                return f"a program of this host has {forward.protocol} port {port}: {shows}"
    return ""


def listening(path: str, state: str) -> list[int]:
    """Return the ports at which programs listen for others than the host itself; none if it does not say."""
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            rows = [line.split(None, 4) for line in file.read(READ_MAX).splitlines()[1:]]
    except OSError:
        return []
    found = []
    for row in rows:
        address, _, port = row[1].partition(":") if len(row) > 3 else ("", "", "")
        four = address.removeprefix(MAPPED)
        loopback = (len(four) == 8 and four.endswith(LOOPBACK4)) or address == LOOPBACK6
        if port and row[3] == state and not loopback:
            found.append(int(port, 16))
    return found
