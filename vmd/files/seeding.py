"""Reads the parts of the seed of a VM: the files that its configuration names, or a copy of them from a client.

The parts are not parsed here, except for the first line of the file with the password.  A seeder makes the seed.
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
    """Read a file of a seed.  Raises OperatorError naming the file."""
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
    """Return the content of a file, at most `most` + 1 bytes.  Raises OSError."""
    data = b""
    while len(data) <= most and (piece := os.pread(fd, most + 1 - len(data), len(data))):
        data += piece
    return data


def parts_of(name: str, seed: "SeedConfig", at: "Callable[[str], None]") -> SeedParts:
    """Read the files of a seed, and return the parts for the VM `name`.  Raises OperatorError."""

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
    """Return a password hash, which is given itself or is the first line of a file.  Raises OperatorError."""
    if not password or password.startswith(HASHED):
        return password
    line, _, _ = read_file(password, "password-hash", at).data.strip().partition(b"\n")
    found = line.decode("ascii", "replace").strip()
    if not found.startswith(HASHED):
        what = f"its first line does not begin with {HASHED}: `openssl passwd -6` makes a hash"
        raise OperatorError(errno.EINVAL, f"password-hash {password}: {what}")
    return found


def given_parts(fd: int, name: str, seed: "SeedConfig") -> SeedParts:
    """Return the parts that a client has read for the seed of the VM `name`.  Raises OperatorError."""
    try:
        raw = read_all(fd, PARTS_MAX)
        if len(raw) > PARTS_MAX:
            raise OperatorError(errno.EFBIG, f"vm {name}: the parts of its seed are larger than {PARTS_MAX} bytes")
        parts = unpack(SeedParts, raw)
    except (OSError, ValueError) as error:
        raise OperatorError(errno.EINVAL, f"vm {name}: the parts of its seed: {sentence(error)}") from None
    # These fields are from the request, because other processes have seen those.
    return parts.replace(vm=name, hostname=seed.hostname, user=seed.user)
