"""The fuzz target "stream" starts from streams that are accepted, and gets past their digests."""

import random

import pytest

from fuzz import targets
from fuzz.seeds import seeds
from tests.support.golden import Parts
from vmd.vm.stream import OLDEST, PREAMBLE, VERSION, StreamError

SEEDS = seeds("stream")
each_seed = pytest.mark.parametrize("seed", SEEDS, ids=lambda seed: f"version {PREAMBLE.unpack_from(seed)[1]}")


def test_there_is_a_seed_of_every_version() -> None:
    """An input of a version that no seed has is found by chance only."""
    assert [PREAMBLE.unpack_from(seed)[1] for seed in SEEDS] == list(range(OLDEST, VERSION + 1))


@each_seed
def test_seeds_are_accepted(seed: bytes) -> None:
    """Down to the last section, with memory and a machine."""
    machine, memory_bytes = targets.receive(seed)
    assert len(machine.vcpus) == 1
    assert memory_bytes > 0


@each_seed
def test_digests_are_mended(seed: bytes) -> None:
    """Else no change would get any further than to the digest of its section."""
    parts = Parts(seed)
    kind, body = parts.sections[0]
    parts.sections[0] = (kind, body[:-1] + b"x")
    assert targets.mended(seed.replace(body, parts.sections[0][1])) == parts.joined()
    assert targets.mended(seed) == seed


def sentence(data: bytes) -> str:
    """Return why a stream is refused, its digests being right, or nothing."""
    try:
        targets.receive(targets.mended(data))
    except (StreamError, ValueError) as error:
        return str(error)
    return ""


@each_seed
def test_changes_get_past_the_digests(seed: bytes) -> None:
    """Some are accepted, some break a record, none is damage."""
    generator, sentences = random.Random(2), set()
    state_at = seed.rindex(Parts(seed).sections[-2][1])
    for start in (PREAMBLE.size, state_at):
        for _ in range(200):
            changed = bytearray(seed)
            changed[generator.randrange(start, start + 500)] = generator.randrange(256)
            sentences.add(sentence(bytes(changed)))
    assert "" in sentences
    assert not any("digest" in each for each in sentences)
    assert any("Header" in each for each in sentences)
    assert any("section 1: MachineState" in each for each in sentences)


@pytest.mark.parametrize("length", [0, 1, PREAMBLE.size - 1, PREAMBLE.size, PREAMBLE.size + 40])
def test_short_inputs_are_left_alone(length: int) -> None:
    """There is no digest in them to mend."""
    raw = SEEDS[-1][:length]
    assert len(targets.mended(raw)) == length
    targets.stream(raw)
