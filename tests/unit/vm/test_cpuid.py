"""CPUID gives each vCPU its own place in one consistent topology."""

import pytest

from vmd.kvmapi.abi import kvm_cpuid_entry2
from vmd.vm.cpuid import BRAND, for_vcpu


def leaf(function: int, eax: int = 0, ebx: int = 0, ecx: int = 0, edx: int = 0) -> kvm_cpuid_entry2:
    """Return one leaf of the host's CPUID."""
    return kvm_cpuid_entry2(function, 0, 0, eax, ebx, ecx, edx)


HOST = [
    leaf(0, eax=0x1F),
    leaf(1, eax=0x806EA, ebx=0x07100800, ecx=0, edx=0x178BFBFF),
    leaf(4, eax=0xFC004121),
    leaf(0xB, eax=1, ebx=2, ecx=0x100, edx=7),
    leaf(0x40000000, eax=0x40000001, ebx=0x4B4D564B, ecx=0x564B4D56, edx=0x4D),
    leaf(0x80000001),
    leaf(0x80000002),
    leaf(0x80000003),
    leaf(0x80000004),
    leaf(0x80000008, eax=0x3028, ecx=0x700F),
    leaf(0x8000001E, eax=99, ebx=99, ecx=99),
]


def table(apic_id: int, vcpus: int, tsc_deadline: bool = True) -> dict[tuple[int, int], kvm_cpuid_entry2]:
    """Return the table of one vCPU by (function, index)."""
    entries = for_vcpu(HOST, apic_id, vcpus, tsc_deadline=tsc_deadline)
    found = {(entry.function, entry.index): entry for entry in entries}
    assert len(found) == len(entries), "a leaf is twice in the table"
    return found


@pytest.mark.parametrize("vcpus", range(1, 17))
def test_topology_agrees_everywhere(vcpus: int) -> None:
    """APIC id and numbers of processors agree in leaves 1, 4, 0Bh, 1Fh, 80000008h and 8000001Eh."""
    for apic_id in range(vcpus):
        found = table(apic_id, vcpus)
        assert found[1, 0].ebx >> 24 == apic_id
        assert found[1, 0].ebx >> 16 & 0xFF == vcpus
        assert bool(found[1, 0].edx & 1 << 28) == (vcpus > 1)
        assert (found[4, 0].eax >> 26) + 1 == vcpus
        for number in (0xB, 0x1F):
            assert [found[number, index].edx for index in range(3)] == [apic_id] * 3
            assert (found[number, 0].eax, found[number, 0].ebx, found[number, 0].ecx) == (0, 1, 0x100)
            assert found[number, 1].ebx == vcpus
            assert vcpus <= 1 << found[number, 1].eax
            assert found[number, 2].ecx >> 8 == 0
        assert (found[0x80000008, 0].ecx & 0xFF) + 1 == vcpus
        assert found[0x8000001E, 0].eax == apic_id


def test_hypervisor_is_announced() -> None:
    """CPUID announces a hypervisor, x2APIC and, if KVM has it, the deadline timer."""
    assert table(0, 1)[1, 0].ecx == 1 << 31 | 1 << 24 | 1 << 21
    assert table(0, 1, tsc_deadline=False)[1, 0].ecx == 1 << 31 | 1 << 21
    assert table(0, 1)[0x40000000, 0].ebx == 0x4B4D564B


def test_the_table_of_the_host_does_not_change() -> None:
    """The tables of several vCPUs are made from the same list."""
    table(3, 4)
    assert HOST[1].ebx == 0x07100800


def test_an_empty_brand_string_is_filled_in() -> None:
    """On some hosts KVM's brand string is empty, so we fill it in."""
    found = table(0, 1)
    text = b"".join(
        getattr(found[function, 0], register).to_bytes(4, "little")
        for function in (0x80000002, 0x80000003, 0x80000004)
        for register in ("eax", "ebx", "ecx", "edx")
    )
    assert text.rstrip(b"\0") == BRAND
