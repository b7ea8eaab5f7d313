"""All messages between all processes.  Only the parent imports as many."""

import importlib
from pathlib import Path

import vmd.ipc.messages
from vmd.ipc.routes import BY_CODE

for _module in sorted(Path(vmd.ipc.messages.__path__[0]).glob("[!_]*.py")):
    importlib.import_module(f"vmd.ipc.messages.{_module.stem}")

MESSAGES = tuple(BY_CODE.values())
CODES = sorted(BY_CODE)
