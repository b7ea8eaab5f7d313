"""Loading files, and the rules that span objects."""

import os
from pathlib import Path

import pytest

from tests.unit.config.conftest import Loader
from vmd.config.check import ConfigErrors, load, parse_macro_definition
from vmd.config.model import NAME_MAX, Config, Globals, NicConfig, valid_vm_name
from vmd.errors import ConfigError, VmdError


@pytest.mark.parametrize(("explicit", "count"), [(False, 0), (True, 1)])
def test_missing_file(tmp_path: Path, explicit: bool, count: int) -> None:
    """Means an empty configuration; whoever asked for it by name is told."""
    warnings: list[str] = []
    settings = Globals(start_delay_s=5)
    path = str(tmp_path / "vm.conf")

    config = load(path, explicit=explicit, warn=warnings.append, settings=settings)

    assert config == Config(settings=settings)
    assert warnings == [f"warning: {path} does not exist, going on without it"] * count


@pytest.mark.parametrize("explicit", [False, True])
def test_path_through_a_file(conf: Loader, explicit: bool) -> None:
    """Any other failure to open is an error."""
    with pytest.raises(ConfigErrors, match=r"/vm\.conf: Not a directory"):
        load(f"{conf.image}/vm.conf", explicit=explicit, warn=conf.warnings.append)


def test_unreadable_file(conf: Loader) -> None:
    """Whether for want of permission, which root has, or because links go in circles."""
    conf.path.symlink_to(conf.path)

    with pytest.raises(ConfigErrors, match=r"/vm\.conf: Too many levels of symbolic links"):
        load(str(conf.path), explicit=True, warn=conf.warnings.append)


@pytest.mark.parametrize("kind", ["fifo", "directory", "device"])
def test_special_files_are_refused(conf: Loader, kind: str) -> None:
    """With a sentence, and at once."""
    path = {"fifo": str(conf.directory / "fifo"), "directory": str(conf.directory), "device": "/dev/zero"}[kind]
    if kind == "fifo":
        os.mkfifo(path)

    with pytest.raises(ConfigErrors, match=f"{path}: not a regular file"):
        load(path, explicit=True, warn=conf.warnings.append)


def test_errors_carry_file_and_line(conf: Loader) -> None:
    """Their text is a line for each."""
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
    """Name and value, which may be empty."""
    assert parse_macro_definition(text) == expected


@pytest.mark.parametrize("text", ["", "a", "=b", "a b=c", "a-b=c", "a=b=c", "é=c"])
def test_macro_definition_refused(text: str) -> None:
    """The last `=` separates; what stands before it must be a name."""
    with pytest.raises(VmdError, match=f"could not parse macro definition {text}"):
        parse_macro_definition(text)


def test_settings_of_a_further_file(conf: Loader) -> None:
    """Are those of the daemon, with what the file says on top."""
    conf.path.write_text("local nat disable\n")
    known = Globals(start_delay_s=5)

    config = load(str(conf.path), explicit=True, warn=conf.warnings.append, settings=known)

    assert config.settings == known.replace(local_nat=False)


def test_a_vm_beyond_the_limits(conf: Loader) -> None:
    """Could not run even alone; wherever in the file the limit is."""
    conf.load("limit vcpus 2\nvm a { vcpus 3 }\nvm b { vcpus 2 }\nvm c { memory 2G }\nlimit memory 1G\n")

    assert conf.warnings == [
        f'{conf.path}:2: vm "a": vcpus 3 are more than limit vcpus 2',
        f'{conf.path}:4: vm "c": memory 2.0G is more than limit memory 1.0G',
    ]


def test_second_vm_of_a_name_is_skipped(conf: Loader) -> None:
    """The warning says where it is."""
    config = conf.load("vm a { memory 1G }\nvm a { memory 2G }\n")

    assert [vm.memory_bytes >> 30 for vm in config.vms] == [1]
    assert conf.warnings == [f'{conf.path}:2: vm "a" skipped (already exists)']


def test_second_switch_of_a_name_is_skipped(conf: Loader) -> None:
    """Nothing could ever be attached to it."""
    config = conf.load("switch a { interface br0 }\nswitch a { interface br1 }\n")

    assert [switch.interface for switch in config.switches] == ["br0"]
    assert conf.warnings == [f'{conf.path}:2: switch "a" skipped (already exists)']


def test_switches_that_share_a_bridge(conf: Loader) -> None:
    """They may, as long as it can be as all of them want it."""
    conf.load(
        "switch a { interface br0 }\nswitch b {\n interface br0\n group lab\n}\n"
        "switch c { interface br1 }\nswitch d {\n interface br1\n rdomain 3\n}\n"
        "switch e {\n interface br0\n down\n disable\n}\n"
    )

    assert conf.warnings == [f'{conf.path}:7: switch "d": bridge br1 is set up for switch "c"']


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
def test_prefixes_of_no_use(conf: Loader, prefix: str, warning: str) -> None:
    """Their addresses mean something else."""
    conf.load(f"local {prefix}\n")

    assert conf.warnings == [f"{conf.path}:1: {warning}"]


@pytest.mark.parametrize("prefix", ["prefix 10/8", "inet6 prefix fd00::/48", "inet6 prefix 2000::/8"])
def test_prefixes_of_use(conf: Loader, prefix: str) -> None:
    """Nothing is said of them."""
    conf.load(f"local {prefix}\n")

    assert conf.warnings == []


def test_unknown_and_disabled_switches(conf: Loader) -> None:
    """Order in the file does not matter."""
    conf.load(
        "vm a { interface switch late }\nvm b { interface switch off }\nvm c { interface switch no }\n"
        "switch late { interface br0 }\nswitch off { interface br1\n disable\n}\n"
    )

    assert conf.warnings == [
        f'{conf.path}:2: vm "b": switch "off" is disabled',
        f'{conf.path}:3: vm "c": switch "no" not found',
    ]


def test_switch_of_an_earlier_file(conf: Loader) -> None:
    """Is known to a file that is loaded on top."""
    conf.path.write_text("vm a { interface switch lan }\n")

    load(str(conf.path), explicit=True, warn=conf.warnings.append, known_switches=["lan"])

    assert conf.warnings == []


@pytest.mark.parametrize(
    ("option", "what"), [("tap3", "interface tap3"), ("lladdr fe:e1:ba:0:0:9", "lladdr fe:e1:ba:00:00:09")]
)
def test_what_only_one_interface_can_have(conf: Loader, option: str, what: str) -> None:
    """Within one VM and between two."""
    conf.load(f"vm a {{\n interface {option}\n interface {option}\n}}\nvm b {{ interface {option} }}\n")

    assert conf.warnings == [
        f'{conf.path}:1: vm "a": {what} is used by vm "a" already',
        f'{conf.path}:5: vm "b": {what} is used by vm "a" already',
    ]


def test_interfaces_without_names_do_not_collide(conf: Loader) -> None:
    """The next free one is another each time."""
    config = conf.load("vm a {\n interface tap\n interface tap\n interfaces 4\n}\n")

    assert config.vms[0].nics == (NicConfig(tap="tap"), NicConfig(tap="tap"), NicConfig(), NicConfig())
    assert conf.warnings == []


def test_multicast_address(conf: Loader) -> None:
    """No packet can come from one."""
    conf.load("vm a { interface lladdr 01:00:5e:0:0:1 }\n")

    assert conf.warnings == [f'{conf.path}:1: vm "a": lladdr 01:00:5e:00:00:01 is a multicast address']


@pytest.mark.parametrize(("head", "count"), [("vm a", 1), ("vm p instance a", 0)])
def test_command_line_without_kernel(conf: Loader, head: str, count: int) -> None:
    """Nobody would read it, unless an instance gets a kernel from its parent."""
    conf.load(f"{head} {{ cmdline 'quiet' }}\n")

    assert conf.warnings == [f'{conf.path}:1: vm "a": cmdline is of no use without boot'] * count


@pytest.mark.parametrize("name", ["a", "0", "a.b", "a-b_c", "a" * NAME_MAX])
def test_valid_vm_names(name: str) -> None:
    """Letters, digits and a few others."""
    assert valid_vm_name(name)


@pytest.mark.parametrize("name", ["", ".", "..", "-a", "_a", "a/b", "a b", "a\n", "é", "a\0", "a" * (NAME_MAX + 1)])
def test_invalid_vm_names(name: str) -> None:
    """Nothing that leaves a directory or a line."""
    assert not valid_vm_name(name)


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
    """One error, at its place."""
    text, line, what = REFUSED[case]

    (error,) = conf.errors(text)

    assert error.startswith(f"{line}: {what}")


def test_regression_accepted(conf: Loader) -> None:
    """`boot`, and a memory size that is no whole MiB."""
    config = conf.load(f'vm "x" {{\n\tboot "{conf.image}"\n\tmemory 1048577\n}}\n')

    assert (config.vms[0].kernel, config.vms[0].memory_bytes) == (str(conf.image), 1 << 20)
