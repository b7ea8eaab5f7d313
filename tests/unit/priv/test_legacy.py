"""The kernel's tables of the old iptables, byte for byte, and invalid ones."""

import errno
import os
import random
import socket
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest

from vmd.priv import legacy
from vmd.priv.firewalls import Chain
from vmd.priv.legacy import (
    CHAIN_NAME,
    DROP,
    ENTRIES,
    FAMILIES,
    INFO,
    OFFSETS,
    SO_GET_ENTRIES,
    SO_GET_INFO,
    TARGET,
    VERDICT,
    Family,
    Loaded,
    chains,
    names,
    policy,
)
from vmd.privsep import linux

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
    assert policy(complete[:-4], 0, family.offsets_at) == DROP
    assert policy(b"x" + complete, 1, family.offsets_at) == DROP
    chain = chain_entry(family, b"name")
    assert list(names(chain[: -CHAIN_NAME.size - 2], family.offsets_at)) == [""]
    assert list(names(chain[: -CHAIN_NAME.size - 3], family.offsets_at)) == []
    endless = chain.replace(OFFSETS.pack(112, len(chain)), OFFSETS.pack(112, 91))
    assert endless != chain
    assert list(names(endless, family.offsets_at)) == ["name"]
    source = random.Random(4711)
    for _ in range(2000):
        policy(source.randbytes(source.randrange(300)), source.randrange(400), family.offsets_at)
        list(names(source.randbytes(source.randrange(300)), family.offsets_at))


# --- what is asked of the kernel -----------------------------------------------------------------------------


class Kernel:
    """A kernel with the table `filter` of the old iptables."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, entries: bytes, hooks: int, underflow: tuple[int, ...]) -> None:
        self.entries, self.hooks, self.underflow = entries, hooks, underflow
        self.opened: list[tuple[int, ...]] = []
        self.fails: dict[int, int] = {}
        monkeypatch.setattr(linux, "getsockopt", self.getsockopt)
        monkeypatch.setattr(socket, "socket", self.open)

    def open(self, *given: int) -> "Kernel":
        """Open a socket."""
        self.opened.append(given)
        return self

    def __enter__(self) -> "Kernel":
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""

    def fileno(self) -> int:
        """Return its descriptor."""
        return 77

    def getsockopt(self, fd: int, level: int, option: int, request: bytes) -> bytes:
        """Answer."""
        assert (fd, level) == (77, 0 if self.opened[-1][0] == socket.AF_INET else 41)
        if option in self.fails:
            raise OSError(self.fails[option], "no")
        if option == SO_GET_INFO:
            assert request == b"filter".ljust(INFO.size, b"\0")
            return INFO.pack(b"filter", self.hooks, 9, 9, 9, 9, 9, *self.underflow, 4, len(self.entries))
        assert option == SO_GET_ENTRIES
        assert request == ENTRIES.pack(b"filter", len(self.entries)) + bytes(len(self.entries))
        return ENTRIES.pack(b"filter", len(self.entries)) + self.entries


def loaded(tmp_path: Path, family: Family, text: str) -> Loaded:
    """Return the loaded tables of a family."""
    path = tmp_path / "names"
    path.write_text(text)
    found = Loaded()
    found.take(family, os.open(path, os.O_RDONLY))
    return found


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.program)
def test_the_chains_of_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: Family) -> None:
    """Those for packets to the host and for passed packets have policies."""
    parts = entry(family, -2), entry(family, DROP), entry(family, -2), chain_entry(family, b"DOCKER-USER")
    size = len(parts[0])
    kernel = Kernel(monkeypatch, b"".join(parts), 0b1110, (7, size, 0, 2 * size, 7))
    table = f"{family.name} filter"
    wanted = [
        Chain(table=table, name="INPUT", hook="input", policy="drop", old=True),
        Chain(table=table, name="FORWARD", hook="forward", policy="accept", old=True),
        Chain(table=table, name="DOCKER-USER", old=True),
    ]
    assert chains(family, loaded(tmp_path, family, "nat\nfilter\n")) == wanted
    assert kernel.opened == [(family.family, socket.SOCK_RAW, socket.IPPROTO_RAW)]
    for hooks, left in ((0b0100, wanted[1:]), (0b0010, [wanted[0], wanted[2]]), (0, wanted[2:])):
        kernel.hooks = hooks
        assert chains(family, loaded(tmp_path, family, "filter")) == left


def test_a_table_that_is_not_loaded_is_not_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel would load it, and guests would be slower."""
    family, other = FAMILIES
    kernel = Kernel(monkeypatch, b"", 0, (0,) * 5)
    assert chains(family, Loaded()) == []
    assert chains(family, loaded(tmp_path, family, "nat\nfilters\n")) == []
    assert chains(other, loaded(tmp_path, family, "filter\n")) == []
    assert kernel.opened == []
    assert chains(family, loaded(tmp_path, family, "filter\n")) == []
    for option in (SO_GET_INFO, SO_GET_ENTRIES):
        kernel.fails = {option: errno.EAGAIN}
        assert chains(family, loaded(tmp_path, family, "filter\n")) == []


def test_files_that_list_tables_replace_each_other(tmp_path: Path) -> None:
    """The parent sends one with each question."""
    family, other = FAMILIES
    found = loaded(tmp_path, family, "filter")
    old = found.fds[family.name]
    found.take(other, None)
    new = os.dup(old)
    found.take(family, new)
    assert found.fds == {family.name: new}
    assert found.tables(family) == [b"filter"]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(old)
    found.take(family, None)
    assert found.tables(family) == []
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(new)


def test_layouts_are_the_kernels() -> None:
    """A compiler compares them."""
    numbers = {
        "IPT_SO_GET_INFO": SO_GET_INFO, "IPT_SO_GET_ENTRIES": SO_GET_ENTRIES, "IP6T_SO_GET_INFO": SO_GET_INFO,
        "IP6T_SO_GET_ENTRIES": SO_GET_ENTRIES, "sizeof(struct ipt_getinfo)": INFO.size,
        "sizeof(struct ip6t_getinfo)": INFO.size, "offsetof(struct ipt_get_entries, entrytable)": ENTRIES.size,
        "offsetof(struct ipt_entry, target_offset)": FAMILIES[0].offsets_at,
        "offsetof(struct ip6t_entry, target_offset)": FAMILIES[1].offsets_at,
        "sizeof(struct xt_entry_target)": TARGET.size, "XT_FUNCTION_MAXNAMELEN": CHAIN_NAME.size,
        "-NF_DROP - 1": DROP, "NF_INET_LOCAL_IN": 1, "NF_INET_FORWARD": 2,
    }  # fmt: skip
    heads = ("stddef.h", "linux/netfilter_ipv4/ip_tables.h", "linux/netfilter_ipv6/ip6_tables.h")
    lines = [f"#include <{head}>" for head in heads]
    lines += [f'_Static_assert(({name}) == {value}, "{name}");' for name, value in numbers.items()]
    assert legacy.HOOKS == {1: "INPUT", 2: "FORWARD"}

    subprocess.run(["gcc", "-fsyntax-only", "-x", "c", "-"], input="\n".join(lines) + "\n", text=True, check=True)
