"""Single changes of a module's source, each like a small slip of a programmer."""

import ast
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    Function = ast.FunctionDef | ast.AsyncFunctionDef

COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
LEAVES = (ast.Return, ast.Raise, ast.Continue, ast.Break)
QUIET = ("log.debug",)  # only for developers: no test checks debug messages
PLACE = ", place "  # numbers equal changes in one line, from the second one on
SHOWN = 160  # characters shown of a change


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One change.  `function`, `text` and `what` still identify it after lines have moved."""

    module: str  # a path below the top
    function: str  # qualified with its classes; "" outside of functions and classes
    line: int
    lines: tuple[int, int]  # first and last line of its statement.  If it runs, some of them have an event
    at_import: bool  # the changed code runs when the module is imported
    text: str  # of the line, before the change
    what: str
    start: int  # in bytes of the source
    end: int
    new: str

    @property
    def name(self) -> tuple[str, str, str, str]:
        """Return the identity of the change, which stays the same when lines move."""
        return self.module, self.function, self.text, self.what

    def apply(self, source: bytes) -> bytes:
        """Return the module's source with this change.  The number of lines does not change."""
        lost = source[self.start : self.end].count(b"\n")
        return source[: self.start] + self.new.encode() + b"\\\n" * lost + source[self.end :]


def sample(changes: list[Change], count: int, seed: int) -> list[Change]:
    """Return `count` of the changes, in line order.  The rank of a change does not depend on the other changes."""

    def rank(change: Change) -> bytes:
        return hashlib.sha256(f"{seed}:{change.name}:{change.new}".encode()).digest()

    return sorted(sorted(changes, key=rank)[:count], key=lambda change: change.line)


def changes_of(module: str, source: bytes) -> list[Change]:
    """Return all changes of a module."""
    found = _Finder(module, source)
    found.visit(ast.parse(source))
    return found.changes


def _others(node: ast.AST) -> Iterator[ast.expr]:
    """Yield the replacements of an expression."""
    if isinstance(node, ast.Compare):
        for at, operator in enumerate(node.ops):
            for other in COMPARISONS[type(operator)]:
                yield ast.Compare(node.left, [*node.ops[:at], other(), *node.ops[at + 1 :]], node.comparators)
    elif isinstance(node, ast.BoolOp):
        yield ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
    elif isinstance(node, ast.Constant) and type(node.value) is int:
        yield ast.Constant(node.value + 1)
        yield ast.Constant(node.value - 1)


class _Finder(ast.NodeVisitor):
    """Walks a module.  It omits annotations, assertions, and f-strings, whose parts have no source positions."""

    def __init__(self, module: str, source: bytes) -> None:
        self.module = module
        self.lines = source.splitlines(keepends=True)
        self.starts = [0]
        for line in self.lines:
            self.starts.append(self.starts[-1] + len(line))
        self.names: list[str] = []
        self.functions = 0  # nesting depth
        self.statement = (0, 0)  # lines of the current statement
        self.changes: list[Change] = []

    def visit(self, node: ast.AST) -> None:
        """Visit a node.  Note the lines of a statement, without those of statements inside it."""
        if isinstance(node, ast.stmt):
            inside = getattr(node, "body", None)
            last = max(node.lineno, inside[0].lineno - 1) if inside else node.end_lineno or node.lineno
            self.statement = node.lineno, last
        super().visit(node)

    def generic_visit(self, node: ast.AST) -> None:
        """Collect the replacements of the node, then visit its children."""
        if isinstance(node, ast.expr):
            for other in _others(node):
                self._add(node, f"{ast.unparse(node)} -> {ast.unparse(other)}", f"({ast.unparse(other)})")
        super().generic_visit(node)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Omit f-strings."""

    def visit_Assert(self, node: ast.Assert) -> None:
        """Omit assertions, which never check input."""

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        """Omit the annotation."""
        if node.value is not None:
            self.visit(node.value)

    def visit_FunctionDef(self, node: "Function") -> None:
        """Omit the annotations."""
        for default in (*node.decorator_list, *node.args.defaults, *node.args.kw_defaults):
            if default is not None:
                self.visit(default)
        self.functions += 1
        self._inside(node.name, node.body)
        self.functions -= 1

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        """Note the name of the class."""
        for part in (*node.decorator_list, *node.bases, *node.keywords):
            self.visit(part)
        self._inside(node.name, node.body)

    def visit_If(self, node: ast.If) -> None:
        """Negate the condition; drop a guard.  Omit blocks for type checkers."""
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return
        if not node.orelse and isinstance(node.body[-1], LEAVES):
            self._add(node.test, f"{ast.unparse(node.test)} -> False, guard dropped", "False")
        self._negate(node.test)
        self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        """Negate the condition."""
        self._negate(node.test)
        self.generic_visit(node)

    def visit_While(self, node: ast.While) -> None:
        """Negate the condition."""
        self._negate(node.test)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        """Negate the conditions."""
        for test in node.ifs:
            self._negate(test)
        self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> None:
        """Drop a call that is a whole statement."""
        if isinstance(node.value, ast.Call) and ast.unparse(node.value.func) not in QUIET:
            self._add(node, f"{ast.unparse(node)} dropped", "pass")
        self.generic_visit(node)

    def _inside(self, name: str, body: list[ast.stmt]) -> None:
        self.names.append(name)
        for statement in body:
            self.visit(statement)
        self.names.pop()

    def _negate(self, test: ast.expr) -> None:
        if isinstance(test, ast.Compare) and len(test.ops) == 1:
            return  # the operator is changed elsewhere
        if isinstance(test, ast.Constant):
            return
        self._add(test, f"{ast.unparse(test)} -> not", f"(not ({ast.unparse(test)}))")

    def _add(self, node: ast.expr | ast.stmt, what: str, new: str) -> None:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        start = self.starts[node.lineno - 1] + node.col_offset
        what = what if len(what) <= SHOWN else what[:SHOWN] + "..."
        same = sum(each.line == node.lineno and each.what.partition(PLACE)[0] == what for each in self.changes)
        self.changes.append(
            Change(
                module=self.module,
                function=".".join(self.names),
                line=node.lineno,
                lines=(min(self.statement[0], node.lineno), max(self.statement[1], node.end_lineno)),
                at_import=not self.functions,
                text=self.lines[node.lineno - 1].decode().strip(),
                what=f"{what}{PLACE}{same + 1}" if same else what,
                start=start,
                end=self.starts[node.end_lineno - 1] + node.end_col_offset,
                new=new,
            )
        )
