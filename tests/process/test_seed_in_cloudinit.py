"""Seeds, read by the cloud-init of Debian.  Each disc is on a loop device, in namespaces of its own."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.support.cloudinit import booted
from tests.support.seeds import HASH, LLADDR, NASTY, public_key, seed_file, usual
from vmd.seed.documents import instance_id, network_config, seed_files, seed_image
from vmd.seed.parts import Interface, SeedParts

pytestmark = pytest.mark.root

OTHER = bytes.fromhex("fee1bad00002")
LLADDRS = re.compile(r"fe(?::[0-9a-f]{2}){5}")
# The syntax of each kind of configuration: `gateway A`, `gateway6: A`, `Gateway=A`, `IPV6_DEFAULTGW=A`, `gateway=A`.
GATEWAYS = re.compile(r"(?:GATEWAY|DEFAULTGW|[Gg]ateway)[46]?(?:=|: | )([0-9a-f.:]+)")
SCRIPT = "#!/bin/sh\necho hello\n"
KEY = public_key()
KEYS = "/home/alice/.ssh/authorized_keys"
PART = "/var/lib/cloud/instance/scripts/part-001"
VENDOR = "/var/lib/cloud/instance/vendor-cloud-config.txt"
USER_DATA = "/var/lib/cloud/instance/user-data.txt"
WISH = {
    "interfaces": {"ens3": LLADDR.hex(":")},
    "show": [KEYS, "/etc/hostname", "/etc/hosts", PART, VENDOR, USER_DATA],
    "commands": ["cat /etc/systemd/network/*cloud-init*; getent shadow alice debian | cut -d: -f1,2; id -nG alice"],
}
WEB = usual(hostname="web.example.org", password_hash=HASH)
ROOT = usual(user="root")
ROOT_S_KEYS = "/root/.ssh/authorized_keys"
CLONE = usual(vm="db", hostname="db")
OWN = usual(
    user_data=seed_file(SCRIPT),
    vendor_data=seed_file("#cloud-config\nuser: {name: alice, gecos: Alice}\nlocale: C.UTF-8\n"),
)
MIME = b"""MIME-Version: 1.0
Content-Type: multipart/mixed; boundary="=b="

--=b=
Content-Type: text/cloud-config

#cloud-config
timezone: UTC
--=b=
Content-Type: text/x-shellscript

#!/bin/sh
--=b=--
"""
NESTED = usual(user="", user_data=seed_file("#cloud-config\nlocale: C\n"), vendor_data=seed_file(MIME), keys=())
TWO = usual(
    interfaces=(
        Interface(lladdr=LLADDR),
        Interface(
            lladdr=OTHER,
            addresses=("192.0.2.5/24", "2001:db8::5/64"),
            gateways=("192.0.2.1", "2001:db8::1"),
            name_servers=("192.0.2.53",),
            search=("example.org",),
        ),
    )
)
MADE = [
    WEB,
    CLONE,
    ROOT,
    usual(user="", keys=()),
    usual(hostname=""),
    usual(keys=tuple(seed_file(public_key(comment=text)) for text in NASTY if text.isprintable())),
    SeedParts(vm="x"),
]  # fmt: skip


class Found(NamedTuple):
    """The results of cloud-init with all seeds."""

    first: dict[str, Any]
    second: dict[str, Any]
    clone: dict[str, Any]
    own: dict[str, Any]
    nested: dict[str, Any]
    root: dict[str, Any]
    schema: list[str]
    rendered: dict[str, dict[str, str]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Boot a guest twice, then a clone of it, and other guests once."""
    folder = tmp_path_factory.mktemp("seeds")
    Path(folder, "work").mkdir()

    def disc(name: str, parts: SeedParts) -> Path:
        path = folder / f"{name}.iso"
        path.write_bytes(seed_image(parts))
        return path

    web = disc("web", WEB)
    documents = [seed_files(parts)["user-data"] for parts in MADE] + [
        seed_files(usual(user_data=OWN.user_data))["vendor-data"]
    ]
    network = network_config(TWO)
    assert network is not None
    answer = booted(
        [
            [(web, WISH), (web, {**WISH, "remove": [KEYS]}), (disc("clone", CLONE), WISH)],
            [(disc("own", OWN), WISH)],
            [(disc("nested", NESTED), {**WISH, "commands": []})],
            [(disc("root", ROOT), {**WISH, "show": [ROOT_S_KEYS], "commands": []})],
        ],
        folder / "work",
        documents=[*documents, b"#cloud-config\nuser: {a: b}\n"],
        networks=[({"eth0": LLADDR.hex(":"), "eth1": OTHER.hex(":")}, network)],
    )
    ((first, second, clone), (own,), (nested,), (root,)) = answer["boots"]
    return Found(first, second, clone, own, nested, root, answer["schema"], answer["rendered"][0])


def test_first_boot(found: Found) -> None:
    """Host name, user, password, key and network are those of the seed."""
    first = found.first
    files, said = first["files"], first["commands"][0]

    assert (first["statuses"], first["complaints"]) == ([0, 0], [])
    assert first["instance"] == instance_id(WEB)
    assert (first["hostname"], files["/etc/hostname"]) == ("web", "web\n")
    assert "127.0.1.1\tweb.example.org\tweb\n" in files["/etc/hosts"]
    assert files[KEYS] == f"{KEY}\n"
    assert f"\nalice:{HASH}\nalice adm sudo\n" in said  # the groups of the image's default user
    assert first["interfaces"] == {"eth0": LLADDR.hex(":")}
    assert "DHCP=ipv4" in said
    assert f"MACAddress={LLADDR.hex(':')}" in said


def test_second_boot_and_clone(found: Found) -> None:
    """The second boot does not repeat the actions of the first.  A clone, with another instance id, repeats them."""
    second, clone = found.second, found.clone

    assert (second["statuses"], second["complaints"]) == ([0, 0], [])
    assert (second["instance"], second["files"][KEYS]) == (instance_id(WEB), None)
    assert (clone["statuses"], clone["complaints"]) == ([0, 0], [])
    assert clone["instance"] == instance_id(CLONE) != second["instance"]
    assert (clone["hostname"], clone["files"][KEYS]) == ("db", f"{KEY}\n")


def test_user_data_and_vendor_data(found: Found) -> None:
    """A script as user-data is not changed, and the user is still created.  Given vendor-data has precedence."""
    own, files = found.own, found.own["files"]

    assert (own["statuses"], own["complaints"]) == ([0, 0], [])
    assert (files[USER_DATA], files[PART]) == (SCRIPT, SCRIPT)
    assert files[KEYS] == f"{KEY}\n"
    assert own["hostname"] == "web"
    assert "manage_etc_hosts: localhost" in files[VENDOR]
    assert "locale: C.UTF-8" in files[VENDOR]
    assert "gecos: Alice" in files[VENDOR]


def test_root_logs_in(found: Found) -> None:
    """An image may forbid root to log in.  A seed with root as its user allows it."""
    root = found.root

    assert (root["statuses"], root["complaints"]) == ([0, 0], [])
    assert root["files"] == {ROOT_S_KEYS: f"{KEY}\n"}


def test_multipart_vendor_data(found: Found) -> None:
    """A MIME message as vendor-data becomes a part of the message that the seed makes."""
    nested = found.nested

    assert (nested["statuses"], nested["complaints"]) == ([0, 0], [])
    assert "timezone: UTC" in nested["files"][VENDOR]
    assert "manage_etc_hosts: localhost" in nested["files"][VENDOR]


def test_schema(found: Found) -> None:
    """All documents that a seed makes are valid cloud-config.  The last document is not, and is refused."""
    assert found.schema[:-1] == [""] * (len(MADE) + 1)
    assert found.schema[-1]


def test_network_of_every_kind_of_guest(found: Found) -> None:
    """Each kind of network configuration finds both interfaces by MAC address, and has all of their settings."""
    rendered = found.rendered

    assert set(rendered) == {"eni", "netplan", "networkd", "sysconfig", "network-manager"}
    for kind, files in rendered.items():
        everything = json.dumps(files)
        words = ["192.0.2.5", "2001:db8::5", "192.0.2.53", "example.org", "eth0", "eth1"]
        assert [word for word in words if word not in everything] == [], kind
        # eni uses the names of interfaces.  A udev file has their MAC addresses.
        assert {LLADDR.hex(":"), OTHER.hex(":")} <= set(LLADDRS.findall(everything.lower())), kind
        assert set(GATEWAYS.findall(everything)) == {"192.0.2.1", "2001:db8::1"}, kind
        assert "::/64" not in everything.replace("2001:db8::5/64", ""), kind
