"""Chains of the tables of the old iptables, which nft(8) does not show.

    getsockopt(SO_GET_INFO)     struct ipt_getinfo      offsets of each chain's first entry, and of its policy
    getsockopt(SO_GET_ENTRIES)  struct ipt_get_entries  all entries (<linux/netfilter_ipv4/ip_tables.h>, and v6's)

Only loaded tables are read, because asking for another one would load it.
"""

import os
import socket
from struct import Struct

from vmd.closing import close
from vmd.errors import HostError
from vmd.priv.firewalls import Chain
from vmd.privsep import linux
from vmd.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

NAMES_MAX = 4096  # bytes
SO_GET_INFO, SO_GET_ENTRIES = 64, 65
TABLE = b"filter"
INFO = Struct("=32sI5I5III")  # name, valid_hooks, hook_entry, underflow, num_entries, size
ENTRIES = Struct("=32sI4x")  # name, size; then the entries
OFFSETS = Struct("=HH")  # target_offset, next_offset
TARGET = Struct("=H29sB")  # size, name, revision of xt_entry_target; then, with an empty name, a verdict
VERDICT = Struct("=i")
CHAIN_TARGET = b"ERROR"  # this target begins a user-defined chain; its name follows
CHAIN_NAME = Struct("=30s")
HOOKS = {1: "INPUT", 2: "FORWARD"}
DROP = -1  # -NF_DROP - 1


class Family(Record):
    """An address family with its program and layout."""

    name: str
    program: str
    family: int
    level: int
    offsets_at: int  # offset of OFFSETS in an entry: after struct ipt_ip, or ip6t_ip6, and nfcache


FAMILIES = (
    Family(name="ip", program="iptables", family=socket.AF_INET, level=socket.IPPROTO_IP, offsets_at=88),
    Family(name="ip6", program="ip6tables", family=socket.AF_INET6, level=socket.IPPROTO_IPV6, offsets_at=140),
)


class Loaded:
    """The files that list the loaded tables.  Only root may open them, so the parent opens them for priv."""

    def __init__(self) -> None:
        self.fds: dict[str, int] = {}  # by the name of the family

    def take(self, family: Family, fd: int | None) -> None:
        """Take over a file.  None: this kernel has no tables of this family now."""
        old = self.fds.pop(family.name, None)
        if old is not None:
            close(old)
        if fd is not None:
            self.fds[family.name] = fd

    def tables(self, family: Family) -> list[bytes]:
        """Return the names of the loaded tables.  Raises OSError."""
        fd = self.fds.get(family.name)
        return os.pread(fd, NAMES_MAX, 0).split() if fd is not None else []


def chains(family: Family, loaded: Loaded) -> list[Chain]:
    """Return the chains of the table `filter`; none if it is not loaded or cannot be read."""
    try:
        if TABLE not in loaded.tables(family):
            return []
        with socket.socket(family.family, socket.SOCK_RAW, socket.IPPROTO_RAW) as any_socket:
            request = INFO.pack(TABLE, *bytes(13))
            info = INFO.unpack(linux.getsockopt(any_socket.fileno(), family.level, SO_GET_INFO, request))
            valid_hooks, underflow, size = info[1], info[7:12], info[13]
            request = ENTRIES.pack(TABLE, size) + bytes(size)
            entries = linux.getsockopt(any_socket.fileno(), family.level, SO_GET_ENTRIES, request)[ENTRIES.size :]
    except (OSError, HostError):
        return []  # there is no table, or it has changed between the two calls
    table = f"{family.name} filter"
    bases = [
        Chain(
            table=table,
            name=name,
            hook=name.lower(),
            policy="drop" if policy(entries, underflow[hook], family.offsets_at) == DROP else "accept",
            old=True,
        )
        for hook, name in HOOKS.items()
        if valid_hooks & 1 << hook
    ]
    return bases + [Chain(table=table, name=name, old=True) for name in names(entries, family.offsets_at)]


def policy(entries: bytes, start: int, offsets_at: int) -> int | None:
    """Return the verdict of the entry that is at `start`; None if it has none."""
    target = target_of(entries, start, offsets_at)
    if target is None or target + TARGET.size + VERDICT.size > len(entries):
        return None
    _, name, _ = TARGET.unpack_from(entries, target)
    return int(VERDICT.unpack_from(entries, target + TARGET.size)[0]) if not name.strip(b"\0") else None


def names(entries: bytes, offsets_at: int) -> "Iterator[str]":
    """Yield the names of the user-defined chains."""
    start = 0
    while (target := target_of(entries, start, offsets_at)) is not None:
        if TARGET.unpack_from(entries, target)[1].rstrip(b"\0") == CHAIN_TARGET:
            raw = entries[target + TARGET.size : target + TARGET.size + CHAIN_NAME.size]
            name = raw.partition(b"\0")[0].decode("ascii", "replace")
            if name != CHAIN_TARGET.decode():  # the last entry of the table looks like the start of a chain
                yield name
        following = OFFSETS.unpack_from(entries, start + offsets_at)[1]
        if following < offsets_at + OFFSETS.size:
            return
        start += following


def target_of(entries: bytes, start: int, offsets_at: int) -> int | None:
    """Return the offset of the target of the entry at `start`; None if `entries` ends before it is complete."""
    if start + offsets_at + OFFSETS.size > len(entries):
        return None
    target: int = start + OFFSETS.unpack_from(entries, start + offsets_at)[0]
    return target if target + TARGET.size <= len(entries) else None
