"""Reads single values of vm.conf: sizes, paths, addresses, users.

Each function takes the text of a value and returns the value, or raises ValueError with a sentence for the operator
(the texts are those of *cat. 2.3 - 2.5*).  `rules.py` says which values are valid.
"""

import errno
import grp
import ipaddress
import os
import pwd
import re
from collections.abc import Callable

from vmd.config import rules
from vmd.config.lexer import ENDING_WORDS
from vmd.config.model import (
    FIRST_IDS,
    FIXED_LENGTHS,
    MAX_INET6_PREFIX,
    MAX_NAME_SERVERS,
    MIN_MEMORY_BYTES,
    NAME_MAX,
    PATH_MAX,
    PORT_MAX,
    RATES,
    ROOT,
    SOCKET_PATH_MAX,
    Forward,
    Listen,
    Owner,
    Prefix,
    VirtioMode,
)
from vmd.config.rules import shown
from vmd.errors import sentence
from vmd.nearest import meant
from vmd.scaled import fmt_scaled, scan_scaled

RATE_FORM = f"bytes a second, from {fmt_scaled(RATES[0])} to {fmt_scaled(RATES[-1])}"
WHEEL = "wheel"  # group 0 on OpenBSD, and in its vm.conf files; many Linux systems have no group of that name
LOCAL_PREFIX6_BITS = 48  # the default: a /64 for each of 65536 interfaces

PORT = re.compile(r"[0-9]{1,5}")
LLADDR = re.compile(r"[0-9A-Fa-f]{1,2}(?::[0-9A-Fa-f]{1,2}){5}")
PORTS = re.compile(r"([0-9]{1,5})(?::([0-9]{1,5}))?")
FORWARD_FORM = "it is `forward [tcp|udp] port N[:M] to port K [from address/length]`"
PREFIX4 = re.compile(r"([0-9]{1,3}(?:\.[0-9]{1,3}){0,3})(?:/([0-9]{1,3}))?")
PREFIX6 = re.compile(r"([0-9A-Fa-f:.]+)(?:/([0-9]{1,3}))?")


def parent_name(name: str) -> str:
    """Return the name of the template of an instance."""
    if rules.too_long(name, NAME_MAX):
        raise ValueError(f"vm {shown(name)} name too long")
    return rules.vm_name(name)


def lladdr(text: str) -> bytes:
    """Return an Ethernet address.  All zeros mean a random address: b"" is returned, as if none were given."""
    if not LLADDR.fullmatch(text):
        raise ValueError(f"invalid address: {shown(text)}")
    address = bytes(int(byte, 16) for byte in text.split(":"))
    return rules.lladdr(address) if any(address) else b""


def listen(text: str) -> Listen:
    """Return where to listen: `address:port`, with an IPv6 address in brackets, or the path of a socket."""
    if text.startswith("/"):
        if rules.too_long(text, SOCKET_PATH_MAX):
            raise ValueError(f"metrics listen {shown(text)}: path too long")
        return Listen(path=text)
    host, _, port = text.rpartition(":")
    six = host.startswith("[") and host.endswith("]")
    try:
        kind = ipaddress.IPv6Address if six else ipaddress.IPv4Address
        address = str(kind(host[1:-1] if six else host))
    except ValueError:
        raise ValueError(f"metrics listen {shown(text)}: must be address:port or a path") from None
    if "%" in address or not PORT.fullmatch(port) or not 1 <= int(port) <= PORT_MAX:
        raise ValueError(f"metrics listen {shown(text)}: must have an address and a port from 1 to {PORT_MAX}")
    return Listen(address=address, port=int(port))


def first_id(number: int) -> int:
    """Return the first user id of VMs."""
    if number not in FIRST_IDS:
        raise ValueError(f"ids {number}: must be from {FIRST_IDS[0]} to {FIRST_IDS[-1]}")
    return number


def memory_limit(size: int | str) -> int:
    """Return a limit of memory in bytes."""
    try:
        size_bytes = scan_scaled(size) if isinstance(size, str) else size
    except ValueError as error:
        raise ValueError(f"failed to parse size: {shown(str(size))}") from error
    if size_bytes < MIN_MEMORY_BYTES:
        raise ValueError("memory size must be at least 1MB")
    return size_bytes


def console_log_size(size: int | str) -> int:
    """Return the size in bytes at which a console log is rotated."""
    try:
        size_bytes = scan_scaled(size) if isinstance(size, str) else size
    except ValueError as error:
        raise ValueError(f"failed to parse size: {shown(str(size))}") from error
    return rules.console_log_bytes(size_bytes)


def memory(size: int | str) -> int:
    """Return a memory size in bytes, not yet rounded."""
    return rules.memory_bytes(memory_limit(size))


def tap(name: str) -> str:
    """Return the name of a VM's tap interface."""
    try:
        return rules.tap_name(name)
    except ValueError:
        # Where vmd(8) takes a name, our keywords are plain words, and the parser joins them: `interface vhost` has
        # `vhost` for its tap.  Such a mistake gets a sentence of its own.
        ours = next((word for word in sorted(ENDING_WORDS["interface"]) if name.startswith(word)), "")
        if ours:
            raise ValueError(f"{ours} of an interface needs braces: interface {{ {ours} ... }}") from None
        raise


def rate(size: int | str) -> int:
    """Return a number of bytes a second."""
    try:
        return rules.rate(scan_scaled(size) if isinstance(size, str) else size)
    except ValueError as error:
        raise ValueError(f"invalid rate: {shown(str(size))}: {RATE_FORM}") from error


def cpu_percent(text: str) -> int:
    """Return a limit of processor time in percent of one processor."""
    number = text.removesuffix("%")
    if not text.endswith("%") or not re.fullmatch("[0-9]{1,9}", number):
        raise ValueError(f"invalid cpu: {shown(text)}: it must be a number with a %, such as 150%")
    return rules.cpu_percent(int(number))


def virtio_mode(text: str) -> VirtioMode:
    """Return the register interface that a VM's devices offer."""
    for mode in VirtioMode:
        if mode.name.lower() == text:
            return mode
    known = [mode.name.lower() for mode in VirtioMode]
    raise ValueError(f"unrecognized virtio mode {shown(text)}{meant(text, known)}")


def disk_path(path: str) -> str:
    """Return the real path of a disk image.

    Unlike vmd, the file need not exist: its file system may be mounted later.  Until then only its VM cannot start.
    """
    rules.path("disk path", path)
    try:
        return resolve(path)
    except OSError as error:
        raise ValueError(f"failed to parse disks: {shown(path)}: {reason(error)}") from error


def cdrom_path(path: str) -> str:
    """Return the path of a disc.  Links stay in it: they are followed at each start of the VM."""
    return rules.path("cdrom name", path)


def kernel_path(path: str) -> str:
    """Return the real path of the kernel of a VM, or the name of one on its own disk."""
    return boot_path("kernel", path)


def initrd_path(path: str) -> str:
    """Return the real path of the initrd of a VM, or the name of one on its own disk."""
    return boot_path("initrd", path)


def boot_path(what: str, path: str) -> str:
    """Return the real path of a file; like a disk image, it need not exist.  `what` is its name in errors.

    The name of a file on a disk of the VM itself is returned unchanged.
    """
    if (rules.disk_file(path) if what == "kernel" else rules.disk_initrd(path)) is not None:
        return path
    try:
        return resolve(path)
    except OSError as error:
        raise ValueError(f"{what} path not found: {reason(error)}: {shown(path)}") from error


def resolve(path: str) -> str:
    """Return the absolute path of a file, without links; it need not exist.  Raises OSError if it cannot ever exist."""
    if not path:
        raise FileNotFoundError(errno.ENOENT, "")
    try:
        found = path if rules.too_long(path, PATH_MAX) else os.path.realpath(path, strict=True)
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):  # a later mount does not help
            raise
        found = os.path.realpath(path)
    if rules.too_long(found, PATH_MAX):
        raise OSError(errno.ENAMETOOLONG, "")
    return found


def reason(error: OSError) -> str:
    """Return the text for an errno of the kernel."""
    return sentence(error)


class UnknownError(ValueError):
    """This host does not know a user or group; a later start may find it."""


def owner(text: str) -> Owner:
    """Return the user and group of `user`, `user:group` or `:group`; each is a name or a number."""
    user, _, group = text.partition(":")
    return Owner(
        uid=identity("user", user, lambda name: pwd.getpwnam(name).pw_uid) if user else Owner().uid,
        gid=identity("group", group, lambda name: grp.getgrnam(name).gr_gid) if group else None,
    )


def identity(what: str, text: str, look_up: Callable[[str], int]) -> int:
    """Return the number of a user or group.  Digits are looked up as a name first, then taken as the number."""
    try:
        return look_up(text)
    except (KeyError, UnicodeEncodeError) as error:
        if re.fullmatch("[0-9]{1,10}", text) and int(text) <= rules.UID_MAX:
            return int(text)
        if what == "group" and text == WHEEL:
            return ROOT
        raise UnknownError(f"failed to get {what}: {shown(text)}") from error


def name_servers(texts: list[str]) -> tuple[bytes, ...]:
    """Return the addresses of name servers for guests, without duplicates."""
    found: list[bytes] = []
    for text in texts:
        try:
            address = ipaddress.ip_address(text)
        except ValueError as error:
            raise ValueError(f"invalid name server: {shown(text)}: an IPv4 or IPv6 address is needed") from error
        if address.is_loopback or address.is_link_local or address.is_unspecified or address.is_multicast:
            raise ValueError(f"invalid name server: {shown(text)}: guests cannot reach it")
        if address.packed not in found:
            found.append(address.packed)
    for size, family in ((4, "IPv4"), (16, "IPv6")):
        if sum(len(address) == size for address in found) > MAX_NAME_SERVERS:
            raise ValueError(f"more than {MAX_NAME_SERVERS} {family} name servers")
    return tuple(found)


def nic_address(text: str) -> Prefix:
    """Return the fixed address of a guest with its prefix length.  The network has only the guest and the host."""
    address, _, length = text.partition("/")
    try:
        packed = ipaddress.IPv4Address(address).packed
        found = Prefix(address=packed, length=int(length) if PORT.fullmatch(length) else FIXED_LENGTHS[-1])
    except ValueError as error:
        raise ValueError(f"invalid address: {shown(text)}: an IPv4 address is needed") from error
    if "/" in text and str(found.length) != length:
        raise ValueError(f"invalid address: {shown(text)}: the prefix length is not a number")
    return rules.fixed_address(found)


def forward(words: list[str]) -> Forward:
    """Return the forward that the words after `forward` describe."""
    text = " ".join(words)
    rest = list(words)
    protocol = rest.pop(0) if rest[0] in ("tcp", "udp") else "tcp"
    source: Prefix | None = None
    if len(rest) == 7 and rest[5] == "from":
        source = source4(rest[6])
        del rest[5:]
    if len(rest) != 5 or (rest[0], rest[2], rest[3]) != ("port", "to", "port"):
        raise ValueError(f"invalid forward: {shown(text)}: {FORWARD_FORM}")
    ports, to = PORTS.fullmatch(rest[1]), PORTS.fullmatch(rest[4])
    if ports is None or to is None:
        raise ValueError(f"invalid forward: {shown(text)}: a port is a number from 1 to {PORT_MAX}")
    first, last = int(ports[1]), int(ports[2] or ports[1])
    if last < first:
        raise ValueError(f"invalid forward: {shown(text)}: port {last} is less than port {first}")
    found = Forward(port=first, to=int(to[1]), count=last - first + 1, udp=protocol == "udp", source=source)
    if to[2] and int(to[2]) - found.to != last - first:
        raise ValueError(f"invalid forward: {shown(text)}: the two ranges have different lengths")
    return rules.forward(found)


def source4(text: str) -> Prefix:
    """Return the IPv4 network of clients that may use a forward."""
    try:
        network = ipaddress.IPv4Network(text)
    except ValueError as error:
        raise ValueError(f"invalid forward: from {shown(text)}: {error}") from error
    return Prefix(address=network.network_address.packed, length=network.prefixlen)


def prefix4(text: str) -> Prefix:
    """Return the range of `local prefix`.  Zero bytes at the end of the address may be omitted: `10/8`."""
    match = PREFIX4.fullmatch(text)
    octets = [int(octet) for octet in match[1].split(".")] if match else []
    if match is None or max(octets) > 255:
        raise ValueError(f"invalid local prefix: invalid format: {shown(text)}")
    length = int(match[2]) if match[2] else rules.LOCAL_PREFIX_BITS
    address = bytes(octets).ljust(4, b"\0")
    if not 1 <= length <= rules.LOCAL_PREFIX_BITS or rules.has_host_bits(address, length):
        raise ValueError(f"invalid local prefix: bad mask: {shown(text)}")
    return Prefix(address=address, length=length)


def prefix6(text: str) -> Prefix:
    """Return the range of `local inet6 prefix`.

    Unlike vmd, each interface gets a /64, because a guest cannot autoconfigure an address in a /96.  So the range must
    be at most MAX_INET6_PREFIX bits long.  vmd allows 64 bits, and gives each interface a /96.
    """
    match = PREFIX6.fullmatch(text)
    try:
        address = ipaddress.IPv6Address(match[1] if match else "").packed
    except ValueError as error:
        raise ValueError(f"invalid local inet6 prefix: invalid format: {shown(text)}") from error
    length = int(match[2]) if match and match[2] else LOCAL_PREFIX6_BITS
    if length > MAX_INET6_PREFIX:
        raise ValueError(
            "invalid local inet6 prefix: no room for a /64 per interface "
            f"(longest is /{MAX_INET6_PREFIX}): {shown(text)}"
        )
    if rules.has_host_bits(address, length):
        raise ValueError(f"invalid local inet6 prefix: bad mask: {shown(text)}")
    return Prefix(address=address, length=length)
