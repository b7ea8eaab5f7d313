"""Changed copies of vmd and vmctl: with bugs, or with the code of an attacker."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from tests.support.daemon import ROOT


def changed_program(code: Path, more: Mapping[str, str]) -> Path:
    """Copy vmd and vmctl to `code`.  `more` maps files to text, which is appended or becomes a new file."""
    for package in ("vmd", "vmctl"):
        # Including compiled files: the processes cannot store them, so each process would compile everything.
        shutil.copytree(ROOT / package, code / package)
    for name, text in more.items():
        with (code / name).open("a") as file:
            file.write(text)
    return code
