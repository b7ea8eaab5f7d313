"""Users and groups of a test: a user database that only processes in its mount namespace see."""

import contextlib
import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self

from tests.support.clients import connect_as
from tests.support.daemon import DEADLINE_S, ROOT
from tests.support.hostnet import NetDaemon
from tests.support.network import Network
from vmd.config.model import Owner
from vmd.ipc.imsg import MAX_MESSAGE, decode, encode
from vmd.record import Record

NO_FDS: Mapping[str, Sequence[int]] = MappingProxyType({})

# All modules are imported before the user is changed, because the user may not be able to read this checkout.
AS_USER = """
import grp, importlib, os, pkgutil, pwd, sys
import vmctl.commands
for module in pkgutil.walk_packages(vmctl.__path__, "vmctl."):
    importlib.import_module(module.name)
from vmctl.__main__ import main
user = pwd.getpwnam(sys.argv[1])
os.initgroups(user.pw_name, user.pw_gid)
os.setresgid(user.pw_gid, user.pw_gid, user.pw_gid)
os.setresuid(user.pw_uid, user.pw_uid, user.pw_uid)
sys.exit(main(sys.argv[2:]))
"""
PRIVATE_ETC = """
mkdir "$0/etc"
mount -t tmpfs -o mode=755 none "$0/etc"
cp -a /etc/passwd /etc/group /etc/shadow /etc/gshadow /etc/login.defs /etc/nsswitch.conf "$0/etc"
cp -a /etc/resolv.conf /etc/ld.so.cache /etc/localtime /etc/iproute2 "$0/etc" 2>/dev/null || :
mount --bind "$0/etc" /etc
echo ready
exec cat
"""
# Covers the topmost folder above the checkout that others cannot enter, and mounts the checkout below the cover.
ENTERABLE = """
exec 9<"$0"
mount -t tmpfs -o mode=755 none "$1"
mkdir -p "$0"
mount --no-canonicalize --bind /proc/self/fd/9 "$0"
exec 9<&-
cd "$0"
shift
exec "$@"
"""


def as_uid(uid: int, *command: str | Path) -> list[str | Path]:
    """Return a command that runs a program of this checkout as a user without groups.  It may be closed to the user."""
    dropped: list[str | Path] = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--", *command]
    above = [folder for folder in ROOT.parents if not folder.stat().st_mode & 0o001]
    if not above:
        return dropped
    return ["unshare", "--mount", "--propagation", "private", "sh", "-e", "-c", ENTERABLE, ROOT, above[-1], *dropped]


@contextlib.contextmanager
def public_folder() -> Iterator[Path]:
    """Make a folder that every user may enter.  Other users cannot always enter pytest's folders."""
    with tempfile.TemporaryDirectory(prefix="vmd-test-") as name:
        os.chmod(name, 0o755)
        yield Path(name)


class Users:
    """A host with the test's users; a context manager."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __enter__(self) -> Self:
        self.keeper = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "sh", "-e", "-c", PRIVATE_ETC, self.directory],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.keeper.stdout is not None
        assert self.keeper.stdout.readline() == "ready\n"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self.keeper:  # closing its input ends it
            pass

    @property
    def inside(self) -> list[str]:
        """A command prefix with which a program sees these users."""
        return ["nsenter", f"--mount=/proc/{self.keeper.pid}/ns/mnt", f"--wd={ROOT}"]

    def run(self, *command: str) -> str:
        """Run a program that sees or changes these users; return its output."""
        done = subprocess.run(
            [*self.inside, *command], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def add_group(self, name: str) -> int:
        """Make a group; return its number."""
        self.run("groupadd", name)
        return int(self.run("getent", "group", name).split(":")[2])

    def add_user(self, name: str, *groups: str, primary: str = "") -> int:
        """Make a user in some groups; return the user's number."""
        options = ["--groups", ",".join(groups)] if groups else []
        options += ["--gid", primary] if primary else ["--user-group"]
        self.run("useradd", "--no-create-home", "--no-log-init", *options, name)
        return int(self.run("id", "-u", name))


class UsersDaemon(NetDaemon):
    """A vmd on a host with these users, with a network of its own."""

    def __init__(self, directory: Path, users: Users, network: Network, conf: str = "") -> None:
        super().__init__(directory, network, conf)
        self.users = users
        self.prefix = users.inside

    def command_of(self, user: str, *arguments: str | Path) -> list[str | Path]:
        """Return the command that runs vmctl as this user."""
        return [*self.prefix, sys.executable, "-c", AS_USER, user, "-s", self.socket, *arguments]

    def vmctl_as(self, user: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """Run vmctl as a user to its end."""
        return subprocess.run(
            self.command_of(user, *arguments),
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DEADLINE_S, check=False,
        )  # fmt: skip

    def must_as(self, user: str, *arguments: str | Path) -> str:
        """Run vmctl as a user.  It must succeed; return its output."""
        done = self.vmctl_as(user, *arguments)
        assert done.returncode == 0, f"{user}: vmctl {arguments}: {done.stderr}\n--- log of vmd\n{self.log}"
        return done.stdout + done.stderr

    def connect_as(self, user: str) -> socket.socket:
        """Return a connection with this user's peer credentials, for messages that vmctl never sends."""
        said = self.users.run("id", user)  # uid=1001(ulf) gid=1001(ulf) groups=1001(ulf),1002(club)
        uid, gid, *groups = (int(number) for number in re.findall(r"(\d+)\(", said))
        return connect_as(self.socket, uid, gid, groups)

    def ask_as(self, user: str, request: Record, fds: Mapping[str, Sequence[int]] = NO_FDS) -> Record:
        """Send a message as this user; return the answer."""
        with self.connect_as(user) as client:
            packet, order = encode(request, fds=fds)
            socket.send_fds(client, [packet], order)
            return decode(client.recv(MAX_MESSAGE), [], "vmd").message


@contextlib.contextmanager
def acting_as(user: Owner | None) -> Iterator[None]:
    """Run the block with a user's rights, as an opener does.  None changes nothing."""
    if user is None or not user.uid:
        yield
        return
    groups, gid = os.getgroups(), os.getegid()
    os.setgroups([])
    os.setegid(user.gid if user.gid is not None else 65534)
    os.seteuid(user.uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(gid)
        os.setgroups(groups)
