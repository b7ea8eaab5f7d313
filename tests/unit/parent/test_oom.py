"""Which process the kernel kills first when memory runs out: never one that all VMs depend on."""

import builtins
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vmd.parent import oom
from vmd.parent.oom import CORE_SCORE, OomScores


@pytest.fixture
def scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int | str], None]:
    """A /proc in which each process has a score.  The parent is 1, vmm 2, a VM 3 with devices 4 and 5."""
    opened = builtins.open

    def open_below(path: str, *words: Any, **more: Any) -> Any:  # noqa: ANN401 - as open
        return opened(f"{tmp_path}{path}", *words, **more)

    monkeypatch.setattr(builtins, "open", open_below)
    monkeypatch.setattr("os.getpid", lambda: 1)
    monkeypatch.setattr(oom, "children", lambda pid: [4, 5] if pid == 3 else [])

    def start(parent: int | str) -> None:
        for pid in range(1, 6):
            (tmp_path / f"proc/{pid}").mkdir(parents=True, exist_ok=True)
            (tmp_path / f"proc/{pid}/{oom.SCORE}").write_text(f"{parent}\n")

    return start


def now(tmp_path: Path) -> list[str]:
    """Return the scores of all processes."""
    return [(tmp_path / f"proc/{pid}/{oom.SCORE}").read_text().strip() for pid in range(1, 6)]


@pytest.mark.parametrize("usual", [0, 200, -499])
def test_the_core_is_less_likely_to_be_killed_than_a_vm(
    tmp_path: Path, scores: Callable[[int | str], None], usual: int
) -> None:
    """A VM and its devices have the score that the daemon was started with; so has the next program."""
    scores(usual)
    room = OomScores()
    assert now(tmp_path) == [str(CORE_SCORE), *[str(usual)] * 4]
    for pid in (2, 3, 4, 5):  # inherited
        (tmp_path / f"proc/{pid}/{oom.SCORE}").write_text(str(CORE_SCORE))
    room.give_usual(0)
    assert now(tmp_path) == [str(CORE_SCORE)] * 5
    room.give_usual(3)
    assert now(tmp_path) == [str(CORE_SCORE)] * 2 + [str(usual)] * 3
    room.give_back()
    assert now(tmp_path)[0] == str(usual)
    room.lower()
    assert now(tmp_path)[0] == str(CORE_SCORE)


@pytest.mark.parametrize("usual", [CORE_SCORE, -1000])
def test_a_score_that_is_low_already_is_kept(
    tmp_path: Path, scores: Callable[[int | str], None], usual: int
) -> None:
    """The operator has set it, for VMs too."""
    scores(usual)
    room = OomScores()
    room.give_usual(3)
    room.give_back()

    assert now(tmp_path) == [str(usual)] * 5


def test_a_process_that_has_just_ended(tmp_path: Path, scores: Callable[[int | str], None]) -> None:
    """The others get their score."""
    scores(0)
    room = OomScores()
    for pid in (3, 4):
        (tmp_path / f"proc/{pid}/{oom.SCORE}").unlink()
        (tmp_path / f"proc/{pid}").rmdir()
    (tmp_path / f"proc/5/{oom.SCORE}").write_text(str(CORE_SCORE))
    room.give_usual(3)

    assert (tmp_path / f"proc/5/{oom.SCORE}").read_text() == "0"


def test_a_host_where_the_score_cannot_be_lowered(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The daemon starts, and its log says the consequence."""

    def refuse(*_words: object, **_more: object) -> io.TextIOBase:
        raise PermissionError(1, "Operation not permitted")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builtins, "open", refuse)
        room = OomScores()
        room.give_usual(3)
        room.give_back()

    assert "Operation not permitted: when memory runs out, the kernel may end all VMs" in capfd.readouterr().err
    assert [*tmp_path.iterdir()] == []
