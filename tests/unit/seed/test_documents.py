"""The texts of a seed, read by another project's YAML parser."""

import email
import json
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support.seeds import HASH, LLADDR, NASTY, public_key, seed_file, usual
from vmd.ipc.imsg import pack, unpack
from vmd.seed import documents
from vmd.seed.documents import notes, quoted, seed_files, seed_image, yaml
from vmd.seed.parts import FILE_MAX, Interface, SeedError, SeedFile, SeedParts

LOAD = "import json, sys, yaml; json.dump(yaml.safe_load(sys.stdin), sys.stdout)"


def load(text: str | bytes) -> object:
    """Return what PyYAML, which cloud-init uses, reads in a document."""
    data = text.encode() if isinstance(text, str) else text
    done = subprocess.run(["/usr/bin/python3", "-c", LOAD], input=data, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


def texts(parts: SeedParts) -> dict[str, object]:
    """Return the contents of a seed's files."""
    return {name: load(data) for name, data in seed_files(parts).items()}


def refusal(**changes: object) -> str:
    """Return the message with which a seed is refused."""
    with pytest.raises(SeedError) as refused:
        seed_image(usual(**changes))
    return str(refused.value)


def test_every_text_is_read_unchanged() -> None:
    """Texts that look like other YAML values are read as texts, also in a list."""
    many: dict[str, Any] = {f"k{index}": text for index, text in enumerate(NASTY)}

    assert load(yaml(many | {"all": NASTY})) == many | {"all": list(NASTY)}


def test_every_character_is_read_unchanged() -> None:
    """The first 0x800 characters and some of the others, in random order."""
    chance = random.Random(1)
    codes = [*range(0x800), *chance.sample(range(0x800, 0xD800), 1000), *chance.sample(range(0xE000, 0x110000), 1000)]
    chance.shuffle(codes)
    many = ["".join(map(chr, codes[at : at + 16])) for at in range(0, len(codes), 16)]

    assert load(yaml({"texts": many})) == {"texts": many}


@pytest.mark.parametrize("code", [0xD800, 0xDCFF, 0xDFFF])
def test_bytes_that_are_no_text_are_refused(code: int) -> None:
    """Such bytes come from a command line."""
    with pytest.raises(SeedError, match="not UTF-8"):
        quoted(f"a{chr(code)}b")


def test_characters_beside_those() -> None:
    """They are text."""
    many = ["\ud7ff", "\ue000", "\x1f", " ", "~", "\x7f", "\xff", "\u0100", "\uffff", "\U00010000", "\U0010ffff"]

    assert load(yaml({"texts": many})) == {"texts": many}


def test_shapes_of_values() -> None:
    """Lists of maps, empty maps, numbers and flags."""
    value: dict[str, Any] = {
        "version": 2,
        "a": {"b": {"c": True}},
        "d": [{"e": "f", "g": ["h", "i"]}, {"e": "j", "g": ["k"]}],
        "l": False,
    }

    assert load(yaml(value)) == value
    assert load(yaml({})) == {}


def test_usual_seed() -> None:
    """A host name, a user with a key, and DHCP."""
    key = public_key()
    made = texts(usual())
    assert made == {
        "meta-data": {
            "instance-id": "1fa1b7c8-c3c9-5058-af1b-3801cd98b041", "local-hostname": "web", "public-keys": [key],
        },
        "user-data": {
            "hostname": "web", "manage_etc_hosts": "localhost", "user": {"name": "alice"}, "ssh_authorized_keys": [key],
        },
        "network-config": {
            "version": 2,
            "ethernets": {
                "eth0": {"match": {"macaddress": "fe:e1:ba:d0:00:01"}, "set-name": "eth0", "dhcp4": True},
            },
        },
    }  # fmt: skip
    assert seed_files(usual())["user-data"].startswith(b"#cloud-config\n")


def test_instance_id() -> None:
    """It is derived from the VM's name, or given.  A clone has another name."""
    named = {vm: texts(SeedParts(vm=vm))["meta-data"] for vm in ("web", "db")}

    assert named["web"] == {"instance-id": "1fa1b7c8-c3c9-5058-af1b-3801cd98b041"}
    assert named["db"] != named["web"]
    assert texts(SeedParts(vm="web", instance_id="i-7"))["meta-data"] == {"instance-id": "i-7"}


def test_password_and_domain() -> None:
    """A user may have a password instead of a key, and root may log in."""
    made = texts(usual(hostname="web.example.org", user="root", password_hash=HASH, keys=()))

    assert made["meta-data"] == {
        "instance-id": "1fa1b7c8-c3c9-5058-af1b-3801cd98b041",
        "local-hostname": "web.example.org",
    }
    assert made["user-data"] == {
        "hostname": "web",
        "fqdn": "web.example.org",
        "manage_etc_hosts": "localhost",
        "user": {"name": "root", "hashed_passwd": HASH, "lock_passwd": False},
        "disable_root": False,
    }


def test_the_user_s_own_user_data() -> None:
    """It is unchanged.  The other settings are in the other files."""
    script = b"#!/bin/sh\r\nexit\xff\n"
    made = seed_files(usual(user_data=seed_file(script)))

    assert made["user-data"] == script
    assert load(made["vendor-data"]) == {"manage_etc_hosts": "localhost", "user": {"name": "alice"}}
    assert "vendor-data" not in seed_files(usual(user_data=seed_file(script), user="", hostname=""))


def test_the_user_s_own_vendor_data_and_network() -> None:
    """They are unchanged, too.  A seed may have no network configuration."""
    own = usual(vendor_data=seed_file("#cloud-config\na: b\n"), network_config=seed_file("version: 1\n"))
    made = seed_files(own)

    assert made["vendor-data"] == b"#cloud-config\na: b\n"
    assert made["network-config"] == b"version: 1\n"
    assert "network-config" not in seed_files(usual(network=False))
    assert "network-config" not in seed_files(usual(interfaces=()))


def test_fixed_addresses() -> None:
    """There are a gateway of each family, name servers and search domains."""
    interface = Interface(
        lladdr=LLADDR,
        addresses=("192.0.2.5/24", "2001:DB8::5/64"),
        gateways=("192.0.2.1", "fe80::1"),
        name_servers=("192.0.2.53",),
        search=("example.org",),
    )
    made = texts(usual(interfaces=(Interface(lladdr=bytes(6)), interface)))["network-config"]

    assert isinstance(made, dict)
    assert made["ethernets"]["eth1"] == {
        "match": {"macaddress": "fe:e1:ba:d0:00:01"},
        "set-name": "eth1",
        "addresses": ["192.0.2.5/24", "2001:db8::5/64"],
        "gateway4": "192.0.2.1",
        "gateway6": "fe80::1",
        "nameservers": {"addresses": ["192.0.2.53"], "search": ["example.org"]},
    }


def parsed(message: bytes) -> list[bytes]:
    """Return the parts of a MIME message, as another program reads them."""
    found = email.message_from_bytes(message)
    assert found["MIME-Version"] == "1.0"
    assert found.get_content_type() == "multipart/mixed"
    parts = [part for part in found.walk() if not part.is_multipart()]
    assert not any(part.defects for part in found.walk())
    return [bytes(part.get_payload(decode=True)) for part in parts]


@pytest.mark.parametrize("own", [b"#!/bin/sh\n\xff\0", b"#cloud-config\n" + b"a: b\n" * 1000, b"", b"--=_\n"])
def test_vendor_data_of_the_user_goes_with_the_other_settings(own: bytes) -> None:
    """Its own part comes second, because that counts where they differ."""
    made = seed_files(usual(user_data=seed_file("#!"), vendor_data=seed_file(own)))["vendor-data"]

    first, second = parsed(made)
    assert load(first) == {"manage_etc_hosts": "localhost", "user": {"name": "alice"}}
    assert first.startswith(b"#cloud-config\n")
    assert second == own


@pytest.mark.parametrize("end", [4096, 4097])
def test_a_message_within_vendor_data(end: int) -> None:
    """It stays a message, if cloud-init would know it as one: by a line within the first 4096 bytes."""
    line = b"MIME-Version: 1.0\n"
    head = b"Content-Type: text/x-shellscript\nX: "
    own = head.ljust(end - len(b"mime-version:") - 1, b"x") + b"\n" + line + b"\n#!/bin/sh\n"
    known = end == 4096

    made = seed_files(usual(user_data=seed_file("#!"), vendor_data=seed_file(own, "/v")))["vendor-data"]

    assert parsed(made)[1] == (b"#!/bin/sh\n" if known else own)
    said = notes(usual(vendor_data=seed_file(own, "/v")))
    assert said == ([] if known else ["vendor-data /v: a MIME message without the line MIME-Version: 1.0, by which"
                                      " cloud-init knows one"])  # fmt: skip


def interface(**values: object) -> tuple[Interface, ...]:
    """Return one interface."""
    return (Interface(lladdr=LLADDR).replace(**values),)


LARGE = SeedFile(name="/f", data=b"#!" + b"\n" * FILE_MAX)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"hostname": "a_b"}, "hostname a_b: no name of a host"),
        ({"user": "A"}, "user A: no name of a user"),
        ({"user": "", "password_hash": HASH}, "password-hash: whose it is has to be said with user"),
        ({"password_hash": "x"}, "password-hash: not as crypt(5) has it"),
        ({"instance_id": "a b"}, "instance-id a b: "),
        ({"keys": (seed_file("x", "/k"),)}, "ssh-key /k:1: "),
        ({"keys": (seed_file(public_key()),) * 65}, "ssh-key: 65 files"),
        ({"keys": (LARGE,)}, "ssh-key /f: larger than 1024 KiB"),
        ({"user_data": LARGE}, "user-data /f: larger than 1024 KiB"),
        ({"vendor_data": LARGE}, "vendor-data /f: larger than 1024 KiB"),
        ({"network_config": LARGE}, "network-config /f: larger than 1024 KiB"),
        ({"interfaces": interface() * 17}, "17 interfaces"),
        ({"interfaces": interface(lladdr=b"abc")}, "interface eth0: an address of 3 bytes"),
        ({"interfaces": interface(addresses=("x",))}, "interface eth0: no address: x"),
        ({"interfaces": interface(gateways=("192.0.2.0/24",))}, "interface eth0: no address: 192.0.2.0/24"),
        ({"interfaces": interface(gateways=("192.0.2.1", "192.0.2.2"))}, "interface eth0: two gateways of one family"),
        ({"interfaces": interface(name_servers=("::1",) * 17)}, "interface eth0: 17 addresses of a kind"),
        ({"interfaces": interface(search=("a b",))}, "hostname a b: "),
        (
            {"user_data": seed_file("#!"), "vendor_data": seed_file(b"\x1f\x8bx", "/v")},
            "vendor-data /v: goes with user or hostname and user-data only uncompressed",
        ),
    ],
)
def test_invalid_parts(changes: dict[str, object], why: str) -> None:
    """The message names the key and the file."""
    assert refusal(**changes).startswith(why)


@pytest.mark.parametrize(
    "changes",
    [
        {"interfaces": interface() * 16},
        {"interfaces": interface(addresses=tuple(f"192.0.2.{number}/24" for number in range(16)))},
        {"interfaces": interface(name_servers=("::1",) * 16)},
        {"interfaces": interface(search=("example.org",) * 16)},
        {"interfaces": interface(gateways=("192.0.2.1", "::1"))},
        {"keys": (seed_file(public_key()),) * 64},
        {"user_data": seed_file(b"#!".ljust(FILE_MAX))},
        {"vendor_data": seed_file(b"#!".ljust(FILE_MAX))},
        {"network_config": seed_file(b"#".ljust(FILE_MAX))},
    ],
)
def test_the_most_that_a_seed_may_have(changes: dict[str, object]) -> None:
    """The limits themselves are allowed."""
    seed_image(usual(**changes))


def test_how_large_a_seed_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit itself is allowed."""
    made = seed_image(usual())
    monkeypatch.setattr(documents, "MAX_SEED_BYTES", len(made))
    assert seed_image(usual()) == made
    monkeypatch.setattr(documents, "MAX_SEED_BYTES", len(made) - 1)
    with pytest.raises(SeedError, match="the seed is larger than 0 MiB"):
        seed_image(usual())


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"#cloud-config\n", ""),
        (b"\n #Cloud-Config\r\n", ""),
        (b"#!/bin/sh\n", ""),
        (b"## template: jinja\n#cloud-config\n", ""),
        (b"#include\nhttps://example.org\n", ""),
        (b"\x1f\x8b\x08", ""),
        (b"Content-Type: multipart/mixed; boundary=x\nMIME-Version: 1.0\n", ""),
        (b"", "empty"),
        (b"\n \n", "empty"),
        (b"# cloud-config\n", "its first line has to be #cloud-config and nothing else"),
        (b"cloud-config:\n", "its first line has to be #cloud-config and nothing else"),
        (b"\xef\xbb\xbf#cloud-config\n", "begins with a byte order mark"),
        (b"Content-Type: multipart/mixed\n", "a MIME message without the line MIME-Version: 1.0"),
        (b"geheim: x\n", "cloud-init does not know its first line"),
    ],
)
def test_first_line_of_user_data(text: bytes, why: str) -> None:
    """A wrong first line gets a warning, which contains nothing of the text."""
    said = notes(usual(user_data=seed_file(text, "/u")))

    assert [note[: len("user-data /u: ") + len(why)] for note in said] == ([f"user-data /u: {why}"] if why else [])
    assert "geheim" not in "".join(said)


def test_nobody_can_log_in() -> None:
    """A warning says so, because a seed is mainly for a login."""
    assert notes(SeedParts(vm="web", hostname="web")) == [
        "neither ssh-key, password-hash nor user-data: nobody may be able to log in"
    ]
    assert notes(usual()) == []


def test_parts_can_be_unpacked() -> None:
    """One process packs them, and the process that makes the disk reads them."""
    parts = usual(user_data=seed_file(b"\xff\0"), password_hash=HASH)

    assert unpack(SeedParts, pack(parts)) == parts


def test_parts_of_an_earlier_version_are_read() -> None:
    """A vmctl of that version has packed them."""
    packed = Path(__file__).parents[2].joinpath("golden/seed-parts-1").read_bytes()

    assert unpack(SeedParts, packed) == usual(
        instance_id="i-1",
        hostname="web.example.org",
        password_hash=HASH,
        user_data=seed_file(b"#cloud-config\n\xff", "/u"),
        vendor_data=seed_file("#!", "/v"),
        network_config=seed_file("version: 2\n", "/n"),
        network=False,
        interfaces=interface(
            addresses=("192.0.2.5/24",), gateways=("192.0.2.1",), name_servers=("::1",), search=("a",)
        ),
    )
