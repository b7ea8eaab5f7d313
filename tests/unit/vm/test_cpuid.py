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


def test_a_brand_string_of_the_host_is_kept() -> None:
    """It is also kept if it is short, and a table with only a part of its leaves stays as it is."""
    named = [leaf(0x80000002, eax=0x65746E49), leaf(0x80000003), leaf(0x80000004)]
    for host in (named, named[1:], named[1:2]):
        found = for_vcpu([leaf(0, eax=1), *host], 0, 1, tsc_deadline=True)
        assert [bytes(each) for each in found if each.function >= 0x80000002] == [bytes(each) for each in host]


# Cache descriptors: EAX has the type (0: no more caches), the level, and how many processors share the cache.
CACHES = [0xFC1FC121, 0xFC1FC122, 0xFC1FC143, 0xFC1FC163, 0xFC1FC000]


@pytest.mark.parametrize("vcpus", [1, 2, 5, 16])
def test_each_core_has_its_caches_for_itself(vcpus: int) -> None:
    """That holds for all levels.  Leaf 4 also has the cores of the package.  The end of the list is left alone."""
    for function, cores in ((4, vcpus - 1), (0x8000001D, 0x3F)):
        host = [kvm_cpuid_entry2(function, index, 1, eax) for index, eax in enumerate(CACHES)]
        found = [each.eax for each in for_vcpu(host, 0, vcpus, tsc_deadline=True)]
        assert found == [*(eax & 0x3FFF | cores << 26 for eax in CACHES[:-1]), CACHES[-1]]


@pytest.mark.parametrize(("vcpus", "ecx"), [(1, 0), (2, 0x1001), (3, 0x2002), (5, 0x3004), (16, 0x400F)])
def test_numbers_of_processors_in_the_leaves_of_amd(vcpus: int, ecx: int) -> None:
    """80000008h has the number and the bits of the APIC id, 80000001h whether there are several cores."""
    host = [leaf(0x80000001, ecx=0x121), leaf(0x80000001, ecx=0x123), leaf(0x80000008, ecx=0x3F0000)]
    found = for_vcpu([*host, leaf(0x8000001E, eax=9, ebx=0x109, ecx=7, edx=5)], vcpus - 1, vcpus, tsc_deadline=True)
    assert [each.ecx for each in found[:3]] == [0x121 | 2 * (vcpus > 1)] * 2 + [0x3F0000 | ecx]
    assert (found[3].eax, found[3].ebx, found[3].ecx, found[3].edx) == (vcpus - 1, vcpus - 1, 0, 5)


@pytest.mark.parametrize(("highest", "leaves"), [(0xA, []), (0xB, [0xB]), (0x1E, [0xB]), (0x1F, [0xB, 0x1F])])
def test_a_topology_leaf_exists_if_the_highest_leaf_reaches_it(highest: int, leaves: list[int]) -> None:
    """A guest does not read leaves behind the highest one."""
    found = for_vcpu([leaf(0, eax=highest), leaf(1, eax=0xFF)], 2, 5, tsc_deadline=False)
    assert [each.function for each in found[2:]] == [number for number in leaves for _ in range(3)]
    for first in range(2, len(found), 3):
        rows = [(each.index, each.flags, each.eax, each.ebx, each.ecx, each.edx) for each in found[first : first + 3]]
        assert rows == [(0, 1, 0, 1, 0x100, 2), (1, 1, 3, 5, 0x201, 2), (2, 1, 0, 0, 2, 2)]


def test_identification_of_a_vcpu() -> None:
    """Leaf 1 keeps its other bits."""
    (found,) = for_vcpu([leaf(1, ebx=0xFFFF0812, ecx=1, edx=1 << 28 | 3)], 4, 5, tsc_deadline=False)
    assert (found.ebx, found.ecx, found.edx) == (0x04050812, 1 << 31 | 1 << 21 | 1, 1 << 28 | 3)
    (alone,) = for_vcpu([leaf(1, edx=1 << 28 | 3)], 0, 1, tsc_deadline=False)
    assert alone.edx == 3
