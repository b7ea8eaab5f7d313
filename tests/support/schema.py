"""Checks output of vmctl --json with `docs/vmctl.schema.json`.  Implements the part of JSON Schema that it uses."""

import json
from typing import Any

from tests.support.daemon import ROOT

SCHEMA: dict[str, Any] = json.loads((ROOT / "docs/vmctl.schema.json").read_text())
TYPES = {
    "string": str, "integer": int, "number": float, "boolean": bool, "object": dict, "array": list, "null": type(None),
}  # fmt: skip
KNOWN = {
    "$ref", "additionalProperties", "anyOf", "const", "description", "enum", "items", "properties", "required", "type",
}  # fmt: skip


def definition(name: str) -> dict[str, Any]:
    """Return the schema of a command's output, or of `error`."""
    found: dict[str, Any] = SCHEMA["$defs"][name]
    return found


def check(text: str, name: str) -> dict[str, Any]:
    """Parse a command's output and return it.  Raises AssertionError if it does not match the schema."""
    document: dict[str, Any] = json.loads(text)
    compare(document, definition(name), name)
    return document


def document(result: tuple[int, str, str], name: str) -> dict[str, Any]:
    """Return the document that vmctl has printed.  `result` is its status, which must be 0, output and errors."""
    status, output, errors = result
    assert status == 0, errors
    return check(output, name)


def compare(value: object, schema: "dict[str, Any]", where: str) -> None:
    """Raise AssertionError if a value does not match a schema, or if the schema has an unsupported keyword."""
    assert set(schema) <= KNOWN, f"{where}: {set(schema) - KNOWN}"
    if "$ref" in schema:
        compare(value, definition(schema["$ref"].removeprefix("#/$defs/")), where)
    if "const" in schema:
        assert value == schema["const"], f"{where}: {value!r}"
    if "enum" in schema:
        assert value in schema["enum"], f"{where}: {value!r}"
    if "anyOf" in schema:
        assert any(holds(value, each, where) for each in schema["anyOf"]), f"{where}: {value!r}"
    if "type" in schema:
        wanted = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        assert type(value) in [TYPES[each] for each in wanted], f"{where}: {value!r} is no {wanted}"
    if isinstance(value, list):
        for number, each in enumerate(value):
            compare(each, schema.get("items", {}), f"{where}[{number}]")
    if isinstance(value, dict):
        compare_object(value, schema, where)


def compare_object(value: "dict[str, Any]", schema: "dict[str, Any]", where: str) -> None:
    """Compare the keys and values of an object with a schema."""
    properties = schema.get("properties", {})
    missing = set(schema.get("required", ())) - set(value)
    assert not missing, f"{where}: no {missing}"
    for key, each in value.items():
        rule = properties.get(key, schema.get("additionalProperties", {}))
        assert rule is not False, f"{where}: nobody describes {key}"
        compare(each, rule, f"{where}.{key}")


def holds(value: object, schema: "dict[str, Any]", where: str) -> bool:
    """Return whether a value matches a schema."""
    try:
        compare(value, schema, where)
    except AssertionError:
        return False
    return True
