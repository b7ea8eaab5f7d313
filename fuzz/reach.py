"""Which lines of the parsers some inputs reach: how far a target comes is seen by that, and by nothing else."""

import sys
import time
from pathlib import Path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import CodeType, FrameType

    Tracer = Callable[[FrameType, str, object], "Tracer | None"]

ROOT = Path(__file__).resolve().parents[1]
PARSERS = str(ROOT / "vmd") + "/"


def reached(target: "Callable[[bytes], None]", inputs: "Iterable[bytes]", limit_s: float) -> dict[str, set[int]]:
    """Return the lines inside functions of vmd that run for these inputs, by path; tried as long as there is time."""
    lines: dict[str, set[int]] = {}

    def on_line(frame: "FrameType", event: str, _argument: object) -> "Tracer":
        if event == "line":
            lines.setdefault(frame.f_code.co_filename, set()).add(frame.f_lineno)
        return on_line

    def on_call(frame: "FrameType", _event: str, _argument: object) -> "Tracer | None":
        return on_line if frame.f_code.co_filename.startswith(PARSERS) else None

    deadline = time.monotonic() + limit_s
    before = sys.gettrace()
    sys.settrace(on_call)
    try:
        for data in inputs:
            if time.monotonic() > deadline:
                break
            target(data)
    finally:
        sys.settrace(before)
    return {str(Path(path).relative_to(ROOT)): found & inside_functions(path) for path, found in lines.items()}


def inside_functions(path: str) -> set[int]:
    """Return the lines with code inside the functions of a module."""
    found: set[int] = set()
    left = [compile(Path(path).read_bytes(), path, "exec")]
    while left:
        code = left.pop()
        left += [constant for constant in code.co_consts if isinstance(constant, type(code))]
        if is_function(code):
            found |= {line for _, _, line in code.co_lines() if line is not None and line > code.co_firstlineno}
    return found


def is_function(code: "CodeType") -> bool:
    """Return whether it is the code of a function, not of a module or a class."""
    return bool(code.co_flags & 2)  # CO_NEWLOCALS


class Share:
    """How many of the lines inside a module's functions were reached."""

    def __init__(self, module: str, lines: dict[str, set[int]]) -> None:
        """`module` is a path below vmd without its suffix; `lines` what `reached` has found."""
        path = f"vmd/{module}.py"
        self.module = module
        self.lines = len(lines.get(path, ()))
        self.all = len(inside_functions(str(ROOT / path)))

    def __str__(self) -> str:
        return f"{self.lines} of {self.all} lines of {self.module}"
