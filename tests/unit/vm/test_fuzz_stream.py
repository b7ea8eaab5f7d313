"""The seeds of the fuzz target "stream" are accepted streams.  The target corrects digests, so inputs get past them."""

import random

import pytest

from fuzz import targets
from fuzz.seeds import seeds
from tests.support.golden import Parts
from vmd.vm.stream import OLDEST, PREAMBLE, VERSION, StreamError

SEEDS = seeds("stream")
each_seed = pytest.mark.parametrize("seed", SEEDS, ids=lambda seed: f"version {PREAMBLE.unpack_from(seed)[1]}")


def test_there_is_a_seed_of_every_version() -> None:
    """The fuzzer would find an input of another version only by chance."""
    assert [PREAMBLE.unpack_from(seed)[1] for seed in SEEDS] == list(range(OLDEST, VERSION + 1))


@each_seed
def test_seeds_are_accepted(seed: bytes) -> None:
    """A seed is read to its last section, with memory and a machine."""
    machine, memory_bytes = targets.receive(seed)
    assert len(machine.vcpus) == 1
    assert memory_bytes > 0


@each_seed
def test_digests_are_corrected(seed: bytes) -> None:
    """Otherwise every change would be refused at the digest of its section."""
    parts = Parts(seed)
    kind, body = parts.sections[0]
    parts.sections[0] = (kind, body[:-1] + b"x")
    assert targets.mended(seed.replace(body, parts.sections[0][1])) == parts.joined()
    assert targets.mended(seed) == seed


def sentence(data: bytes) -> str:
    """Return why a stream is refused when its digests are correct; "" if it is accepted."""
    try:
        targets.receive(targets.mended(data))
    except (StreamError, ValueError) as error:
        return str(error)
    return ""


@each_seed
def test_changes_get_past_the_digests(seed: bytes) -> None:
    """Some changed streams are accepted, and some have a bad record.  None has a wrong digest."""
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
    """A short input has no digest to correct."""
    raw = SEEDS[-1][:length]
    assert len(targets.mended(raw)) == length
    targets.stream(raw)
