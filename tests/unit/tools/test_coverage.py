"""Which statements are counted, in which kinds of processes, and the report."""

import subprocess
import sys
from pathlib import Path

import pytest

from tools import coverage
from tools.coverage import marked_code, prepare, ranges, report
from tools.reached import MAGIC

SOURCE = b'''"""A module."""

TYPE_CHECKING = False
if TYPE_CHECKING:
    import nothing


class C:
    """A class."""

    def f(self, x: int) -> int:
        """Say."""
        try:
            match x:
                case 1:
                    return 1
                case _:
                    raise ValueError
        except ValueError:
            return 2
        finally:
            del x
'''
STATEMENTS = [3, 4, 8, 11, 13, 14, 16, 18, 20, 22]


def test_each_statement_is_counted_once() -> None:
    """Statements for readers and type checkers only are not counted."""
    number: dict[coverage.Place, int] = {}
    marked_code(SOURCE, "vmd/m.py", number)

    assert sorted(number) == [("vmd/m.py", line) for line in STATEMENTS]
    assert sorted(number.values()) == list(range(len(MAGIC), len(MAGIC) + len(STATEMENTS)))


def test_report() -> None:
    """Consecutive lines are one range, also with lines without a statement between them."""
    assert list(ranges([(1, True), (3, False), (5, False), (6, True), (9, False)])) == ["3-5", "9"]
    number = {("vmd/a/m.py", 1): 0, ("vmd/a/m.py", 2): 1, ("vmd/n.py", 7): 2}
    assert [line.split() for line in report(number, b"\1\0\1")] == [
        ["vmd/a/m.py", "50.0", "%:", "2"],
        [],
        ["vmd/a", "1", "of", "2", "statements", "50.0", "%"],
        ["vmd", "1", "of", "1", "statements", "100.0", "%"],
        ["all", "2", "of", "3", "statements", "66.7", "%"],
    ]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout of the code that starts processes, and of one module that is started."""
    root = tmp_path / "checkout"
    for name in ("vmd/__init__.py", "vmctl/__init__.py", "vmd/privsep/__init__.py", ".venv/x", "build/x"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    (root / "vmd/privsep/spawn.py").write_text("import m\n\n\ndef spawn(*, fds=None):\n    return m.start(fds)\n")
    (root / "vmd/m.py").write_text("import os\nos.kill(os.getpid(), 9)\n0 / 1\n")
    (root / "tools").mkdir()
    (root / "tools/reached.py").write_bytes(Path(coverage.ROOT, "tools/reached.py").read_bytes())
    monkeypatch.setattr(coverage, "ROOT", root)
    return root


def test_a_process_that_is_killed_has_left_its_marks(checkout: Path, tmp_path: Path) -> None:
    """The sources of the copy equal those of the checkout, and the checkout is not changed."""
    tree, file, number = prepare(tmp_path)
    subprocess.run([sys.executable, "-c", "import vmd.m"], cwd=tree, check=False)

    marks = file.read_bytes()
    assert [bool(marks[number["vmd/m.py", line]]) for line in (1, 2, 3)] == [True, True, False]
    assert (tree / "vmd/m.py").read_text() == (checkout / "vmd/m.py").read_text()
    assert not (checkout / "vmd/reached.py").exists()
    assert not list(checkout.rglob("__pycache__"))


def test_no_descriptor_with_a_low_number_is_left_open(checkout: Path, tmp_path: Path) -> None:
    """Some processes check for a descriptor with a fixed number, or for none."""
    tree, _file, _number = prepare(tmp_path)
    (tree / "vmd/n.py").write_text("import vmd.reached, os\nprint(sorted(map(int, os.listdir('/proc/self/fd'))))\n")
    listed = subprocess.run([sys.executable, "-c", "import vmd.n"], cwd=tree, stdout=subprocess.PIPE, check=True).stdout

    assert [int(word) for word in listed.strip(b"[]\n").split(b",")][:4] == [0, 1, 2, 3]  # 3 is the folder's
    assert [int(word) for word in listed.strip(b"[]\n").split(b",")][4] > 60


CONFINED = """
import os, sys, types
sys.modules["m"] = started = types.ModuleType("m")
started.start = lambda fds: fds
from vmd.privsep.spawn import spawn
(number, fd), = spawn(fds=None).items()
assert spawn(fds={{5: 6}}) == {{5: 6, number: fd}}
os.dup2(os.dup(fd), number)
os.rename({file!r}, {file!r} + ".hidden")
os.execv(sys.executable, [sys.executable, "-I", "-S", "-c", "import sys; sys.path[:0] = ['.']; import vmd.m"])
"""


def test_a_process_without_files_inherits_the_marks(checkout: Path, tmp_path: Path) -> None:
    """`spawn` passes them on, beside the other descriptors."""
    tree, file, number = prepare(tmp_path)
    subprocess.run([sys.executable, "-c", CONFINED.format(file=str(file))], cwd=tree, check=False)

    marks = Path(f"{file}.hidden").read_bytes()
    assert [bool(marks[number["vmd/m.py", line]]) for line in (1, 2, 3)] == [True, True, False]


def test_without_the_file_programs_run_all_the_same(checkout: Path, tmp_path: Path) -> None:
    """Examples are a program that the tests have installed, and a program of a user who cannot open the file."""
    tree, file, _number = prepare(tmp_path)
    file.unlink()
    (tree / "vmd/n.py").write_text("from vmd.reached import marks\nmarks[3] = 1\n")

    assert subprocess.run([sys.executable, "-c", "import vmd.n"], cwd=tree, check=False).returncode == 0
