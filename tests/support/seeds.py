"""Parts of seeds, for tests."""

import base64
import struct

from vmd.seed.parts import Interface, SeedFile, SeedParts

LLADDR = bytes.fromhex("fee1bad00001")
HASH = "$6$saltsalt$yX1Y8JvE5Qq6tG0jO6o0fQ1Y4c1mT0sFv3f8o2oG3Zr4q1yA5X6i8m7a9V0bXhQk1dC2eR3tYu4iOp5aSd6fG"

# The files of a disc, of very different sizes.
FILES = {
    "meta-data": b"instance-id: x\n",
    "user-data": bytes(range(256)) * 17,
    "vendor-data": b"",
    "network-config": b"n" * 2048,
}
# Text that is special in YAML, a shell or a terminal.
NASTY = (
    "", "no", "yes", "on", "~", "null", "1e3", "0x10", "0o17", "12:30:45", "2001-01-01", "1_000", "=", "<<",
    "- a", "? b", ": c", "a: b", "#d", "a #e", "&f", "*g", "!h", "|", ">", "%i", "@j", "`k", "'", '"', "\\", "\\n",
    '"\\"', "{", "}", "[", "]", ",", " l ", "\t", "a\nb", "\r\n", "\0", "\x1b[0m", "\x7f", "\x85", "\xa0", "\u2028",
    "\ufeff", "\uffff", "\U0001f600", "---", "...", "--- a", "{{ ds }}", "${x}", "a" * 5000,
)  # fmt: skip


def public_key(kind: str = "ssh-ed25519", comment: str = "me@host", *, blob: bytes = bytes(32)) -> str:
    """Return a public key in the format of ssh-keygen(1).  No private key for it exists."""
    data = b"".join(struct.pack(">I", len(part)) + part for part in (kind.encode(), blob))
    return " ".join(filter(None, (kind, base64.b64encode(data).decode(), comment)))


def seed_file(text: str | bytes, name: str = "/home/me/file") -> SeedFile:
    """Return a file that a user has named."""
    return SeedFile(name=name, data=text if isinstance(text, bytes) else text.encode())


def usual(**changes: object) -> SeedParts:
    """Return the parts of a usual seed."""
    parts = SeedParts(
        vm="web",
        hostname="web",
        user="alice",
        keys=(seed_file(public_key() + "\n", "/home/me/.ssh/id_ed25519.pub"),),
        interfaces=(Interface(lladdr=LLADDR),),
    )
    return parts.replace(**changes)
