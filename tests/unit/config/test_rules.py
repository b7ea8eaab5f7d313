"""One rule with one message limits a VM from vm.conf, from clients and streams, and from vmctl."""

import ast
import errno
import re
from pathlib import Path
from typing import Any

import pytest

from tests.unit.config.conftest import Loader
from vmctl.commands.start import Wanted
from vmctl.errors import CommandError
from vmd.config import rules
from vmd.config.model import (
    BootDevice,
    DiskConfig,
    DiskFile,
    Forward,
    NicConfig,
    Owner,
    Prefix,
    Rights,
    VmConfig,
    VmLimits,
)
from vmd.errors import OperatorError
from vmd.parent.requests import checked_request, require_startable

DISK = DiskConfig(path="/x")
# (options of vm.conf, the same as fields of a VmConfig, the same as options of vmctl if there are any, the message)
INVALID: dict[str, tuple[str, dict[str, Any], tuple[str, ...] | None, str]] = {
    "memory": ("memory 1B", {"memory_bytes": 1}, ("-m", "1B"), "memory size must be at least 1MB"),
    "much memory": (
        "memory 2T", {"memory_bytes": 2 << 40}, ("-m", "2T"), "memory size too large (limit is 1.0T)",
    ),
    "vcpus": ("vcpus 17", {"vcpus": 17}, ("-p", "17"), "invalid number of vcpus: 17 (limit is 16)"),
    "disks": (
        "disk /x\n" * 5, {"disks": (DISK,) * 5}, ("-d", "/dev/null") * 5, "too many disks: 5 (limit is 4)",
    ),
    "format": ("disk /x format vdi", {"disks": (DISK.replace(format="vdi"),)}, None, "unrecognized disk format vdi"),
    "disk path": (f"disk /{'d' * 1023}", {"disks": (DISK.replace(path="/" + "d" * 1023),)}, None, "disk path too long"),
    "cdrom path": (f"cdrom /{'c' * 1023}", {"cdrom": "/" + "c" * 1023}, None, "cdrom name too long"),
    "iops": (
        "disk /x limit iops -1", {"disks": (DISK.replace(iops_limit=-1),)}, None,
        "invalid iops: -1: must be from 1 to 10000000",
    ),
    "weight": (
        "limit { weight 10001 }", {"limit": VmLimits(weight=10001)}, None,
        "invalid weight: 10001: must be from 1 to 10000",
    ),
    "cpu": (
        "limit { cpu 100001% }", {"limit": VmLimits(cpu_percent=100001)}, None,
        "invalid cpu: 100001: must be from 1 to 100000",
    ),
    "serial": (
        f"disk /x serial {'s' * 21}", {"disks": (DISK.replace(serial="s" * 21),)}, None,
        f"a serial number is 1 to 20 printable ASCII characters, not '{'s' * 21}'",
    ),
    "cmdline": (
        f"cmdline '{'c' * 2048}'", {"cmdline": "c" * 2048}, ("-k", "c" * 2048),
        "cmdline too long: 2048 bytes (limit is 2047)",
    ),
    "interfaces": (
        "interface\n" * 5, {"nics": (NicConfig(),) * 5}, ("-L", "") * 5, "too many interfaces: 5 (limit is 4)",
    ),
    "interface count": (
        "interfaces 5", {"nics": (NicConfig(),) * 5}, ("-i", "5"), "too many interfaces: 5 (limit is 4)",
    ),
    "tap": ("interface eth0", {"nics": (NicConfig(tap="eth0"),)}, None, f"invalid interface: eth0: {rules.TAP_FORM}"),
    "long tap": ("interface tap1234567890123", {"nics": (NicConfig(tap="tap1234567890123"),)}, None,
                 f"invalid interface: tap1234567890123: {rules.TAP_FORM}"),
    "group": ("interface group lab1", {"nics": (NicConfig(group="lab1"),)}, None, "invalid group name: lab1"),
    "switch": (
        f"interface switch {'s' * 64}", {"nics": (NicConfig(switch="s" * 64),)}, ("-n", "s" * 64),
        "switch name too long",
    ),
    "rdomain": ("interface rdomain 256", {"nics": (NicConfig(rdomain=256),)}, None, "invalid rdomain: 256"),
    "host's rdomain": (
        "interface rdomain 254", {"nics": (NicConfig(rdomain=254),)}, None,
        "invalid rdomain: 254 is a routing table of the host itself",
    ),
    "multicast": (
        "interface lladdr 1:0:5e:0:0:1", {"nics": (NicConfig(lladdr=b"\1\0\x5e\0\0\1"),)}, None,
        "invalid address: 01:00:5e:00:00:01 is a multicast address, which no interface can have",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", INVALID)
def test_one_rule_has_one_message(conf: Loader, case: str) -> None:
    """The message is the same for every source of the value."""
    text, fields, arguments, sentence = INVALID[case]

    assert sentence in [error.partition(": ")[2] for error in conf.errors(f"vm a {{\n{text}\n}}\n")]
    with pytest.raises(OperatorError, match=f"^vm a: {re.escape(sentence)}$"):
        checked_request(VmConfig(name="a", **fields), bootable=True)
    if arguments is not None:
        with pytest.raises(CommandError, match=f"^{re.escape(sentence)}$"):
            take(arguments)


def take(arguments: tuple[str, ...]) -> None:
    """Give options to `vmctl start`."""
    wanted = Wanted()
    for option, value in zip(arguments[::2], arguments[1::2], strict=True):
        wanted.take(option, value)


@pytest.mark.parametrize("name", ["", "-a", "a/b", "a" * 64, "a b"])
def test_name(conf: Loader, name: str) -> None:
    """The name of a VM has the same rule, too."""
    (error,) = conf.errors(f"vm '{name}' {{ disable }}\n")
    with pytest.raises(OperatorError) as refused:
        checked_request(VmConfig(name=name), bootable=True)

    assert error == f"1: {refused.value}"


@pytest.mark.parametrize(
    "fields",
    [
        {"owner": Owner(uid=1 << 32)},
        {"owner": Owner(uid=1, gid=-1)},
        {"rights": Rights(disks=Owner(uid=0xFFFFFFFF))},
        {"cmdline": "a\0b"},
        {"kernel": "/" * 1024},
        {"disks": (DISK.replace(rate_limit=100),)},
        {"nics": (NicConfig(rate_limit=-1),)},
        {"limit": VmLimits(memory_bytes=-1)},
        {"initrd": "/" * 1024},
        {"disks": (DISK.replace(serial="s"), DISK.replace(path="/y", serial="s"))},
        {"kernel": "disk0:bsd"},
        {"initrd": "disk0:"},
        {"plan_id": -1},
        {"nics": (NicConfig(host_name="a"),)},
        {"nics": (NicConfig(local=True, forwards=(Forward(port=1, to=1),)),) * 2},
        {"nics": (NicConfig(local=True, host_name="a_b"),)},
        {"nics": (NicConfig(local=True, address=Prefix(address=bytes(4), length=31)),)},
        {"limit": VmLimits(cpu_percent=-1)},
        *({"rights": Rights(**{field: Owner(uid=-1)})} for field in Rights.fields),
    ],
    ids=repr,
)
def test_values_that_vm_conf_cannot_have(fields: dict[str, Any]) -> None:
    """A client or a stream could have them, so check_vm refuses them."""
    with pytest.raises(ValueError, match=r"^\w"):
        rules.check_vm(VmConfig(name="a", **fields))


@pytest.mark.parametrize(
    ("fields", "bootable", "found"),
    [
        ({}, False, [(errno.EINVAL, "no kernel, disk or cdrom to boot from")]),
        ({}, True, []),
        ({"kernel": "/k"}, False, []),
        ({"cdrom": "/c"}, False, []),
        ({"disks": (DISK,)}, False, []),
        ({"disks": (DISK, DISK)}, False, [(errno.EBUSY, "disk /x is given twice")]),
        (
            {"disks": (DISK,), "boot_device": BootDevice.CDROM}, False,
            [(errno.ENODEV, "boot device cdrom: the vm has no cdrom")],
        ),
        (
            {"cdrom": "/c", "boot_device": BootDevice.DISK},
            False,
            [(errno.ENODEV, "boot device disk: the vm has no disk")],
        ),
        ({"boot_device": BootDevice.DISK}, True, []),
        ({"kernel": "/k", "drive": True, "boot_device": BootDevice.CDROM}, False, []),
        ({"kernel": "/k", "disks": (DISK,), "boot_device": BootDevice.DISK}, False, []),
        (
            {"kernel": "/k", "sev_es": True}, False,
            [(errno.ENOTSUP, "encrypted memory (sev): not supported by this version of vmd")],
        ),
        (
            {"kernel": "/k", "sev": True}, False,
            [(errno.ENOTSUP, "encrypted memory (sev): not supported by this version of vmd")],
        ),
        (
            {"kernel": "/k", "limit": VmLimits(memory_bytes=(640 << 20) - 1)}, False,
            [(
                errno.EINVAL,
                "limit memory 640M is too small: the guest has 512M, and vmd needs 128M for it",
            )],
        ),
        ({"kernel": "/k", "limit": VmLimits(memory_bytes=640 << 20)}, False, []),
        ({"kernel": "disk0:/k", "disks": (DISK,)}, False, []),
        (
            {"kernel": "disk1:/k", "disks": (DISK,)}, False,
            [(errno.EINVAL, "boot disk1:/k: there is no disk1: the vm has disk0 only")],
        ),
        (
            {"kernel": "disk2:/k", "disks": (DISK, DISK.replace(path="/y"))}, False,
            [(errno.EINVAL, "boot disk2:/k: there is no disk2: the disks of the vm are disk0 to disk1")],
        ),
        ({"kernel": "disk0:/k"}, False, [(errno.EINVAL, "boot disk0:/k: there is no disk0: the vm has no disk")]),
        (
            {"kernel": "disk0:/k", "initrd": "/i", "disks": (DISK,)}, False,
            [(
                errno.EINVAL,
                "boot disk0:/k initrd /i: both must be on disks of the vm, or both must be files of the host",
            )],
        ),
        ({"kernel": "/k", "fault": "failed to get user: u"}, True, [(errno.EINVAL, "failed to get user: u")]),
    ],
)  # fmt: skip
def test_obstacles(fields: dict[str, Any], bootable: bool, found: list[tuple[int, str]]) -> None:
    """Each is found before anything is opened, and the first is the answer to a start."""
    config = VmConfig(name="a", **fields)

    assert list(rules.obstacles(config, bootable=bootable)) == found
    rules.check_vm(config)  # an obstacle is not an invalid value
    for code, what in found[:1]:
        with pytest.raises(OperatorError) as refused:
            require_startable(config, bootable=bootable)
        assert (refused.value.number, str(refused.value)) == (code, f"vm a: {what}")


LIMITS = {
    "CMDLINE_MAX", "GROUP_MAX", "MAX_DISKS", "MAX_MEMORY_BYTES", "MAX_RDOMAIN", "MAX_VCPUS", "MIN_MEMORY_BYTES",
    "SERIAL_MAX",
}  # fmt: skip
CHECK_THEMSELVES = {"vmd/priv/requests.py": {"MAX_RDOMAIN"}}  # it does not trust its peers


# Flags, and fields that only vm.conf sets.
WITHOUT_A_RULE = {"allow", "console_log", "enabled", "given", "origin", "parent", "virtio"}


def test_each_field_of_a_vm_has_a_rule() -> None:
    """Otherwise a stream or a client could set values that vm.conf may not.

    rules.py checks a new field, or it is named here.
    """
    source = ast.parse(Path(rules.__file__).read_text())
    looked_at = {node.attr for node in ast.walk(source) if isinstance(node, ast.Attribute)}

    assert set(VmConfig.fields) - looked_at == WITHOUT_A_RULE


def test_limits_are_compared_in_one_place() -> None:
    """Other modules call a rule, which has the message."""
    root = Path(__file__).resolve().parents[3]
    found = {}
    for path in sorted([*root.glob("vmd/**/*.py"), *root.glob("vmctl/**/*.py")]):
        name = str(path.relative_to(root))
        names = {
            alias.name
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom) and node.module == "vmd.config.model"
            for alias in node.names
        }
        if not name.startswith("vmd/config/") and names & LIMITS != CHECK_THEMSELVES.get(name, set()):
            found[name] = names & LIMITS

    assert found == {}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("disk0:/bsd", DiskFile(disk=0, path="/bsd")),
        ("disk3:", DiskFile(disk=3)),
        ("disk999p999:/k", DiskFile(disk=999, partition="p999", path="/k")),
        ("disk0p2:/boot/vmlinuz", DiskFile(disk=0, partition="p2", path="/boot/vmlinuz")),
        ("disk1a:/bsd", DiskFile(disk=1, partition="a", path="/bsd")),
        ("disk0p:/bsd", DiskFile(disk=0, partition="p", path="/bsd")),
        ("disk0:/a:b", DiskFile(disk=0, path="/a:b")),
        *((name, None) for name in ("", "/disk0:/bsd", "./disk0:/bsd", "disk:/bsd", "disk0", "disks:/", "disk0.img:/")),
    ],
)
def test_a_file_on_a_disk(text: str, found: DiskFile | None) -> None:
    """It is distinguished from files of the host, and formatted as it was read."""
    assert rules.disk_file(text) == found
    assert found is None or str(found) == text


@pytest.mark.parametrize(
    "text",
    ["disk0p0:/", "disk0p1000:/", "disk0ab:/", "disk1000:/", "disk0ab2:/", "disk0p2a:/",
     "disk0:bsd", "disk0:/a\0", "disk0:/" + "x" * 1023],
)  # fmt: skip
def test_malformed_names_of_files_on_disks(text: str) -> None:
    """They are not taken for files of the host."""
    with pytest.raises(ValueError, match=r"^disk"):
        rules.disk_file(text)
