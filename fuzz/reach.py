"""Finds the lines of the parsers that some inputs reach, which is the measure of a target."""

import sys
import time
from pathlib import Path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable
    from types import CodeType, FrameType

    Tracer = Callable[[FrameType, str, object], "Tracer | None"]

ROOT = Path(__file__).resolve().parents[1]
PARSERS = str(ROOT / "vmd") + "/"


def reached(target: "Callable[[bytes], None]", inputs: "Iterable[bytes]", limit_s: float) -> dict[str, set[int]]:
    """Return the lines of vmd's functions that run for these inputs, by path.  Stop after `limit_s` seconds."""
    lines: dict[str, set[int]] = {}

    def on_line(frame: "FrameType", event: str, _argument: object) -> "Tracer":
        if event == "line":
            lines.setdefault(frame.f_code.co_filename, set()).add(frame.f_lineno)
        return on_line

    def on_call(frame: "FrameType", _event: str, _argument: object) -> "Tracer | None":
        return on_line if frame.f_code.co_filename.startswith(PARSERS) else None

    deadline = time.process_time() + limit_s
    before = sys.gettrace()
    sys.settrace(on_call)
    try:
        for data in inputs:
            if time.process_time() > deadline:
                break
            target(data)
    finally:
        sys.settrace(before)
    return {str(Path(path).relative_to(ROOT)): found for path, found in lines.items()}


def inside_functions(path: str, names: "Collection[str]" = ()) -> set[int]:
    """Return the lines of code inside functions of a module: all, or only those of the functions or classes `names`."""
    found: set[int] = set()
    left = [(compile(Path(path).read_bytes(), path, "exec"), not names)]
    while left:
        code, counts = left.pop()
        counts = counts or code.co_name in names
        left += [(constant, counts) for constant in code.co_consts if isinstance(constant, type(code))]
        if counts and is_function(code):
            found |= {line for _, _, line in code.co_lines() if line is not None and line > code.co_firstlineno}
    return found


def is_function(code: "CodeType") -> bool:
    """Return whether a code object is a function's, not a module's or a class's."""
    return bool(code.co_flags & 2)  # CO_NEWLOCALS


class Share:
    """The share of lines inside a module's functions, or some of them, that was reached."""

    def __init__(self, module: str, lines: dict[str, set[int]]) -> None:
        """`module` is a path below vmd without its suffix.  Names of functions or classes may follow after a colon.

        `lines` is the result of `reached`.
        """
        self.module, _, names = module.partition(":")
        path = f"vmd/{self.module}.py"
        there = inside_functions(str(ROOT / path), names.split())
        self.lines = len(lines.get(path, set()) & there)
        self.all = len(there)

    def __str__(self) -> str:
        return f"{self.lines} of {self.all} lines in {self.module}.py"
