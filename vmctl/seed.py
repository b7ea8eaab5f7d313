"""`vmctl start -C`: the parts of the seed of a new VM.  Files are read with the rights of the user."""

import os
import posixpath

from vmctl.errors import ArgumentError, CommandError
from vmctl.options import alternatives, meant
from vmd.config.model import SeedConfig
from vmd.errors import sentence
from vmd.ipc.imsg import pack
from vmd.memfile import fill_file, memory_file
from vmd.seed import rules
from vmd.seed.parts import FILE_MAX, HASHED, PARTS_MAX, SeedFile, SeedParts

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar

    T = TypeVar("T")

WORDS: "dict[str, Callable[[str], str]]" = {
    "hostname": rules.hostname,
    "user": rules.user,
    "instance-id": rules.instance_id,
}
FILES = ("user-data", "vendor-data", "network-config")
SSH_KEY, PASSWORD_HASH = "ssh-key", "password-hash"
KEYS = (*WORDS, SSH_KEY, PASSWORD_HASH, *FILES)


class Seed:
    """The parts that were given with -C so far."""

    def __init__(self) -> None:
        self.given: dict[str, Any] = {}
        self.keys: list[SeedFile] = []

    def take(self, text: str) -> None:
        """Take one KEY=VALUE.  Raises ArgumentError, CommandError."""
        key, equals, value = text.partition("=")
        if key not in KEYS:
            close = meant(key, KEYS) or f": it is {alternatives(KEYS)}"
            raise ArgumentError(f"-C {key}: not a part of a seed{close}")
        if key == SSH_KEY:
            self.keys += own_keys() if not equals else [read(key, value)]
            ruled(rules.key_files, len(self.keys))
            return
        if not value:
            raise ArgumentError(f"-C {key} needs a value: -C {key}={'no' if key == 'network-config' else '...'}")
        field = key.replace("-", "_")
        if field in self.given or (key == "network-config" and "network" in self.given):
            raise ArgumentError(f"-C {key} specified multiple times")
        if key in WORDS:
            self.given[field] = ruled(WORDS[key], value)
        elif key == PASSWORD_HASH:
            self.given[field] = hash_in(value)
        elif key == "network-config" and value == "no":
            self.given["network"] = False
        else:
            self.given[field] = read(key, value)

    def config(self) -> SeedConfig:
        """Return the part of the seed that the daemon needs.  Raises ArgumentError."""
        if "password_hash" in self.given and "user" not in self.given:
            raise ArgumentError("-C password-hash needs a user: -C user=...")
        return SeedConfig(hostname=self.given.get("hostname", ""), user=self.given.get("user", ""))

    def file(self, name: str) -> int:
        """Return a memory file with the seed for a VM of that name.  The caller closes it.  Raises CommandError."""
        raw = pack(SeedParts(vm=name, keys=tuple(self.keys), **self.given))
        if len(raw) > PARTS_MAX:
            raise CommandError(f"the parts of the seed have {len(raw)} bytes, and may have {PARTS_MAX} at most")
        fd = memory_file("seed-parts")
        try:
            fill_file(fd, raw)
        except BaseException:
            os.close(fd)
            raise
        return fd


def ruled(rule: "Callable[[T], T]", value: "T") -> "T":
    """Apply a rule to a value.  Return its result.  Raises ArgumentError with the rule's sentence."""
    try:
        return rule(value)
    except ValueError as error:
        raise ArgumentError(f"-C {error}") from None


def read(key: str, path: str) -> SeedFile:
    """Return a file, which may be a pipe.  Raises CommandError."""
    try:
        # Most shells do not expand the ~ in ssh-key=~/.ssh/a.pub.
        with open(posixpath.expanduser(path), "rb") as file:
            data = file.read(FILE_MAX + 1)
    except (OSError, ValueError) as error:
        raise CommandError(f"cannot read {key} {path!r}: {sentence(error)}", getattr(error, "errno", None)) from None
    if len(data) > FILE_MAX:
        raise CommandError(f"{key} {path!r}: larger than {FILE_MAX >> 10} KiB")
    return SeedFile(name=path, data=data)


def hash_in(path: str) -> str:
    """Return the hash of a password from the first line of a file.  Raises ArgumentError, CommandError."""
    if path.startswith(HASHED):
        why = "all users can see the arguments of vmctl while it runs"
        raise ArgumentError(f"-C {PASSWORD_HASH} takes the name of a file with the hash in it: {why}")
    lines = read(PASSWORD_HASH, path).data.decode("ascii", "replace").split("\n", 1)
    return ruled(rules.password_hash, lines[0].strip())


def own_keys() -> list[SeedFile]:
    """Return the public keys of the user.  Raises CommandError."""
    folder = posixpath.expanduser("~/.ssh")
    try:
        names = sorted(name for name in os.listdir(folder) if name.endswith(".pub") and not name.endswith("-cert.pub"))
    except OSError:
        names = []
    if not names:
        raise CommandError(f"no public key in {folder}: make one with ssh-keygen, or name a file: -C {SSH_KEY}=FILE")
    return [read(SSH_KEY, f"{folder}/{name}") for name in names]
