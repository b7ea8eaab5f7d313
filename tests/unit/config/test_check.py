"""Loading files, and the rules about several objects."""

import grp
import itertools
import os
import pwd
import random
import re
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from tests.unit.config.conftest import Loader
from vmd.config.check import ConfigErrors, claims, load, parse_macro_definition
from vmd.config.model import (
    FIXED_LENGTHS,
    IDS,
    NAME_MAX,
    AllowInstance,
    Config,
    Forward,
    Globals,
    NicConfig,
    Owner,
    Prefix,
    SwitchConfig,
    VmFlag,
)
from vmd.config.rules import same_network, vm_name
from vmd.errors import ConfigError, VmdError
from vmd.parent import instances


def test_missing_file(tmp_path: Path) -> None:
    """A missing file is an error, and not an empty configuration."""
    path = str(tmp_path / "vm.conf")

    with pytest.raises(ConfigErrors, match=f"^{re.escape(path)}: No such file or directory$"):
        load(path, warn=lambda _text: None)


def test_missing_file_that_is_optional(tmp_path: Path) -> None:
    """The result is an empty configuration, with a warning."""
    warnings: list[str] = []
    settings = Globals(start_delay_s=5)
    path = str(tmp_path / "vm.conf")

    config = load(path, may_be_missing=True, warn=warnings.append, settings=settings)

    assert config == Config(settings=settings)
    assert warnings == [f"warning: {path} does not exist, going on without it"]


@pytest.mark.parametrize("may_be_missing", [False, True])
def test_path_through_a_file(conf: Loader, may_be_missing: bool) -> None:
    """Any other failure to open is an error."""
    with pytest.raises(ConfigErrors, match=r"/vm\.conf: Not a directory"):
        load(f"{conf.image}/vm.conf", may_be_missing=may_be_missing, warn=conf.warnings.append)


def test_unreadable_file(conf: Loader) -> None:
    """The error is reported.  A loop of links stands in for missing permission, which root never lacks."""
    conf.path.symlink_to(conf.path)

    with pytest.raises(ConfigErrors, match=r"/vm\.conf: Too many levels of symbolic links"):
        load(str(conf.path), warn=conf.warnings.append)


@pytest.mark.parametrize("kind", ["fifo", "directory", "device"])
def test_special_files_are_refused(conf: Loader, kind: str) -> None:
    """They are refused at once with a message."""
    path = {"fifo": str(conf.directory / "fifo"), "directory": str(conf.directory), "device": "/dev/zero"}[kind]
    if kind == "fifo":
        os.mkfifo(path)

    with pytest.raises(ConfigErrors, match=f"{path}: not a regular file"):
        load(path, warn=conf.warnings.append)


def test_errors_carry_file_and_line(conf: Loader) -> None:
    """The text of the exception has one line for each error."""
    with pytest.raises(ConfigErrors) as refused:
        conf.load("vm a { vcpus 0 }\nfoo\n")

    first, second = refused.value.errors
    assert isinstance(first, ConfigError)
    assert (first.path, first.line, first.what) == (str(conf.path), 1, "invalid number of vcpus: 0 (limit is 16)")
    assert str(refused.value) == f"{first}\n{second}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a=b", ("a", "b")), ("a=", ("a", "")), ("a_1=b c", ("a_1", "b c")), ("disk=/x", ("disk", "/x"))],
)
def test_macro_definition(text: str, expected: tuple[str, str]) -> None:
    """The result is name and value; the value may be empty."""
    assert parse_macro_definition(text) == expected


@pytest.mark.parametrize("text", ["", "a", "=b", "a b=c", "a-b=c", "a=b=c", "é=c"])
def test_macro_definition_refused(text: str) -> None:
    """The last `=` separates name and value, and the name must be valid."""
    with pytest.raises(VmdError, match=f"could not parse macro definition {text}"):
        parse_macro_definition(text)


def test_settings_of_another_file(conf: Loader) -> None:
    """They are those of the daemon, changed by the file."""
    conf.path.write_text("local nat disable\n")
    known = Globals(start_delay_s=5)

    config = load(str(conf.path), warn=conf.warnings.append, settings=known)

    assert config.settings == known.replace(local_nat=False)


def test_a_vm_beyond_the_limits(conf: Loader) -> None:
    """A VM that could not run even alone gets a warning, with the limit at any place in the file."""
    conf.load(
        "limit vcpus 2\nvm a { vcpus 3 }\nvm b { vcpus 2 }\nvm c { memory 2G }\nvm d { memory 1G }\nlimit memory 1G\n"
    )

    assert conf.warnings == [
        f'{conf.path}:2: vm "a": vcpus 3 are more than limit vcpus 2',
        f'{conf.path}:4: vm "c": memory 2.0G is more than limit memory 1.0G',
    ]


def test_vms_that_cannot_run_together(conf: Loader) -> None:
    """A shared host port of one protocol, or a shared network, is no error: the VMs may never run together."""
    conf.load(
        "vm a { local interface { forward port 80:89 to port 80, address 10.0.0.2/24 } }\n"
        "vm b { local interface { forward port 85 to port 1 } }\n"
        "vm c { local interface { forward udp port 85 to port 1, address 10.0.0.77 } }\n"
        "vm d { local interface { forward port 90 to port 1, address 10.0.1.2 } }\n"
    )

    assert conf.warnings == [
        f'{conf.path}:2: vm "b": forward tcp port 85 to port 1: vm "a" has tcp port 80:89 to port 80: '
        "only one of them can run",
        f'{conf.path}:3: vm "c": address 10.0.0.77/31: vm "a" has 10.0.0.2/24: only one of them can run',
    ]


def test_conflicts_of_two_interfaces() -> None:
    """`claims` finds exactly the conflicts that a comparison of all pairs finds."""
    chance = random.Random(4)

    def interface() -> NicConfig:
        number = (10 << 24) + chance.randrange(1 << 18)
        address = Prefix(address=number.to_bytes(4, "big"), length=chance.choice(FIXED_LENGTHS))
        forward = Forward(port=chance.randrange(90), to=1, count=chance.randrange(1, 4), udp=chance.random() < 0.3)
        return NicConfig(address=chance.choice((None, address)), forwards=chance.choice(((), (forward,))))

    interfaces = [interface() for _ in range(150)]
    found = 0
    for one, other in itertools.combinations(interfaces, 2):
        ports = any(ours.overlaps(theirs) for ours in one.forwards for theirs in other.forwards)
        both = one.address is not None and other.address is not None
        networks = both and same_network(cast("Prefix", one.address), cast("Prefix", other.address))
        (_, meets), (has, _) = claims(one), claims(other)
        assert bool({*meets} & {*has}) is (ports or networks)
        found += ports or networks
    assert 100 < found < 10000


def test_forwards_without_nat(conf: Loader) -> None:
    """The warning does not depend on the order of the statements."""
    conf.load("vm a { local interface { forward port 1 to port 1 } }\nlocal nat disable\n")

    assert conf.warnings == [f'{conf.path}:1: vm "a": interface 0: forward: not without NAT (local nat disable)']


def test_second_vm_of_a_name_is_skipped(conf: Loader) -> None:
    """The warning has the place of the second VM."""
    config = conf.load("vm a { memory 1G }\nvm a { memory 2G }\n")

    assert [vm.memory_bytes >> 30 for vm in config.vms] == [1]
    assert conf.warnings == [f'{conf.path}:2: vm "a" skipped (already exists)']


def test_second_switch_of_a_name_is_skipped(conf: Loader) -> None:
    """No interface could ever be attached to it."""
    config = conf.load("switch a { interface br0 }\nswitch a { interface br1 }\n")

    assert [switch.interface for switch in config.switches] == ["br0"]
    assert conf.warnings == [f'{conf.path}:2: switch "a" skipped (already exists)']


def test_switches_that_share_a_bridge(conf: Loader) -> None:
    """They may share it if their settings for the bridge agree."""
    conf.load(
        "switch a { interface br0 }\nswitch b {\n interface br0\n group lab\n}\n"
        "switch c { interface br1 }\nswitch d {\n interface br1\n rdomain 3\n}\n"
        "switch e {\n interface br0\n down\n disable\n}\n"
    )

    assert conf.warnings == [f'{conf.path}:7: switch "d": bridge br1 is set up differently by switch "c"']


@pytest.mark.parametrize(
    ("prefix", "warning"),
    [
        ("prefix 127/8", "local prefix 127.0.0.0/8: guests cannot have addresses such as 127.0.1.0"),
        ("prefix 224/8", "local prefix 224.0.0.0/8: guests cannot have addresses such as 224.0.1.0"),
        ("prefix 0/8", "local prefix 0.0.0.0/8: guests cannot have addresses such as 0.0.1.0"),
        ("prefix 250/8", "local prefix 250.0.0.0/8: guests cannot have addresses such as 250.0.1.0"),
        ("inet6 prefix fe80::/48", "local inet6 prefix fe80::/48: guests cannot have addresses such as fe80:0:0:4::"),
        ("inet6 prefix ff05::/48", "local inet6 prefix ff05::/48: guests cannot have addresses such as ff05:0:0:4::"),
        ("inet6 prefix ::/0", "local inet6 prefix ::/0: guests cannot have addresses such as 0:0:0:4::"),
    ],
)
def test_unusable_prefixes(conf: Loader, prefix: str, warning: str) -> None:
    """Addresses in these prefixes have a special meaning."""
    conf.load(f"local {prefix}\n")

    assert conf.warnings == [f"{conf.path}:1: {warning}"]


@pytest.mark.parametrize("prefix", ["prefix 10/8", "inet6 prefix fd00::/48", "inet6 prefix 2000::/8"])
def test_usable_prefixes(conf: Loader, prefix: str) -> None:
    """There is no warning."""
    conf.load(f"local {prefix}\n")

    assert conf.warnings == []


def test_unknown_and_disabled_switches(conf: Loader) -> None:
    """The order in the file does not matter."""
    conf.load(
        "vm a { interface switch late }\nvm b { interface switch off }\nvm c { interface switch no }\n"
        "vm d { interface switch laet }\n"
        "switch late { interface br0 }\nswitch off { interface br1\n disable\n}\n"
    )

    assert conf.warnings == [
        f'{conf.path}:2: vm "b": interface 0: switch "off" is disabled: the interface is connected to nothing',
        f'{conf.path}:3: vm "c": interface 0: switch "no" not found: the interface is connected to nothing',
        f'{conf.path}:4: vm "d": interface 0: switch "laet" not found: the interface is connected to nothing: '
        "did you mean late?",
    ]


def test_switch_of_an_earlier_file(conf: Loader) -> None:
    """A file that is loaded later may use it."""
    conf.path.write_text("vm a { interface switch lan }\n")

    load(str(conf.path), warn=conf.warnings.append, known_switches=[SwitchConfig(name="lan", interface="br0")])

    assert conf.warnings == []


@pytest.mark.parametrize(
    ("option", "what"), [("tap3", "interface tap3"), ("lladdr fe:e1:ba:0:0:9", "lladdr fe:e1:ba:00:00:09")]
)
def test_settings_that_only_one_interface_can_have(conf: Loader, option: str, what: str) -> None:
    """A duplicate within one VM or between two gets a warning."""
    conf.load(f"vm a {{\n interface {option}\n interface {option}\n}}\nvm b {{ interface {option} }}\n")

    assert conf.warnings == [
        f'{conf.path}:1: vm "a": {what} is used by vm "a" already',
        f'{conf.path}:5: vm "b": {what} is used by vm "a" already',
    ]


def test_interfaces_without_names_do_not_collide(conf: Loader) -> None:
    """Each gets another free tap."""
    config = conf.load("vm a {\n interface tap\n interface tap\n interfaces 4\n}\n")

    assert config.vms[0].nics == (NicConfig(tap="tap"), NicConfig(tap="tap"), NicConfig(), NicConfig())
    assert conf.warnings == []


def test_rdomain_of_an_interface_on_a_switch(conf: Loader) -> None:
    """It must be the rdomain of the switch, or absent.  Without a switch any is accepted."""
    conf.load(
        "switch s { interface br0 }\nswitch t { interface br1\n rdomain 3\n}\n"
        "vm a { interface { switch s rdomain 3 } }\nvm b { interface { switch t rdomain 0 } }\n"
        "vm c {\n interface { switch s rdomain 0 }\n interface { switch t rdomain 3 }\n interface { switch t }\n"
        " interface rdomain 5\n}\n"
    )

    assert conf.warnings == [
        f'{conf.path}:{line}: vm "{name}": interface 0: rdomain {given} differs from rdomain {there} of its switch: '
        "this vm cannot start"
        for line, name, given, there in [(5, "a", 3, 0), (6, "b", 0, 3)]
    ]


def test_name_that_is_a_number(conf: Loader) -> None:
    """Upstream accepts it, but its vmctl then takes the name for an id."""
    conf.load("vm '2' { disable }\nvm 2a { disable }\n")

    (warning,) = conf.warnings
    assert warning.startswith(f'{conf.path}:1: vm "2": the name is a number')


class Accounts:
    """A host with these members of group 0, and these users whose primary group is 0."""

    def __init__(self, members: list[str], primary: list[str]) -> None:
        self.members = members
        self.primary = primary

    def getgrgid(self, gid: int) -> grp.struct_group:
        """Return the group 0."""
        return grp.struct_group(("root", "x", gid, self.members))

    def getpwall(self) -> list[pwd.struct_passwd]:
        """Return root, a user of another group, and the users with group 0 as their primary group."""
        users = [("root", 0, 0), ("ann", 1000, 1000), *((name, 1001, 0) for name in self.primary)]
        return [pwd.struct_passwd((name, "x", uid, gid, "", "/", "/bin/sh")) for name, uid, gid in users]


@pytest.mark.parametrize(
    ("statement", "members", "primary", "warned"),
    [
        ("allow instance { boot, disk, memory }", [], [], True),
        ("allow instance { boot, disk, memory }", ["root"], [], True),
        ("allow instance { boot, disk, memory }", ["ann"], [], False),
        ("allow instance { boot, disk, memory }", [], ["op"], False),
        ("allow instance { disk, owner daemon }", [], [], False),
        ("allow instance { disk, owner :daemon }", [], [], False),
        ("memory 1G", [], [], False),
    ],
)
def test_template_that_no_user_may_use(
    conf: Loader, statement: str, members: list[str], primary: list[str], warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without an owner it is for group 0, as upstream.  On most hosts that group has no members."""
    accounts = Accounts(members, primary)
    monkeypatch.setattr("vmd.config.check.grp", SimpleNamespace(getgrgid=accounts.getgrgid))
    monkeypatch.setattr("vmd.config.check.pwd", SimpleNamespace(getpwall=accounts.getpwall, getpwuid=pwd.getpwuid))

    conf.load(f"vm a {{\n {statement}\n}}\n")

    start = f'{conf.path}:1: vm "a": allow instance has no owner: it is for group 0'
    assert [warning.startswith(start) for warning in conf.warnings] == [True] * warned


@pytest.mark.parametrize(("head", "count"), [("vm a", 1), ("vm p instance a", 0)])
def test_command_line_without_kernel(conf: Loader, head: str, count: int) -> None:
    """It has no effect, unless an instance gets a kernel from its parent."""
    conf.load(f"{head} {{ cmdline 'quiet' }}\n")

    assert conf.warnings == [f'{conf.path}:1: vm "a": cmdline is of no use without boot'] * count


@pytest.mark.parametrize("name", ["a", "0", "a.b", "a-b_c", "a" * NAME_MAX])
def test_valid_vm_names(name: str) -> None:
    """They have letters, digits and a few other characters."""
    assert vm_name(name) == name


@pytest.mark.parametrize("name", ["", ".", "..", "-a", "_a", "a/b", "a b", "a\n", "é", "a\0", "a" * (NAME_MAX + 1)])
def test_invalid_vm_names(name: str) -> None:
    """A name cannot leave a directory or end a line."""
    with pytest.raises(ValueError, match="vm name too long" if len(name) > NAME_MAX else "invalid VM name"):
        vm_name(name)


# The regression cases of cat. 2.10, as files

REFUSED = {
    "boot-path-too-long": (f'vm "x" {{\n\tboot "/{"b" * 4200}"\n}}\n', 2, "kernel path not found: File name too long"),
    "cdrom-path-too-long": (f'vm "x" {{\n\tcdrom "/{"c" * 4200}"\n}}\n', 2, "cdrom name too long"),
    "disk-path-too-long": (f'vm "x" {{\n\tdisk "/{"d" * 4200}"\n}}\n', 2, "disk path too long"),
    "kernel-keyword": ('vm "x" {\n\tkernel "/bsd"\n}\n', 2, "syntax error"),
    "switch-without-interface": ('switch "s" {\n\tup\n}\n', 1, 'switch "s" is missing interface name'),
    "too-little-memory": ('vm "x" {\n\tmemory 1\n}\n', 2, "memory size must be at least 1MB"),
    "vm-name-too-long": (f'vm "{"x" * 64}" {{\n\tmemory 1G\n}}\n', 1, "vm name too long"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_regression_refused(conf: Loader, case: str) -> None:
    """Each has one error, in the right line."""
    text, line, what = REFUSED[case]

    (error,) = conf.errors(text)

    assert error.startswith(f"{line}: {what}")


def test_regression_accepted(conf: Loader) -> None:
    """`boot` is accepted, and so is a memory size that is not a multiple of 1 MiB."""
    config = conf.load(f'vm "x" {{\n\tboot "{conf.image}"\n\tmemory 1048577\n}}\n')

    assert (config.vms[0].kernel, config.vms[0].memory_bytes) == (str(conf.image), 1 << 20)


# users and groups that this host does not have


MISSING = {
    "owner": ("vm b {\n owner no-such-user\n}\n", 2, "failed to get user: no-such-user"),
    "group": ("vm b {\n owner :no-such-group\n}\n", 2, "failed to get group: no-such-group"),
    "instances": ("vm b {\n allow instance { disk owner no-such-user }\n}\n", 2, "failed to get user: no-such-user"),
}


@pytest.mark.parametrize("case", MISSING)
def test_unknown_owner(conf: Loader, case: str) -> None:
    """It is an error in a check or reload.  At the start of the daemon only this VM cannot start."""
    text, line, what = MISSING[case]

    assert conf.errors(text) == [f"{line}: {what}"]
    conf.path.write_text("vm a { disable }\n" + text + "vm c { owner daemon }\n")
    config = load(str(conf.path), starting=True, warn=conf.warnings.append)

    assert [(vm.name, vm.fault) for vm in config.vms] == [("a", ""), ("b", what), ("c", "")]
    assert config.vms[1].owner == Owner()
    assert config.vms[1].allow in (None, AllowInstance(flags=VmFlag.DISK, owner=Owner()))
    assert conf.warnings == [f'{conf.path}:2: vm "b": {what}: this vm cannot start']


def test_instance_of_a_vm_with_an_unknown_owner(conf: Loader) -> None:
    """It would have the template's owner, so it cannot start either."""
    conf.path.write_text("vm a {\n owner no-such-user\n}\nvm a instance b { memory 1G }\n")
    config = load(str(conf.path), starting=True, warn=conf.warnings.append)

    vms, problems = instances.resolve(config.vms, lambda _name: None)

    assert [vm.fault for vm in vms] == ["failed to get user: no-such-user"] * 2
    assert problems == []


def test_unknown_owner_of_the_socket(conf: Loader) -> None:
    """A daemon that starts gives the socket to root."""
    text = "\nsocket owner no-such-user\n"

    assert conf.errors(text) == ["2: failed to get user: no-such-user"]
    config = load(str(conf.path), starting=True, warn=conf.warnings.append)

    assert config.settings.socket_owner == Owner(uid=0, gid=0)
    assert conf.warnings == [
        f"{conf.path}:2: failed to get user: no-such-user: only root may use the control socket"
    ]


def test_included_file_that_is_not_there(conf: Loader) -> None:
    """At a start, the daemon skips it.  A reload would lose its VMs, so there it is an error."""
    text = "vm a { disable }\ninclude /nowhere/b.conf\nvm c { disable }\n"
    what = "failed to include file /nowhere/b.conf: No such file or directory"

    assert conf.errors(text) == [f"2: {what}"]
    config = load(str(conf.path), starting=True, warn=conf.warnings.append)

    assert [vm.name for vm in config.vms] == ["a", "c"]
    assert conf.warnings == [f"{conf.path}:2: {what}: going on without it"]


def test_mistakes_are_errors_at_a_start_too(conf: Loader) -> None:
    """They would be errors on every host."""
    conf.path.write_text("vm a { memory lots }\ninclude /dev/zero\n")

    with pytest.raises(ConfigErrors) as refused:
        load(str(conf.path), starting=True, warn=conf.warnings.append)

    assert [error.what for error in refused.value.errors if isinstance(error, ConfigError)] == [
        "failed to parse size: lots", "failed to include file /dev/zero: not a regular file",
    ]  # fmt: skip


def test_group_wheel(conf: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of OpenBSD name it.  On a host without it, gid 0 is used, which is its number on OpenBSD."""
    text = "socket owner :wheel\nvm a { owner daemon:wheel }\n"
    names = {"daemon": 1}
    no_wheel = SimpleNamespace(getgrnam=lambda name: grp.struct_group((name, "x", names[name], [])))
    monkeypatch.setattr("vmd.config.values.grp", no_wheel)

    config = conf.load(text)
    names["wheel"] = 10
    with_wheel = conf.load(text)

    assert (config.settings.socket_owner, config.vms[0].owner) == (Owner(uid=0, gid=0), Owner(uid=1, gid=0))
    assert (with_wheel.settings.socket_owner.gid, with_wheel.vms[0].owner.gid) == (10, 10)


@pytest.mark.parametrize(
    ("name", "line", "who"),
    [
        ("passwd", "bob:x:{first}:100::/:/bin/sh", "bob"),
        ("group", "staff:x:{last}:", "staff"),
        ("subuid", "eve:{before}:65537", "eve"),
        ("subgid", "eve:{last}:65536", "eve"),
    ],
)
def test_ids_that_belong_to_a_user(
    conf: Loader, monkeypatch: pytest.MonkeyPatch, name: str, line: str, who: str
) -> None:
    """The host's files assign an id of the range to a user.  VMs could then control that user's processes."""
    first, last = 1 << 20, (1 << 20) + IDS
    path = conf.path.with_name(name)
    path.write_text(f"# comment\n\n{line.format(first=first, last=last, before=first - 65536)}\n")
    monkeypatch.setattr("vmd.config.check.USERS", (str(path),))
    monkeypatch.setattr("vmd.config.check.RANGES", (str(path),) if name.startswith("sub") else ())

    common = last if "{last}" in line else first
    with pytest.raises(ConfigErrors) as refused:
        conf.load(f"\nids {first}\n")
    assert str(refused.value) == f"{conf.path}:2: ids {first}: {common} belongs to {who} in {path}"
    beside = first + 1 if common == first else first - 1
    assert conf.load(f"ids {beside}\n").settings.first_id == beside
