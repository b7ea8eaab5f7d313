"""Counts work instead of timing it, because times on a busy host vary."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

CODE = str(Path(__file__).parents[2] / "vmd") + os.sep


def instructions(call: Callable[[], object]) -> int:
    """Return how many bytecode instructions of our code a call executes.  C code, such as sorting, is not counted."""
    count = 0

    def trace(frame: FrameType, event: str, _argument: object) -> Any:  # noqa: ANN401 - a trace function, or None
        nonlocal count
        if event == "call":
            if not frame.f_code.co_filename.startswith(CODE):
                return None
            frame.f_trace_lines, frame.f_trace_opcodes = False, True
        elif event == "opcode":
            count += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count
