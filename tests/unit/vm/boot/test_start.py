"""Segments and descriptor tables of a start (Intel SDM 3, 3.4.5)."""

import pytest

from vmd.vm.boot.start import Segment, code32, code64, data32, descriptor_table, flat_segments, task

FLAT = {"base": 0, "limit": 0xFFFFFFFF, "present": 1, "dpl": 0, "s": 1, "g": 1, "avl": 0, "unusable": 0}


@pytest.mark.parametrize(("segment", "fields", "descriptor"), [
    (code32(8), {**FLAT, "selector": 8, "type": 0xB, "db": 1, "l": 0}, 0x00CF9B000000FFFF),
    (code64(16), {**FLAT, "selector": 16, "type": 0xB, "db": 0, "l": 1}, 0x00AF9B000000FFFF),
    (data32(24), {**FLAT, "selector": 24, "type": 3, "db": 1, "l": 0}, 0x00CF93000000FFFF),
    (
        task(32),
        {**FLAT, "selector": 32, "type": 0xB, "limit": 0x67, "s": 0, "db": 0, "l": 0, "g": 0},
        0x00008B0000000067,
    ),
])  # fmt: skip
def test_segments(segment: Segment, fields: dict[str, int], descriptor: int) -> None:
    """Each field has its value in the register, and its bits in the descriptor."""
    assert segment.as_dict() == fields
    assert segment.descriptor() == descriptor


@pytest.mark.parametrize(("g", "limit", "descriptor"), [
    (0, 0xFFFFF, 0x897FFAABCDEFFFFF), (1, 0xFFFFFFFF, 0x89FFFAABCDEFFFFF), (0, 0x54321, 0x8975FAABCDEF4321),
    (1, 0x54321FFF, 0x89F5FAABCDEF4321),
])  # fmt: skip
def test_bits_of_a_descriptor(g: int, limit: int, descriptor: int) -> None:
    """Base and limit are in several pieces.  With `g` the limit counts pages."""
    segment = Segment(selector=8, type=0xA, base=0x89ABCDEF, limit=limit, dpl=3, db=1, l=1, g=g, avl=1)
    assert segment.descriptor() == descriptor


def test_a_descriptor_table_has_each_segment_at_its_selector() -> None:
    """It ends with the last segment.  A segment with selector 0 is left out."""
    code, data = code32(16), data32(8)
    table = descriptor_table(code, data, task(0))
    assert [int.from_bytes(table[at : at + 8], "little") for at in range(0, len(table), 8)] == [
        0, data.descriptor(), code.descriptor(),
    ]  # fmt: skip


def test_registers_of_a_flat_start() -> None:
    """All data segments are the same.  There is no LDT."""
    code, data, tss = code32(8), data32(16), task(24)
    ldt = Segment(selector=0, type=2, s=0, limit=0xFFFF)
    assert flat_segments(code, data, tss) == {
        "cs": code, "ds": data, "es": data, "fs": data, "gs": data, "ss": data, "tr": tss, "ldt": ldt,
    }  # fmt: skip
