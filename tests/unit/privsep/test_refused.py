"""The line of the log that names a refused system call, for developers."""

import sys

from vmd.privsep import refused


def test_a_call_is_named_with_its_arguments() -> None:
    """The innermost function comes first."""
    line = refused.refusal_line(41, [1, 16], sys._getframe())

    beginning, callers = line.split("; called in ")
    assert beginning == "system call socket(0x1, 0x10) is refused by the filter"
    assert callers.split(" < ")[0].startswith(f"{__name__}.test_a_call_is_named_with_its_arguments:")


def test_the_innermost_callers_are_named() -> None:
    """All of them would be too long for a line."""

    def deep(left: int) -> str:
        return deep(left - 1) if left else refused.refusal_line(0, [], sys._getframe())

    callers = deep(20).split("; called in ")[1].split(" < ")

    assert len(callers) == refused.FRAMES_SHOWN
    assert all(".deep:" in caller for caller in callers)


def test_a_call_that_is_not_known_has_its_number() -> None:
    """It may be newer than the list, or there may be no Python code that has made it."""
    assert refused.refusal_line(9999, [], None) == (
        "system call number 9999() is refused by the filter; called in "
    )


def test_the_names_have_their_numbers() -> None:
    """Both parts of the list begin at their own number."""
    assert [refused.NAMES[number] for number in (0, 1, 334, 424, 435, 461)] == [
        "read", "write", "rseq", "pidfd_send_signal", "clone3", "lsm_list_modules",
    ]  # fmt: skip
    assert 335 not in refused.NAMES
