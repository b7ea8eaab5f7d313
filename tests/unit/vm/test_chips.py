"""Every chip with registers is in the stream of a machine, and its state is tried on a spare chip before it is sent."""

import ast
from pathlib import Path
from typing import Any, cast

import pytest

from vmd.vm.boot.fwcfg import FwCfg
from vmd.vm.bus import Bus
from vmd.vm.chips.acpipm import AcpiPm
from vmd.vm.chips.i8042 import I8042
from vmd.vm.chips.mc146818 import Mc146818
from vmd.vm.chips.ns8250 import Uart
from vmd.vm.chips.resetport import ResetPort, SystemControlA
from vmd.vm.stream import VERSION

ROOT = Path(__file__).resolve().parents[3]
# The chips of a stream, by its version.  An older stream has no state of a new chip, so `vm/state.py` refuses it.
CHIPS = {4: ["uart", "rtc", "pm", "reset", "keyboard", "port 92", "fw_cfg"]}
MACHINE = ast.parse((ROOT / "vmd/vm/machine.py").read_text())


def table(method: str) -> dict[str, str]:
    """Return the dictionary that a method of Machine returns: name of a chip -> expression that makes or holds it."""
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


def on_the_bus() -> set[str]:
    """Return the attributes of a Machine that are passed to its bus or to the PCI bus."""
    found = set()
    for node in ast.walk(MACHINE):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("bus.add_pio", "PciBus"):
            found |= {each.attr for part in node.args for each in ast.walk(part) if isinstance(each, ast.Attribute)}
    return found


def test_a_guest_finds_every_chip() -> None:
    """Every chip that is in a stream is also on a bus."""
    held = {value.removeprefix("self.") for value in table("chips").values()}

    assert held - on_the_bus() == set(), "Machine puts these on no bus"


def test_every_chip_has_tests() -> None:
    """Every chip has a file of tests, for drivers and for hostile guests."""
    chips = {path.stem for path in ROOT.glob("vmd/vm/chips/*.py")} - {"__init__"}
    tested = {path.stem.removeprefix("test_") for path in ROOT.glob("tests/unit/vm/chips/test_*.py")}

    assert chips - tested == set(), "tests/unit/vm/chips has no test of these"


def test_a_chip_has_a_row_in_each_table() -> None:
    """The tables have the same names in the same order, because the state of a chip is tried on the spare chip."""
    assert list(table("chips")) == list(table("spare_chips"))


def test_a_stream_has_the_chips_of_its_version() -> None:
    """A new chip needs a new version of the stream.  The reader then adds the state of that chip to older streams."""
    assert list(table("chips")) == CHIPS.get(VERSION), f"a stream of version {VERSION} has other chips"


def test_every_chip_with_registers_is_in_a_stream() -> None:
    """A chip that is missing there would be reset at the receiver, while its guest continues."""
    made = {value.partition("(")[0].rpartition(".")[2] for value in table("spare_chips").values()}

    assert with_registers()
    assert with_registers() - made == set(), "`chips` and `spare_chips` of Machine do not have these"


def nothing(*_: object) -> None:
    """Be a line, or another output of a chip."""


def chips() -> dict[str, Any]:
    """Return each chip with ports of 8 bits, by its name."""
    return {
        "uart": Uart(nothing, nothing),
        "rtc": Mc146818(nothing, lambda: 0.0, cast("Any", nothing), 8 << 20, 1),
        "reset": ResetPort(nothing),
        "port 92": SystemControlA(nothing),
        "keyboard": I8042(nothing),
    }


class Watched:
    """Passes accesses on to a chip, and notes their sizes."""

    def __init__(self, chip: Any) -> None:  # noqa: ANN401
        self.chip = chip
        self.pio_width = chip.pio_width
        self.sizes: list[int] = []

    def pio_read(self, offset: int, size: int) -> int:
        """Read."""
        self.sizes.append(size)
        return int(self.chip.pio_read(offset, size))

    def pio_write(self, offset: int, size: int, value: int) -> None:
        """Write."""
        self.sizes.append(size)
        self.chip.pio_write(offset, size, value)


@pytest.mark.parametrize("name", chips())
def test_a_wide_access_reaches_an_8_bit_chip_byte_by_byte(name: str) -> None:
    """The bridge in front of such a chip splits an access into bytes, and the chip never sees a wide one."""
    chip = Watched(chips()[name])
    bus = Bus()
    bus.add_pio(0x100, 8, chip)
    bus.pio_read(0x100, 4)
    bus.pio_write(0x100, 2, 0)
    assert chip.sizes == [1] * 6


def test_the_ports_of_a_chip() -> None:
    """The machine gives them to the chip.  Ports behind them belong to others."""
    assert (I8042.PORTS, AcpiPm.PORTS, FwCfg.PORTS) == (5, 12, 12)
