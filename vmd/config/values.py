"""Single values of vm.conf: sizes, paths, addresses, names, users.

Each function takes the text of a value and returns what it stands for, or raises ValueError with the
sentence for the operator (the texts are those of *cat. 2.3 - 2.5*).
"""

import errno
import grp
import ipaddress
import os
import pwd
import re
from collections.abc import Callable

from vmd.config.lexer import shown
from vmd.config.model import (
    GROUP_MAX,
    IFNAME_MAX,
    MAX_INET6_PREFIX,
    MAX_MEMORY_BYTES,
    MAX_RDOMAIN,
    MIN_MEMORY_BYTES,
    NAME_MAX,
    PATH_MAX,
    SERIAL_MAX,
    Owner,
    Prefix,
    VirtioMode,
    valid_serial,
    valid_vm_name,
)
from vmd.errors import sentence
from vmd.nearest import meant
from vmd.scaled import fmt_scaled, scan_scaled

DISK_FORMATS = ("raw", "qcow2")
UID_MAX = (1 << 32) - 2  # the next one means "no change" to chown(2)
LOCAL_PREFIX_BITS = 16  # at most, and by default: VM id and NIC live in the other half of the address
LOCAL_PREFIX6_BITS = 48  # by default: a /64 each for 65536 interfaces

TAP = re.compile(rf"tap[0-9]{{0,{IFNAME_MAX - len('tap')}}}")
# What Linux takes for an interface, but for patterns such as br%d; a bridge may have any name that it can have.
BRIDGE = re.compile(rf"(?!\.\.?$)[!-$&-.0-9;-~]{{1,{IFNAME_MAX}}}")
NO_BRIDGE = re.compile(r"tap[0-9]*|lo|all|default")  # Linux takes the last two for all interfaces, and new ones
GROUP = re.compile(rf"[A-Za-z0-9_.-]{{1,{GROUP_MAX}}}")
LLADDR = re.compile(r"[0-9A-Fa-f]{1,2}(?::[0-9A-Fa-f]{1,2}){5}")
PREFIX4 = re.compile(r"([0-9]{1,3}(?:\.[0-9]{1,3}){0,3})(?:/([0-9]{1,3}))?")
PREFIX6 = re.compile(r"([0-9A-Fa-f:.]+)(?:/([0-9]{1,3}))?")


def too_long(text: str, limit: int) -> bool:
    """Return whether a text has more bytes than a limit."""
    return len(os.fsencode(text)) > limit


def vm_name(name: str) -> str:
    """Return the name of a VM."""
    if too_long(name, NAME_MAX):
        raise ValueError("vm name too long")
    if not valid_vm_name(name):
        raise ValueError(f"invalid VM name: {shown(name)}")
    return name


def parent_name(name: str) -> str:
    """Return the name of the VM that an instance is made from."""
    if too_long(name, NAME_MAX):
        raise ValueError(f"vm {shown(name)} name too long")
    return vm_name(name)


def switch_name(name: str) -> str:
    """Return the name of a switch."""
    if too_long(name, NAME_MAX):
        raise ValueError("switch name too long")
    if not name or not name.isprintable():
        raise ValueError(f"invalid switch name: {shown(name)}")
    return name


def switch_interface(name: str) -> str:
    """Return the name of a bridge; unlike vmd's, Linux's have no fixed pattern."""
    if not BRIDGE.fullmatch(name) or NO_BRIDGE.fullmatch(name):
        raise ValueError(f"invalid switch interface: {shown(name)}")
    return name


def tap_name(name: str) -> str:
    """Return the name of a VM's own interface; "" and "tap" leave the choice to us."""
    if name and not TAP.fullmatch(name):
        raise ValueError(f"invalid interface: {shown(name)}")
    return name


def group_name(name: str) -> str:
    """Return the name of an interface group; a digit at its end would make it an interface."""
    if name and (not GROUP.fullmatch(name) or name[-1].isdigit()):
        raise ValueError(f"invalid group name: {shown(name)}")
    return name


def rdomain(number: int) -> int:
    """Return a routing domain."""
    if not 0 <= number <= MAX_RDOMAIN:
        raise ValueError(f"invalid rdomain: {number}")
    return number


def lladdr(text: str) -> bytes:
    """Return an Ethernet address; all zeros ask for a random one, as no address does."""
    if not LLADDR.fullmatch(text):
        raise ValueError(f"invalid address: {shown(text)}")
    address = bytes(int(byte, 16) for byte in text.split(":"))
    return address if any(address) else b""


def memory_limit(size: int | str) -> int:
    """Return how many bytes of memory all VMs together may have."""
    try:
        size_bytes = scan_scaled(size) if isinstance(size, str) else size
    except ValueError as error:
        raise ValueError(f"failed to parse size: {shown(str(size))}") from error
    if size_bytes < MIN_MEMORY_BYTES:
        raise ValueError("memory size must be at least 1MB")
    return size_bytes


def memory(size: int | str) -> int:
    """Return a memory size in bytes, not yet rounded."""
    size_bytes = memory_limit(size)
    if size_bytes > MAX_MEMORY_BYTES:
        raise ValueError(f"memory size too large (limit is {fmt_scaled(MAX_MEMORY_BYTES)})")
    return size_bytes


def virtio_mode(text: str) -> VirtioMode:
    """Return the register interface that a VM's devices offer."""
    for mode in VirtioMode:
        if mode.name.lower() == text:
            return mode
    known = [mode.name.lower() for mode in VirtioMode]
    raise ValueError(f"unrecognized virtio mode {shown(text)}{meant(text, known)}")


def disk_format(text: str) -> str:
    """Return the format of a disk image."""
    if text.lower() not in DISK_FORMATS:
        raise ValueError(f"unrecognized disk format {shown(text)}{meant(text, DISK_FORMATS)}")
    return text.lower()


def disk_serial(text: str) -> str:
    """Return the serial number of a disk."""
    if not valid_serial(text):
        raise ValueError(f"a serial number is 1 to {SERIAL_MAX} printable ASCII characters, not {shown(text)!r}")
    return text


def disk_path(path: str) -> str:
    """Return the real path of a disk image.

    Unlike vmd, one with an absolute path need not be there yet: it may be mounted later.  Until then its VM, and no
    other, cannot start.
    """
    if too_long(path, PATH_MAX):
        raise ValueError("disk path too long")
    try:
        return resolve(path, strict=not os.path.isabs(path))
    except OSError as error:
        raise ValueError(f"failed to parse disks: {shown(path)}: {reason(error)}") from error


def kernel_path(path: str) -> str:
    """Return the real path of what a VM boots."""
    return boot_path("kernel", path)


def initrd_path(path: str) -> str:
    """Return the real path of an initial RAM disk."""
    return boot_path("initrd", path)


def boot_path(what: str, path: str) -> str:
    """Return the real path of a part of a direct boot."""
    try:
        return resolve(path)
    except OSError as error:
        raise ValueError(f"{what} path not found: {reason(error)}: {shown(path)}") from error


def resolve(path: str, *, strict: bool = True) -> str:
    """Return the absolute path, free of links, of a file.

    Raises OSError if it cannot; if `strict`, also for a file that is not there.
    """
    if not path:
        raise FileNotFoundError(errno.ENOENT, "")
    found = path if too_long(path, PATH_MAX) else os.path.realpath(path, strict=strict)
    if too_long(found, PATH_MAX):
        raise OSError(errno.ENAMETOOLONG, "")
    return found


def reason(error: OSError) -> str:
    """Return the kernel's words for an error."""
    return sentence(error)


def owner(text: str) -> Owner:
    """Return who `user`, `user:group` or `:group` is, each a name or a number."""
    user, _, group = text.partition(":")
    return Owner(
        uid=identity("user", user, lambda name: pwd.getpwnam(name).pw_uid) if user else Owner().uid,
        gid=identity("group", group, lambda name: grp.getgrnam(name).gr_gid) if group else None,
    )


def identity(what: str, text: str, look_up: Callable[[str], int]) -> int:
    """Return the number of a user or group; digits that are nobody's name stand for themselves."""
    try:
        return look_up(text)
    except (KeyError, UnicodeEncodeError) as error:
        if re.fullmatch("[0-9]{1,10}", text) and int(text) <= UID_MAX:
            return int(text)
        raise ValueError(f"failed to get {what}: {shown(text)}") from error


def prefix4(text: str) -> Prefix:
    """Return the range of `local prefix`; zero bytes at the end of the address may be left out."""
    match = PREFIX4.fullmatch(text)
    octets = [int(octet) for octet in match[1].split(".")] if match else []
    if match is None or max(octets) > 255:
        raise ValueError(f"invalid local prefix: invalid format: {shown(text)}")
    length = int(match[2]) if match[2] else LOCAL_PREFIX_BITS
    address = bytes(octets).ljust(4, b"\0")
    if not 1 <= length <= LOCAL_PREFIX_BITS or has_host_bits(address, length):
        raise ValueError(f"invalid local prefix: bad mask: {shown(text)}")
    return Prefix(address=address, length=length)


def prefix6(text: str) -> Prefix:
    """Return the range of `local inet6 prefix`.

    Unlike vmd, which allows up to /64 and cuts /96s out of it: guests cannot autoconfigure in those, so
    every interface gets a /64 and the range must have room for some.
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
    if has_host_bits(address, length):
        raise ValueError(f"invalid local inet6 prefix: bad mask: {shown(text)}")
    return Prefix(address=address, length=length)


def has_host_bits(address: bytes, length: int) -> bool:
    """Return whether bits are set behind a prefix."""
    bits = len(address) * 8 - length
    return int.from_bytes(address, "big") & ((1 << bits) - 1) != 0
