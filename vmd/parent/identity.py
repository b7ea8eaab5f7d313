"""The identity of a VM: its id, its Ethernet addresses, and the number that its local addresses are computed from.

An identity belongs to a (name, owner), not to a place in vm.conf.  A file keeps it when the daemon ends:

    {"version": 1, "ula": "fd..::/48",
     "vms": [{"name": ..., "owner": uid, "configured": bool, "id": n, "number": n, "lladdrs": {"0": "fe:e1:..."}}]}

Missing fields have their defaults, and unknown ones are ignored.  If there is no file, or it cannot be used, VMs get
new numbers and addresses, and the log says so.
"""

import errno
import fcntl
import ipaddress
import itertools
import json
import os

from vmd.closing import close
from vmd.config import rules
from vmd.config.model import COUNT_MAX, LLADDR_BYTES, MAX_NICS, Prefix
from vmd.errors import HostError, VmdError, sentence
from vmd.log import log

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator
    from typing import Any

    Key = tuple[str, int]  # name of a VM, and uid of its owner

VERSION = 1
DIRECTORY = "/var/lib/vmd"
FILE = "identities"
FILE_MAX = 1 << 24  # bytes
# How many identities of absent VMs are kept, by `Identity.configured`: many of VMs that vm.conf has had, few of others.
ABSENT_MAX = {True: 4096, False: 64}
RANDOM_TRIES, ORDERLY_TRIES = 64, 8192  # the second is more than there can be VMs
ULA_BITS = 48
GROUP = 1  # the group bit, in the first byte of an Ethernet address


class Identity:
    """The id, number and addresses of one (name, owner)."""

    def __init__(self) -> None:
        self.vmid = 0  # 0: none yet
        self.number = 0  # its local addresses are computed from it (`addresses.Plan`); 0: none yet
        self.lladdrs: dict[int, bytes] = {}  # by number of the interface; only those that vm.conf does not give
        self.configured = False  # a vm.conf has had this VM, now or earlier


class Identities:
    """All known identities, in the order of their last use."""

    def __init__(self) -> None:
        self.known: dict[Key, Identity] = {}
        self.ula: Prefix | None = None  # range for local interfaces of this host (RFC 4193)
        self.on_change: Callable[[], None] = lambda: None
        self.touched: dict[Key, None] = {}  # keys that changed since `Writer` emptied this, the latest change last
        self._ids: set[int] = set()  # that are taken
        self._lowest = 1  # no lower id is free

    def changed(self, *keys: "Key") -> None:
        """These identities have changed; without keys, all have."""
        for key in keys or self.known:
            self._touch(key)
        self.on_change()

    def _touch(self, key: "Key") -> None:
        self.touched.pop(key, None)
        self.touched[key] = None

    def of(self, key: "Key") -> Identity:
        """Return the identity of a VM, and make one if it has none."""
        identity = self.known.setdefault(key, Identity())
        if not identity.vmid:
            identity.vmid = next(number for number in itertools.count(self._lowest) if number not in self._ids)
            self._lowest = identity.vmid + 1
            self._ids.add(identity.vmid)
            self.changed(key)
        return identity

    def leave(self, key: "Key", present: "Callable[[], set[Key]]") -> None:
        """A VM does not exist any more: keep its identity.  If too many VMs are absent, forget the oldest of them.

        `present` returns the keys of the VMs that exist.

        Unlike vmd, which keeps all: a user who may make instances must not be able to fill memory and disk.
        """
        identity = self.known.pop(key, None)
        if identity is None:
            return
        self.known[key] = identity
        kind = identity.configured
        if len(self.known) > ABSENT_MAX[kind]:
            self._forget(kind, present)
        self.changed(key)

    def _forget(self, kind: bool, present: "Callable[[], set[Key]]") -> None:
        """Forget the oldest absent VMs of a kind (`Identity.configured`) if there are too many."""
        alike = [other for other, each in self.known.items() if each.configured is kind]
        if len(alike) <= ABSENT_MAX[kind]:
            return
        there = present()
        absent = [other for other in alike if other not in there]
        for oldest in absent[: max(0, len(absent) - ABSENT_MAX[kind])]:
            vmid = self.known.pop(oldest).vmid
            self._ids.discard(vmid)
            self._lowest = min(self._lowest, vmid or self._lowest)
            self._touch(oldest)

    def choose_number(
        self, key: "Key", end: int, free: "Callable[[int], bool]", present: "Callable[[], Collection[Key]]"
    ) -> int:
        """Return a number from 1 to `end` - 1 for the local interfaces of a VM; 0 if none is left.

        The VM keeps its number if that is in the range and `free`.  Else it gets a random number that no other VM has;
        random, so that VMs of different hosts seldom have the same.  Else it gets the number of a VM that is not
        `present`, which loses it.
        """
        own = self.of(key).number
        if 0 < own < end and free(own):
            return own
        others = {each.number: other for other, each in self.known.items() if each.number and other != key}
        reserved = set(others)
        for _ in range(2):
            for number in candidates(end):
                if number not in reserved and free(number):
                    if number in others:
                        self.known[others[number]].number = 0
                        self.changed(others[number])
                    return number
            there = present()
            reserved = {number for number, other in others.items() if other in there}
        return 0

    def others(self, key: "Key") -> "Iterator[Identity]":
        """Return all identities except that of `key`."""
        return (identity for other, identity in self.known.items() if other != key)

    def lladdrs(self) -> "Iterator[bytes]":
        """Yield the Ethernet addresses of all identities."""
        for identity in self.known.values():
            yield from identity.lladdrs.values()

    def forget_ids(self) -> None:
        """Let ids count from 1 again.  Addresses stay."""
        for identity in self.known.values():
            identity.vmid = 0
        self._ids.clear()
        self._lowest = 1
        self.changed()

    # --- as bytes ----------------------------------------------------------------------------------------

    def encode(self) -> bytes:
        """Return the contents of the file."""
        rows = [row_of(key, identity) for key, identity in self.known.items()]
        head = {"version": VERSION, "ula": prefix_text(self.ula)}
        lines = ",\n".join(json.dumps(row) for row in rows)
        return f'{json.dumps(head)[:-1]}, "vms": [\n{lines}\n]}}\n'.encode()

    def decode(self, raw: bytes) -> None:
        """Take over the contents of a file.

        Raises:
            LaterVersionError: a later version of vmd has written it.
            ValueError: the file is damaged; nothing was taken over.
        """
        try:
            found = json.loads(raw)
        except RecursionError:
            raise ValueError("nested too deeply") from None
        version = checked(checked(found, dict).get("version"), int)
        if version < 1:
            raise ValueError(f"version {version}")
        if version > VERSION:
            raise LaterVersionError(version)
        ula = parse_ula(found.get("ula", ""))
        known: dict[Key, Identity] = {}
        ids: set[int] = set()
        for row in checked(found.get("vms", []), list):
            key, identity = parse_row(row)
            if key in known or identity.vmid in ids:
                raise ValueError(f"vm {key[0]}, id {identity.vmid}, occurs twice")
            ids.update({identity.vmid} - {0})
            known[key] = identity
        self.known, self.ula = known, ula
        self._ids, self._lowest = ids, 1

    def encode_touched(self) -> bytes:
        """Return the changes since `touched` was emptied, for `folded`."""
        rows = [row_of(key, self.known[key]) for key in self.touched if key in self.known]
        gone = [key for key in self.touched if key not in self.known]
        return json.dumps({"ula": prefix_text(self.ula), "vms": rows, "gone": gone}).encode()


def folded(raw: bytes, changes: "Iterable[bytes]") -> bytes:
    """Return the contents of a file with changes applied (`Identities.encode_touched`).  Raises ValueError."""
    try:
        found = json.loads(raw)
        rows = {(row["name"], row["owner"]): row for row in found["vms"]}
        for change in map(json.loads, changes):
            found["ula"] = change["ula"]
            for name, owner in change["gone"]:
                rows.pop((name, owner), None)
            for row in change["vms"]:
                rows.pop((row["name"], row["owner"]), None)  # the latest used is the last
                rows[row["name"], row["owner"]] = row
    except (RecursionError, KeyError, TypeError) as error:
        raise ValueError(f"{type(error).__name__} {error}") from error
    return json.dumps({**found, "vms": list(rows.values())}).encode()


def row_of(key: "Key", identity: Identity) -> "dict[str, Any]":
    """Return one VM as the file has it."""
    name, uid = key
    return {
        "name": name,
        "owner": uid,
        "configured": identity.configured,
        "id": identity.vmid,
        "number": identity.number,
        "lladdrs": {str(index): lladdr.hex(":") for index, lladdr in identity.lladdrs.items()},
    }


def candidates(end: int) -> "Iterator[int]":
    """Yield numbers from 1 to `end` - 1: RANDOM_TRIES random ones, then up to ORDERLY_TRIES in order."""
    for _ in range(RANDOM_TRIES):
        yield 1 + int.from_bytes(os.urandom(8), "big") % (end - 1)
    yield from range(1, min(end, ORDERLY_TRIES))


class LaterVersionError(VmdError):
    """The file has a later version than VERSION."""

    def __init__(self, version: int) -> None:
        super().__init__(version)
        self.version = version


def parse_row(row: "Any") -> "tuple[Key, Identity]":  # noqa: ANN401 - of a file
    """Return the key and identity of one VM of the file.  Raises ValueError."""
    row = checked(row, dict)
    name, uid = checked(row.get("name"), str), checked(row.get("owner"), int)
    rules.vm_name(name)
    rules.user_number(uid)
    identity = Identity()
    identity.vmid, identity.number = (checked(row.get(field, 0), int) for field in ("id", "number"))
    identity.configured = checked(row.get("configured", False), bool)
    if not 0 <= identity.vmid <= COUNT_MAX or not 0 <= identity.number <= COUNT_MAX:
        raise ValueError(f"vm {name}: id {identity.vmid}, number {identity.number}")
    for index, text in checked(row.get("lladdrs", {}), dict).items():
        lladdr = bytes.fromhex(checked(text, str).replace(":", ""))
        if not 0 <= int(index) < MAX_NICS or len(lladdr) != LLADDR_BYTES or lladdr[0] & GROUP or not any(lladdr):
            raise ValueError(f"vm {name}: interface {index}: {text}")
        identity.lladdrs[int(index)] = lladdr
    return (name, uid), identity


def checked(value: "Any", kind: "type[Any]") -> "Any":  # noqa: ANN401 - of a file
    """Return `value` if its type is `kind`.  Raises ValueError if not."""
    if type(value) is not kind:
        raise ValueError(f"{str(value)[:40]!r} is not of type {kind.__name__}")
    return value


def prefix_text(prefix: Prefix | None) -> str:
    """Return a range as text, ADDRESS/LENGTH; empty for none."""
    return f"{ipaddress.ip_address(prefix.address)}/{prefix.length}" if prefix is not None else ""


def parse_ula(text: "Any") -> Prefix | None:  # noqa: ANN401 - of a file
    """Return the range of a text; it must be one that `random_ula` makes.  Raises ValueError."""
    if not checked(text, str):
        return None
    network = ipaddress.IPv6Network(text)
    if network.prefixlen != ULA_BITS or network.network_address.packed[0] != 0xFD:
        raise ValueError(f"{text} is no range for local interfaces")
    return Prefix(address=network.network_address.packed, length=ULA_BITS)


# --- on disk -------------------------------------------------------------------------------------------------


class StateFile:
    """The file of identities.  One daemon at a time uses it.  If it cannot be used, that is logged."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.path = os.path.join(directory, FILE)
        self.fd = -1  # of the directory, locked
        self.failed = False

    def load(self, identities: Identities) -> None:
        """Load the file.  After that, `save` writes it, unless another or a later daemon uses it."""
        try:
            if not self._open():
                log.warn(f"{self.directory} is used by another vmd: ids and addresses of VMs are not kept")
                return
            raw = self._read()
        except OSError as error:
            self._cannot_keep(error)
            return
        try:
            if raw is not None:
                identities.decode(raw)
        except LaterVersionError as error:
            self.close()
            log.warn(
                f"{self.path} was written by a later vmd (version {error.version}) and is left alone: "
                "VMs have new ids and addresses, which are not kept"
            )
        except (ValueError, OverflowError) as error:
            self._put_aside(str(error))

    def save(self, identities: Identities) -> None:
        """Write the file.  A failure is logged once, until writing has succeeded again."""
        if self.fd < 0:
            return
        temporary = f"{FILE}.new"  # a failure or a kill damages only this file
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600, dir_fd=self.fd)
            with open(fd, "wb") as file:
                file.write(identities.encode())
            # No fsync: the daemon must not wait for slow storage.  A power failure can lose the changes of the last
            # seconds, or on some file systems the whole file.
            os.rename(temporary, FILE, src_dir_fd=self.fd, dst_dir_fd=self.fd)
        except OSError as error:
            if not self.failed:
                self._cannot_keep(error)
            self.failed = True
            return
        if self.failed:
            log.info(f"{self.path}: ids and addresses of VMs are kept again")
        self.failed = False

    def close(self) -> None:
        """Release the lock on the directory."""
        if self.fd >= 0:
            close(self.fd)
            self.fd = -1

    def _open(self) -> bool:
        """Make and lock the directory; return False if another daemon has the lock.  Raises OSError."""
        os.makedirs(self.directory, 0o700, exist_ok=True)
        fd = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno == errno.EWOULDBLOCK:
                close(fd)
                return False
            # A file system that has no locks is used without one.
        self.fd = fd
        return True

    def _read(self) -> bytes | None:
        """Return the contents of the file; None if there is no file.  Raises OSError."""
        try:
            fd = os.open(FILE, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=self.fd)
        except FileNotFoundError:
            return None
        with open(fd, "rb") as file:
            return file.read(FILE_MAX)

    def _put_aside(self, why: str) -> None:
        """Keep a damaged file under another name, so that the operator can examine it."""
        aside = f"{FILE}.damaged"
        try:
            os.rename(FILE, aside, src_dir_fd=self.fd, dst_dir_fd=self.fd)
        except OSError as error:
            log.error(str(HostError(f"rename {self.path}", error)))
        log.warn(f"{self.path} is damaged ({why}): VMs have new ids and addresses; the damaged file is kept as {aside}")

    def _cannot_keep(self, error: OSError) -> None:
        reason = sentence(error)
        log.warn(f"{self.path}: {reason}: ids and addresses of VMs are not kept when vmd ends")


def state_directory() -> str:
    """Return the directory of the file: that of systemd (systemd.exec(5), StateDirectory=), or DIRECTORY."""
    return os.environ.get("STATE_DIRECTORY", "").partition(":")[0] or DIRECTORY
