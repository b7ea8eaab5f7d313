"""Chips travel: whatever has registers is in the stream of a machine, and can be tried before it is sent."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
MACHINE = ast.parse((ROOT / "vmd/vm/machine.py").read_text())


def table(method: str) -> dict[str, str]:
    """Return the dictionary that a method of Machine returns: name of a chip -> what makes or holds it."""
    (function,) = (node for node in ast.walk(MACHINE) if isinstance(node, ast.FunctionDef) and node.name == method)
    last = function.body[-1]
    assert isinstance(last, ast.Return)
    made = last.value
    assert isinstance(made, ast.Dict)
    return {ast.literal_eval(key): ast.unparse(value) for key, value in zip(made.keys, made.values, strict=True) if key}


def with_registers() -> set[str]:
    """Return the classes of all chips that have a state."""
    found = set()
    for path in sorted(ROOT.glob("vmd/vm/chips/*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                methods = {each.name for each in node.body if isinstance(each, ast.FunctionDef)}
                found |= {node.name} if {"state", "restore"} <= methods else set()
    return found


def test_a_chip_has_a_row_in_each_table() -> None:
    """Under the same name and in the same order: the state of one is tried on the other."""
    assert list(table("chips")) == list(table("spare_chips"))


def test_every_chip_with_registers_travels() -> None:
    """One that does not would be as after power-on where its guest goes on."""
    made = {value.partition("(")[0].rpartition(".")[2] for value in table("spare_chips").values()}

    assert with_registers()
    assert with_registers() - made == set()
