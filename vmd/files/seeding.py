"""What the seed of a VM is made from: the files that its configuration names, or what a client has read.

None of it is looked at here but the first line of a password's file: the seed is made by a seeder.
"""

import errno
import os

from vmd.closing import close
from vmd.errors import OperatorError, sentence
from vmd.files.boot import open_regular
from vmd.ipc.imsg import unpack
from vmd.seed.parts import FILE_MAX, HASHED, PARTS_MAX, SeedFile, SeedParts

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmd.config.model import SeedConfig


def read_file(path: str, what: str, at: "Callable[[str], None]") -> SeedFile:
    """Return a file of a seed.  Raises OperatorError naming it."""
    name = f"{what} {path}"
    at(name)
    fd = open_regular(path, what)
    try:
        data = read_all(fd, FILE_MAX)
    except OSError as error:
        raise OperatorError(error.errno or errno.EIO, f"{name}: cannot be read: {sentence(error)}") from None
    finally:
        close(fd)
    if len(data) > FILE_MAX:
        raise OperatorError(errno.EFBIG, f"{name}: larger than {FILE_MAX >> 10} KiB")
    return SeedFile(name=path, data=data)


def read_all(fd: int, most: int) -> bytes:
    """Return what a file holds, and no more than one byte beyond `most`.  Raises OSError."""
    data = b""
    while len(data) <= most and (piece := os.pread(fd, most + 1 - len(data), len(data))):
        data += piece
    return data


def parts_of(name: str, seed: "SeedConfig", at: "Callable[[str], None]") -> SeedParts:
    """Return what the seed of a VM of that name is made from, its files read.  Raises OperatorError."""

    def read(path: str, what: str) -> SeedFile | None:
        return read_file(path, what, at) if path else None

    return SeedParts(
        vm=name,
        instance_id=seed.instance_id,
        hostname=seed.hostname,
        user=seed.user,
        password_hash=hash_of(seed.password, at),
        keys=tuple(read_file(path, "ssh-key", at) for path in seed.ssh_keys),
        user_data=read(seed.user_data, "user-data"),
        vendor_data=read(seed.vendor_data, "vendor-data"),
        network_config=read(seed.network_config, "network-config"),
        network=seed.network,
    )


def hash_of(password: str, at: "Callable[[str], None]") -> str:
    """Return the hash of a password, which is given or is the first line of a file.  Raises OperatorError."""
    if not password or password.startswith(HASHED):
        return password
    line, _, _ = read_file(password, "password-hash", at).data.strip().partition(b"\n")
    found = line.decode("ascii", "replace").strip()
    if not found.startswith(HASHED):
        what = f"its first line does not begin with {HASHED}: `openssl passwd -6` makes a hash"
        raise OperatorError(errno.EINVAL, f"password-hash {password}: {what}")
    return found


def given_parts(fd: int, name: str, seed: "SeedConfig") -> SeedParts:
    """Return what a client has read for the seed of a VM of that name.  Raises OperatorError."""
    try:
        raw = read_all(fd, PARTS_MAX)
        if len(raw) > PARTS_MAX:
            raise OperatorError(errno.EFBIG, f"vm {name}: what its seed is made from is larger than {PARTS_MAX} bytes")
        parts = unpack(SeedParts, raw)
    except (OSError, ValueError) as error:
        raise OperatorError(errno.EINVAL, f"vm {name}: what its seed is made from: {sentence(error)}") from None
    # What others go by is what was said with the request.
    return parts.replace(vm=name, hostname=seed.hostname, user=seed.user)
