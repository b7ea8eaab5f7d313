"""Every statement, every limit with its message, and recovery from errors."""

import os
import pwd
import random
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.config.conftest import Loader
from vmd.config import lexer, rules, yacc
from vmd.config.check import check
from vmd.config.grammar import GOES_ON, Grammar
from vmd.config.lexer import ENDING_WORDS, RESERVED, Lexer
from vmd.config.model import (
    IDS,
    WHEEL,
    AgentxConfig,
    AllowInstance,
    BootDevice,
    Config,
    ConsoleLog,
    DiskConfig,
    Forward,
    Globals,
    Listen,
    NicConfig,
    Owner,
    Prefix,
    Rights,
    SeedConfig,
    SwitchConfig,
    VirtioMode,
    VmFlag,
    VmLimits,
)
from vmd.errors import ConfigError
from vmd.log import log
from vmd.units import MIB

NAME63 = "a" * 63
NAME64 = "a" * 64
UNBRACED = ": the limits of a disk or an interface need no braces"
BRACED = ": the limits of a vm need braces, limit { ... }"


# Statements outside blocks


def test_empty_file_is_all_defaults(conf: Loader) -> None:
    """A file of comments and blank lines is empty, too."""
    assert conf.load("") == conf.load("\n\n # nothing \\\n here\n\t\n") == Config()


@pytest.mark.parametrize(
    ("text", "address", "length"),
    [
        ("10.77.0.0/16", "10.77.0.0", 16),
        ("10.77.0.0", "10.77.0.0", 16),
        ("10.0.0.0/8", "10.0.0.0", 8),
        ("10/8", "10.0.0.0", 8),
        ("'10/8'", "10.0.0.0", 8),
        ("10", "10.0.0.0", 16),
        ("10.77/16", "10.77.0.0", 16),
        ("128.0.0.0/1", "128.0.0.0", 1),
    ],
)
def test_local_prefix(conf: Loader, text: str, address: str, length: int) -> None:
    """Short forms are equal to long ones."""
    prefix = conf.load(f"local prefix {text}\n").settings.local_prefix

    assert (".".join(str(octet) for octet in prefix.address), prefix.length) == (address, length)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("10.1.0.0/8", "bad mask: 10.1.0.0/8"),
        ("10.77.1.0", "bad mask: 10.77.1.0"),
        ("10.0.0.0/17", "bad mask: 10.0.0.0/17"),
        ("0.0.0.0/0", "bad mask: 0.0.0.0/0"),
        ("10.0.0.256/8", "invalid format: 10.0.0.256/8"),
        ("10.0.0.0.0/8", "invalid format: 10.0.0.0.0/8"),
        ("host/8", "invalid format: host/8"),
        ("10.0.0.0/", "invalid format: 10.0.0.0/"),
        ("10.0.0.0/8/8", "invalid format: 10.0.0.0/8/8"),
        ("''", "invalid format: "),
        ("-10", "invalid format: -10"),
    ],
)
def test_local_prefix_errors(conf: Loader, text: str, error: str) -> None:
    """Bits behind the mask, a length without room for addresses, and malformed text are refused."""
    assert conf.errors(f"\nlocal prefix {text}\n") == [f"2: invalid local prefix: {error}"]


def test_local_inet6(conf: Loader) -> None:
    """Without a prefix, the daemon uses its random one."""
    config = conf.load("local inet6\n").settings

    assert (config.local_inet6, config.local_inet6_prefix) == (True, None)


@pytest.mark.parametrize(("text", "length"), [("fd00:1:2::/48", 48), ("fd00:1:2::", 48), ("fd00::/60", 60)])
def test_local_inet6_prefix(conf: Loader, text: str, length: int) -> None:
    """A prefix turns on IPv6, too."""
    config = conf.load(f"local inet6 prefix {text}\n").settings

    assert config.local_inet6
    assert config.local_inet6_prefix is not None
    assert config.local_inet6_prefix.address[:2] == b"\xfd\0"
    assert config.local_inet6_prefix.length == length


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("fd00::1/48", "bad mask: fd00::1/48"),
        ("fd00:1:2:3::", "bad mask: fd00:1:2:3::"),
        ("fd00::/64", "no room for a /64 per interface (longest is /60): fd00::/64"),
        ("fd00::/999", "no room for a /64 per interface (longest is /60): fd00::/999"),
        ("fd00::/x", "invalid format: fd00::/x"),
        ("'fe80::%eth0/48'", "invalid format: fe80::%eth0/48"),
        ("10.0.0.0/8", "invalid format: 10.0.0.0/8"),
        ("''", "invalid format: "),
    ],
)
def test_local_inet6_prefix_errors(conf: Loader, text: str, error: str) -> None:
    """A prefix must have room for a /64 per interface (arch. 6)."""
    assert conf.errors(f"local inet6 prefix {text}\n") == [f"1: invalid local inet6 prefix: {error}"]


@pytest.mark.parametrize(("word", "expected"), [("disable", False), ("enable", True)])
def test_local_nat(conf: Loader, word: str, expected: bool) -> None:
    """It is our keyword.  NAT is on by default."""
    assert conf.load(f"local nat {word}\n").settings.local_nat is expected


def test_local_dns(conf: Loader) -> None:
    """It is our keyword.

    Addresses of both families are kept once each, and the last line counts.  Elsewhere `dns` is an ordinary word.
    """
    nine, one, six = bytes((9, 9, 9, 9)), bytes((1, 1, 1, 1)), bytes.fromhex("26200000000000000000000000fe00fe")
    assert conf.load("").settings.local_dns == ()
    assert conf.load("local dns 9.9.9.9\n").settings.local_dns == (nine,)
    assert conf.load('local dns 9.9.9.9 2620::fe:fe "1.1.1.1" 9.9.9.9\n').settings.local_dns == (nine, six, one)
    assert conf.load("local dns 9.9.9.9\nlocal dns 1.1.1.1\n").settings.local_dns == (one,)
    assert conf.load('dns = "1.1.1.1"\nlocal dns $dns\nswitch dns { interface br0\n}\n').settings.local_dns == (one,)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("example.org", "invalid name server: example.org: an IPv4 or IPv6 address is needed"),
        ("9.9.9", "invalid name server: 9.9.9: an IPv4 or IPv6 address is needed"),
        ("127.0.0.53", "invalid name server: 127.0.0.53: guests cannot reach it"),
        ("::1", "invalid name server: ::1: guests cannot reach it"),
        ("fe80::1", "invalid name server: fe80::1: guests cannot reach it"),
        ("0.0.0.0", "invalid name server: 0.0.0.0: guests cannot reach it"),
        ("224.0.0.1", "invalid name server: 224.0.0.1: guests cannot reach it"),
        ("1.0.0.1 1.0.0.2 1.0.0.3 1.0.0.4", "more than 3 IPv4 name servers"),
        ("fd00::1 fd00::2 fd00::3 fd00::4", "more than 3 IPv6 name servers"),
    ],
)
def test_local_dns_errors(conf: Loader, text: str, error: str) -> None:
    """Addresses that no guest could use are refused with their line."""
    assert conf.errors(f"local dns {text}\n") == [f"1: {error}"]


@pytest.mark.parametrize(
    ("text", "owner"),
    [
        ("root", Owner(uid=0)),
        ("root:root", Owner(uid=0, gid=0)),
        (":daemon", Owner(uid=0, gid=1)),
        ("daemon:", Owner(uid=1)),
        ("1234", Owner(uid=1234)),
        ("1234:4321", Owner(uid=1234, gid=4321)),
        ("'root' ':root'", Owner(uid=0, gid=0)),
    ],
)
def test_owner(conf: Loader, text: str, owner: Owner) -> None:
    """Names and numbers are accepted for a VM and for the socket.  The socket always has a group."""
    assert conf.vm(f"owner {text}").owner == owner
    assert conf.load(f"socket owner {text}\n").settings.socket_owner == owner.replace(gid=owner.gid or 0)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("no-such-user", "failed to get user: no-such-user"),
        ("root:no-such-group", "failed to get group: no-such-group"),
        (":no-such-group", "failed to get group: no-such-group"),
        ("-1", "failed to get user: -1"),
        ("4294967295", "failed to get user: 4294967295"),
        ("99999999999", "failed to get user: 99999999999"),
    ],
)
def test_owner_errors(conf: Loader, text: str, error: str) -> None:
    """The number 4294967295, which is not a valid uid, is refused, too."""
    assert conf.errors(f"socket owner {text}\n") == [f"1: {error}"]
    assert conf.errors(f"vm a {{\nallow instance owner {text}\n}}\n") == [f"2: {error}"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("agentx", AgentxConfig()),
        ("agentx context vms", AgentxConfig(context="vms")),
        ("agentx path /run/x", AgentxConfig(path="/run/x")),
        ("agentx context vms path /run/x", AgentxConfig(context="vms", path="/run/x")),
        (f"agentx context {'c' * 32} path /{'p' * 106}", AgentxConfig(context="c" * 32, path="/" + "p" * 106)),
    ],
)
def test_agentx(conf: Loader, text: str, expected: AgentxConfig) -> None:
    """Both options have defaults."""
    assert conf.load(text).settings.agentx == expected


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (f"context {'c' * 33}", "agentx context too large"),
        ("path run/x", "agentx path is not absolute"),
        (f"path /{'p' * 107}", "agentx path too large"),
    ],
)
def test_agentx_errors(conf: Loader, text: str, error: str) -> None:
    """The path of a socket has at most 107 bytes, and a context has 32."""
    assert conf.errors(f"agentx {text}\n") == [f"1: {error}"]


def test_metrics(conf: Loader) -> None:
    """It is our keyword.  Each line adds a place, and a place is kept once."""
    text = 'metrics listen 127.0.0.1:9177\nmetrics listen "[::1]:9177"\nmetrics listen /run/m\nmetrics listen /run/m\n'
    places = conf.load(text).settings.metrics

    assert places == (Listen(address="127.0.0.1", port=9177), Listen(address="::1", port=9177), Listen(path="/run/m"))
    assert [str(place) for place in places] == ["127.0.0.1:9177", "[::1]:9177", "/run/m"]
    assert conf.load("").settings.metrics == ()


@pytest.mark.parametrize("place", ["127.0.0.1:1", "127.0.0.1:65535", "[fd00::1]:1", f"/{'p' * 106}"])
def test_bounds_of_metrics(conf: Loader, place: str) -> None:
    """The first and the last port, and the longest path of a socket, are valid."""
    (listen,) = conf.load(f'metrics listen "{place}"\n').settings.metrics

    assert str(listen) == place


@pytest.mark.parametrize("place", [
    "9177", "127.0.0.1", "localhost:9177", "127.0.0.1:0", "127.0.0.1:65536", "127.0.0.1:-1", "127.0.0.1:x", "::1:9177",
    "[::1:9177", "::1]:9177",
    "[127.0.0.1]:1", "[::1]", "[fe80::1%eth0]:1", "1.2.3:1", "127.0.0.1:+1", "run/m", f"/{'p' * 107}",
])  # fmt: skip
def test_metrics_errors(conf: Loader, place: str) -> None:
    """Names are not resolved, because the daemon would have to wait for that."""
    (error,) = conf.errors(f'metrics listen "{place}"\n')

    assert error.startswith(f"1: metrics listen {place[:20]}")


def test_limits(conf: Loader) -> None:
    """They are our keywords.  Limits are independent, and the last line for each one counts."""
    config = conf.load("limit memory 48G\nlimit vms 20\nlimit vcpus 0\nlimit vms 10\n").settings

    assert (config.limit_memory_bytes, config.limit_vms, config.limit_vcpus) == (48 << 30, 10, 0)
    for number in (0, 2147483647):
        most = conf.load(f"limit vms {number}\nlimit vcpus {number}\n").settings
        assert (most.limit_vms, most.limit_vcpus) == (number, number)
    assert conf.load("limit memory 1048576\n").settings.limit_memory_bytes == 1 << 20
    assert conf.load("limit memory 4096T\n").settings.limit_memory_bytes == 1 << 52
    default = conf.load("").settings
    assert (default.limit_memory_bytes, default.limit_vms, default.limit_vcpus) == (None, 512, 512)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("limit memory 1023K", "memory size must be at least 1MB"),
        ("limit memory lots", "failed to parse size: lots"),
        ("limit memory 9E", "failed to parse size: 9E"),
        ("limit vms -1", "invalid limit: -1"),
        ("limit vcpus 2147483648", "invalid limit: 2147483648"),
        ("limit vms many", 'syntax error at "many"'),
        ("limit disks 1", 'syntax error at "disks"'),
        ("limit", "syntax error at end of line"),
        ("vm a {\nlimit vms 1\n}", 'syntax error at "vms"'),
    ],
)
def test_limit_errors(conf: Loader, text: str, error: str) -> None:
    """Negative numbers and unknown limits are refused, and these limits are only allowed outside of blocks."""
    line = 2 if "{" in text else 1
    assert conf.errors(text + "\n")[0] == f"{line}: {error}"


def test_ids(conf: Loader) -> None:
    """It is our keyword: the first user id of VM processes."""
    assert conf.load("ids 65536\n").settings.first_id == 0x10000
    assert conf.load("ids 4294901758\n").settings.first_id + IDS == 0xFFFFFFFE
    assert conf.load("").settings.first_id == 0x7F000000


@pytest.mark.parametrize("first", [-1, 0, 65535, 4294901759])
def test_ids_that_are_not_for_vms(conf: Loader, first: int) -> None:
    """System ids, and numbers that are not valid user ids, are refused."""
    assert conf.errors(f"ids {first}\n") == [f"1: ids {first}: must be from 65536 to 4294901758"]


def test_staggered_start(conf: Loader) -> None:
    """It sets the number of VMs at a time, and the delay between them."""
    config = conf.load("staggered start parallel 2 delay 15\n").settings

    assert (config.start_parallel, config.start_delay_s) == (2, 15)
    for parallel, delay in ((1, 0), (2147483647, 2147483647)):
        config = conf.load(f"staggered start parallel {parallel} delay {delay}\n").settings
        assert (config.start_parallel, config.start_delay_s) == (parallel, delay)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("parallel 0 delay 1", "invalid parallel value: 0"),
        ("parallel 4294967296 delay 1", "invalid parallel value: 4294967296"),
        ("parallel 2147483648 delay 1", "invalid parallel value: 2147483648"),
        ("parallel 1 delay 2147483648", "invalid delay: 2147483648"),
        ("parallel 1 delay -1", "invalid delay: -1"),
        ("parallel 1 delay 4294967296", "invalid delay: 4294967296"),
        ("parallel 1", "syntax error at end of line"),
    ],
)
def test_staggered_start_errors(conf: Loader, text: str, error: str) -> None:
    """With zero at a time no VM would ever start."""
    assert conf.errors(f"staggered start {text}\n") == [f"1: {error}"]


# switch


def test_switch(conf: Loader) -> None:
    """All options, and the defaults of omitted ones."""
    config = conf.load(
        "switch all {\n interface veb0\n disable\n group lab\n locked lladdr\n rdomain 252\n down\n}\n"
        "switch 'one line' { interface br-lan }\n"
    )

    assert config.switches == (
        SwitchConfig(
            name="all", interface="veb0", enabled=False, group="lab", locked=True, rdomain=252, up=False,
            origin=f"{conf.path}:1",
        ),
        SwitchConfig(name="one line", interface="br-lan", origin=f"{conf.path}:9"),
    )  # fmt: skip


@pytest.mark.parametrize("name", ["bridge0", "veb12", "br0", "virbr0", "br-lan", "a" * 15])
def test_switch_interface(conf: Loader, name: str) -> None:
    """Linux has no fixed pattern for the names of bridges."""
    assert conf.load(f"switch s {{ interface {name} }}\n").switches[0].interface == name


@pytest.mark.parametrize(
    "name", ["tap0", "tap", "lo", "all", "default", "a" * 16, "a/b", "br%d", "'a b'", "'.'", "'..'", "''", "a:1", "'é'"]
)
def test_switch_interface_errors(conf: Loader, name: str) -> None:
    """Names of interfaces that cannot be bridges, and invalid names, are refused."""
    assert conf.errors(f"switch s {{\n interface {name}\n}}\n") == [
        f"2: invalid switch interface: {name.strip(chr(39))}"
    ]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("switch s {\n up\n}", '1: switch "s" is missing interface name'),
        ("switch s { disable }", '1: switch "s" is missing interface name'),
        (f"switch {NAME64} {{\n interface br0\n}}", "1: switch name too long"),
        ("switch '' {\n interface br0\n}", "1: invalid switch name: "),
        ("switch 'a\tb' {\n interface br0\n}", "1: invalid switch name: a\tb"),
        ("switch s {\n interface br0\n rdomain 256\n}", "3: invalid rdomain: 256"),
        ("switch s {\n interface br0\n rdomain -1\n}", "3: invalid rdomain: -1"),
        (
            "switch s {\n interface br0\n rdomain 254\n}",
            "3: invalid rdomain: 254 is a routing table of the host itself",
        ),
        ("switch s {\n interface br0\n group a1\n}", "3: invalid group name: a1"),
        (f"switch s {{\n interface br0\n group {'g' * 16}\n}}", f"3: invalid group name: {'g' * 16}"),
        ("switch s {\n interface br0\n group 'a b'\n}", "3: invalid group name: a b"),
        ("switch s {}", '1: syntax error at "}"'),
        ("switch s {\n}", '2: syntax error at "}"'),
        ("switch s {\n interface br0\n vcpus 2\n}", '3: syntax error at "vcpus"'),
    ],
)
def test_switch_errors(conf: Loader, text: str, error: str) -> None:
    """Each mistake has its message and its line."""
    assert error in conf.errors(text + "\n")


def test_longest_names(conf: Loader) -> None:
    """A name may have 63 characters, and a group 15."""
    config = conf.load(f"switch {NAME63} {{ interface br0\n group {'g' * 15}\n}}\nvm {NAME63} {{ disable }}\n")

    assert (config.switches[0].name, config.vms[0].name) == (NAME63, NAME63)


# vm


def test_vm_with_everything(conf: Loader) -> None:
    """Every option arrives in its field."""
    kernel, initrd = conf.directory / "vmlinuz", conf.directory / "initrd.img"
    kernel.touch()
    initrd.touch()

    vm = conf.vm(
        f"""
        disable
        memory 1.5G
        vcpus 4
        virtio modern
        disk {conf.image} format QCOW2
        limit {{ cpu 200% }}
        seed {{ user alice }}
        disk "{conf.image}"
        cdrom install.iso
        boot "{kernel}" initrd "{initrd}" cmdline "console=ttyS0 root=/dev/vda"
        boot device net
        owner root:daemon
        seves
        console log "%n.log" size 1M keep 9
        interfaces 3
        allow instance {{ boot, memory, interface
            disk, cdrom instance, vcpus, owner :daemon }}
        local interface tap7 {{
            switch lan
            group lab
            locked lladdr fe:e1:ba:0:0:9
            rdomain 3
            down
        }}
        """
    )

    assert vm.as_dict() == {
        "name": "a",
        "parent": "",
        "enabled": False,
        "given": VmFlag(0xBF),
        "memory_bytes": 3 << 29,
        "vcpus": 4,
        "kernel": str(kernel),
        "initrd": str(initrd),
        "cmdline": "console=ttyS0 root=/dev/vda",
        "boot_device": BootDevice.NET,
        "disks": (DiskConfig(path=str(conf.image), format="qcow2"), DiskConfig(path=str(conf.image))),
        "nics": (
            NicConfig(
                tap="tap7", switch="lan", group="lab", lladdr=b"\xfe\xe1\xba\0\0\x09", locked=True, local=True,
                rdomain=3, up=False,
            ),
            NicConfig(),
            NicConfig(),
        ),
        "cdrom": f"{conf.directory}/install.iso",
        "owner": Owner(uid=0, gid=1),
        "allow": AllowInstance(flags=VmFlag(0x7F), owner=Owner(uid=0, gid=1)),
        "virtio": VirtioMode.MODERN,
        "sev": True,
        "sev_es": True,
        "limit": VmLimits(cpu_percent=200),
        "seed": SeedConfig(user="alice"),
        "fault": "",
        "drive": False,
        "console_log": ConsoleLog(path=f"{conf.directory}/%n.log", size_bytes=1 << 20, keep=9),
        "origin": f"{conf.path}:1",
        "plan_id": 0,
        "plan_prefix4": None,
        "plan_prefix6": None,
        "rights": Rights(),
    }  # fmt: skip


def test_vm_defaults(conf: Loader) -> None:
    """The values of a VM without options."""
    (vm,) = conf.load("vm a { enable }\n").vms

    assert (vm.memory_bytes, vm.vcpus, vm.owner, vm.allow) == (512 << 20, 1, Owner(), None)
    assert (vm.enabled, vm.given, vm.disks, vm.nics) == (True, VmFlag(0), (), ())
    assert vm.virtio == VirtioMode.TRANSITIONAL


def test_instance(conf: Loader) -> None:
    """It has the name of its parent, which may be in another file."""
    (vm,) = conf.load('vm "tmpl" instance "scratch" { disable }\n').vms

    assert (vm.name, vm.parent, vm.given) == ("scratch", "tmpl", VmFlag.INSTANCE)


def test_adjacent_strings_concatenate(conf: Loader) -> None:
    """The kinds of their quotes may differ."""
    assert [vm.name for vm in conf.load("vm a \"b\" 'c' { disable }\n").vms] == ["abc"]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (f"vm {NAME64} {{", "vm name too long"),
        (f"vm {'é' * 0}'{'é' * 32}' {{", "vm name too long"),
        (f"vm {NAME64} instance b {{", f"vm {NAME64} name too long"),
        (f"vm a instance {NAME64} {{", "vm name too long"),
        ("vm '' {", f"invalid VM name: : {rules.NAME_FORM}"),
        ("vm '.a' {", f"invalid VM name: .a: {rules.NAME_FORM}"),
        ("vm '-a' {", f"invalid VM name: -a: {rules.NAME_FORM}"),
        ("vm _a {", f"invalid VM name: _a: {rules.NAME_FORM}"),
        ("vm a/../b {", f"invalid VM name: a/../b: {rules.NAME_FORM}"),
        ("vm 'a b' {", f"invalid VM name: a b: {rules.NAME_FORM}"),
        ("vm 'é' {", f"invalid VM name: é: {rules.NAME_FORM}"),
        ("vm a:b instance c {", f"invalid VM name: a:b: {rules.NAME_FORM}"),
    ],
)
def test_vm_names_refused(conf: Loader, text: str, error: str) -> None:
    """Names become file names, process titles and descriptions of interfaces."""
    assert conf.errors(f"{text}\n disable\n}}\n") == [f"1: {error}"]


@pytest.mark.parametrize("name", ["a", "9", "a.b-c_d", "1a"])
def test_vm_names_accepted(conf: Loader, name: str) -> None:
    """A digit may come first, although vm.conf(5) of OpenBSD says otherwise."""
    assert conf.load(f"vm '{name}' {{ disable }}\n").vms[0].name == name


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ("memory 512", "memory size must be at least 1MB"),
        ("memory 1023K", "memory size must be at least 1MB"),
        ("memory -1", "memory size must be at least 1MB"),
        ("memory 1025G", "memory size too large (limit is 1.0T)"),
        ("memory 1099511627777", "memory size too large (limit is 1.0T)"),
        ("memory 1X", "failed to parse size: 1X"),
        ("memory ''", "failed to parse size: "),
        ("memory 9E", "failed to parse size: 9E"),
        ("memory 1G\nmemory 2G", "memory specified more than once"),
        ("vcpus 0", "invalid number of vcpus: 0 (limit is 16)"),
        ("vcpus 17", "invalid number of vcpus: 17 (limit is 16)"),
        ("vcpus 1\nvcpus 1", "vcpus specified more than once"),
        ("virtio 2.0", "unrecognized virtio mode 2.0"),
        ("virtio Modern", "unrecognized virtio mode Modern: did you mean modern?"),
        ("disk ''", "failed to parse disks: : No such file or directory"),
        ("disk IMAGE\n" * 5, "too many disks: 5 (limit is 4)"),
        ("disk IMAGE format vmdk", "unrecognized disk format vmdk"),
        ("disk IMAGE format raw format raw", "an option of the disk is given twice"),
        ("disk IMAGE serial a format raw serial a", "an option of the disk is given twice"),
        ("disk IMAGE serial ''", "a serial number is 1 to 20 printable ASCII characters, not ''"),
        (f"disk IMAGE serial '{'s' * 21}'", f"a serial number is 1 to 20 printable ASCII characters, not '{'s' * 21}'"),
        ("disk IMAGE serial 'ä'", "a serial number is 1 to 20 printable ASCII characters, not 'ä'"),
        ("disk IMAGE serial 'a\tb'", "a serial number is 1 to 20 printable ASCII characters, not 'a\\tb'"),
        (f"disk /{'d' * 1023}", "disk path too long"),
        (f"cdrom /{'c' * 1023}", "cdrom name too long"),
        ("cdrom a\ncdrom b", "cdrom specified more than once"),
        ("boot ''", "kernel path not found: No such file or directory: "),
        (f"boot /{'b' * 1023}", f"kernel path not found: File name too long: /{'b' * 76}..."),
        (f"boot /{'b' * 256}", f"kernel path not found: File name too long: /{'b' * 76}..."),
        ("boot IMAGE\nboot IMAGE", "kernel specified more than once"),
        ("boot disk0:bsd", "disk0:bsd: the path of a file on a disk begins with /"),
        (
            "boot 'disk0xy:/bsd'",
            "disk0xy: not a disk or partition: disk0 is the first disk, disk0p2 its second partition, disk0a one of its"
            " OpenBSD disklabel",
        ),
        ("boot disk0: initrd disk0:", "disk0:: an initrd needs the path of a file"),
        (f"boot IMAGE initrd /{'i' * 256}", f"initrd path not found: File name too long: /{'i' * 76}..."),
        ("boot IMAGE initrd IMAGE initrd IMAGE", "initrd specified more than once"),
        ("boot IMAGE cmdline a cmdline b", "cmdline specified more than once"),
        (f"boot IMAGE\ncmdline '{'c' * 2048}'", "cmdline too long: 2048 bytes (limit is 2047)"),
        ("console log /v/", "console log /v/: not an absolute path of a file"),
        ("console log /v/..", "console log /v/..: not an absolute path of a file"),
        (f"console log /{'l' * 190}", "console log path too long"),
        (f"console log {'/l' * 520}", "console log path too long"),
        ("console log /l size 63K", "console log size 63.0K: must be from 64.0K to 1.0T"),
        ("console log /l size 2T", "console log size 2.0T: must be from 64.0K to 1.0T"),
        ("console log /l size x", "failed to parse size: x"),
        ("console log /l keep 100", "console log keep 100: must be from 0 to 99"),
        ("console log /l keep 1 keep 2", "an option of the console log is given twice"),
        ("console log /l\nconsole log /m", "console log specified more than once"),
        ("boot device floppy", 'syntax error at "floppy"'),
        ("interface em0", f"invalid interface: em0: {rules.TAP_FORM}"),
        ("interface tap0x", f"invalid interface: tap0x: {rules.TAP_FORM}"),
        ("interface tap1234567890123", f"invalid interface: tap1234567890123: {rules.TAP_FORM}"),
        ("interface\n" * 5, "too many interfaces: 5 (limit is 4)"),
        ("interfaces 5", "too many interfaces: 5 (limit is 4)"),
        ("interfaces -1", "invalid number of interfaces: -1"),
        ("interfaces 0\ninterfaces 1", "interfaces specified more than once"),
        ("interface lladdr 00:11", "invalid address: 00:11"),
        ("interface lladdr 00:11:22:33:44:gg", "invalid address: 00:11:22:33:44:gg"),
        ("interface rdomain 256", "invalid rdomain: 256"),
        ("interface group eth0", "invalid group name: eth0"),
        (f"interface switch {NAME64}", "switch name too long"),
        ("owner nobody-here", "failed to get user: nobody-here"),
        ("allow instance network", 'syntax error at "network"'),
        ("limit { cpu 50 }", "invalid cpu: 50: it must be a number with a %, such as 150%"),
        ("limit { cpu half }", "invalid cpu: half: it must be a number with a %, such as 150%"),
        ("limit { weight 5, weight 5 }", "a limit is given twice"),
        ("limit { weight 5 }\nlimit { cpu 5% }", "limit specified more than once"),
        ("limit { memory lots }", "failed to parse size: lots"),
        ("limit { iops 5 }", 'syntax error at "iops"'),
        ("limit { memroy 5G }", 'syntax error at "memroy": did you mean "memory"?'),
        ("disk IMAGE limit", "syntax error at end of line"),
        ("disk IMAGE limit iops 5 iops 5", "a limit is given twice"),
        ("disk IMAGE limit rate 20X", "invalid rate: 20X: bytes a second, from 64.0K to 1.0T"),
        ("disk IMAGE limit rate 1K", "invalid rate: 1K: bytes a second, from 64.0K to 1.0T"),
        ("disk IMAGE limit rate 1M limit iops 5", "an option of the disk is given twice"),
        ("interface { limit rate -1 }", "invalid rate: -1: bytes a second, from 64.0K to 1.0T"),
        ("interface { limit iops 5 }", 'syntax error at "iops"'),
        ("interface { limit { rate 5M } }", f'syntax error at "{{"{UNBRACED}'),
        ("disk IMAGE limit { iops 5 }", f'syntax error at "{{"{UNBRACED}'),
        ("limit memory 5M", f'syntax error at "memory"{BRACED}'),
        ("limit cpu 5%", f'syntax error at "cpu"{BRACED}'),
        ("limit weight 5", f'syntax error at "weight"{BRACED}'),
        *(
            (f"{local}interface {word} x", f"{word} of an interface needs braces: interface {{ {word} ... }}")
            for local in ("", "local ")
            for word in sorted(ENDING_WORDS["interface"])
        ),
        ("kernel IMAGE", 'syntax error at "kernel"'),
        ("interface { address 10.0.0.1 }", "address: only a local interface has one"),
        ("interface { forward port 1 to port 1 }", "forward: only a local interface has one"),
        ("interface { dns 9.9.9.9 }", "dns: only a local interface has one"),
        ("interface { hostname a }", "hostname: only a local interface has one"),
        ("local interface { address 10.0.0.1, address 10.0.0.1 }", "address specified more than once"),
        ("local interface { dns 9.9.9.9, dns 9.9.9.9 }", "dns specified more than once"),
        ("local interface { hostname a, hostname a }", "hostname specified more than once"),
        ("local interface { address fd00::1 }", "invalid address: fd00::1: an IPv4 address is needed"),
        ("local interface { address 10.0.0 }", "invalid address: 10.0.0: an IPv4 address is needed"),
        ("local interface { address 10.0.0.1/ }", "invalid address: 10.0.0.1/: the prefix length is not a number"),
        ("local interface { address 10.0.0.1/x }", "invalid address: 10.0.0.1/x: the prefix length is not a number"),
        ("local interface { address 10.0.0.1/15 }", "invalid address: 10.0.0.1/15: the length is from 16 to 31"),
        ("local interface { address 10.0.0.1/32 }", "invalid address: 10.0.0.1/32: the length is from 16 to 31"),
        ("local interface { address 127.0.0.1 }", "invalid address: 127.0.0.1/31: no guest can have it"),
        ("local interface { address 169.254.0.1 }", "invalid address: 169.254.0.1/31: no guest can have it"),
        ("local interface { address 224.0.0.1 }", "invalid address: 224.0.0.1/31: no guest can have it"),
        ("local interface { address 0.0.0.1 }", "invalid address: 0.0.0.1/31: no guest can have it"),
        (
            "local interface { address 10.0.0.255/24 }",
            "invalid address: 10.0.0.255/24: it is the first or the last of its network",
        ),
        (
            "local interface { hostname a_b }",
            "invalid hostname: a_b: it has letters, digits and hyphens, with dots between its parts",
        ),
        ("local interface { dns 127.0.0.1 }", "invalid name server: 127.0.0.1: guests cannot reach it"),
        ("local interface { forward }", 'syntax error at "}"'),
        *(
            (
                f"local interface {{ forward {words} }}",
                f"invalid forward: {words}: it is `forward [tcp|udp] port N[:M] to port K [from address/length]`",
            )
            for words in ("8022", "tcp 8022 to port 22", "sctp port 1 to port 1", "port 1 to 1", "port 1 to port 1 by")
        ),
        *(
            (f"local interface {{ forward {words} }}", f"invalid forward: {words}: a port is a number from 1 to 65535")
            for words in ("port ssh to port 22", "port 1 to port 1-2", "port 123456 to port 1")
        ),
        (
            "local interface { forward port 0 to port 1 }",
            "invalid forward: tcp port 0 to port 1: a port is a number from 1 to 65535",
        ),
        (
            "local interface { forward port 10:11 to port 65535 }",
            "invalid forward: tcp port 10:11 to port 65535: a port is a number from 1 to 65535",
        ),
        (
            "local interface { forward port 11:10 to port 1 }",
            "invalid forward: port 11:10 to port 1: port 10 is less than port 11",
        ),
        (
            "local interface { forward port 1:1025 to port 1 }",
            "invalid forward: tcp port 1:1025 to port 1: it has 1 to 1024 ports",
        ),
        *(
            (
                f"local interface forward {protocol}port 80 to port 80",
                'syntax error at "80": the forward of an interface needs braces: interface { forward ... }',
            )
            for protocol in ("", "tcp ")
        ),
        (
            "local interface { forward port 10:12 to port 1:2 }",
            "invalid forward: port 10:12 to port 1:2: the two ranges have different lengths",
        ),
        (
            "local interface { forward port 1 to port 1 from 192.0.2.1/24 }",
            "invalid forward: from 192.0.2.1/24: 192.0.2.1/24 has host bits set",
        ),
        (
            "local interface { forward port 1:9 to port 1, forward tcp port 9 to port 2 }",
            "forward tcp port 9 to port 2: tcp port 1:9 to port 1 has the same port of the host",
        ),
        (
            "local interface { rdomain 3, forward port 1 to port 1 }",
            "forward: an interface in rdomain 3 cannot have one",
        ),
        (
            "local interface { forward port 1 to port 1 }\nlocal interface { forward port 1 to port 2 }",
            "forward tcp port 1 to port 2: interface 0 of this vm has tcp port 1 to port 1",
        ),
        (
            "local interface { address 10.0.0.2 }\nlocal interface { address 10.0.0.9/24 }",
            "address 10.0.0.9/24: interface 0 of this vm is in the same network",
        ),
        (
            "local interface {" + ",".join(f"forward port {port} to port 1" for port in range(1, 18)) + "}",
            "too many forwards of an interface: 17 (limit is 16)",
        ),
    ],
)
def test_option_errors(conf: Loader, options: str, error: str) -> None:
    """Every limit has its message, with the line of the wrong option."""
    options = options.strip().replace("IMAGE", str(conf.image))
    line = 2 + options.count("\n")

    assert conf.errors(f"vm a {{\n{options}\n}}\n") == [f"{line}: {error}"]


@pytest.mark.parametrize(
    ("word", "size_mb"),
    [("1048576", 1), ("1M", 1), ("1.9M", 1), ("1.5G", 1536), ("1g", 1024), ("1024G", 1 << 20), ("2000000K", 1953)],
)
def test_memory(conf: Loader, word: str, size_mb: int) -> None:
    """A plain number is in bytes.  The size is rounded down to whole MiB."""
    assert conf.vm(f"memory {word}").memory_bytes == size_mb << 20


def test_memory_rounding_is_a_debug_message(
    conf: Loader, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not a warning."""
    monkeypatch.setattr(log, "verbosity", 2)

    conf.vm("memory 1.5M")

    assert f"{conf.path}:2: memory size rounded to 1 megabytes" in capfd.readouterr().err
    assert conf.warnings == []


def test_paths_are_resolved(conf: Loader) -> None:
    """Links of disks and kernels are resolved now.  The path of a CD is resolved when it is used."""
    (conf.directory / "link").symlink_to("disk.img")

    vm = conf.vm(f"disk '{conf.directory}/link'\nboot '{conf.directory}/./link'\ncdrom '{conf.directory}/link'")

    assert (vm.disks[0].path, vm.kernel, vm.cdrom) == (str(conf.image), str(conf.image), f"{conf.directory}/link")


def test_relative_paths(conf: Loader, write: Callable[[str, str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    """They start at the directory of the file that has them; the daemon's current directory does not matter."""
    write("sub/inner.conf", "vm b {\n disk b.img\n boot './../kernel' initrd './initrd'\n cdrom b.iso\n}\n")
    monkeypatch.chdir("/")

    a, b = conf.load("vm a { disk a.img }\ninclude sub/inner.conf\nvm c { cdrom c.iso }\n").vms[:2]

    here = os.path.realpath(conf.directory)
    assert a.disks[0].path == f"{here}/a.img"
    assert (b.disks[0].path, b.kernel, b.initrd) == (f"{here}/sub/b.img", f"{here}/kernel", f"{here}/sub/initrd")
    assert b.cdrom == f"{conf.directory}/sub/b.iso"


def test_files_need_not_exist(conf: Loader) -> None:
    """They may be mounted later.  Until then only their VM cannot start."""
    vm = conf.vm("disk /nowhere/disk.img\nboot /nowhere/kernel initrd /nowhere/initrd\ncdrom /nowhere/disc.iso")

    assert (vm.disks[0].path, vm.kernel, vm.initrd, vm.cdrom) == (
        "/nowhere/disk.img", "/nowhere/kernel", "/nowhere/initrd", "/nowhere/disc.iso",
    )  # fmt: skip


def test_paths_need_not_be_utf8(conf: Loader) -> None:
    """Linux allows any bytes in a path."""
    name = os.path.join(os.fsencode(conf.directory), b"caf\xe9.img")
    with open(name, "wb"):
        pass

    (vm,) = conf.load(b'vm a { disk "' + name + b'" }\n').vms

    assert os.fsencode(vm.disks[0].path) == name


@pytest.mark.parametrize(
    ("options", "boot"),
    [
        ("boot IMAGE", ("IMAGE", "", "")),
        ("boot IMAGE initrd IMAGE", ("IMAGE", "IMAGE", "")),
        ("boot IMAGE cmdline 'a b'", ("IMAGE", "", "a b")),
        ("boot IMAGE cmdline a initrd IMAGE", ("IMAGE", "IMAGE", "a")),
        ("cmdline a\ninitrd IMAGE\nboot IMAGE", ("IMAGE", "IMAGE", "a")),
        ("boot IMAGE cmdline cmdline", ("IMAGE", "", "cmdline")),
        ("boot disk0:", ("disk0:", "", "")),
        ("boot 'disk0a:/bsd'", ("disk0a:/bsd", "", "")),
        (
            "boot 'disk0p2:/vmlinuz' initrd 'disk0p2:/initrd.img' cmdline quiet",
            ("disk0p2:/vmlinuz", "disk0p2:/initrd.img", "quiet"),
        ),
    ],
)
def test_boot(conf: Loader, options: str, boot: tuple[str, str, str]) -> None:
    """Kernel, initial RAM disk and command line, on one line or several.

    The files are of the host, or on a disk of the VM.
    """
    vm = conf.vm(options.replace("IMAGE", str(conf.image)))

    assert (vm.kernel, vm.initrd, vm.cmdline) == tuple(part.replace("IMAGE", str(conf.image)) for part in boot)


@pytest.mark.parametrize(
    ("statement", "nic"),
    [
        ("interface", NicConfig()),
        ("interface tap", NicConfig(tap="tap")),
        ("interface tap3", NicConfig(tap="tap3")),
        ("local interface", NicConfig(local=True)),
        ("interface switch lan", NicConfig(switch="lan")),
        ("interface tap0 switch lan, rdomain 2 down", NicConfig(tap="tap0", switch="lan", rdomain=2, up=False)),
        ("interface { switch lan  rdomain 2  up }", NicConfig(switch="lan", rdomain=2)),
        ("interface { switch lan, down, }", NicConfig(switch="lan", up=False)),
        ("interface {\nswitch lan\n\nlocked lladdr\n}", NicConfig(switch="lan", locked=True)),
        ("interface { switch lan\n group x }", NicConfig(switch="lan", group="x")),
        ("interface {\n switch lan up\n}", NicConfig(switch="lan")),
        ("interface lladdr", NicConfig()),
        ("interface lladdr 0:0:0:0:0:0", NicConfig()),
        ("interface locked lladdr 00:01:02:03:04:0a", NicConfig(lladdr=bytes([0, 1, 2, 3, 4, 10]), locked=True)),
        ("interface lladdr 0:1:2:3:4:5 locked lladdr", NicConfig(lladdr=bytes(range(6)), locked=True)),
    ],
)
def test_interface(conf: Loader, statement: str, nic: NicConfig) -> None:
    """Options are on one line or in a block."""
    assert conf.vm(statement).nics == (nic,)


@pytest.mark.parametrize(("number", "count"), [(0, 1), (1, 1), (4, 4)])
def test_interfaces_is_a_minimum(conf: Loader, number: int, count: int) -> None:
    """Interfaces without options are added after the described ones."""
    nics = conf.vm(f"interfaces {number}\ninterface tap3").nics

    assert nics == (NicConfig(tap="tap3"), *[NicConfig()] * (count - 1))


@pytest.mark.parametrize(
    ("statement", "allow"),
    [
        ("allow instance disk", AllowInstance(flags=VmFlag.DISK, owner=WHEEL)),
        ("allow instance owner root", AllowInstance(owner=Owner(uid=0))),
        ("allow instance { disk }", AllowInstance(flags=VmFlag.DISK, owner=WHEEL)),
        ("allow instance { disk, memory }", AllowInstance(flags=VmFlag.DISK | VmFlag.MEMORY, owner=WHEEL)),
        ("allow instance { disk memory }", AllowInstance(flags=VmFlag.DISK | VmFlag.MEMORY, owner=WHEEL)),
        ("allow instance {\ndisk\n\nmemory,\nboot\n}", AllowInstance(flags=VmFlag(0x16), owner=WHEEL)),
        ("allow instance { owner daemon, disk }", AllowInstance(flags=VmFlag.DISK, owner=Owner(uid=1))),
        ("allow instance disk\nallow instance memory", AllowInstance(flags=VmFlag(0x14), owner=WHEEL)),
        ("allow instance disk\nallow instance owner daemon", AllowInstance(flags=VmFlag.DISK, owner=Owner(uid=1))),
    ],
)
def test_allow_instance(conf: Loader, statement: str, allow: AllowInstance) -> None:
    """One flag or a block of flags.  Several statements add up.  Without an owner it is for group 0."""
    assert conf.vm(statement).allow == allow


def test_allow_instance_does_not_leak_into_the_next_vm(conf: Loader) -> None:
    """It does not, even if its block had an error."""
    errors = conf.errors("vm a {\n allow instance { disk foo\n}\n memory 0\n}\n")
    config = conf.load("vm a { allow instance disk }\nvm b { allow instance memory }\n")

    assert errors == ['2: syntax error at "foo"', "4: memory size must be at least 1MB"]
    assert config.vms[1].allow == AllowInstance(flags=VmFlag.MEMORY, owner=WHEEL)


@pytest.mark.parametrize(
    "block",
    [
        "{ memory 1G }",
        "{\nmemory 1G\n}",
        "{\n\n\nmemory 1G\n\n\n}",
        "{ memory 1G\n}",
        "{\nmemory 1G }",
        "{ memory 1G\nenable\n}",
        "{ memory 1G enable\n}",
        "{\nmemory 1G enable\ndisk DISK\n}",
        "{\nmemory 1G\nenable }",
    ],
)
def test_blocks_accepted(conf: Loader, block: str) -> None:
    """One option on one line, or several on lines of their own.  The first line may have two, as upstream."""
    (vm,) = conf.load(f"vm a {block.replace('DISK', str(conf.image))}\n").vms

    assert vm.memory_bytes == 1 << 30


@pytest.mark.parametrize(
    ("block", "error"),
    [
        ("{ }", '1: syntax error at "}"'),
        ("{\n}", '2: syntax error at "}"'),
        ("{ memory 1G enable }", '1: syntax error at "}"'),
        ("{\nmemory 1G\nenable disable\n}", '3: syntax error at "disable"'),
        ("{ memory 1G enable disable\n}", '1: syntax error at "disable"'),
        ("\n{ memory 1G }", "1: syntax error at end of line"),
        ("{\ninterface { }\n}", '2: syntax error at "}"'),
        ("{\ninterface {\n}\n}", '3: syntax error at "}"'),
        ("{\nallow instance { }\n}", '2: syntax error at "}"'),
        ("{\nmemory 1G", "3: syntax error at end of file"),
        ("{ memory 1G } memory", '1: syntax error at "memory"'),
    ],
)
def test_blocks_refused(conf: Loader, block: str, error: str) -> None:
    """An option must end with its line."""
    assert conf.errors(f"vm a {block}\n")[0] == error


WORLD = Prefix(address=bytes((192, 0, 2, 0)), length=24)


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        ("{ address 10.0.0.2 }", {"address": Prefix(address=bytes((10, 0, 0, 2)), length=31)}),
        ("{ address 10.0.0.2/24 }", {"address": Prefix(address=bytes((10, 0, 0, 2)), length=24)}),
        ("{ forward port 8022 to port 22 }", {"forwards": (Forward(port=8022, to=22),)}),
        ("{\nforward tcp port 8022 to port 22\n}", {"forwards": (Forward(port=8022, to=22),)}),
        ("{ forward udp port 53 to port 53 }", {"forwards": (Forward(port=53, to=53, udp=True),)}),
        ("{ forward port 8000:8009 to port 80 }", {"forwards": (Forward(port=8000, to=80, count=10),)}),
        ("{ forward port 8000:8009 to port 80:89 }", {"forwards": (Forward(port=8000, to=80, count=10),)}),
        ("{ forward port 1 to port 2 from 192.0.2.0/24 }", {"forwards": (Forward(port=1, to=2, source=WORLD),)}),
        (
            "{ forward port 1 to port 1 forward udp port 1 to port 1, hostname www\n}",
            {"forwards": (Forward(port=1, to=1), Forward(port=1, to=1, udp=True)), "host_name": "www"},
        ),
        (
            '{ hostname "www.example.org" dns 9.9.9.9 1.1.1.1 limit rate 1M address 10.0.0.2 }',
            {
                "host_name": "www.example.org",
                "dns": (bytes((9, 9, 9, 9)), bytes((1, 1, 1, 1))),
                "rate_limit": MIB,
                "address": Prefix(address=bytes((10, 0, 0, 2)), length=31),
            },
        ),
        ("{ group forward hostname dns }", {"group": "forward", "host_name": "dns"}),
        ("tap7 hostname www forward port 1 to port 1", {"tap": "tap7", "host_name": "www", "forwards": (
            Forward(port=1, to=1),)}),
    ],
    ids=range(12),
)  # fmt: skip
def test_options_of_a_local_interface(conf: Loader, options: str, fields: dict[str, Any]) -> None:
    """Options have any order, on one line or several, with or without commas."""
    assert conf.vm(f"local interface {options}").nics == (NicConfig(local=True, **fields),)


# our keywords must not change the meaning of upstream's files

ALL_OF_OURS = lexer.BLOCK_WORDS | lexer.LOCAL_WORDS | lexer.LINE_WORDS | lexer.LIMITED_WORDS | lexer.METRICS_WORDS
OUR_WORDS = sorted(word for word in ALL_OF_OURS | {"legacy", "modern", "transitional"} if word.isalpha())
# The next word after these begins with a digit, or it is outside of vm blocks.
NO_WORD_FOLLOWS = {"CONTEXT", "CPU", "INCLUDE", "INSTANCE", "PATH", "RATE", "VM"}


def test_each_keyword_before_a_string_is_in_string_follows() -> None:
    """The next word after such a keyword is never read as one of our keywords."""
    productions = [method.__doc__ or "" for name, method in vars(Grammar).items() if name.startswith("p_")]
    before = set(re.findall(r"\b([A-Z][A-Z_0-9]*) (?:strings?|optional_string)\b", "\n".join(productions)))
    ours = {lexer.kind_of(word) for word in lexer.BLOCK_WORDS | lexer.RESERVED}

    assert before & ours - lexer.STRING_FOLLOWS == NO_WORD_FOLLOWS


def test_each_word_of_a_production_is_in_the_lexer() -> None:
    """Otherwise no parser could be made, and the daemon could not start."""
    productions = [method.__doc__ or "" for name, method in vars(Grammar).items() if name.startswith("p_")]
    words = {word for text in productions for word in re.findall(r"\b[A-Z][A-Z_0-9]*\b", text.partition(":")[2])}

    assert words - set(lexer.TOKENS) == set(), "lexer.py does not have these words of productions"


@pytest.mark.parametrize("word", OUR_WORDS)
def test_our_words_are_still_words(conf: Loader, word: str) -> None:
    """Every upstream word or name may be one of our keywords."""
    config = conf.load(
        f"""
        {word} = {word}
        switch {word} {{
            group {word}
            interface {word}
        }}
        vm {word} {{
            boot {word}
            disk {word}
            cdrom {word}
            interface tap {{ group {word} switch {word} }}
            disk ${word}
        }}
        vm x instance {word}2 {{ cdrom {word} }}
        """
    )

    (vm, _) = config.vms
    assert (vm.name, vm.nics[0].switch, vm.nics[0].group) == (word, word, word)
    assert [vm.cdrom, *(disk.path for disk in vm.disks)] == [vm.kernel] * 3 == [str(conf.directory / word)] * 3
    assert (config.switches[0].name, config.switches[0].interface) == (word, word)


@pytest.mark.parametrize(
    ("options", "form", "serial"),
    [
        ("", "", ""),
        ("format raw", "raw", ""),
        ("serial root", "", "root"),
        ("serial 'a b~!'", "", "a b~!"),
        ("serial 0042", "", "0042"),
        ("serial 12345678901234567890 format raw", "raw", "12345678901234567890"),
        ("serial 4f-1", "", "4f-1"),
        ("format raw serial s-1", "raw", "s-1"),
        ("serial serial format qcow2", "qcow2", "serial"),
        (f"serial {'s' * 20}", "", "s" * 20),
    ],
)
def test_disk_options(conf: Loader, options: str, form: str, serial: str) -> None:
    """Options have any order.  A serial number is any printable word, and one of digits is not read as a number."""
    (disk,) = conf.vm(f"disk {conf.image} {options}").disks

    assert (disk.format, disk.serial) == (form, serial)


def test_serial_numbers_are_different_within_a_vm(conf: Loader) -> None:
    """A guest could not distinguish the disks.  Disks of two VMs may share one."""
    line = f"disk {conf.image} serial a"

    assert conf.errors(f"vm a {{\n{line}\n{line}\n}}\n") == ["3: serial a is used by another disk of this vm"]
    assert len(conf.load(f"vm a {{ {line} }}\nvm b {{ {line} }}\n").vms) == 2


@pytest.mark.parametrize(
    ("options", "size_bytes", "keep"),
    [
        ("", 10 << 20, 3),
        ("size 64K", 64 << 10, 3),
        ("keep 0", 10 << 20, 0),
        ("size 65536 keep 99", 64 << 10, 99),
        ("keep 2 size 1G", 1 << 30, 2),
    ],
)
def test_console_log(conf: Loader, options: str, size_bytes: int, keep: int) -> None:
    """Options have any order, and the path starts at the file's directory.  The words may be names elsewhere."""
    assert conf.vm(f"console log keep.log {options}").console_log == ConsoleLog(
        path=f"{conf.directory}/keep.log", size_bytes=size_bytes, keep=keep
    )
    assert [vm.name for vm in conf.load("keep = log\nvm $keep { console log /a/keep }\n").vms] == ["log"]


def test_console_log_of_two_vms(conf: Loader) -> None:
    """A file that two VMs share gets a warning.  With `%n` each VM has another file."""
    conf.load('vm a { console log "/v/a" }\nvm b { console log "/v/%n" }\n')
    assert conf.warnings == []
    conf.load('vm a { console log "/v/b" }\nvm b { console log "/v/%n" }\n')

    assert conf.warnings[-1].endswith('vm "b": console log /v/b is used by vm "a" already')


@pytest.mark.parametrize(
    ("text", "limits"),
    [
        ("{ memory 3G, cpu 150%, weight 200 }", VmLimits(memory_bytes=3 << 30, cpu_percent=150, weight=200)),
        ("{ memory 3G cpu 150% weight 200 }", VmLimits(memory_bytes=3 << 30, cpu_percent=150, weight=200)),
        ("{\n\nweight 1\n\ncpu 5%,\n memory 1073741824\n}", VmLimits(memory_bytes=1 << 30, cpu_percent=5, weight=1)),
        ("{ cpu 7% }", VmLimits(cpu_percent=7)),
        ("{ memory 1G }", VmLimits(memory_bytes=1 << 30)),
        ("{ weight 7 }", VmLimits(weight=7)),
    ],
)
def test_limits_of_a_vm(conf: Loader, text: str, limits: VmLimits) -> None:
    """Limits have any order, on one line or several.  `memory` in it is not the guest's memory."""
    vm = conf.vm(f"memory 512M\nlimit {text}")

    assert (vm.limit, vm.memory_bytes) == (limits, 512 * MIB)


@pytest.mark.parametrize(
    ("options", "iops", "rate"),
    [
        ("limit iops 500 rate 20M", 500, 20 * MIB),
        ("limit rate 20000000 iops 1 format raw", 1, 20_000_000),
        ("serial s-1 limit iops 9", 9, 0),
        ("limit rate 2M iops 9", 9, 2 * MIB),
        ("limit rate 1.5M serial 7", 0, 3 * MIB // 2),
        ("serial limit limit iops 9", 9, 0),
    ],
)
def test_limits_of_a_disk(conf: Loader, options: str, iops: int, rate: int) -> None:
    """They stand among its other options."""
    (disk,) = conf.vm(f"disk {conf.image} {options}").disks

    assert (disk.iops_limit, disk.rate_limit) == (iops, rate)


@pytest.mark.parametrize(
    "text",
    [
        "interface tap limit rate 1M", "interface { limit rate 1M }", "local interface {\nlimit rate 1M\n}",
        "interface { switch lan limit rate 1M }", "interface group x, limit rate 1M",
        "interface { locked lladdr, limit rate 1M }", "interface lladdr 2:0:0:0:0:1 limit rate 1048576",
        "interface { rdomain 2 limit rate 1024K up }",
    ],
)  # fmt: skip
def test_limit_of_an_interface(conf: Loader, text: str) -> None:
    """It stands among the other options."""
    (nic,) = conf.load(f"switch lan {{ interface br0 }}\nvm a {{\n{text}\n}}\n").vms[0].nics

    assert nic.rate_limit == MIB


@pytest.mark.parametrize(
    "text",
    [
        "interface tap vhost", "interface tap7 vhost", "interface { vhost }", "local interface {\nvhost\n}",
        "interface { switch lan vhost }", "interface switch lan, vhost, group x", "interface { vhost limit rate 1M }",
        "interface { locked lladdr, vhost }", "local interface { hostname a vhost dns 192.0.2.1 }",
    ],
)  # fmt: skip
def test_vhost_of_an_interface(conf: Loader, text: str) -> None:
    """It is an option of every kind of interface."""
    (nic,) = conf.load(f"switch lan {{ interface br0 }}\nvm a {{\n{text}\n}}\n").vms[0].nics

    assert nic.vhost


@pytest.mark.parametrize("mode", VirtioMode)
def test_virtio_mode(conf: Loader, mode: VirtioMode) -> None:
    """The name of each mode is accepted."""
    assert conf.vm(f"virtio {mode.name.lower()}").virtio is mode


def test_quoted_words_are_not_our_keywords(conf: Loader) -> None:
    """`boot "a" "initrd"` is one path, as upstream."""
    (conf.directory / "diskinitrd").touch()

    assert conf.vm(f'boot "{conf.directory}/disk" "initrd"').kernel == f"{conf.directory}/diskinitrd"


def test_our_words_end_strings_of_their_statement_only(conf: Loader) -> None:
    """`serial` is an option of a disk, and a word after a disc."""
    vm = conf.vm(f"disk {conf.image}\ncdrom disc serial")

    assert vm.cdrom == f"{conf.directory}/discserial"


@pytest.mark.parametrize("word", sorted(RESERVED))
def test_reserved_words_must_be_quoted(conf: Loader, word: str) -> None:
    """Quoted, they are ordinary names."""
    assert conf.errors(f"vm {word} {{ disable }}\n") == [f'1: syntax error at "{word}"']
    assert conf.load(f"vm '{word}' {{ disable }}\n").vms[0].name == word


# recovery from errors


def test_all_errors_are_reported(conf: Loader) -> None:
    """An error skips its own line only, at every depth of blocks."""
    errors = conf.errors(
        """\
foo
local prefix 1.2.3.4/8
switch "a" {
    bar
    interface tap0
}
vm "x" {
    memory
    memory 2
    interface {
        baz
        lladdr x
    }
    allow instance { qux }
    interface { quux }
    vcpus 99
}
vm y bar {
    memory 1
}
vm "z" { corge }
vm "z" {
    memory 3
    interface tap1 }
vm "z" { interfaces 7 }
} stray
socket owner nobody-here
"""
    )

    assert errors == [
        "1: syntax error at end of line",
        "2: invalid local prefix: bad mask: 1.2.3.4/8",
        '4: syntax error at "bar"',
        "5: invalid switch interface: tap0",
        "8: syntax error at end of line",
        "9: memory size must be at least 1MB",
        '11: syntax error at "baz"',
        "12: invalid address: x",
        '14: syntax error at "qux"',
        '15: syntax error at "quux"',
        "16: invalid number of vcpus: 99 (limit is 16)",
        "19: memory size must be at least 1MB",
        '21: syntax error at "corge"',
        "23: memory size must be at least 1MB",
        "25: too many interfaces: 7 (limit is 4)",
        '26: syntax error at "}"',
        "27: failed to get user: nobody-here",
    ]


@pytest.mark.parametrize("bad", ["}", "enable", ",", "="])
def test_errors_in_the_first_lines(conf: Loader, bad: str) -> None:
    """Each is reported, and a statement after them is read."""
    assert conf.errors(f"{bad}\n{bad}\nvm a {{ vcpus 0 }}\n") == [
        f'1: syntax error at "{bad}"',
        f'2: syntax error at "{bad}"',
        "3: invalid number of vcpus: 0 (limit is 16)",
    ]


@pytest.mark.parametrize(("head", "bad"), [("vm a b =", "="), ("switch a b c instance", "instance")])
def test_broken_head_skips_its_block(conf: Loader, head: str, bad: str) -> None:
    """Without their block, all of its options would be reported as errors."""
    assert conf.errors(f"{head} x {{\n disk a\n interface {{\n up\n }}\n}}\nfoo\n") == [
        f'1: syntax error at "{bad}"',
        "7: syntax error at end of line",
    ]


def test_brace_behind_an_error_still_closes(conf: Loader) -> None:
    """Otherwise the next statements would be read as part of the block."""
    assert conf.errors("vm a {\n disable\n memory }\nvm b {\n interface {\n foo }\n vcpus 0\n}\nbar\n") == [
        '3: syntax error at "}"',
        "6: syntax error at \"foo\"",
        "7: invalid number of vcpus: 0 (limit is 16)",
        "9: syntax error at end of line",
    ]


def test_every_token_and_production_is_in_use(grammar: Grammar) -> None:
    """A keyword that no production uses, or a production that cannot be reached, was forgotten."""
    rules = yacc.rules_of(grammar)
    reached = ["file"]
    for name in reached:
        found = {symbol for rule in rules if rule.name == name for symbol in rule.symbols}
        reached += sorted(found - set(reached))

    assert set(reached) == {*lexer.TOKENS, *lexer.LITERALS, yacc.ERROR, *(rule.name for rule in rules)}


@pytest.mark.parametrize("word", sorted(GOES_ON))
def test_each_word_of_goes_on_has_a_conflict(grammar: Grammar, word: str) -> None:
    """An unnecessary word would hide a later conflict."""
    tokens = {*lexer.TOKENS, *lexer.LITERALS}

    with pytest.raises(yacc.GrammarError, match=f"^{word} can be shifted, "):
        yacc.Tables(yacc.rules_of(grammar), tokens, "file", GOES_ON - {word})


# hostile input

VALID = b"""\
images = "/"
local prefix 10.77.0.0/16
local inet6 prefix fd00::/48
local nat disable
local dns 9.9.9.9 2620:fe::fe
ids 1000000000
limit memory 8G
limit vms 3
limit vcpus 12
socket owner :root
staggered start parallel 2 delay 15
agentx context "c" path "/run/x"
switch "lan" {
    interface veb0
    locked lladdr
    group labnet
}
vm "db1" {
    memory 2G # much
    vcpus 2
    virtio legacy
    disk $images format raw
    interface { switch "lan" rdomain 3 lladdr fe:e1:ba:00:00:09 }
    local interface tap4 up, locked lladdr
    boot "/" initrd "/" cmdline "a \\"b\\" \\
c"
    allow instance { disk, memory, owner :root
        boot }
}
vm "db1" instance "x" { cdrom '/x' }
"""


@pytest.fixture(scope="module")
def grammar() -> Grammar:
    """One parser for thousands of texts, because making it takes most of the time."""
    return Grammar()


def load_or_refuse(conf: Loader, grammar: Grammar, text: bytes) -> None:
    """Read a text.  It is a configuration, or has errors with messages; no exception is raised."""
    conf.path.write_bytes(text)
    lexer = Lexer({})
    lexer.open(str(conf.path))
    config = grammar.parse(lexer, conf.warnings.append, Globals())
    check(config, conf.warnings.append)
    assert all(isinstance(error, ConfigError) and error.line > 0 and error.what for error in lexer.errors)


def test_valid_text_is_valid(conf: Loader) -> None:
    """Otherwise the tests below would prove little."""
    assert len(conf.load(VALID).vms) == 2


def test_the_tables_are_made_once(conf: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reload of the configuration does not make them again."""
    conf.load(VALID)
    monkeypatch.setattr(yacc, "Tables", lambda *_of: pytest.fail("the tables were made again"))

    assert len(conf.load(VALID).vms) == 2


def test_a_file_with_errors_does_not_affect_the_next(conf: Loader, grammar: Grammar) -> None:
    """The parser with its stacks, drafts and settings is used again, wherever the first file ends."""
    valid = conf.load(VALID)
    for length in range(0, len(VALID), 7):
        load_or_refuse(conf, grammar, VALID[:length] + b"{\n")
        conf.path.write_bytes(VALID)
        lexer = Lexer({})
        lexer.open(str(conf.path))

        assert grammar.parse(lexer, conf.warnings.append, Globals()) == valid
        assert lexer.errors == []


def test_truncated(conf: Loader, grammar: Grammar) -> None:
    """Every prefix of a valid file loads or is refused."""
    for length in range(len(VALID)):
        load_or_refuse(conf, grammar, VALID[:length])


def test_one_byte_changed(conf: Loader, grammar: Grammar) -> None:
    """A valid file with single bytes replaced, removed or doubled loads or is refused."""
    rng = random.Random(1)
    for _ in range(1000):
        at = rng.randrange(len(VALID))
        middle = rng.choice((b"", b"\n", b"}", b"{", b"\"", b"\\", b"\0", b"\xff", VALID[at : at + 1] * 2))
        load_or_refuse(conf, grammar, VALID[:at] + middle + VALID[at + 1 :])


def test_random_bytes(conf: Loader, grammar: Grammar) -> None:
    """Random bytes are refused without an exception."""
    rng = random.Random(2)
    for _ in range(1000):
        load_or_refuse(conf, grammar, rng.randbytes(rng.randrange(200)))


WORDS = (
    *sorted(RESERVED), "{", "}", "\n", ",", "=", "$m", "1", "-1", "1G", "'", "x", "vcpus", "nat", "ids", "limit",
    "vms", "initrd", "\\\n",
)  # fmt: skip


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(st.lists(st.sampled_from(WORDS), max_size=40))
def test_random_words(conf: Loader, grammar: Grammar, words: list[str]) -> None:
    """Recovery works after any sequence of tokens."""
    load_or_refuse(conf, grammar, " ".join(words).encode())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)
@given(st.lists(st.sampled_from(VALID.decode().splitlines(keepends=True)), max_size=20))
def test_shuffled_lines(conf: Loader, grammar: Grammar, lines: list[str]) -> None:
    """Lines in wrong places load or are refused."""
    load_or_refuse(conf, grammar, "".join(lines).encode())


def test_long_file_of_strings_is_read_in_time(conf: Loader) -> None:
    """The time for concatenation and for recovery is not quadratic."""
    (error,) = conf.errors(b"vm " + b"'a' " * 20000 + b"{ disable }\n")

    assert error == "1: vm name too long"


def test_owner_is_looked_up_in_the_password_file(conf: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name of digits is looked up as a name first."""
    entry = pwd.getpwnam("daemon")

    def getpwnam(name: str) -> Any:  # noqa: ANN401 - a struct_passwd
        assert name == "77"
        return entry

    monkeypatch.setattr(pwd, "getpwnam", getpwnam)

    assert conf.vm("owner 77").owner == Owner(uid=entry.pw_uid)


def test_prefix_records(conf: Loader) -> None:
    """The last statement of a kind counts."""
    config = conf.load("local prefix 10/8\nlocal prefix 11/8\n").settings

    assert config.local_prefix == Prefix(address=bytes([11, 0, 0, 0]), length=8)


MISTYPED = [
    ('vmm "x" {\n}', 'syntax error at "x": did you mean "vm" instead of "vmm"?'),
    ('swtich "a" {\n interface br0\n}', 'syntax error at "a": did you mean "switch" instead of "swtich"?'),
    ("lcoal prefix 10.0.0.0/8", 'syntax error at "prefix": did you mean "local" instead of "lcoal"?'),
    ("frobnicate yes", 'syntax error at "yes": "frobnicate" is not a statement, and no "=" follows it as in a macro'),
    ("inlcude", 'syntax error at end of line: did you mean "include" instead of "inlcude"?'),
    ("local natt disable", 'syntax error at "natt": did you mean "nat"?'),
    ("socket onwer :x", 'syntax error at "onwer": did you mean "owner"?'),
    ("limit memry 1G", 'syntax error at "memry": did you mean "memory"?'),
    ("vm x {\n memroy 1G\n}", 'syntax error at "memroy": did you mean "memory"?'),
    ("vm x { vcpu 2 }", 'syntax error at "vcpu": did you mean "vcpus"?'),
    ("vm x {\n boot device dsk\n}", 'syntax error at "dsk": did you mean "disk"?'),
    ("vm x {\n interface {\n  swich lan\n }\n}", 'syntax error at "swich": did you mean "switch"?'),
    ("vm x {\n allow instance { bot }\n}", 'syntax error at "bot": did you mean "boot"?'),
    ("switch x {\n interfcae br0\n}", 'syntax error at "interfcae": did you mean "interface"?'),
    ("vm x {\n virtio moden\n}", "unrecognized virtio mode moden: did you mean modern?"),
    ("vm x {\n disk /a format qcow\n}", "unrecognized disk format qcow: did you mean qcow2?"),
    ('disks = "/x"\nvm x {\n disk $diks\n}', "macro 'diks' not defined: did you mean disks?"),
    # Similar to a keyword that cannot be there, or to no keyword.
    ("switch x {\n memroy 1G\n interface br0\n}", 'syntax error at "memroy"'),
    ('vm x {\n kernel "/bsd"\n}', 'syntax error at "kernel"'),
]


def test_mistyped_keyword(conf: Loader) -> None:
    """The message names the most similar keyword of those that could stand there."""
    errors = conf.errors("".join(f"{text}\n" for text, _ in MISTYPED))

    assert [error.partition(": ")[2] for error in errors] == [error for _, error in MISTYPED]


def test_a_missing_quote_is_reported_where_its_string_begins(conf: Loader) -> None:
    """Everything after it is misread, so the first error must name it."""
    errors = conf.errors('vm "a" {\n memory 1G\n disk "/srv/a\n}\nvm "b" {\n disk "/srv/b"\n}\n')

    assert errors[0] == "3: a quoted string begins here and ends on line 5: is a quote missing?"
    assert errors[1].startswith("5: syntax error at ")
    assert not any("quote" in error for error in errors[1:])


def test_a_string_over_several_lines_is_no_error(conf: Loader) -> None:
    """It is not reported in a valid file, nor if another line has an error, nor with escaped line ends."""
    assert conf.load('place = "/srv\n/a"\nvm "a" { disk $place }\n').vms[0].disks[0].path == "/srv/a"
    assert conf.errors('place = "/srv\n/a"\nlimit disks 1\n')[0] == '3: syntax error at "disks"'
    assert conf.errors('limit "a\\\nb" 1\n') == ['1: syntax error at "ab"']
