"""Name servers for guests of `local` interfaces: those of vm.conf, else the host's, else the host itself.

They are looked up each time a guest asks, because a host's name servers change with its network.
"""

import ipaddress
from collections.abc import Sequence

from vmd.ipc.devmsg import DNS_MAX

Servers = tuple[tuple[bytes, ...], tuple[bytes, ...]]  # IPv4, IPv6

RESOLV_CONFS = ("/etc/resolv.conf", "/run/systemd/resolve/resolv.conf")  # the second, if the first has only a stub
RESOLV_CONF_MAX = 1 << 16
UDP_SOCKETS = "/proc/net/udp"  # proc(5): the second column is address and port
PORT = ":0035"  # 53
ANY4 = "00000000"
SHOWN_MAX = 3


def servers(local_dns: Sequence[bytes], paths: Sequence[str] = RESOLV_CONFS) -> Servers:
    """Return the name servers for guests.  If there are none, guests ask the host itself."""
    if local_dns:
        return tuple(each for each in local_dns if len(each) == 4), tuple(each for each in local_dns if len(each) == 16)
    return resolvers(paths)


def problem(found: Servers, host4: bytes, prefix6: bytes, paths: Sequence[str] = RESOLV_CONFS) -> str:
    """Return why a guest has no working name server, and what to do; empty if no trouble is known.

    `host4` is the host's address on the guest's interface.  The guest asks it if there is no other name server.
    """
    dns4, dns6 = found
    if dns4 or (dns6 and prefix6) or host_answers(host4):
        return ""
    named = named_servers(paths[0])
    why = f"it has {', '.join(named[:SHOWN_MAX])} in {paths[0]}" if named else f"{paths[0]} has none"
    return (
        f"the host has no name server that guests can reach ({why}), and none listens on its own address "
        f"{ipaddress.ip_address(host4)}: write `local dns ADDRESS` in vm.conf"
    )


def resolvers(paths: Sequence[str] = RESOLV_CONFS) -> Servers:
    """Return the IPv4 and the IPv6 name servers of this host that guests can reach too."""
    return next(filter(any, map(usable, map(named_servers, paths))), ((), ()))


def named_servers(path: str) -> list[str]:
    """Return the words after `nameserver` in a resolv.conf(5), unchecked; nothing if there is no such file."""
    try:
        with open(path, "rb") as file:
            lines = file.read(RESOLV_CONF_MAX).decode("ascii", "replace").splitlines()
    except OSError:
        return []
    rows = [line.split() for line in lines]
    return [words[1] for words in rows if len(words) > 1 and words[0] == "nameserver"]


def usable(named: Sequence[str]) -> Servers:
    """Return the servers that can be reached from outside this host and this link."""
    found: dict[int, list[bytes]] = {4: [], 6: []}
    for word in named:
        try:
            address = ipaddress.ip_address(word)
        except ValueError:
            continue  # an address with a scope, or no address
        if address.is_loopback or address.is_link_local or address.is_unspecified or address.is_multicast:
            continue
        servers = found[address.version]
        if address.packed not in servers and len(servers) < DNS_MAX:
            servers.append(address.packed)
    return tuple(found[4]), tuple(found[6])


def host_answers(host4: bytes) -> bool:
    """Return whether a program of this host listens at the DNS port of an address, or of all addresses."""
    ours = host4[::-1].hex().upper()  # the kernel prints the 32 bits in the host's byte order
    wanted = {ours + PORT, ANY4 + PORT}
    try:
        with open(UDP_SOCKETS) as file:
            if any(words[1] in wanted for words in map(str.split, file) if len(words) > 1):
                return True
        with open(f"{UDP_SOCKETS}6") as file:
            return any(words[1] == ANY4 * 4 + PORT for words in map(str.split, file) if len(words) > 1)
    except OSError:
        return False
