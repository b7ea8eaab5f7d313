"""Every fuzzing target starts from inputs that its parser accepts, so that mutations get past its first checks."""

import random
import re
from pathlib import Path
from typing import NoReturn

import pytest

from fuzz import targets
from fuzz.__main__ import INPUT_MAX
from fuzz.reach import Share, inside_functions, reached
from fuzz.seeds import refused as refused_seeds
from fuzz.seeds import seeds
from fuzz.targets import PARSERS, TARGETS

ROOT = Path(__file__).resolve().parents[2]
SEEDS = [pytest.param(name, seed, id=f"{name}-{at}") for name in TARGETS for at, seed in enumerate(seeds(name))]


def refused(error: Exception) -> NoReturn:
    """Fail, in place of the function that records a refusal."""
    raise AssertionError(f"refused: {error}")


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_has_a_seed(target: str) -> None:
    """Without a seed, mutations would have to find magic numbers and addresses by chance."""
    assert seeds(target)


@pytest.mark.parametrize(("target", "seed"), SEEDS)
def test_seeds_are_accepted(monkeypatch: pytest.MonkeyPatch, target: str, seed: bytes) -> None:
    """A seed that is refused or truncated would leave the code behind that check untested.

    Seeds that are invalid on purpose are tested below.
    """
    monkeypatch.setattr(targets, "said", refused)

    TARGETS[target](seed)

    assert len(seed) <= INPUT_MAX


@pytest.mark.parametrize("target", ["qcow2", "dhcp"])
def test_invalid_seeds_are_refused(monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    """Each of them is refused, and no other target has such seeds."""
    errors: list[Exception] = []
    monkeypatch.setattr(targets, "said", errors.append)
    for seed in refused_seeds(target):
        errors.clear()

        TARGETS[target](seed)

        assert errors
    assert [name for name in TARGETS if refused_seeds(name)] == ["qcow2", "dhcp"]


@pytest.mark.parametrize(("target", "changed"), [("dhcp", range(50, 54)), ("solicitation", range(64, 68))])
def test_a_change_gets_past_the_checksums(monkeypatch: pytest.MonkeyPatch, target: str, changed: range) -> None:
    """The changed fields may have any value: the seconds and flags of a DHCP request, and a link-layer address."""
    monkeypatch.setattr(targets, "said", refused)
    generator = random.Random(1)
    for seed in seeds(target)[:1]:
        for at in changed:
            TARGETS[target](seed[:at] + bytes((generator.randrange(256),)) + seed[at + 1 :])


@pytest.mark.parametrize("target", PARSERS)
def test_seeds_reach_the_parsers(target: str) -> None:
    """They reach at least a third of the lines of each.  Code behind a check that no seed passes is not fuzzed."""
    lines = reached(TARGETS[target], seeds(target), 60)

    short = [str(share) for share in (Share(name, lines) for name in PARSERS[target]) if share.lines * 3 < share.all]
    assert short == []


def test_lines_are_those_inside_functions(tmp_path: Path) -> None:
    """Lines of the module and its classes run at import, so they do not count, nor does a function's first line."""
    module = tmp_path / "it.py"
    module.write_text("x = 1\nclass A:\n    y = 2\n    def f(self):\n        return 3\ndef g():\n    return [\n4]\n")

    assert inside_functions(str(module)) == {5, 7, 8}
    assert inside_functions(str(module), ["A"]) == inside_functions(str(module), ["f"]) == {5}
    assert inside_functions(str(module), ["g"]) == {7, 8}
    assert inside_functions(str(module), ["h"]) == set()


def test_the_document_has_every_target() -> None:
    """docs/hostile-input.md says for each target what it reads and who may have written the input."""
    text = (ROOT / "docs" / "hostile-input.md").read_text().partition("## What is fuzzed")[2]

    assert re.findall(r"^\| `([a-z0-9-]+)` \|", text, re.MULTILINE) == list(TARGETS)


def test_every_target_has_an_existing_parser() -> None:
    """Otherwise `make fuzz` would report no lines for it."""
    assert list(PARSERS) == list(TARGETS)
    shares = [Share(name, {}) for names in PARSERS.values() for name in names]
    assert [str(share) for share in shares if not share.all] == []
