"""Files of public keys for a login."""

import random

import pytest

from tests.support.seeds import public_key, seed_file
from vmd.seed.keys import LINE_MAX, fields_of, keys_of
from vmd.seed.parts import FILE_MAX, SeedError

SECRET = "b3BlbnNzaC1rZXktdjEAAAAA"
PRIVATE = f"-----BEGIN OPENSSH PRIVATE KEY-----\n{SECRET}\n-----END OPENSSH PRIVATE KEY-----\n"


def refusal(text: str | bytes) -> str:
    """Return the message with which a file of keys is refused."""
    with pytest.raises(SeedError) as refused:
        keys_of(seed_file(text, "/k"))
    return str(refused.value)


def test_keys_of_a_file() -> None:
    """As in authorized_keys, it has comments, options and keys of any type."""
    first, second = public_key(), public_key("ssh-rsa", "a \u00e4 b", blob=bytes(400))
    third = 'command="echo \\"ssh-rsa AAAA\\"",no-pty ' + public_key("sk-ssh-ed25519@openssh.com", "")
    text = f"# mine\n\n{first}\r\n  {second} \n{third}"

    assert keys_of(seed_file(text)) == [first, second, third]


def test_longest_line_and_longest_type() -> None:
    """With a character more they are refused."""
    line = public_key(comment="x")
    line += "x" * (LINE_MAX - len(line))
    kind = public_key("t" * 64)

    assert keys_of(seed_file(f"{line}\n{kind}\n")) == [line, kind]
    assert refusal(line + "x") == f"ssh-key /k:1: longer than {LINE_MAX} bytes"
    assert "no public key" in refusal(public_key("t" * 65))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "ssh-key /k: no key in it"),
        ("# nothing\n\n", "ssh-key /k: no key in it"),
        (PRIVATE, "ssh-key /k:1: a private key: name the file with the public one, which ends in .pub"),
        (f"PuTTY-User-Key-File-3: ssh-ed25519\n{SECRET}", "ssh-key /k:1: a private key: "),
        ("---- BEGIN SSH2 PUBLIC KEY ----\n", "ssh-key /k:1: not in the form of OpenSSH"),
        (public_key("ssh-ed25519-cert-v01@openssh.com"), "ssh-key /k:1: a certificate: "),
        (f"{public_key()}\n{SECRET}\n", "ssh-key /k:2: no public key in the form of authorized_keys"),
        (public_key().replace("ssh-ed25519 ", "ssh-rsa "), "ssh-key /k:1: no public key"),
        (public_key()[:20], "ssh-key /k:1: no public key"),
        ("ssh-ed25519 AAAAC3NzaC1lZDI1NTE5", "ssh-key /k:1: no public key"),
        (public_key(comment="a\0b"), "ssh-key /k:1: has characters that cannot be printed"),
        (public_key().encode() + b"\xff", "ssh-key /k:1: not UTF-8"),
        (public_key(comment="x" * 20000), "ssh-key /k:1: longer than 16384 bytes"),
    ],
)
def test_invalid_keys(text: str | bytes, why: str) -> None:
    """The message names file and line, and has nothing of the text."""
    said = refusal(text)

    assert said.startswith(why)
    assert SECRET not in said


def test_prefixes_and_random_bytes_are_refused() -> None:
    """Only complete keys are accepted."""
    whole, chance = public_key().encode(), random.Random(1)
    end = len(public_key(comment=""))
    for size in range(1, end):
        assert "/k:1: no public key" in refusal(whole[:size])
    for _ in range(200):
        assert refusal(chance.randbytes(chance.randrange(1, 100))).startswith("ssh-key /k")
    refusal(b'"' * FILE_MAX)


@pytest.mark.parametrize(
    ("blob", "fields"),
    [
        (b"", []), (b"\0\0\0", []), (b"\0\0\0\0", [b""]), (b"\0\0\0\1", []), (b"\0\0\0\1a", [b"a"]),
        (b"\0\0\0\1ab", []), (b"\0\0\0\1a\0\0\0\2bc", [b"a", b"bc"]), (b"\0\0\0\1a\0\0\0\0", [b"a", b""]),
        (b"\xff\xff\xff\xffa", []),
    ],
)  # fmt: skip
def test_fields_of_a_key(blob: bytes, fields: list[bytes]) -> None:
    """The last one ends with the key, and may be empty."""
    assert fields_of(blob) == fields
