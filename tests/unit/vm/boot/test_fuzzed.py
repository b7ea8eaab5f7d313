"""Fuzzing of boot images starts from accepted images, so that changed ones get past the first checks."""

import pytest

from fuzz.__main__ import INPUT_MAX
from fuzz.seeds import seeds
from fuzz.targets import load_boot_image

SEEDS = seeds("boot-image")


@pytest.mark.parametrize("number", range(len(SEEDS)))
def test_seed_is_loaded(number: int) -> None:
    """After a seed that is refused at once, fuzzing would not reach the code after that check."""
    load_boot_image(SEEDS[number])

    assert len(SEEDS[number]) <= INPUT_MAX


def test_seeds_are_of_every_kind() -> None:
    """There is a seed for each loader, for both classes of ELF, and for compressed images."""
    starts = {seed[:5] for seed in SEEDS if seed[:4] == b"\x7fELF"}

    assert starts == {b"\x7fELF\1", b"\x7fELF\2"}
    assert any(seed[0x202:0x206] == b"HdrS" for seed in SEEDS)
    assert any(seed.startswith(b"\x1f\x8b") for seed in SEEDS)
    assert any(len(seed) == 1 << 16 for seed in SEEDS)
