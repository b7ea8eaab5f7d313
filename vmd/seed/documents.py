"""The texts of a seed (cloud-init's NoCloud): meta-data, user-data, vendor-data and network-config.

Of a user's own file only the first line is parsed.  The YAML that is generated here has every text in quotes, so that
`no`, `1e3` or `: #` stay texts.
"""

import base64
import hashlib
import ipaddress
import uuid

from vmd.config.model import LLADDR_BYTES, MAX_SEED_BYTES
from vmd.config.rules import shown
from vmd.seed import rules
from vmd.seed.iso import image
from vmd.seed.keys import keys_of
from vmd.seed.parts import (
    ADDRESSES_MAX,
    FILE_MAX,
    INTERFACES_MAX,
    KEY_FILES_MAX,
    LABEL,
    Interface,
    SeedError,
    SeedFile,
    SeedParts,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import TypeAlias

    Yaml: TypeAlias = "str | bool | int | Sequence[Yaml] | dict[str, Yaml]"

INSTANCES = uuid.UUID("5d1c3b0e-31a2-5c0c-9a43-7c9fd0d4f6a1")  # the name space of instance-ids made from names
GZIP = b"\x1f\x8b"
# The beginnings by which cloud-init knows a text (`INCLUSION_TYPES_MAP`), in lower case.  Blanks may precede them.
HEADS = (
    b"#cloud-config", b"#!", b"#include", b"#part-handler", b"#cloud-boothook", b"## template: jinja",
)  # fmt: skip
MIME, MIME_WITHIN = b"mime-version:", 4096  # cloud-init also takes a text that has this in so many bytes

META_DATA, USER_DATA, VENDOR_DATA, NETWORK_CONFIG = "meta-data", "user-data", "vendor-data", "network-config"


# --- YAML ----------------------------------------------------------------------------------------------------


def quoted(text: str) -> str:
    """Return a text in YAML's double quotes (YAML 1.1, 5.6), in ASCII.  Raises SeedError."""
    return '"' + "".join(map(escaped, text)) + '"'


def escaped(char: str) -> str:
    """Return one character within double quotes.  Raises SeedError."""
    code = ord(char)
    if 0xD800 <= code < 0xE000:  # a byte that was no UTF-8
        raise SeedError("a text of the seed is not UTF-8")
    if char in '"\\':
        return "\\" + char
    if 0x20 <= code < 0x7F:
        return char
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def yaml(value: "dict[str, Yaml]") -> str:
    """Return a YAML document.  Keys are plain words.  Raises SeedError."""
    return "".join(f"{line}\n" for line in lines(value)) or "{}\n"


def lines(value: "Yaml") -> "Iterator[str]":
    """Yield the lines of a value, without indentation.  Raises SeedError."""
    if isinstance(value, bool):
        yield "true" if value else "false"
    elif isinstance(value, int):
        yield str(value)
    elif isinstance(value, str):
        yield quoted(value)
    elif isinstance(value, dict):
        for key, each in value.items():
            first, *rest = lines(each)
            if isinstance(each, str | int):
                yield f"{key}: {first}"
            else:
                yield f"{key}:"
                yield from (f"  {line}" for line in (first, *rest))
    else:
        for each in value:
            first, *rest = lines(each)
            yield f"- {first}"
            yield from (f"  {line}" for line in rest)


# --- the parts -------------------------------------------------------------------------------------------------


def instance_id(parts: SeedParts) -> str:
    """Return the instance-id.  Made from a name, it is the same at each start and on every host.  Raises SeedError."""
    return ruled(rules.instance_id, parts.instance_id) or str(uuid.uuid5(INSTANCES, parts.vm))


def ruled(rule: "Callable[[str], str]", text: str) -> str:
    """Return a word that follows a rule, or an empty one.  Raises SeedError."""
    try:
        return rule(text) if text else ""
    except ValueError as error:
        raise SeedError(str(error)) from None


def public_keys(parts: SeedParts) -> list[str]:
    """Return all public keys without duplicates.  Raises SeedError."""
    if len(parts.keys) > KEY_FILES_MAX:
        raise SeedError(f"ssh-key: {len(parts.keys)} files, and {KEY_FILES_MAX} are the most")
    return list(dict.fromkeys(key for file in parts.keys for key in keys_of(bounded("ssh-key", file))))


def bounded(key: str, file: SeedFile) -> SeedFile:
    """Return the file.  Raises SeedError if it is too large."""
    if len(file.data) > FILE_MAX:
        raise SeedError(f"{key} {file.name}: larger than {FILE_MAX >> 10} KiB")
    return file


def meta_data(parts: SeedParts) -> bytes:
    """Return the meta-data: the guest's identity and public keys.  Raises SeedError."""
    values: dict[str, Yaml] = {"instance-id": instance_id(parts)}
    if parts.hostname:
        values["local-hostname"] = ruled(rules.hostname, parts.hostname)
    if keys := public_keys(parts):
        # cloud-init adds these to the keys of user-data, also to those of a user's own file.
        values["public-keys"] = keys
    return yaml(values).encode()


def defaults(parts: SeedParts) -> "dict[str, Yaml]":
    """Return the settings that go into cloud-config, because meta-data has no place for them.  Raises SeedError."""
    values: dict[str, Yaml] = {}
    if parts.hostname:
        # Without an entry in /etc/hosts, sudo complains each time that it cannot resolve the host name.
        values["manage_etc_hosts"] = "localhost"
    if parts.user:
        # The user gets the groups, the shell and the sudo rule of the image's default user.
        user: dict[str, Yaml] = {"name": ruled(rules.user, parts.user)}
        if parts.password_hash:
            user |= {"hashed_passwd": ruled(rules.password_hash, parts.password_hash), "lock_passwd": False}
        values["user"] = user
        if parts.user == "root":
            values["disable_root"] = False
    elif parts.password_hash:
        raise SeedError("password-hash: whose it is has to be said with user")
    return values


def user_data(parts: SeedParts) -> bytes:
    """Return the user's own file unchanged, or a generated one.  Raises SeedError."""
    if parts.user_data is not None:
        return bounded(USER_DATA, parts.user_data).data
    values = defaults(parts)
    if parts.hostname:
        name, dot, _ = ruled(rules.hostname, parts.hostname).partition(".")
        values = {"hostname": name, **({"fqdn": parts.hostname} if dot else {}), **values}
    if keys := public_keys(parts):
        # Meta-data has them too, but readers other than cloud-init do not look there.
        values["ssh_authorized_keys"] = keys
    return cloud_config(values)


def cloud_config(values: "dict[str, Yaml]") -> bytes:
    """Return a document for cloud-init.  Raises SeedError."""
    return b"#cloud-config\n" + yaml(values).encode()


def vendor_data(parts: SeedParts) -> bytes | None:
    """Return the vendor-data: the user's own file, and the settings that the user's own user-data lacks.

    Raises SeedError.
    """
    own = bounded(VENDOR_DATA, parts.vendor_data) if parts.vendor_data is not None else None
    values = defaults(parts) if parts.user_data is not None else {}
    if own is None:
        return cloud_config(values) if values else None
    return together(cloud_config(values), own) if values else own.data


def together(made: bytes, own: SeedFile) -> bytes:
    """Return a MIME message with two parts.  Where they differ, the second one counts.  Raises SeedError."""
    if own.data.startswith(GZIP):
        raise SeedError(f"{VENDOR_DATA} {own.name}: goes with user or hostname and user-data only uncompressed")
    boundary = b"=_" + hashlib.sha256(own.data).hexdigest().encode()
    nested = MIME in own.data[:MIME_WITHIN].lower()
    parts = (attachment(made), own.data if nested else attachment(own.data))
    head = b'MIME-Version: 1.0\nContent-Type: multipart/mixed; boundary="' + boundary + b'"\n'
    return head + b"".join(b"\n--" + boundary + b"\n" + part for part in parts) + b"\n--" + boundary + b"--\n"


def attachment(data: bytes) -> bytes:
    """Return a part of a MIME message.  cloud-init tells its kind by the first line of `data`."""
    head = b'Content-Type: text/plain; charset="utf-8"\nContent-Transfer-Encoding: base64\n\n'
    return head + base64.encodebytes(data)


def network_config(parts: SeedParts) -> bytes | None:
    """Return the user's own file, or a generated one; None without interfaces.  Raises SeedError."""
    if parts.network_config is not None:
        return bounded(NETWORK_CONFIG, parts.network_config).data
    if not parts.network or not parts.interfaces:
        return None
    if len(parts.interfaces) > INTERFACES_MAX:
        raise SeedError(f"{len(parts.interfaces)} interfaces, and {INTERFACES_MAX} are the most")
    # Versions of cloud-init that write /etc/network/interfaces need the name.
    named: dict[str, Yaml] = {
        f"eth{index}": ethernet(f"eth{index}", each) for index, each in enumerate(parts.interfaces)
    }
    return yaml({"version": 2, "ethernets": named}).encode()


def ethernet(name: str, interface: Interface) -> "dict[str, Yaml]":
    """Return an interface in the form of network-config, version 2.  Raises SeedError."""
    if len(interface.lladdr) != LLADDR_BYTES:
        raise SeedError(f"interface {name}: an address of {len(interface.lladdr)} bytes")
    values: dict[str, Yaml] = {"match": {"macaddress": interface.lladdr.hex(":")}, "set-name": name}
    if not interface.addresses:
        values["dhcp4"] = True
    else:
        values["addresses"] = [parsed(name, ipaddress.ip_interface, each) for each in few(name, interface.addresses)]
    for gateway in (parsed(name, ipaddress.ip_address, each) for each in few(name, interface.gateways)):
        # A route to ::/0 would be wrong: except for netplan, cloud-init 22.4 turns it into one to ::/64.
        key = "gateway6" if ":" in gateway else "gateway4"
        if key in values:
            raise SeedError(f"interface {name}: two gateways of one family")
        values[key] = gateway
    servers: dict[str, Yaml] = {}
    if interface.name_servers:
        found = [parsed(name, ipaddress.ip_address, each) for each in few(name, interface.name_servers)]
        servers["addresses"] = found
    if interface.search:
        servers["search"] = [ruled(rules.hostname, each) for each in few(name, interface.search)]
    if servers:
        values["nameservers"] = servers
    return values


def parsed(name: str, form: "Callable[[str], object]", text: str) -> str:
    """Return an address in its canonical form.  Raises SeedError."""
    try:
        return str(form(text))
    except ValueError:
        raise SeedError(f"interface {name}: no address: {shown(text)}") from None


def few(name: str, items: "tuple[str, ...]") -> "tuple[str, ...]":
    """Return the items.  Raises SeedError if an interface may not have so many."""
    if len(items) > ADDRESSES_MAX:
        raise SeedError(f"interface {name}: {len(items)} addresses of a kind, and {ADDRESSES_MAX} are the most")
    return items


# --- all of it -------------------------------------------------------------------------------------------------


def seed_files(parts: SeedParts) -> dict[str, bytes]:
    """Return the files of a seed by name.  Raises SeedError."""
    files = {
        META_DATA: meta_data(parts),
        USER_DATA: user_data(parts),  # cloud-init ignores a seed without it
        VENDOR_DATA: vendor_data(parts),
        NETWORK_CONFIG: network_config(parts),
    }
    return {name: data for name, data in files.items() if data is not None}


def seed_image(parts: SeedParts) -> bytes:
    """Return the disk image of a seed.  The same parts give the same bytes.  Raises SeedError."""
    made = image(LABEL, seed_files(parts))
    if len(made) > MAX_SEED_BYTES:
        raise SeedError(f"the seed is larger than {MAX_SEED_BYTES >> 20} MiB")
    return made


def notes(parts: SeedParts) -> list[str]:
    """Return warnings for the user who starts the VM.  They show no text of a file."""
    said = [
        f"{key} {file.name}: {why}"
        for key, file in ((USER_DATA, parts.user_data), (VENDOR_DATA, parts.vendor_data))
        if file is not None and (why := strange(file.data))
    ]
    if not (parts.keys or parts.password_hash or parts.user_data or parts.vendor_data):
        said.append("neither ssh-key, password-hash nor user-data: nobody may be able to log in")
    return said


def strange(data: bytes) -> str:
    """Return why cloud-init will not understand a user-data or vendor-data; "" if it will."""
    begin = data[:MIME_WITHIN].lower()
    text = begin.lstrip()
    if not text:
        return "empty"
    if begin.startswith(GZIP) or MIME in begin or text.startswith(HEADS):
        return ""
    if text.startswith(b"\xef\xbb\xbf"):
        return "begins with a byte order mark, and cloud-init does not know the first line then"
    if text.startswith(b"content-type:"):
        return "a MIME message without the line MIME-Version: 1.0, by which cloud-init knows one"
    words = text.split(b"\n", 1)[0].translate(None, b" _-#\r:\t")
    if words == b"cloudconfig":
        return "its first line has to be #cloud-config and nothing else, or cloud-init ignores it"
    return "cloud-init does not know its first line, which could be #cloud-config or #!"
