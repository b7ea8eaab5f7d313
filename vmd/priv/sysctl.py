"""Kernel settings below /proc/sys/net that priv changes, and their old values.

An old value is written to a file before the new one is set, so that the next daemon can restore it if this one is
killed.  The file is in /run/vmd/priv and belongs to this network namespace.  Each setting is a line of JSON, [name, old
value, our value].  Lines are only appended, until all settings are restored.  The file is locked: of two daemons on one
host, only the first owns the network.

Forwarding is a switch for all programs of a host, and a program that finds it on does not change it.  So it cannot be
known which programs rely on it.  It stays on where others may need it, with the settings that belong to it
(`FORWARDING`).
"""

import contextlib
import errno
import fcntl
import json
import os
import socket

from vmd.closing import close
from vmd.errors import HostError
from vmd.log import log
from vmd.privsep.confine import PRIV_DIRECTORY

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection

SYS = "/proc/sys/net"
SO_NETNS_COOKIE = 71
STATE_MAX = 1 << 20
# Endings of the settings that are changed for forwarding.
FORWARDING = ("/ip_forward", "/forwarding", "/accept_redirects", "/accept_ra")
DEFAULT_ACCEPT_RA = "ipv6/conf/default/accept_ra"


def read(name: str) -> str | None:
    """Return a setting such as ipv4/ip_forward; None if this kernel does not have it."""
    try:
        with open(f"{SYS}/{name}") as file:
            return file.read().strip()
    except OSError:
        return None


def write(name: str, value: str) -> None:
    """Change a setting.  Raises HostError."""
    try:
        with open(f"{SYS}/{name}", "w") as file:
            file.write(value)
    except OSError as error:
        raise HostError(f"set net/{name} to {value}", error) from error


def entries(directory: str) -> list[str]:
    """Return the names in a directory of settings; none if this kernel does not have it."""
    try:
        return sorted(os.listdir(f"{SYS}/{directory}"))
    except OSError:
        return []


def state_path() -> str:
    """Return the path of the file for this network namespace.  The number in it is not used for another one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            cookie = int.from_bytes(any_socket.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8), "little")
        except OSError:
            cookie = os.stat("/proc/self/ns/net").st_ino  # before Linux 5.14; another namespace may have it later
    return f"{PRIV_DIRECTORY}/network-{cookie}"


class ChangedSettings:
    """Settings that were changed: name -> (old value, the value that we set)."""

    def __init__(self) -> None:
        self.path = state_path()
        self.fd = -1
        self.size = 0  # of the file, in bytes
        self.values: dict[str, tuple[str, str]] = {}

    def lock(self) -> bool:
        """Become the owner of this network, and read the old values that an earlier daemon has left.

        Return False if another process is the owner.  Raises HostError.
        """
        while self.fd < 0:
            try:
                fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            except OSError as error:
                raise HostError(f"open {self.path}", error) from error
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                close(fd)
                return False
            if os.fstat(fd).st_nlink:
                self.fd = fd
                self.values, self.size = parse(os.pread(fd, STATE_MAX, 0))
            else:
                close(fd)  # its owner has just removed the file
        return True

    def change(self, name: str, value: str) -> bool:
        """Change a setting and keep its old value.  Return False if it has the value already.  Raises HostError."""
        old = read(name)
        if old in (None, value):
            return False
        assert old is not None
        self._keep(name, old, value)
        write(name, value)
        return True

    def remember(self, name: str) -> None:
        """Keep the value of a setting that the kernel changes together with another one.  Raises HostError."""
        value = read(name)
        if value is not None:
            self._keep(name, value, value)

    def changes(self, family: str) -> bool:
        """Return whether settings of `family` ("ipv4" or "ipv6") were changed."""
        return any(name.startswith(f"{family}/") and old != ours for name, (old, ours) in self.values.items())

    def put_back(self, left: "Collection[str]" = ()) -> None:
        """Restore all settings that nobody else has changed since.  Failures are logged.

        Forwarding of the families in `left` stays as it is, and its old values are kept in the file.
        """
        stay = {
            name: kept
            for name, kept in self.values.items()
            if name.endswith(FORWARDING) and name.partition("/")[0] in left
        }
        back = {name: kept for name, kept in self.values.items() if name not in stay}
        inherited = self._inherited() if DEFAULT_ACCEPT_RA in back else ()
        for name, (old, ours) in (*inherited, *reversed(back.items())):
            now = read(name)
            if now in (None, old) or (now != ours and old != ours):
                continue  # it is gone, has its old value, or was changed by another program since
            try:
                write(name, old)
                log.info(f"net/{name} is {old} again")
            except HostError as error:
                log.error(str(error))
        self.values.clear()
        self.size = 0
        with contextlib.suppress(OSError):
            os.ftruncate(self.fd, 0)
        for name, (old, ours) in stay.items():
            with contextlib.suppress(HostError):
                self._keep(name, old, ours)

    def _inherited(self) -> list[tuple[str, tuple[str, str]]]:
        """Return the settings of later interfaces, which have inherited our value of the default."""
        old, ours = self.values[DEFAULT_ACCEPT_RA]
        names = (f"ipv6/conf/{name}/accept_ra" for name in entries("ipv6/conf") if name != "all")
        return [(name, (old, ours)) for name in names if old != ours and name not in self.values]

    def close(self) -> None:
        """Give up the ownership of the network, and remove the file."""
        if self.fd >= 0:
            with contextlib.suppress(OSError):
                os.unlink(self.path)
            close(self.fd)
            self.fd = -1

    def _keep(self, name: str, old: str, ours: str) -> None:
        if name in self.values:
            return
        line = json.dumps([name, old, ours]).encode() + b"\n"
        try:
            if os.pwrite(self.fd, line, self.size) < len(line):
                raise OSError(errno.ENOSPC, "")
        except OSError as error:
            raise HostError(f"write {self.path}", error) from error
        self.size += len(line)
        self.values[name] = (old, ours)


def parse(raw: bytes) -> tuple[dict[str, tuple[str, str]], int]:
    """Return the values of a file, and the length of its complete lines in bytes.  Invalid lines are left out."""
    values: dict[str, tuple[str, str]] = {}
    size = 0
    for line in raw.splitlines(keepends=True):
        if not line.endswith(b"\n"):
            break  # its writer was killed before it changed the setting
        size += len(line)
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if not isinstance(found, list) or len(found) != 3 or not all(isinstance(word, str) for word in found):
            continue
        name, old, ours = found
        if name.startswith(("ipv4/", "ipv6/")) and "/../" not in name:
            values.setdefault(name, (old, ours))
    return values, size
