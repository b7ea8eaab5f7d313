"""The ports at which programs of this host listen (proc(5)).  Such a port cannot also be forwarded to a guest.

A program that listens only on the loopback interface is no obstacle, because packets for that are not forwarded.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.config.model import Forward

TABLES = {False: ("/proc/net/tcp", "/proc/net/tcp6"), True: ("/proc/net/udp", "/proc/net/udp6")}  # by `Forward.udp`
READ_MAX = 4 << 20  # bytes
LISTENS = {False: "0A", True: "07"}  # the state of a listening socket, as the kernel prints it
# Parts of the addresses 127.0.0.0/8 and ::1, as the kernel prints them: 32-bit numbers in the host's byte order.
LOOPBACK4, LOOPBACK6 = "7F", "00000000000000000000000001000000"
MAPPED = "0000000000000000FFFF0000"  # begins an IPv4 address of an IPv6 socket


def in_the_way(forward: "Forward") -> str:
    """Return a sentence if a program of this host listens at a port of a forward; else an empty string."""
    for path in TABLES[forward.udp]:
        for port in listening(path, LISTENS[forward.udp]):
            if port in forward.ports:
                shows = f"`ss -l{'u' if forward.udp else 't'}np` shows it"
                return f"a program of this host has {forward.protocol} port {port}: {shows}"
    return ""


def listening(path: str, state: str) -> list[int]:
    """Return the ports at which programs listen on more than the loopback; none if the file cannot be read."""
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
