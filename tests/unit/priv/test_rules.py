"""The nftables rules, and which interfaces of the host were made by vmd, without a real host."""

import json
import subprocess

import pytest

from vmd.config.model import Forward, Prefix
from vmd.config.rules import HOST_TABLES
from vmd.errors import OperatorError
from vmd.priv.firewalls import Chain
from vmd.priv.lists import Link
from vmd.priv.nics import is_bridge, is_tap, is_vrf, link_local
from vmd.priv.requests import inside
from vmd.priv.rules import TRANSLATES, Member, Nft, needed, ruleset, shape

NET4, NET6 = (bytes((100, 64, 3, 4)), 31), (b"\xfd" + bytes(15), 64)


def test_no_table_without_need() -> None:
    """An interface without local networks, groups or switches needs no table."""
    assert not needed([])
    assert not needed([Member(name="tap0")])
    assert needed([Member(name="tap0", groups=("a",))])
    assert needed([Member(name="tap0", networks=(NET4,))])
    assert needed([Member(name="tap0")], ["br0"])


def test_the_shape_of_a_text() -> None:
    """It has the number of rules of each chain and of elements of each set.  Empty ones are included."""
    members = [Member(name=f"tap{number}", groups=("lab",), networks=(NET4, NET6)[:number]) for number in range(3)]

    found = shape(ruleset(members, ["old"], ["br0"]))

    assert found == found | {
        "set vmd_lab": 3, "set vmd_old": 0, "set local": 2, "set nat4": 1, "set nat6": 1, "set source6": 1,
        "set from_first": 2, "set switch_last": 1,
        "chain forward": 5, "chain forwarded": 3, "chain input": 1, "chain received": 1, "chain postrouting": 2,
    }  # fmt: skip
    assert set(shape(ruleset([]))) == set(found) - {"set vmd_lab", "set vmd_old"}


def test_forwards() -> None:
    """Each forward is a rule in a chain for packets to the host itself.  Without forwards there is no jump to it."""
    world = Prefix(address=bytes((192, 0, 2, 0)), length=24)
    forwards = (
        Forward(port=8022, to=22),
        Forward(port=80, to=80, source=world),
        Forward(port=5000, to=5000, count=10, udp=True),
        Forward(port=7000, to=80, count=2),
    )
    web = Member(name="tap0", networks=(NET4,), guest4=bytes((100, 64, 3, 5)), forwards=forwards)
    rules = ruleset([web, Member(name="tap1", networks=(NET4,))]).splitlines()

    assert [rule.removeprefix("add rule inet vmd forwards ") for rule in rules if "forwards tcp" in rule] == [
        "tcp dport 8022 dnat ip to 100.64.3.5:22",
        "tcp dport 7000-7001 dnat ip to 100.64.3.5 : tcp dport map { 7000 : 80, 7001 : 81 }",
    ]
    assert "add rule inet vmd forwards ip saddr 192.0.2.0/24 tcp dport 80 dnat ip to 100.64.3.5" in rules
    assert "add rule inet vmd forwards udp dport 5000-5009 dnat ip to 100.64.3.5" in rules
    for chain in ("prerouting", "output"):
        (rule,) = [rule for rule in rules if rule.startswith(f"add rule inet vmd {chain} ")]
        assert rule.endswith(" ip daddr != 127.0.0.0/8 fib daddr type local jump forwards")
    assert shape("\n".join(rules))["chain forwards"] == len(forwards)
    assert "jump" not in ruleset([web.replace(forwards=())])


def test_the_whole_text() -> None:
    """Sets come first, then chains.  Each is emptied before it is filled."""
    members = [
        Member(name="tap0", groups=("lab", "web")),
        Member(name="tap1", groups=("lab",), networks=(NET4, NET6)),
    ]

    assert ruleset(members, ["old"], ["br0"]) == (
        "add table inet vmd\n"
        "add set inet vmd vmd_lab { type ifname; }\n"
        "flush set inet vmd vmd_lab\n"
        'add element inet vmd vmd_lab { "tap0", "tap1" }\n'
        "add set inet vmd vmd_old { type ifname; }\n"
        "flush set inet vmd vmd_old\n"
        "add set inet vmd vmd_web { type ifname; }\n"
        "flush set inet vmd vmd_web\n"
        'add element inet vmd vmd_web { "tap0" }\n'
        "add set inet vmd local { type ifname; }\n"
        "flush set inet vmd local\n"
        'add element inet vmd local { "tap1" }\n'
        "add set inet vmd nat4 { type ipv4_addr; flags interval; }\n"
        "flush set inet vmd nat4\n"
        "add element inet vmd nat4 { 100.64.3.4/31 }\n"
        "add set inet vmd nat6 { type ipv6_addr; flags interval; }\n"
        "flush set inet vmd nat6\n"
        "add element inet vmd nat6 { fd00::/64 }\n"
        "add set inet vmd source4 { type ifname . ipv4_addr; flags interval; }\n"
        "flush set inet vmd source4\n"
        'add element inet vmd source4 { "tap1" . 100.64.3.4/31 }\n'
        "add set inet vmd source6 { type ifname . ipv6_addr; flags interval; }\n"
        "flush set inet vmd source6\n"
        'add element inet vmd source6 { "tap1" . fd00::/64 }\n'
        "add set inet vmd from_first { type ifname; counter; }\n"
        "flush set inet vmd from_first\n"
        'add element inet vmd from_first { "tap1" }\n'
        "add set inet vmd to_first { type ifname; counter; }\n"
        "flush set inet vmd to_first\n"
        'add element inet vmd to_first { "tap1" }\n'
        "add set inet vmd host_first { type ifname; counter; }\n"
        "flush set inet vmd host_first\n"
        'add element inet vmd host_first { "tap1" }\n'
        "add set inet vmd switch_first { type ifname . ifname; counter; }\n"
        "flush set inet vmd switch_first\n"
        'add element inet vmd switch_first { "br0" . "br0" }\n'
        "add set inet vmd from_last { type ifname; counter; }\n"
        "flush set inet vmd from_last\n"
        'add element inet vmd from_last { "tap1" }\n'
        "add set inet vmd to_last { type ifname; counter; }\n"
        "flush set inet vmd to_last\n"
        'add element inet vmd to_last { "tap1" }\n'
        "add set inet vmd host_last { type ifname; counter; }\n"
        "flush set inet vmd host_last\n"
        'add element inet vmd host_last { "tap1" }\n'
        "add set inet vmd switch_last { type ifname . ifname; counter; }\n"
        "flush set inet vmd switch_last\n"
        'add element inet vmd switch_last { "br0" . "br0" }\n'
        "add chain inet vmd forward { type filter hook forward priority -500; policy accept; }\n"
        "flush chain inet vmd forward\n"
        "add chain inet vmd forwarded { type filter hook forward priority 1000; policy accept; }\n"
        "flush chain inet vmd forwarded\n"
        "add chain inet vmd input { type filter hook input priority -500; policy accept; }\n"
        "flush chain inet vmd input\n"
        "add chain inet vmd received { type filter hook input priority 1000; policy accept; }\n"
        "flush chain inet vmd received\n"
        "add chain inet vmd postrouting { type nat hook postrouting priority srcnat; policy accept; }\n"
        "flush chain inet vmd postrouting\n"
        "add chain inet vmd prerouting { type nat hook prerouting priority dstnat; policy accept; }\n"
        "flush chain inet vmd prerouting\n"
        "add chain inet vmd output { type nat hook output priority -100; policy accept; }\n"
        "flush chain inet vmd output\n"
        "add chain inet vmd forwards\n"
        "flush chain inet vmd forwards\n"
        "add rule inet vmd forward iifname @local meta nfproto ipv4 iifname . ip saddr != @source4 drop\n"
        "add rule inet vmd forward iifname @local meta nfproto ipv6 iifname . ip6 saddr != @source6 drop\n"
        "add rule inet vmd postrouting ip saddr @nat4 oifname != @local masquerade\n"
        "add rule inet vmd postrouting ip6 saddr @nat6 oifname != @local masquerade\n"
        "add rule inet vmd forward iifname @local ct state != invalid iifname @from_first\n"
        "add rule inet vmd forward oifname @local ct state != invalid oifname @to_first\n"
        "add rule inet vmd input iifname @local ct state != invalid meta pkttype host iifname @host_first\n"
        "add rule inet vmd forward iifname . oifname @switch_first\n"
        "add rule inet vmd forwarded iifname @local ct state != invalid iifname @from_last\n"
        "add rule inet vmd forwarded oifname @local ct state != invalid oifname @to_last\n"
        "add rule inet vmd received iifname @local ct state != invalid meta pkttype host iifname @host_last\n"
        "add rule inet vmd forwarded iifname . oifname @switch_last\n"
    )


def test_groups_alone_need_no_rules() -> None:
    """Without NAT the chains are empty."""
    assert "add rule" not in ruleset([Member(name="tap0", groups=("lab",))])


def test_a_host_whose_sets_have_no_counters() -> None:
    """NAT works without them."""
    text = ruleset([Member(name="tap1", networks=(NET4,))], bridges=["br0"], counted=False)

    assert "counter" not in text
    assert "first" not in text
    assert "last" not in text
    assert "masquerade" in text


@pytest.mark.parametrize(
    ("rule", "translates"),
    [
        ("oifname eth0 masquerade", True), ("tcp dport 80 dnat to 10.0.0.2:80", True), ("snat ip to 192.0.2.1", True),
        ("tcp dport 80 redirect to :8080", True), ("counter packets 0 bytes 0 XT target MASQUERADE not found", True),
        ("dnat ip to tcp dport map { 80 : 10.0.0.2 }", True), ("ct status dnat accept", False),
        ("ct status { snat, dnat } accept", False), ("icmpv6 type nd-redirect accept", False),
        ("goto nat_POST_public", False),
    ],
)  # fmt: skip
def test_rules_that_translate(rule: str, translates: bool) -> None:
    """Rules that only match translated packets, or that are about something else, do not translate."""
    assert bool(TRANSLATES.search(f"chain x {{\n\t\t{rule}\n\t}}\n")) is translates


def run_as(monkeypatch: pytest.MonkeyPatch, result: object) -> Nft:
    """Return an nft with this result, which is returned or raised."""

    def run(*_: object, **__: object) -> object:
        if isinstance(result, BaseException):
            raise result
        return result

    monkeypatch.setattr("vmd.priv.rules.subprocess.run", run)
    nft = Nft()
    nft.path = "/usr/sbin/nft"
    return nft


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (subprocess.CompletedProcess([], 1, "", "Error: cache\nmore\n"), "nftables cannot be used: Error: cache"),
        (subprocess.CompletedProcess([], 3, "", ""), "nftables cannot be used: exit status 3"),
        (subprocess.TimeoutExpired([], 10), "nft does not answer for 10 s"),
        (PermissionError(13, "Permission denied"), "nft: Permission denied"),
    ],
    ids=repr,
)
def test_each_failure_of_nft_has_a_message(monkeypatch: pytest.MonkeyPatch, result: object, words: str) -> None:
    """The message has the reason."""
    with pytest.raises(OperatorError, match=words):
        run_as(monkeypatch, result).apply("")


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"nftables": 3}', '{"nftables": [{"chain": {}}]}', '{"nftables": [7]}']
)
def test_invalid_listings_of_nft(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """An nft with another output format causes a warning, and does not prevent the start."""
    nft = run_as(monkeypatch, subprocess.CompletedProcess([], 0, text, ""))

    assert nft.chains() == []
    assert nft.counters() == {}


def asks(monkeypatch: pytest.MonkeyPatch, output: str) -> tuple[Nft, list[tuple[list[str], str]]]:
    """Return an nft with this output, and the arguments and inputs that it gets."""
    calls: list[tuple[list[str], str]] = []

    def run(command: list[str], *, input: str, timeout: float, env: dict[str, str], **_: object) -> object:
        assert (timeout, env["LC_ALL"]) == (10.0, "C")
        calls.append((command[1:], input))
        return subprocess.CompletedProcess(command, 0, output, "a warning\n")

    monkeypatch.setattr("vmd.priv.rules.subprocess.run", run)
    nft = Nft()
    nft.path = "/usr/sbin/nft"
    return nft, calls


def test_what_nft_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that is gone is no obstacle to its deletion."""
    nft, calls = asks(monkeypatch, "table ip nat\ntable inet vmd\n")
    nft.apply("x\n")
    nft.delete_table()
    nft.delete_table("netdev vmd_tap0")
    assert calls == [
        (["-f", "-"], "x\n"),
        (["-f", "-"], "add table inet vmd\ndelete table inet vmd\n"),
        (["-f", "-"], "add table netdev vmd_tap0\ndelete table netdev vmd_tap0\n"),
    ]
    calls.clear()
    assert nft.tables() == ["table ip nat", "table inet vmd"]
    assert nft.has_table()
    assert nft.listing("ruleset", "netdev").startswith("table")
    assert not nft.translates("ip my table")
    assert [arguments for arguments, _ in calls] == [
        ["list", "tables"], ["list", "tables"], ["-j", "list", "ruleset", "netdev"], ["list", "table", "ip", "my table"]
    ]  # fmt: skip
    for output, there in (("table ip nat\n", False), ("table inet vmd_more\n", False), ("", False)):
        assert asks(monkeypatch, output)[0].has_table() is there
    assert asks(monkeypatch, "table ip nat {\n masquerade\n}\n")[0].translates("ip nat")


def test_a_host_without_nft(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no tables."""
    monkeypatch.setattr("vmd.priv.rules.NFT_PATHS", ("/nonexistent/nft",))
    nft = Nft()
    assert (nft.path, nft.tables(), nft.has_table()) == (None, [], False)
    with pytest.raises(OperatorError, match="nft was not found: install nftables") as error:
        nft.apply("")
    assert error.value.number == 2
    monkeypatch.setattr("vmd.priv.rules.NFT_PATHS", ("/nonexistent/nft", "/bin/sh", "/bin/true"))
    assert Nft().path == "/bin/sh"


def test_chains_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours are left out."""
    chain = {"family": "ip", "table": "nat", "name": "POSTROUTING", "handle": 1}
    base = chain | {"type": "nat", "hook": "postrouting", "prio": 100, "policy": "accept"}
    entries = [
        {"metainfo": {}}, {"chain": base}, {"chain": chain | {"name": "mine"}},
        {"chain": chain | {"family": "inet", "table": "vmd"}}, {"chain": chain | {"table": "vmd"}},
    ]  # fmt: skip
    nft, calls = asks(monkeypatch, json.dumps({"nftables": entries}))
    assert nft.chains() == [
        Chain(table="ip nat", name="POSTROUTING", kind="nat", hook="postrouting", policy="accept"),
        Chain(table="ip nat", name="mine"),
        Chain(table="ip vmd", name="POSTROUTING"),
    ]
    assert calls == [(["-j", "list", "chains"], "")]


def test_our_table_as_nft_shows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its shape, and its counters."""

    def counted(value: object, packets: int) -> dict[str, object]:
        return {"elem": {"val": value, "counter": {"packets": packets, "bytes": 9}}}

    pair = {"concat": ["br0", "br0"]}
    entries = [
        {"metainfo": {}}, {"table": {"name": "vmd"}},
        {"set": {"name": "local", "elem": ["tap0", "tap1"]}}, {"set": {"name": "nat4"}},
        {"set": {"name": "from_first", "elem": [counted("tap0", 5), counted("tap1", 6)]}},
        {"set": {"name": "switch_last", "elem": [counted(pair, 7), {"elem": {"val": "tap0"}}]}},
        {"chain": {"name": "forward"}}, {"chain": {"name": "output"}},
        {"rule": {"chain": "forward"}}, {"rule": {"chain": "forward"}}, {"rule": {"chain": "later"}},
    ]  # fmt: skip
    nft, calls = asks(monkeypatch, json.dumps({"nftables": entries}))
    assert nft.shape() == {
        "set local": 2, "set nat4": 0, "set from_first": 2, "set switch_last": 2, "chain forward": 2,
        "chain output": 0, "chain later": 1,
    }  # fmt: skip
    assert nft.counters() == {"from_first": {"tap0": 5, "tap1": 6}, "switch_last": {"br0": 7}}
    assert calls == [(["-j", "list", "table", "inet", "vmd"], "")] * 2
    assert asks(monkeypatch, "{}")[0].shape() == {}


# --- made by vmd ---------------------------------------------------------------------------------------------


def link(name: str, kind: str, alias: str, table: int = 0) -> Link:
    """Return an interface."""
    return Link(index=7, name=name, kind=kind, alias=alias, master=0, mtu=1500, lladdr=b"", up=True, table=table)


@pytest.mark.parametrize(
    ("each", "taps", "bridges", "vrfs"),
    [
        (link("tap0", "tun", "vm1-if0-a"), True, False, False),
        (link("tap0", "tun", ""), False, False, False),
        (link("tap0", "tun", "vm for tests"), False, False, False),
        (link("tap0", "bridge", "vm1-if0-a"), False, False, False),
        (link("vnet0", "tun", "vm1-if0-a"), False, False, False),
        (link("br0", "bridge", "switch1-lan"), False, True, False),
        (link("br0", "bridge", "switch 1"), False, False, False),
        (link("eth0", "", "switch1-lan"), False, False, False),
        (link("vrf3", "vrf", "rdomain3", 3), False, False, True),
        (link("vrf3", "vrf", "", 3), False, False, False),
    ],
    ids=repr,
)
def test_which_interfaces_were_made_by_vmd(each: Link, taps: bool, bridges: bool, vrfs: bool) -> None:
    """Kind and alias decide together.  One of them alone may be a coincidence."""
    assert (is_tap(each), is_bridge(each), is_vrf(each)) == (taps, bridges, vrfs)


def test_the_hosts_tables() -> None:
    """rt_tables(5): default, main, local."""
    assert HOST_TABLES == (253, 254, 255)


def test_link_local_addresses() -> None:
    """The example of RFC 4291, appendix A: the universal bit is inverted."""
    assert link_local(bytes.fromhex("3456789abcde")).hex() == "fe80000000000000365678fffe9abcde"


@pytest.mark.parametrize(
    ("address", "network", "length", "expected"),
    [
        ((100, 64, 3, 5), (100, 64, 3, 4), 31, True),
        ((100, 64, 3, 6), (100, 64, 3, 4), 31, False),
        ((100, 64, 3, 4), (100, 64, 3, 5), 31, True),
        (tuple(16 * [0]), (0, 0, 0, 0), 0, False),
    ],
)
def test_an_address_is_inside_a_network(
    address: tuple[int, ...], network: tuple[int, ...], length: int, expected: bool
) -> None:
    """The prefix decides.  Addresses of different families do not match."""
    assert inside(bytes(address), bytes(network), length) == expected
