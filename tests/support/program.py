"""Copies of the program that are not quite the program: with bugs, or with code of somebody who has taken it over."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from tests.support.daemon import ROOT


def changed_program(code: Path, more: Mapping[str, str]) -> Path:
    """Copy vmd and vmctl to `code`; `more` is what is added at the end of files there, or is all of a new one."""
    for package in ("vmd", "vmctl"):
        # With what is compiled: the processes cannot keep it, and each would compile everything for itself.
        shutil.copytree(ROOT / package, code / package)
    for name, text in more.items():
        with (code / name).open("a") as file:
            file.write(text)
    return code
