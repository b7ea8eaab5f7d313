"""`make coverage`: reports the statements of vmd and vmctl that the tests run, also in confined and killed processes.

    python -m tools.coverage [--into FOLDER] [ARGUMENT ...]      of pytest, such as tests/unit or --deep

The tests run in a copy of the checkout.  Its sources are the same, but in its byte code each statement first stores a
mark (tools/reached.py).  So the programs that users run are not affected.  There is no tracer, which a confined process
could not load, and whose results a killed process would lose.
"""

import argparse
import ast
import importlib.util
import marshal
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from tools.reached import MAGIC

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ("vmd", "vmctl")
NOT_COPIED = (".git", ".venv", "build", "__pycache__", ".*_cache", ".hypothesis")
MARKS = "vmd/reached.py"  # path in the copy
SPAWN = "vmd/privsep/spawn.py"  # starts all processes
# These tests check sources and imports, and run no counted statements.
LEFT_OUT = (
    "--ignore=tests/test_style.py", "--ignore=tests/test_layering.py", "--ignore=tests/test_citations.py",
    "--ignore=tests/test_security.py", "--ignore=tests/unit/test_one_truth.py",
    "--deselect=tests/unit/vmctl/test_main.py::test_status_loads_nothing_heavy",
)  # fmt: skip
Place = tuple[str, int]  # path below the checkout, line


class Marker(ast.NodeTransformer):
    """Puts a mark before each statement of a module."""

    def __init__(self, path: str, number: dict[Place, int]) -> None:
        """`number` is the index of each place in the file of marks.  New places are added to it."""
        self.path = path
        self.number = number

    def statements(self, body: list[ast.stmt]) -> list[ast.stmt]:
        """Return the statements of a block, with marks before them."""
        marked: list[ast.stmt] = []
        for statement in body:
            if not is_text(statement):
                number = self.number.setdefault((self.path, statement.lineno), len(MAGIC) + len(self.number))
                mark = ast.parse(f"_marks[{number}] = 1").body[0]
                for node in ast.walk(mark):
                    ast.copy_location(node, statement)
                marked.append(mark)
            marked.append(statement if is_for_types(statement) else self.visit(statement))
        return marked

    def generic_visit(self, node: ast.AST) -> ast.AST:
        """Mark the blocks of a statement."""
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.stmt | ast.expr):  # an `except` or `case` clause
                self.generic_visit(child)
        for block in ("body", "orelse", "finalbody"):
            body = getattr(node, block, None)
            if isinstance(body, list):
                setattr(node, block, self.statements(body))
        return node


def is_text(statement: ast.stmt) -> bool:
    """Return whether a statement is a docstring or an ellipsis, which have no code."""
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def is_for_types(statement: ast.stmt) -> bool:
    """Return whether the body of a statement is only for type checkers."""
    return isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING"


def marked_code(source: bytes, path: str, number: dict[Place, int]) -> bytes:
    """Return the marshalled byte code of a module, with marks."""
    tree = ast.parse(source)
    first = 1 if ast.get_docstring(tree) is not None else 0
    Marker(path, number).generic_visit(tree)
    tree.body.insert(first, ast.parse("from vmd.reached import marks as _marks").body[0])
    if path == SPAWN:
        tree.body += ast.parse("from vmd.reached import hand_on as _hand_on\nspawn = _hand_on(spawn)").body
    return marshal.dumps(compile(tree, path, "exec", dont_inherit=True))


def write_byte_code(path: Path, code: bytes) -> None:
    """Write code as the .pyc file that the interpreter uses for a source file (PEP 552)."""
    status = path.stat()
    header = importlib.util.MAGIC_NUMBER + struct.pack("<III", 0, int(status.st_mtime), status.st_size)
    cached = Path(importlib.util.cache_from_source(str(path)))
    cached.parent.mkdir(exist_ok=True)
    cached.write_bytes(header + code)


def prepare(into: Path) -> tuple[Path, Path, dict[Place, int]]:
    """Make the copy and the file of marks.  Return both, and the index of each place in the file."""
    tree, file = into / "tree", into / "marks"
    shutil.rmtree(tree, ignore_errors=True)
    shutil.copytree(ROOT, tree, symlinks=True, ignore=shutil.ignore_patterns(*NOT_COPIED))
    (tree / ".venv").symlink_to(ROOT / ".venv")
    for cache in (ROOT / "build").glob("*-cache"):  # guests that the tests have built
        shutil.copytree(cache, tree / "build" / cache.name, symlinks=True)
    number: dict[Place, int] = {}
    for source in (source for program in PROGRAMS for source in sorted((tree / program).rglob("*.py"))):
        write_byte_code(source, marked_code(source.read_bytes(), str(source.relative_to(tree)), number))
    size = len(MAGIC) + len(number)
    file.write_bytes(MAGIC.ljust(size, b"\0"))
    file.chmod(0o666)  # any user may run vmctl
    text = (ROOT / "tools/reached.py").read_text()
    text = text.replace('FILE = ""', f"FILE = {str(file)!r}").replace("SIZE = 0", f"SIZE = {size}")
    (tree / MARKS).write_text(text)
    return tree, file, number


def ranges(lines: "Iterable[tuple[int, bool]]") -> Iterator[str]:
    """Yield the lines not reached, as `12` or `14-19`.  The input is (line, whether it was reached), in order."""
    first = last = 0
    for line, reached in (*sorted(lines), (0, True)):
        if not reached:
            first, last = first or line, line
        elif first:
            yield str(first) if first == last else f"{first}-{last}"
            first = 0


def report(number: dict[Place, int], marks: bytes) -> Iterator[str]:
    """Yield the lines of the report: the lines not reached in each file, and a table of the packages."""
    files: dict[str, list[tuple[int, bool]]] = {}
    for (path, line), mark in number.items():
        files.setdefault(path, []).append((line, bool(marks[mark])))
    packages: dict[str, list[bool]] = {}
    for path, lines in sorted(files.items()):
        missing = ", ".join(ranges(lines))
        if missing:
            yield f"{path}  {share([reached for _, reached in lines])}: {missing}"
        packages.setdefault(os.path.dirname(path), []).extend(reached for _, reached in lines)
    yield ""
    packages["all"] = [bool(marks[mark]) for mark in number.values()]
    for package, reached in packages.items():
        yield f"{package:24}{sum(reached):7} of {len(reached):6} statements {share(reached):>7}"


def share(reached: list[bool]) -> str:
    """Return the reached share, in percent."""
    return f"{100 * sum(reached) / len(reached):.1f} %"


def main(arguments: list[str]) -> int:
    """Run the tests in the copy.  Print and save the report.  Return pytest's exit status."""
    parser = argparse.ArgumentParser(prog="coverage")
    parser.add_argument("--into", type=Path, default=ROOT / "build/coverage")
    given, tests = parser.parse_known_args(arguments)
    into = given.into.resolve()
    into.mkdir(parents=True, exist_ok=True)
    tree, file, number = prepare(into)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *LEFT_OUT]
    done = subprocess.run([*command, *tests], cwd=tree, check=False)
    text = "\n".join(report(number, file.read_bytes()))
    (into / "report").write_text(text + "\n")
    print(text)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
