"""Rules for the values of a seed."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.seeds import HASH
from vmd.config.model import SeedConfig
from vmd.seed import rules


@pytest.mark.parametrize(
    "name", ["web", "WEB-2", "a", "1a", "3com.example", "web.example.org", "x" * 63, ".".join(["x" * 61] * 4)]
)
def test_hostname(name: str) -> None:
    """The domain is optional."""
    assert rules.hostname(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "a.",
        ".a",
        "a..b",
        "-a",
        "a-",
        "a_b",
        "a b",
        "a\n",
        "\u00e4",
        "x" * 64,
        ".".join(["x" * 63] * 4),
        ".".join(["x" * 63] * 3 + ["x" * 62]),
        "1",
        "192.0.2.1",
    ],
)
def test_invalid_hostnames(name: str) -> None:
    """A name that looks like an address is refused, too: cloud-init would derive another name from it."""
    with pytest.raises(ValueError, match=r"^hostname "):
        rules.hostname(name)


@pytest.mark.parametrize(
    ("vm", "name"),
    [
        ("web", "web"), ("Web_1", "Web-1"), ("web.example.org", "web.example.org"), ("a.1", "a-1"), ("7", ""),
        ("a__b_", "a--b"), ("a_.b", "a.b"), ("a..b", "a--b"), ("10.0", "10-0"),
    ],
)  # fmt: skip
def test_hostname_of_a_vm(vm: str, name: str) -> None:
    """It is as similar to the VM's name as a valid host name can be."""
    assert rules.hostname_of(vm) == name


@given(st.text("aZ09._-", min_size=1, max_size=63))
def test_hostname_of_any_vm(vm: str) -> None:
    """It is valid or empty."""
    name = rules.hostname_of(vm)

    assert not name or rules.hostname(name) == name


@pytest.mark.parametrize("name", ["alice", "_apt", "a-b.c_d9", "root", "x" * 32])
def test_user(name: str) -> None:
    """Names are those that useradd(8) accepts."""
    assert rules.user(name) == name


@pytest.mark.parametrize("name", ["", "Alice", "-a", "9a", "a b", "a:b", "a\n", "../a", "x" * 33, "\u00e9"])
def test_invalid_users(name: str) -> None:
    """The message names the user."""
    with pytest.raises(ValueError, match=r"^user "):
        rules.user(name)


@pytest.mark.parametrize(
    "text",
    [
        HASH, "$y$j9T$F5Jx5fExrKuPp53xLKQ..1$X3DX6M94c7o.9agCG9G317fhZg9SqC.5i5rd.RhAtQ7", "$5$rounds=5000$a$bcdefgh",
        "$2b$10$abcdefghijklmnopqrstuv", "$1$a$b",
    ],
)  # fmt: skip
def test_password_hash(text: str) -> None:
    """Every method is accepted."""
    assert rules.password_hash(text) == text


@pytest.mark.parametrize(
    "text", ["geheim", "", "$", "$$$", "$6$", "$6$a:b", "$6$a b", "x$6$a$b", "$6$a$b\n", "$6$" + "x" * 600]
)
def test_a_password_is_not_shown(text: str) -> None:
    """A user may give the password itself by mistake, and it must not get into the log."""
    with pytest.raises(ValueError, match=r"^password-hash: ") as refused:
        rules.password_hash(text)

    assert not text.strip("$6\n") or text not in str(refused.value)


def test_instance_id() -> None:
    """It is one word."""
    assert rules.instance_id("i-0.1_a") == "i-0.1_a"
    for text in ("", "a b", "a\n", "x" * 129, '"'):
        with pytest.raises(ValueError, match=r"^instance-id "):
            rules.instance_id(text)


@pytest.mark.parametrize(
    ("rule", "longest"),
    [
        (rules.hostname, ".".join(["x" * 63] * 3 + ["x" * 61])), (rules.user, "x" * 32), (rules.instance_id, "x" * 128),
        (rules.password_hash, "$6$" + "x" * 509),
    ],
)  # fmt: skip
def test_the_longest_values(rule: Callable[[str], str], longest: str) -> None:
    """One character more is refused."""
    assert rule(longest) == longest
    with pytest.raises(ValueError, match=r"hostname|user|instance-id|password-hash"):
        rule(longest + "x")


def test_the_number_of_files_with_keys() -> None:
    """All of them have to be read at a start."""
    assert rules.key_files(64) == 64
    with pytest.raises(ValueError, match="too many ssh-keys: 65"):
        rules.key_files(65)


@pytest.mark.parametrize(
    "seed",
    [
        SeedConfig(),
        SeedConfig(hostname="web", user="me", instance_id="i", password=HASH, ssh_keys=("/k",), user_data="/u"),
        SeedConfig(user="me", password="/h", vendor_data="/v", network_config="/n"),
    ],
)
def test_a_seed_that_follows_all_rules(seed: SeedConfig) -> None:
    """All of its fields are optional."""
    rules.check(seed)


LONG = "/" + "x" * 5000  # no path of Linux


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"hostname": "a b"}, "hostname a b"),
        ({"user": "A"}, "user A"),
        ({"instance_id": "a b"}, "instance-id a b"),
        ({"password": "$6"}, "password-hash: not as crypt"),
        ({"password": LONG}, "path of a file of the seed"),
        ({"password": HASH, "user": ""}, "password-hash: whose it is has to be said with user"),
        ({"password": "/h", "user": ""}, "password-hash: whose it is has to be said with user"),
        ({"ssh_keys": ("/k",) * 65}, "too many ssh-keys: 65"),
        ({"ssh_keys": ("/k", LONG)}, "path of a file of the seed"),
        ({"user_data": LONG}, "path of a file of the seed"),
        ({"vendor_data": LONG}, "path of a file of the seed"),
        ({"network_config": LONG}, "path of a file of the seed"),
    ],
)
def test_each_rule_is_applied_to_a_seed(changes: dict[str, object], why: str) -> None:
    """A client may send any."""
    with pytest.raises(ValueError, match=why):
        rules.check(SeedConfig(user="me").replace(**changes))
