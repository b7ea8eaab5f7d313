"""Numbers and names of VMs on a command line, at their limits."""

import pytest

from tests.unit.vmctl.fake import vm_info
from vmctl.errors import ArgumentError
from vmctl.numbers import count
from vmctl.vmref import VmRef, parse_vmref


@pytest.mark.parametrize(("text", "number"), [("1", 1), ("0007", 7), ("2147483647", 2147483647), ("0" * 99 + "1", 1)])
def test_counts(text: str, number: int) -> None:
    """They are from 1 to the largest id of a VM."""
    assert count(text, "count") == number


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("0", "too small"), ("000", "too small"), ("-1", "too small"), ("-0", "too small"), ("", "invalid"),
        ("-", "invalid"), ("1x", "invalid"), ("+1", "invalid"), (" 1", "invalid"), ("x", "invalid"),
        ("\u0661", "invalid"), ("\u00b2", "invalid"), ("2147483648", "too large"), ("9999999999", "too large"),
        ("10000000000", "too large"),
    ],
)  # fmt: skip
def test_no_counts(text: str, what: str) -> None:
    """The words are those of strtonum(3)."""
    with pytest.raises(ArgumentError, match=f"^count is {what}: "):
        count(text, "count")


@pytest.mark.parametrize(
    ("word", "ref"),
    [
        ("1", VmRef(vmid=1, name="1")), ("007", VmRef(vmid=7, name="007")),
        ("4294967295", VmRef(vmid=4294967295, name="4294967295")), ("4294967296", VmRef(name="4294967296")),
        ("99999999999", VmRef(name="99999999999")), ("web", VmRef(name="web")), ("1a", VmRef(name="1a")),
        ("\u0661", VmRef(name="\u0661")), ("n" * 63, VmRef(name="n" * 63)), ("\u00fc" * 31, VmRef(name="\u00fc" * 31)),
    ],
)  # fmt: skip
def test_vms(word: str, ref: VmRef) -> None:
    """A number may be an id or a name."""
    assert parse_vmref(word) == ref
    assert str(ref) == word
    assert ref.sure_name == ("" if ref.vmid > 0 else word)


@pytest.mark.parametrize(
    ("word", "what"),
    [
        ("0", "invalid id: 0"), ("00", "invalid id: 00"), ("", "invalid id: "), ("-1", "invalid id: -1"),
        ("n" * 64, "name too long: n"), ("\u00fc" * 32, "name too long: "),
    ],
)  # fmt: skip
def test_no_vms(word: str, what: str) -> None:
    """They are refused before any request."""
    with pytest.raises(ArgumentError, match=f"^{what}"):
        parse_vmref(word)


def test_a_name_comes_before_an_id() -> None:
    """`stop -f 2` must not kill the VM with the id 2 if another one is called 2."""
    first, second = vm_info("a", vmid=2), vm_info("2", vmid=5)
    for vms in ((first, second), (second, first)):
        assert parse_vmref("2").find(vms) is second
    assert parse_vmref("2").find((first,)) is first
    assert parse_vmref("a").find((second, first)) is first
    assert parse_vmref("3").find((first, second)) is None
    assert VmRef(vmid=5).find((first, second)) is second
    assert VmRef().find((first, second)) is None
