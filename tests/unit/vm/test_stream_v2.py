"""Records of version 2 of the stream have values in order.  They are read by name, even if records get new fields."""

import msgpack
import pytest

from tests.support import golden, saved
from vmd.ipc.imsg import pack
from vmd.record import Record, RecordType
from vmd.vm import state, stream_v2
from vmd.vm.header import Header, read_header
from vmd.vm.state import MachineState
from vmd.vm.virtio import VirtioState

HEADER, MACHINE = stream_v2.HEADER, stream_v2.MACHINE
EACH_FORM = pytest.mark.parametrize(("cls", "layout"), [
    (Header, HEADER), (MachineState, MACHINE), (VirtioState, stream_v2.VIRTIO),
])  # fmt: skip


def in_order(layout: object, values: object) -> object:
    """Return the values in the order of version 2, given by name."""
    if layout is stream_v2.PLAIN or values is None:
        return values
    if isinstance(layout, list):
        assert isinstance(values, list)
        return [in_order(layout[0], each) for each in values]
    assert isinstance(layout, dict)
    assert isinstance(values, dict)
    return [in_order(inner, values[name]) for name, inner in layout.items()]


def written(record: Record, layout: object) -> bytes:
    """Return a record as version 2 wrote it."""
    packed: bytes = msgpack.packb(in_order(layout, msgpack.unpackb(pack(record))))
    return packed


def missing(cls: RecordType, layout: object, where: str) -> list[str]:
    """Return the fields without default that version 2 did not have, also of the records in these fields."""
    assert isinstance(layout, dict)
    found = [f"{where}.{name}" for name in cls.fields if name not in layout and name not in cls.defaults]
    for name, inner in layout.items():
        declared = cls.fields.get(name)
        declared = next((arg for arg in getattr(declared, "__args__", ()) if isinstance(arg, RecordType)), declared)
        if inner is not stream_v2.PLAIN and isinstance(declared, RecordType):
            found += missing(declared, inner[0] if isinstance(inner, list) else inner, f"{where}.{name}")
    return found


@EACH_FORM
def test_fields_that_came_later_have_defaults(cls: RecordType, layout: object) -> None:
    """Otherwise streams of version 2 could no longer be read."""
    assert missing(cls, layout, cls.__name__) == []


def test_records_of_version_2_are_read() -> None:
    """The result equals the original records."""
    header, machine = saved.header(), saved.machine_state(virtio=(saved.device(),))
    assert read_header(2, written(header, HEADER)) == header
    assert state.read_machine(2, written(machine, MACHINE)) == machine


def test_each_version_is_read_in_its_own_form() -> None:
    """Names in a stream of version 2, or lists in a later one, are refused."""
    header, machine = saved.header(), saved.machine_state()
    for version, raw_header, raw_machine in (
        (2, pack(header), pack(machine)), (3, written(header, HEADER), written(machine, MACHINE)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"^Header: "):
            read_header(version, raw_header)
        with pytest.raises(ValueError, match=r"^MachineState: "):
            state.read_machine(version, raw_machine)


def test_another_number_of_fields_is_refused() -> None:
    """This holds for every record and list of records.  The error has its name."""
    good = msgpack.unpackb(written(saved.header(), HEADER))
    for bad, where in (
        (good[:-1], "Header"), ([*good, 1], "Header"), ([good[0][:-1], *good[1:]], "Header.config"),
        ([[*good[0], 1], *good[1:]], "Header.config"), ([*good[:-1], [[1]]], "Header.devices"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{where}: wrong number of fields$"):
            read_header(2, msgpack.packb(bad))
    with pytest.raises(ValueError, match=r"^Header\.cpuid: int is not a list$"):
        read_header(2, msgpack.packb([*good[:-2], 1, good[-1]]))


@pytest.mark.parametrize("name", golden.KINDS)
def test_recorded_streams(name: str) -> None:
    """Streams of the first release are read, and the order of all fields is correct."""
    parts = golden.recorded(2, name)
    header = read_header(parts.version, parts.header)
    (body,) = (body for kind, body in parts.sections if kind == golden.STATE)
    machine = state.read_machine(parts.version, body)

    assert (header.config.name, header.config.memory_bytes) == ("golden", 64 << 20)
    assert [leaf.function for leaf in header.cpuid if leaf.function == 1] == [1]
    assert len(machine.vcpus) == header.config.vcpus
    assert len(machine.virtio) == len(header.devices)
    assert [chip.name for chip in machine.chips] == ["uart", "rtc", "pm", "reset", "keyboard", "port 92", "fw_cfg"]
    assert [each.slot for each in machine.functions] == list(range(len(machine.functions)))
    assert in_order(HEADER, msgpack.unpackb(pack(header))) == msgpack.unpackb(parts.header)
    assert in_order(MACHINE, msgpack.unpackb(pack(machine))) == msgpack.unpackb(body)
