"""What the operator can do if another firewall drops packets of guests."""

import pytest

from vmd.priv import drops
from vmd.priv.drops import Loss
from vmd.priv.firewalls import Chain, Guests, advice

V4, V6 = Guests(networks=("100.64.1.2/31",)), Guests(networks=("fd00::/64",))
LAN = Guests(bridge="br0")
OUTSIDE_TAILSCALE = Guests(networks=("10.64.1.2/31",))


def base(
    table: str, hook: str = "forward", *, name: str = "FORWARD", policy: str = "accept", old: bool = False
) -> Chain:
    """Return a base chain."""
    return Chain(table=table, name=name, kind="filter", hook=hook, policy=policy, old=old)


def said(*chains: Chain, guests: Guests = V4, place: str = drops.FROM) -> list[str]:
    """Return the advice for a loss."""
    return advice(Loss(place=place, name="tap0", lost=1, arrived=1, since_s=0), chains, guests)


def beside(chain: Chain, name: str) -> Chain:
    """Return another chain of the same table, which is no base chain."""
    return Chain(table=chain.table, name=name, old=chain.old)


def test_firewalld() -> None:
    """The zone gets the interface."""
    assert said(base("inet firewalld")) == [
        "firewalld lets them through after: firewall-cmd --permanent --zone=trusted --add-interface=tap+; "
        "firewall-cmd --reload"
    ]
    assert "--add-interface=br0" in said(base("inet firewalld"), guests=LAN)[0]


def test_docker() -> None:
    """It has a chain for rules of others, which only sees packets that are passed on."""
    chain = base("ip filter", policy="drop")
    chains = chain, beside(chain, "DOCKER-USER")

    assert said(*chains) == [
        "Docker lets them through after: iptables -I DOCKER-USER -i tap+ -j ACCEPT; "
        "iptables -I DOCKER-USER -o tap+ -j ACCEPT"
    ]
    assert said(*chains, guests=LAN) == [
        "Docker lets them through after: iptables -I DOCKER-USER -i br0 -o br0 -j ACCEPT"
    ]
    incoming = base("ip filter", "input", name="INPUT", policy="drop")
    assert "Docker" not in said(incoming, beside(incoming, "DOCKER-USER"), place=drops.HOST)[0]


@pytest.mark.parametrize("name", ["ufw-before-forward", "ufw6-before-forward"])
def test_ufw(name: str) -> None:
    """Packets to the host have another command."""
    chain = base("ip filter")
    incoming = base("ip filter", "input", name="INPUT")

    assert said(chain, beside(chain, name)) == [
        "ufw lets them through after: ufw route allow in on tap+; ufw route allow out on tap+"
    ]
    assert said(chain, beside(chain, name), guests=LAN) == [
        "ufw lets them through after: ufw route allow in on br0 out on br0"
    ]
    assert said(incoming, beside(incoming, name), place=drops.HOST) == [
        "ufw lets them through after: ufw allow in on tap+"
    ]


def test_tailscale() -> None:
    """Only guests with addresses that it claims."""
    chain = base("ip filter")
    chains = chain, beside(chain, "ts-forward")
    assert said(*chains)[0].startswith("Tailscale claims all of 100.64.0.0/10")
    assert "Tailscale" not in said(*chains, guests=OUTSIDE_TAILSCALE)[0]
    assert "Tailscale" not in said(chain, beside(chain, "ts-input"))[0]
    chain6 = base("ip6 filter")
    assert "Tailscale" not in said(chain6, beside(chain6, "ts-forward"), guests=V6)[0]


def test_an_unknown_firewall_that_drops_by_default() -> None:
    """The commands insert rules at the beginning of its chain."""
    assert said(base("inet mine", name="fwd", policy="drop")) == [
        "nftables chain inet mine fwd can let them through: nft insert rule inet mine fwd iifname 'tap*' accept; "
        "nft insert rule inet mine fwd oifname 'tap*' accept"
    ]
    assert said(base("ip filter", policy="drop", old=True)) == [
        "chain FORWARD of the old iptables can let them through: iptables -I FORWARD -i tap+ -j ACCEPT; "
        "iptables -I FORWARD -o tap+ -j ACCEPT"
    ]
    assert said(base("ip6 filter", policy="drop", old=True), guests=V6)[0].startswith(
        "chain FORWARD of the old ip6tables can let them through: ip6tables -I FORWARD -i tap+"
    )


def test_packets_to_the_host_only_come_in() -> None:
    """So one command is enough."""
    assert said(base("inet mine", "input", name="in", policy="drop"), place=drops.HOST) == [
        "nftables chain inet mine in can let them through: nft insert rule inet mine in iifname 'tap*' accept"
    ]


def test_an_unknown_firewall_with_another_policy_is_a_guess() -> None:
    """It is named only if there is no better one."""
    guess = base("inet mine", name="fwd")
    assert said(guess)[0].startswith("it may be nftables chain inet mine fwd: nft insert rule")
    assert said(guess, guests=LAN) == [
        "it may be nftables chain inet mine fwd: nft insert rule inet mine fwd iifname 'br0' oifname 'br0' accept"
    ]
    (better,) = said(guess, base("inet strict", policy="drop"))
    assert better.startswith("nftables chain inet strict FORWARD can let them through")


@pytest.mark.parametrize(
    ("chain", "guests", "place", "concerned"),
    [
        (base("ip filter"), V4, drops.FROM, True),
        (base("ip filter"), V6, drops.FROM, False),
        (base("ip6 filter"), V6, drops.TO, True),
        (base("ip6 filter"), V4, drops.TO, False),
        (base("inet filter"), V6, drops.TO, True),
        (base("ip filter"), LAN, drops.SWITCH, True),
        (base("ip6 filter"), LAN, drops.SWITCH, True),
        (base("bridge filter"), LAN, drops.SWITCH, False),
        (base("ip filter", "input"), V4, drops.FROM, False),
        (base("ip filter", "input"), V4, drops.HOST, True),
        (base("ip filter"), V4, drops.HOST, False),
        (Chain(table="ip filter", name="user"), V4, drops.FROM, False),
    ],
)
def test_only_chains_that_the_packets_pass_are_named(chain: Chain, guests: Guests, place: str, concerned: bool) -> None:
    """By family and hook."""
    assert bool(said(chain, guests=guests, place=place)) is concerned


def test_the_same_sentence_is_there_once() -> None:
    """A firewall has chains for both families."""
    assert len(said(base("inet firewalld", name="a"), base("inet firewalld", name="b"))) == 1


def test_the_old_iptables_are_another_firewall() -> None:
    """Their chains have the names of those in nftables."""
    old = base("ip filter", policy="drop", old=True)
    new = base("ip filter", policy="drop")

    found = said(old, new, beside(new, "ufw-before-forward"))

    assert [sentence.split()[0] for sentence in found] == ["ufw", "chain"]
