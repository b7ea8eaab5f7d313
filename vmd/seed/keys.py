"""Public keys of ssh in the form of authorized_keys (sshd(8)), as in ~/.ssh/*.pub."""

import base64
import binascii
import struct

from vmd.seed.parts import SeedError, SeedFile

LINE_MAX = 16 << 10  # bytes; an RSA key of 16384 bits has 2.8 KiB
LENGTH = struct.Struct(">I")
TYPE_MAX = 64
CERTIFICATE = "-cert-v"


def keys_of(file: SeedFile) -> list[str]:
    """Return the keys of a file, one line each.  Raises SeedError, which names file and line but shows no text."""
    found: list[str] = []
    for number, raw in enumerate(file.data.splitlines(), 1):
        where = f"ssh-key {file.name}:{number}"
        if b"PRIVATE KEY" in raw or raw.startswith(b"PuTTY-User-Key-File"):
            raise SeedError(f"{where}: a private key: name the file with the public one, which ends in .pub")
        if b"BEGIN SSH2 PUBLIC KEY" in raw:
            raise SeedError(f"{where}: not in the form of OpenSSH: `ssh-keygen -i -f` makes that from it")
        if len(raw) > LINE_MAX:
            raise SeedError(f"{where}: longer than {LINE_MAX} bytes")
        try:
            line = raw.decode().strip()
        except UnicodeDecodeError:
            raise SeedError(f"{where}: not UTF-8") from None
        if not line or line.startswith("#"):
            continue
        if not line.replace("\t", " ").isprintable():
            raise SeedError(f"{where}: has characters that cannot be printed")
        kind = type_of(line) or type_of(without_options(line))
        if not kind:
            raise SeedError(f"{where}: no public key in the form of authorized_keys")
        if CERTIFICATE in kind:
            raise SeedError(f"{where}: a certificate: name the file with the public key that it is for")
        found.append(line)
    if not found:
        raise SeedError(f"ssh-key {file.name}: no key in it")
    return found


def type_of(text: str) -> str:
    """Return the type of the key in a text `TYPE BASE64 ...`; "" if it is no key or the key itself has another type."""
    words = text.split(None, 2)
    if len(words) < 2 or len(words[0]) > TYPE_MAX:
        return ""
    kind = words[0].encode()
    try:
        blob = base64.b64decode(words[1], validate=True)
    except (binascii.Error, ValueError):
        return ""
    fields = fields_of(blob)
    return words[0] if len(fields) > 1 and fields[0] == kind else ""


def fields_of(blob: bytes) -> list[bytes]:
    """Return the fields of a key (RFC 4253, 6.6); [] if the last one does not end with the key."""
    fields: list[bytes] = []
    at = 0
    while at < len(blob):
        begin = at + LENGTH.size
        if begin > len(blob):
            return []
        (size,) = LENGTH.unpack_from(blob, at)
        at = begin + size
        fields.append(blob[begin:at])
    return fields if at == len(blob) else []


def without_options(line: str) -> str:
    """Return the text behind the first blank that is not in quotes."""
    quoted = False
    before = ""
    for place, char in enumerate(line):
        if char == '"' and before != "\\":
            quoted = not quoted
        elif char in " \t" and not quoted:
            return line[place:].strip()
        before = char
    return ""
