"""Packets that are missing at the last hook were dropped, but packets on their way are not missing."""

import pytest

from vmd.priv.drops import LOG_AGAIN_S, Seen, Watch
from vmd.priv.firewalls import Chain, Guests, advice

FORWARD = Chain(table="ip filter", name="FORWARD", hook="forward", kind="filter", policy="drop")


def test_packets_on_their_way_are_not_missing() -> None:
    """The first counter is read first, so the last one may be larger for a moment."""
    seen = Seen()
    for first, last in ((10, 12), (20, 20), (30, 31)):
        seen.take(first, last, 5)
    assert (seen.arrived, seen.lost, seen.now) == (30, 0, False)


def test_lost_packets_and_their_end() -> None:
    """They are counted once.

    A look without traffic changes nothing.  A look with traffic and without loss ends the loss.
    """
    seen = Seen()
    for first, last, now_s, lost, now in (
        (5, 5, 1, 0, False), (9, 6, 2, 3, True), (9, 6, 3, 3, True), (12, 7, 4, 5, True), (13, 8, 5, 5, False),
        (14, 8, 6, 6, True),
    ):  # fmt: skip
        seen.take(first, last, now_s)
        assert (seen.lost, seen.now) == (lost, now), (first, last)
    assert (seen.arrived, seen.since_s) == (14, 6)


def test_counters_that_were_reset() -> None:
    """The reset is announced, or seen because a counter is smaller than before."""
    seen = Seen()
    seen.take(9, 4, 1)
    seen.restart()
    seen.take(10, 8, 2)
    seen.take(3, 2, 3)
    assert (seen.arrived, seen.lost) == (22, 8)


def test_a_loss_is_logged_when_it_begins_and_not_too_often() -> None:
    """Losses of packets for the host itself are not logged."""
    watch = Watch()
    counted = {"from_first": 3, "from_last": 0, "host_first": 1, "host_last": 0}
    watch.take({name: {"tap0": packets} for name, packets in counted.items()}, 1)
    assert [loss.place for loss in watch.losses("tap0")] == ["from", "host"]
    assert [(loss.place, loss.lost, loss.arrived) for loss in watch.to_log(100)] == [("from", 3, 3)]
    assert watch.to_log(100 + LOG_AGAIN_S - 1) == []
    assert len(watch.to_log(100 + LOG_AGAIN_S)) == 1
    watch.restart({"tap1"})
    assert watch.losses("tap0") == []


@pytest.mark.parametrize(
    ("chains", "words"),
    [
        ([], []),
        ([FORWARD.replace(hook="input")], []),
        ([FORWARD.replace(table="ip6 filter")], []),
        ([FORWARD.replace(policy="accept")], ["it may be nftables chain ip filter FORWARD: "]),
        ([FORWARD.replace(policy="accept"), FORWARD.replace(table="inet x")], ["nftables chain inet x FORWARD can"]),
        (
            [FORWARD, Chain(table="ip filter", name="DOCKER-USER"), Chain(table="ip filter", name="ufw-user-input")],
            ["Docker lets", "ufw lets"],
        ),
        ([FORWARD, Chain(table="ip filter", name="DOCKER-USER", old=True)], ["nftables chain ip filter FORWARD can"]),
        ([FORWARD.replace(old=True), Chain(table="ip filter", name="DOCKER-USER", old=True)], ["Docker lets"]),
        ([FORWARD, Chain(table="ip filter", name="ts-forward")], ["nftables chain ip filter FORWARD can"]),
    ],
)
def test_the_programs_that_may_have_dropped_packets(chains: list[Chain], words: list[str]) -> None:
    """Programs that judge such packets are named, Tailscale only for its own range.

    Without a program, chains are named.
    """
    watch = Watch()
    watch.take({"from_first": {"tap0": 3}, "from_last": {"tap0": 0}}, 1)
    (loss,) = watch.losses("tap0")

    sentences = advice(loss, chains, Guests(networks=("10.0.1.2/31",)))

    assert len(sentences) == len(words)
    assert all(sentence.startswith(word) for sentence, word in zip(sentences, words, strict=True))
