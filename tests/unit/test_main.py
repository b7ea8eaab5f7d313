"""The first code of every process: which process runs, and what its arguments mean."""

import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest

from tests.support.daemon import ROOT
from vmd import __main__ as first
from vmd.errors import HostError


class Started:
    """What was started in place of real processes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[object] = []
        self.collector: list[str] = []  # calls of the garbage collector, and of `stdio.fill`
        self.fails = False
        for name in (*first.PROCESSES, "parent"):
            module = ModuleType(name)
            path = {"log": "vmd.logger.main", "parent": "vmd.parent.startup"}.get(name, f"vmd.{name}.main")
            module.__dict__.update(main=lambda name=name: self.run(name), run=lambda words: self.run(words))
            monkeypatch.setitem(sys.modules, path, module)
        log = SimpleNamespace(setup=lambda *given: self.calls.append(given), crit=self.calls.append)
        monkeypatch.setattr(first, "log", log)
        calls = {name: lambda name=name: self.collector.append(name) for name in ("disable", "enable", "freeze")}
        monkeypatch.setattr(first, "stdio", SimpleNamespace(fill=lambda: self.collector.append("fill")))
        monkeypatch.setattr(first, "gc", SimpleNamespace(**calls))

    def run(self, what: object) -> int:
        """Note a start."""
        self.calls.append(what)
        if self.fails:
            raise HostError("open", 2)
        return 7


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    """Notes what is started."""
    return Started(monkeypatch)


@pytest.mark.parametrize("name", first.PROCESSES)
def test_each_process(monkeypatch: pytest.MonkeyPatch, started: Started, name: str) -> None:
    """The log is set up first.  A failure at the start is logged there."""
    monkeypatch.setattr(sys, "argv", ["vmd", name, "leaf", "2", "more"])
    assert first.main() == 7
    assert started.calls == [(name, "leaf", 2), name]
    assert started.collector == ["fill", "disable", "freeze", "enable"]
    started.calls.clear()
    started.fails = True
    monkeypatch.setattr(sys, "argv", ["vmd", name, "leaf", "0"])
    assert first.main() == 1
    assert started.calls == [(name, "leaf", 0), name, "open: No such file or directory"]


@pytest.mark.parametrize("words", [[], ["-d"], ["vmm"], ["vmm", "leaf"], ["-f", "vmm", "log"]])
def test_the_daemon(monkeypatch: pytest.MonkeyPatch, started: Started, words: list[str]) -> None:
    """Every other command line is that of vmd(8)."""
    monkeypatch.setattr(sys, "argv", ["vmd", *words])
    assert first.main() == 7
    assert started.calls == [words]
    assert started.collector == ["fill", "freeze", "enable"]


def test_it_is_a_program() -> None:
    """Its exit status says that its command line is wrong."""
    done = subprocess.run(
        [sys.executable, "-m", "vmd", "-?"], cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert "usage" in done.stderr
