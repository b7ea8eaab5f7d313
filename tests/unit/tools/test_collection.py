"""The Ansible collection agrees with the program."""

import json
import re
from pathlib import Path

import pytest

from tools.install import ROOT, collection
from vmd.version import VERSION

TOP = Path(ROOT, "fleet/ansible")
MODULES = sorted(TOP.joinpath("plugins/modules").glob("*.py"))


def test_it_has_the_version_of_the_program() -> None:
    """Ansible requires three numbers."""
    found = re.search(r"^version: (.*)$", TOP.joinpath("galaxy.yml").read_text(), re.M)
    assert found is not None
    assert found.group(1) == VERSION.partition(".dev")[0]


def test_all_of_it_is_installed() -> None:
    """Files that Python has made there are not installed."""
    names = {name for name, _ in collection()}
    assert {"galaxy.yml", "README.md", "plugins/module_utils/vmctl.py", "plugins/inventory/vmd.py"} <= names
    assert {f"plugins/modules/{module.name}" for module in MODULES} <= names
    assert not any("__pycache__" in name for name in names)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.stem)
def test_every_option_is_documented(module: Path) -> None:
    """The documented options are those of the code."""
    text = module.read_text()
    documented = re.findall(r"^  (\w+):$", text.partition("options:")[2].partition("attributes:")[0], re.M)
    code = text.partition("argument_spec=")[2].partition("supports_check_mode")[0]
    own = re.findall(r'"(\w+)": \{"type"', code)
    assert sorted(documented) == sorted([*own, "vmctl", "socket"])


def test_states_of_a_vm_are_those_of_vmctl() -> None:
    """Every state in the module's table is a state of the schema."""
    schema = json.loads(Path(ROOT, "docs/vmctl.schema.json").read_text())
    states = set(schema["$defs"]["vm"]["properties"]["state"]["enum"])
    table = TOP.joinpath("plugins/modules/vmd_vm.py").read_text().partition("STEPS:")[2].partition("}  # fmt")[0]
    assert set(re.findall(r'"(\w+)": (?:None|\[|\{)', table)) <= states
