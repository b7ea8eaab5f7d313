"""Reads `equal.toml`: the changes that change no behaviour that matters, each with the reason."""

import tomllib
from pathlib import Path

from mutants.changes import Change, changes_of

FILE = "mutants/equal.toml"
KEYS = ("module", "function", "text", "what")

Name = tuple[str, str, str, str]


def read(top: Path) -> dict[Name, str]:
    """Return the reasons by the names of changes.  Raises ValueError if an entry is incomplete or a duplicate."""
    path = top / FILE
    entries = tomllib.loads(path.read_text()).get("change", []) if path.exists() else []
    reasons: dict[Name, str] = {}
    for entry in entries:
        if set(entry) != {*KEYS, "why"} or not entry["why"].strip():
            raise ValueError(f"{FILE}: an entry has {', '.join((*KEYS, 'why'))}: {entry}")
        module, function, text, what = (entry[key] for key in KEYS)
        name = module, function, text, what
        if name in reasons:
            raise ValueError(f"{FILE}: {describe(name)} is there twice")
        reasons[name] = entry["why"]
    return reasons


def stale(top: Path, reasons: dict[Name, str]) -> list[str]:
    """Describe the entries that no longer match a change of the source."""
    possible: set[Name] = set()
    for module in {name[0] for name in reasons}:
        path = top / module
        if path.exists():
            possible |= {change.name for change in changes_of(module, path.read_bytes())}
    return [describe(name) for name in reasons if name not in possible]


def describe(name: Name) -> str:
    """Return a readable form of a name."""
    module, function, text, what = name
    return f"{module}, {function or 'module'}, {text!r}: {what}"


def entry(change: Change) -> str:
    """Return the entry of a change, without the reason."""
    keys = zip(KEYS, change.name, strict=True)
    return "\n".join(["[[change]]", *(f"{key} = {_quoted(value)}" for key, value in keys)])


def _quoted(text: str) -> str:
    if "'" not in text:
        return f"'{text}'"
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
