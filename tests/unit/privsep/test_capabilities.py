"""The capabilities that the parent keeps agree with the documentation and the unit."""

import re
from pathlib import Path

from vmd.privsep import linux
from vmd.privsep.confine import PARENT_CAPABILITIES

ROOT = Path(__file__).resolve().parents[3]
KEPT = {
    name
    for name, value in vars(linux).items()
    if name.startswith("CAP_") and name != "CAP_LAST" and value in PARENT_CAPABILITIES
}


def test_each_has_a_reason() -> None:
    """docs/security.md has a row for each, and no other rows."""
    lines = Path(ROOT, "docs/security.md").read_text().splitlines()
    rows = [line.split("|")[1] for line in lines if line.startswith("| CAP_")]

    assert {name for row in rows for name in re.findall(r"CAP_\w+", row)} == KEPT


def test_the_unit_gives_no_others() -> None:
    """The unit does not grant a capability that the daemon gives up."""
    lines = Path(ROOT, "etc/vmd.service").read_text().splitlines()
    given = [line.partition("=")[2] for line in lines if line.startswith("CapabilityBoundingSet=")]

    assert {name for names in given for name in names.split()} == KEPT
