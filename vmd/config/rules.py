"""The rules for the values of a VM.  vm.conf, requests of clients, streams and vmctl share them.

A rule takes a value and returns it if it is valid, or raises ValueError with a sentence for the user.  Where upstream
has a sentence, the rule uses it (*cat. 2.3 - 2.5*).  `check_vm` applies every rule to a whole VM.  `obstacles` says why
a VM that passes every rule still cannot be started.

vmctl and VM processes load this module, so it imports little.
"""

import errno
import os

from vmd.config.model import (
    BESIDES_BYTES,
    CMDLINE_MAX,
    COUNT_MAX,
    CPU_PERCENTS,
    FIXED_LENGTHS,
    GROUP_MAX,
    IFNAME_MAX,
    IOPS,
    LLADDR_BYTES,
    MAX_DISKS,
    MAX_FORWARDED,
    MAX_FORWARDS,
    MAX_INET6_PREFIX,
    MAX_LOG_BYTES,
    MAX_LOGS_KEPT,
    MAX_MEMORY_BYTES,
    MAX_NAME_SERVERS,
    MAX_NICS,
    MAX_RDOMAIN,
    MAX_VCPUS,
    MIN_LOG_BYTES,
    MIN_MEMORY_BYTES,
    NAME_MAX,
    PATH_MAX,
    PORT_MAX,
    RATES,
    SERIAL_MAX,
    WEIGHTS,
    BootDevice,
    DiskFile,
    Prefix,
    VmConfig,
)
from vmd.nearest import meant
from vmd.scaled import fmt_scaled

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vmd.config.model import DiskConfig, Forward, NicConfig

DISK_FORMATS = ("raw", "qcow2")
UID_MAX = (1 << 32) - 2  # chown(2) takes the next number for "no change"
LOCAL_PREFIX_BITS = 16  # the longest prefix, and the default: the other 16 bits of an address hold VM id and NIC
HOST_NAME_MAX, LABEL_MAX = 255, 63  # RFC 1035, 2.3.4
HOST_TABLES = (253, 254, 255)  # the routing tables default, main and local: a VRF cannot use them
LOG_NAME_MAX = 255 - NAME_MAX - 3  # bytes of a file name, less a VM's name and `.99`
SHOWN_MAX = 80  # characters of a value that an error message quotes

DIGITS = frozenset("0123456789")
LETTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
NAME_FIRST = LETTERS | DIGITS
LABEL = NAME_FIRST | {"-"}
NAME_OTHER = NAME_FIRST | set(".-_")
TAP_FORM = "a tap is called tap, tap0, tap1 and so on"
NAME_FORM = "it has letters, digits, dots, hyphens and underscores, and begins with a letter or digit"
GROUP_CHARS = NAME_FIRST | set("_.-")
# The characters that Linux allows in the name of an interface, except `%`: br%d is a pattern.
BRIDGE_CHARS = frozenset(map(chr, range(0x21, 0x7F))) - set("%/:")
NO_BRIDGES = (".", "..", "lo", "all", "default")  # sysctl has the last two for all interfaces and for new ones
DISK_DIGITS = 3  # of the number of a disk or partition
SERIAL_CHARS = frozenset(map(chr, range(0x20, 0x7F)))


def shown(text: str) -> str:
    """Return a text as error messages quote it: cut to SHOWN_MAX characters."""
    return text if len(text) <= SHOWN_MAX else text[: SHOWN_MAX - 3] + "..."


def too_long(text: str, limit: int) -> bool:
    """Return whether a text is longer than `limit` bytes."""
    return len(os.fsencode(text)) > limit


# --- names ---------------------------------------------------------------------------------------------------


def vm_name(name: str) -> str:
    """Return the name of a VM (*cat. 2.5*).  A valid name is safe as a file name and in a message."""
    if too_long(name, NAME_MAX):
        raise ValueError("vm name too long")
    if not name or name[0] not in NAME_FIRST or not NAME_OTHER.issuperset(name):
        raise ValueError(f"invalid VM name: {shown(name)}: {NAME_FORM}")
    return name


def switch_name(name: str) -> str:
    """Return the name of a switch."""
    if too_long(name, NAME_MAX):
        raise ValueError("switch name too long")
    if not name or not name.isprintable():
        raise ValueError(f"invalid switch name: {shown(name)}")
    return name


def bridge_name(name: str) -> str:
    """Return the name of a switch's bridge.  Unlike vmd's, the name of a bridge on Linux follows no pattern."""
    usable = 0 < len(name) <= IFNAME_MAX and BRIDGE_CHARS.issuperset(name) and name not in NO_BRIDGES
    if not usable or is_tap(name):
        raise ValueError(f"invalid switch interface: {shown(name)}")
    return name


def tap_name(name: str) -> str:
    """Return the name of a VM's tap interface.  For "" and "tap", vmd chooses the number."""
    if name and not (is_tap(name) and len(name) <= IFNAME_MAX):
        raise ValueError(f"invalid interface: {shown(name)}: {TAP_FORM}")
    return name


def is_tap(name: str) -> bool:
    """Return whether a name is `tap`, or `tap` with a number."""
    return name.startswith("tap") and DIGITS.issuperset(name.removeprefix("tap"))


def group_name(name: str) -> str:
    """Return the name of an interface group.  It must not end in a digit: an interface's name does."""
    if name and (len(name) > GROUP_MAX or not GROUP_CHARS.issuperset(name) or name[-1] in DIGITS):
        raise ValueError(f"invalid group name: {shown(name)}")
    return name


# --- sizes and numbers ---------------------------------------------------------------------------------------


def memory_bytes(size: int) -> int:
    """Return a size of memory."""
    if size < MIN_MEMORY_BYTES:
        raise ValueError("memory size must be at least 1MB")
    if size > MAX_MEMORY_BYTES:
        raise ValueError(f"memory size too large (limit is {fmt_scaled(MAX_MEMORY_BYTES)})")
    return size


def vcpus(number: int) -> int:
    """Return a number of processors."""
    if not 1 <= number <= MAX_VCPUS:
        raise ValueError(f"invalid number of vcpus: {number} (limit is {MAX_VCPUS})")
    return number


def disk_count(number: int) -> int:
    """Return a number of disks."""
    if number > MAX_DISKS:
        raise ValueError(f"too many disks: {number} (limit is {MAX_DISKS})")
    return number


def nic_count(number: int) -> int:
    """Return a number of network interfaces."""
    if number > MAX_NICS:
        raise ValueError(f"too many interfaces: {number} (limit is {MAX_NICS})")
    if number < 0:
        raise ValueError(f"invalid number of interfaces: {number}")
    return number


def rdomain(number: int) -> int:
    """Return the number of a routing domain.  Unlike OpenBSD's, 253 to 255 are the host's own routing tables."""
    if not 0 <= number <= MAX_RDOMAIN:
        raise ValueError(f"invalid rdomain: {number}")
    if number in HOST_TABLES:
        raise ValueError(f"invalid rdomain: {number} is a routing table of the host itself")
    return number


def user_number(number: int) -> int:
    """Return the id of a user or group.  It must fit 32 bits: cut to 32 bits, a larger number could become 0, root."""
    if not 0 <= number <= UID_MAX:
        raise ValueError(f"invalid user: {number}")
    return number


# --- limits -------------------------------------------------------------------------------------------------


def within(what: str, number: int, numbers: range) -> int:
    """Return a number that must be in a range; `what` is its keyword."""
    if number not in numbers:
        raise ValueError(f"invalid {what}: {number}: must be from {numbers[0]} to {numbers[-1]}")
    return number


def iops(number: int) -> int:
    """Return a number of requests a second."""
    return within("iops", number, IOPS)


def rate(number: int) -> int:
    """Return a number of bytes a second."""
    return within("rate", number, RATES)


def cpu_percent(number: int) -> int:
    """Return a share of processors in percent: 100 is one processor."""
    return within("cpu", number, CPU_PERCENTS)


def weight(number: int) -> int:
    """Return the weight of a VM relative to other VMs."""
    return within("weight", number, WEIGHTS)


def limits(config: VmConfig) -> None:
    """Check all limits of a VM.  0 means no limit.  Raises ValueError."""
    given = [(iops, disk.iops_limit) for disk in config.disks]
    given += [(rate, disk.rate_limit) for disk in config.disks] + [(rate, nic.rate_limit) for nic in config.nics]
    given += [(cpu_percent, config.limit.cpu_percent), (weight, config.limit.weight)]
    for rule, number in given:
        if number:
            rule(number)
    if config.limit.memory_bytes < 0:
        raise ValueError(f"invalid limit of memory: {config.limit.memory_bytes}")


# --- boot images and disks -----------------------------------------------------------------------------------


def path(what: str, name: str) -> str:
    """Return the path of a file.  The file need not exist before the VM starts."""
    if too_long(name, PATH_MAX):
        raise ValueError(f"{what} too long")
    return name


def disk_file(text: str) -> DiskFile | None:
    """Parse a name such as `disk0:/bsd` or `disk0p2:/vmlinuz`: a file on a disk of the VM itself.

    Return None if the text has another form: then it is a path of the host.  `./disk0:` is a path of the host, too.
    Raises ValueError.
    """
    name, colon, within = text.partition(":")
    place = name.removeprefix("disk")
    rest = place.lstrip("0123456789")
    number = place.removesuffix(rest)
    if not colon or place == name or not number or not (LETTERS | DIGITS).issuperset(rest):
        return None
    numbered = rest[1:].lstrip("0") if rest[:1] == "p" else ""
    right = len(rest) < 2 or (DIGITS.issuperset(rest[1:]) and 0 < len(numbered) <= DISK_DIGITS)
    if not right or len(number) > DISK_DIGITS:
        form = "disk0 is the first disk, disk0p2 its second partition, disk0a one of its OpenBSD disklabel"
        raise ValueError(f"{shown(name)}: not a disk or partition: {form}")
    if within and (not within.startswith("/") or "\0" in within):
        raise ValueError(f"{shown(text)}: the path of a file on a disk begins with /")
    if too_long(within, PATH_MAX):
        raise ValueError(f"{name}: path too long")
    return DiskFile(disk=int(number), partition=rest if not numbered else f"p{numbered}", path=within)


def disk_initrd(text: str) -> DiskFile | None:
    """Parse the name of an initrd as `disk_file` does.  Unlike a kernel's it must have a path.  Raises ValueError."""
    found = disk_file(text)
    if found is not None and not found.path:
        raise ValueError(f"{shown(text)}: an initrd needs the path of a file")
    return found


def files_on_disks(config: VmConfig) -> tuple[DiskFile | None, DiskFile | None]:
    """Return the kernel and the initrd on its own disks that a VM boots; None if it has none.  Raises ValueError."""
    return disk_file(config.kernel), disk_initrd(config.initrd)


def boots_from_disks(config: VmConfig) -> "Iterator[str]":
    """Yield the problems of a kernel or initrd on a disk of the VM itself.  Raises ValueError."""
    kernel, initrd = files_on_disks(config)
    if config.kernel and config.initrd and (kernel is None) != (initrd is None):
        yield (
            f"boot {shown(config.kernel)} initrd {shown(config.initrd)}: both must be on disks of the vm, or"
            " both must be files of the host"
        )
    for name, found in ((config.kernel, kernel), (config.initrd, initrd)):
        if found is not None and found.disk >= len(config.disks):
            last = len(config.disks) - 1
            few = "the vm has disk0 only" if last == 0 else "the vm has no disk"
            have = f"the disks of the vm are disk0 to disk{last}" if last > 0 else few
            yield f"boot {shown(name)}: there is no disk{found.disk}: {have}"


def console_log_path(name: str) -> str:
    """Return the path of a console log.  `%n` in its file name stands for the name of the VM."""
    file = name.rpartition("/")[2]
    if not name.startswith("/") or file in ("", ".", ".."):
        raise ValueError(f"console log {shown(name)}: not an absolute path of a file")
    if too_long(name, PATH_MAX) or too_long(file, LOG_NAME_MAX):
        raise ValueError("console log path too long")
    return name


def console_log_bytes(size: int) -> int:
    """Return the size in bytes at which a console log is rotated."""
    if not MIN_LOG_BYTES <= size <= MAX_LOG_BYTES:
        least, most = fmt_scaled(MIN_LOG_BYTES), fmt_scaled(MAX_LOG_BYTES)
        raise ValueError(f"console log size {fmt_scaled(size)}: must be from {least} to {most}")
    return size


def console_logs_kept(number: int) -> int:
    """Return how many rotated console logs are kept."""
    if not 0 <= number <= MAX_LOGS_KEPT:
        raise ValueError(f"console log keep {number}: must be from 0 to {MAX_LOGS_KEPT}")
    return number


def cmdline(text: str) -> str:
    """Return a kernel's command line."""
    raw = os.fsencode(text)
    if len(raw) > CMDLINE_MAX:
        raise ValueError(f"cmdline too long: {len(raw)} bytes (limit is {CMDLINE_MAX})")
    if b"\0" in raw:
        raise ValueError("cmdline contains a NUL byte")
    return text


def disk_format(text: str) -> str:
    """Return the format of a disk image."""
    if text.lower() not in DISK_FORMATS:
        raise ValueError(f"unrecognized disk format {shown(text)}{meant(text, DISK_FORMATS)}")
    return text.lower()


def valid_serial(text: str) -> bool:
    """Return whether a text is a valid serial number of a disk."""
    return 0 < len(text) <= SERIAL_MAX and SERIAL_CHARS.issuperset(text)


def disk_serial(text: str) -> str:
    """Return the serial number of a disk."""
    if not valid_serial(text):
        raise ValueError(f"a serial number is 1 to {SERIAL_MAX} printable ASCII characters, not {shown(text)!r}")
    return text


def disks(given: "Sequence[DiskConfig]") -> None:
    """Check all disks of a VM.  Two disks must not have the same serial number.  Raises ValueError."""
    disk_count(len(given))
    serials = [disk.serial for disk in given if disk.serial]
    for disk in given:
        path("disk path", disk.path)
        if disk.format:
            disk_format(disk.format)
    for serial in serials:
        disk_serial(serial)
        if serials.count(serial) > 1:
            raise ValueError(f"two disks have the serial number {serial}")


# --- network -------------------------------------------------------------------------------------------------


def lladdr(address: bytes) -> bytes:
    """Return the Ethernet address of an interface."""
    text = address[:LLADDR_BYTES].hex(":")
    if len(address) != LLADDR_BYTES or not any(address):
        raise ValueError(f"invalid address: {text}")
    if address[0] & 1:
        raise ValueError(f"invalid address: {text} is a multicast address, which no interface can have")
    return address


def nics(given: "Sequence[NicConfig]") -> None:
    """Check all network interfaces of a VM.  Raises ValueError."""
    nic_count(len(given))
    for nic in given:
        tap_name(nic.tap)
        group_name(nic.group)
        if nic.switch:
            switch_name(nic.switch)
        if nic.lladdr:
            lladdr(nic.lladdr)
        if nic.rdomain is not None:
            rdomain(nic.rdomain)
        local_options(nic)
    without_conflicts(given)


def without_conflicts(given: "Sequence[NicConfig]") -> "tuple[NicConfig, ...]":
    """Return the interfaces of a VM.  Two of them must not have the same port of the host, or overlapping networks."""
    for index, nic in enumerate(given):
        for number, other in enumerate(given[:index]):
            for ours, theirs in ((ours, theirs) for ours in nic.forwards for theirs in other.forwards):
                if ours.overlaps(theirs):
                    raise ValueError(f"forward {ours}: interface {number} of this vm has {theirs}")
            if nic.address is not None and other.address is not None and same_network(nic.address, other.address):
                what = f"interface {number} of this vm is in the same network"
                raise ValueError(f"address {shown_prefix(nic.address)}: {what}")
    return tuple(given)


def same_network(one: Prefix, other: Prefix) -> bool:
    """Return whether two networks have addresses in common.  An IPv4 and an IPv6 network have none."""
    if len(one.address) != len(other.address):
        return False
    bits = len(one.address) * 8 - min(one.length, other.length)
    return not (int.from_bytes(one.address, "big") ^ int.from_bytes(other.address, "big")) >> bits


def shown_prefix(prefix: Prefix) -> str:
    """Return an IPv4 address and its prefix length as text."""
    return f"{'.'.join(map(str, prefix.address))}/{prefix.length}"


def fixed_address(prefix: Prefix) -> Prefix:
    """Return the fixed address of a guest.  Its network has this address and the host's, and no others."""
    text = shown_prefix(prefix)
    if len(prefix.address) != 4 or prefix.length not in FIXED_LENGTHS:
        first, last = FIXED_LENGTHS[0], FIXED_LENGTHS[-1]
        raise ValueError(f"invalid address: {text}: the length is from {first} to {last}")
    first_byte = prefix.address[0]
    if first_byte in (0, 127) or first_byte >= 224 or prefix.address[:2] == b"\xa9\xfe":
        raise ValueError(f"invalid address: {text}: no guest can have it")
    number, ends = int.from_bytes(prefix.address, "big"), (1 << (32 - prefix.length)) - 1
    if prefix.length < FIXED_LENGTHS[-1] and number & ends in (0, ends):
        raise ValueError(f"invalid address: {text}: it is the first or the last of its network")
    return prefix


def forward(given: "Forward") -> "Forward":
    """Return a forward of ports."""
    last = given.count - 1
    ports = (given.port, given.to, given.port + last, given.to + last)
    if not 1 <= given.count <= MAX_FORWARDED:
        raise ValueError(f"invalid forward: {given}: it has 1 to {MAX_FORWARDED} ports")
    if not all(1 <= port <= PORT_MAX for port in ports):
        raise ValueError(f"invalid forward: {given}: a port is a number from 1 to {PORT_MAX}")
    if given.source is not None and not is_prefix(given.source, 4, 32):
        raise ValueError(f"invalid forward: {given}: the addresses after `from` are not a network")
    return given


def forwards(given: "Sequence[Forward]") -> None:
    """Check all forwards of an interface.  Raises ValueError."""
    if len(given) > MAX_FORWARDS:
        raise ValueError(f"too many forwards of an interface: {len(given)} (limit is {MAX_FORWARDS})")
    for index, each in enumerate(given):
        forward(each)
        for other in given[:index]:
            if each.overlaps(other):
                raise ValueError(f"forward {each}: {other} has the same port of the host")


def local_options(nic: "NicConfig") -> "NicConfig":
    """Return an interface.  Check the options that only a `local` interface can have."""
    options = (("address", nic.address), ("forward", nic.forwards), ("dns", nic.dns), ("hostname", nic.host_name))
    for word, value in options:
        if value and not nic.local:
            raise ValueError(f"{word}: only a local interface has one")
    if nic.address is not None:
        fixed_address(nic.address)
    forwards(nic.forwards)
    if nic.forwards and nic.rdomain:
        raise ValueError(f"forward: an interface in rdomain {nic.rdomain} cannot have one")
    if nic.host_name:
        host_name(nic.host_name)
    for size in (4, 16):
        if sum(len(address) == size for address in nic.dns) > MAX_NAME_SERVERS:
            raise ValueError(f"more than {MAX_NAME_SERVERS} IPv4 or IPv6 name servers")
    if any(len(address) not in (4, 16) for address in nic.dns):
        raise ValueError("invalid name server")
    return nic


def is_host_name(name: str) -> bool:
    """Return whether a text is a valid host name, with or without a domain (RFC 1123, 2.1)."""
    return len(name) <= HOST_NAME_MAX and all(
        0 < len(label) <= LABEL_MAX and LABEL.issuperset(label) and label[0] != "-" != label[-1]
        for label in name.split(".")
    )


def host_name(text: str) -> str:
    """Return the host name of a guest."""
    if not is_host_name(text):
        raise ValueError(
            f"invalid hostname: {shown(text)}: it has letters, digits and hyphens, with dots between its parts"
        )
    return text


def is_prefix(prefix: Prefix, size: int, most: int) -> bool:
    """Return whether a prefix has addresses of `size` bytes, at most `most` bits, and no bits set after these."""
    if len(prefix.address) != size or not 0 <= prefix.length <= most:
        return False
    return not has_host_bits(prefix.address, prefix.length)


def has_host_bits(address: bytes, length: int) -> bool:
    """Return whether an address has bits set after a prefix of `length` bits."""
    bits = len(address) * 8 - length
    return int.from_bytes(address, "big") & ((1 << bits) - 1) != 0


def plan(config: VmConfig) -> None:
    """Check the plan of a VM: the values from which the addresses of its `local` interfaces are computed."""
    prefix4, prefix6 = config.plan_prefix4, config.plan_prefix6
    if not 0 <= config.plan_id <= COUNT_MAX or not (
        (prefix4 is None or is_prefix(prefix4, 4, LOCAL_PREFIX_BITS))
        and (prefix6 is None or is_prefix(prefix6, 16, MAX_INET6_PREFIX))
    ):
        raise ValueError("invalid addresses of local interfaces")


# --- a whole VM ----------------------------------------------------------------------------------------------


def check_vm(config: VmConfig) -> None:
    """Apply every rule above to a VM.  Raises ValueError, which names the first rule that it breaks."""
    vm_name(config.name)
    memory_bytes(config.memory_bytes)
    vcpus(config.vcpus)
    path("boot image path", config.kernel)
    path("initrd path", config.initrd)
    files_on_disks(config)
    path("cdrom name", config.cdrom)
    cmdline(config.cmdline)
    disks(config.disks)
    nics(config.nics)
    limits(config)
    plan(config)
    for user in (config.owner, config.rights.boot, config.rights.disks, config.rights.cdrom, config.rights.seed):
        if user is not None:
            user_number(user.uid)
            user_number(user.gid or 0)


def obstacles(config: VmConfig, *, bootable: bool = False) -> "Iterator[tuple[int, str]]":
    """Yield every reason why a VM of this configuration cannot be started on any host: an errno and a sentence.

    `bootable`: the VM has something to boot that is not in its configuration.
    """
    if config.fault:
        yield errno.EINVAL, config.fault
    if config.sev or config.sev_es:
        yield errno.ENOTSUP, "encrypted memory (sev): not supported by this version of vmd"
    if not (bootable or config.kernel or config.disks or config.cdrom):
        yield errno.EINVAL, "no kernel, disk or cdrom to boot from"
    for what in boots_from_disks(config):
        yield errno.EINVAL, what
    least_bytes = config.memory_bytes + BESIDES_BYTES
    if 0 < config.limit.memory_bytes < least_bytes:
        what = f"limit memory {fmt_scaled(config.limit.memory_bytes)} is too small"
        besides = f"the guest has {fmt_scaled(config.memory_bytes)}, and vmd needs {fmt_scaled(BESIDES_BYTES)} for it"
        yield errno.EINVAL, f"{what}: {besides}"
    paths = [disk.path for disk in config.disks]
    for again in sorted({name for name in paths if paths.count(name) > 1}):
        yield errno.EBUSY, f"disk {again} is given twice"
    for device, there in ((BootDevice.CDROM, config.cdrom or config.drive), (BootDevice.DISK, config.disks)):
        if config.boot_device is device and not there and not bootable:
            name = device.name.lower()
            yield errno.ENODEV, f"boot device {name}: the vm has no {name}"
