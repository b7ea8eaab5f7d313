"""The option `seed` of a vm block, which is ours."""

import pytest

from tests.support.seeds import HASH
from tests.unit.config.conftest import Loader
from vmd.config.model import AllowInstance, Owner, SeedConfig, VmConfig, VmFlag, without_secrets

FORM = "labels of letters, digits and hyphens, with dots between them"


@pytest.mark.parametrize(
    "text",
    [
        'seed { hostname web.example user alice ssh-key a.pub ssh-key "/b c.pub" user-data u network-config no }',
        'seed {\nhostname "web.example"\n\nuser alice, ssh-key a.pub\nssh-key "/b c.pub",\n'
        "user-data u\nnetwork-config no\n}",
        'seed { network-config no user-data u ssh-key a.pub ssh-key "/b c.pub" user alice\nhostname web.example }',
    ],
)
def test_a_seed(conf: Loader, text: str) -> None:
    """Options have any order, on one line or several, with or without commas.

    File names start at the directory of vm.conf.
    """
    vm = conf.vm(text)

    assert vm.seed == SeedConfig(
        hostname="web.example",
        user="alice",
        ssh_keys=(f"{conf.directory}/a.pub", "/b c.pub"),
        user_data=f"{conf.directory}/u",
        network=False,
    )
    assert vm.given & VmFlag.SEED


def test_all_options_of_a_seed(conf: Loader) -> None:
    """The hash of a password begins with a dollar sign.  A word that names an option may be the value of another."""
    assert conf.vm("seed").seed == SeedConfig()
    assert conf.vm("disable").seed is None
    rest = 'vendor-data seed network-config "./no" instance-id user user hostname'
    vm = conf.vm(f'seed {{ password-hash "{HASH}" {rest} }}')
    assert vm.seed == SeedConfig(
        user="hostname",
        password=HASH,
        vendor_data=f"{conf.directory}/seed",
        network_config=f"{conf.directory}/no",
        instance_id="user",
    )
    vm = conf.vm("seed { user a password-hash hash }\nallow instance { seed, owner 0 }")
    assert vm.seed is not None
    assert vm.seed.password == f"{conf.directory}/hash"
    assert vm.allow == AllowInstance(flags=VmFlag.SEED, owner=Owner())


def test_its_words_are_names_elsewhere(conf: Loader) -> None:
    """Upstream's files with these words as names keep their meaning."""
    config = conf.load('user = "x"\nseed = "y"\nswitch seed { interface user }\nvm hostname {\ndisk user\n}\n')
    assert [vm.name for vm in config.vms] == ["hostname"]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ('seed { hostname "-a" }', f"hostname -a: no name of a host, which has {FORM}"),
        ("seed { user Alice }", "user Alice: no name of a user, which has"),
        ('seed { user a password-hash "$x" }', "password-hash: not as crypt(5) has it"),
        (f'seed {{ password-hash "{HASH}" }}', "password-hash: whose it is has to be said with user"),
        ('seed { instance-id "a b" }', "instance-id a b: not 1 to"),
        ("seed { user a user b }", "user of the seed is given twice"),
        ("seed { network-config no network-config x }", "network-config of the seed is given twice"),
        ("seed user a", 'syntax error at "user": the options of a seed need braces, seed { ... }'),
        ("seed\nseed { user a }", "seed specified more than once"),
        ("seed { ssh-keys x }", 'syntax error at "ssh-keys": did you mean "ssh-key"?'),
        ("seed { " + "ssh-key x " * 65 + "}", "too many ssh-keys: 65 (limit is 64)"),
    ],
)  # fmt: skip
def test_mistakes(conf: Loader, text: str, error: str) -> None:
    """Each has its message, and a password is not shown."""
    said = conf.errors(f"vm a {{\n{text}\n}}\n")[0]

    assert said.partition(": ")[2].startswith(error)
    assert "$" not in said.replace("$6$...", "")


def test_secrets_are_removed(conf: Loader) -> None:
    """VM processes and streams do not get them, and repr does not show them."""
    vm = conf.vm(f'seed {{ user a hostname b password-hash "{HASH}" user-data c instance-id d }}')

    assert without_secrets(vm).seed == SeedConfig(user="a", hostname="b")
    assert HASH not in repr(vm)
    assert without_secrets(VmConfig(name="a")) == VmConfig(name="a")


@pytest.mark.parametrize(
    ("mode", "password", "warned"), [(0o644, HASH, True), (0o600, HASH, False), (0o644, "file", False)]
)
def test_a_hash_that_everybody_may_read(conf: Loader, mode: int, password: str, warned: bool) -> None:
    """A warning reports it without the hash."""
    conf.path.touch()
    conf.path.chmod(mode)
    conf.load(f'vm a {{\nseed {{ user a password-hash "{password}" }}\n}}\n')

    what = f"every user may read the password-hash: make {conf.path} readable by root only, or name a file"
    assert conf.warnings == ([f'{conf.path}:1: vm "a": {what}'] if warned else [])
