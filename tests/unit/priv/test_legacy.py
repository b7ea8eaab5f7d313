"""The kernel's tables of the old iptables, byte for byte, and invalid ones."""

import random
from itertools import pairwise

import pytest

from vmd.priv.legacy import CHAIN_NAME, DROP, FAMILIES, OFFSETS, TARGET, VERDICT, Family, names, policy

HEADER = 24  # after OFFSETS: comefrom, and two counters of 64 bits


def entry(family: Family, verdict: int, target: bytes = b"") -> bytes:
    """Return an entry whose target is a verdict or has a name."""
    offset = family.offsets_at + OFFSETS.size + HEADER - 4
    body = TARGET.pack(TARGET.size + 8, target, 0) + VERDICT.pack(verdict) + bytes(4)
    return bytes(family.offsets_at) + OFFSETS.pack(offset, offset + len(body)) + bytes(HEADER - 4) + body


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.program)
def test_the_policy_is_the_verdict_of_a_chains_last_entry(family: Family) -> None:
    """The third chain drops.  An entry with another target has no verdict."""
    entries = [entry(family, -2), entry(family, -2), entry(family, DROP), entry(family, 0, b"ERROR")]
    starts = [sum(map(len, entries[:index])) for index in range(len(entries))]

    found = [policy(b"".join(entries), start, family.offsets_at) for start in starts]

    assert found == [-2, -2, DROP, None]
    assert {after - before for before, after in pairwise(starts)} == {len(entries[0])}


def chain_entry(family: Family, name: bytes) -> bytes:
    """Return the entry that begins a chain of a user."""
    offset = family.offsets_at + OFFSETS.size + HEADER - 4
    body = TARGET.pack(TARGET.size + CHAIN_NAME.size, b"ERROR", 0) + CHAIN_NAME.pack(name) + bytes(2)
    return bytes(family.offsets_at) + OFFSETS.pack(offset, offset + len(body)) + bytes(HEADER - 4) + body


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.program)
def test_the_names_of_chains(family: Family) -> None:
    """They identify other programs.  The end of a table looks like a chain, but is none."""
    chains = (b"DOCKER-USER", b"ts-input", b"ERROR")
    entries = entry(family, -2) + b"".join(chain_entry(family, name) for name in chains)

    assert list(names(entries, family.offsets_at)) == ["DOCKER-USER", "ts-input"]
    for length in range(len(entries)):
        assert set(names(entries[:length], family.offsets_at)) <= {"DOCKER-USER", "ts-input"} | {
            name[:end] for name in ("DOCKER-USER", "ts-input", "ERROR") for end in range(len(name))
        }


def test_truncated_and_random_tables() -> None:
    """A table that is too short has no policy."""
    family = FAMILIES[0]
    complete = entry(family, DROP)
    for length in range(len(complete) - 4):
        assert policy(complete[:length], 0, family.offsets_at) is None
    source = random.Random(4711)
    for _ in range(2000):
        policy(source.randbytes(source.randrange(300)), source.randrange(400), family.offsets_at)
        list(names(source.randbytes(source.randrange(300)), family.offsets_at))
