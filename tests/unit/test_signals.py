"""Signals have the numbers and names of the standard library."""

import signal

from vmd import signals


def test_names_are_those_of_the_standard_library() -> None:
    """A number may have two names.  Ours is the common one."""
    for each in signal.Signals:
        assert signals.name_of(each) == each.name
    assert signals.name_of(0) == "signal 0"


def test_exported_constants_are_those_of_the_standard_library() -> None:
    """Type checkers use the standard module in place of ours."""
    ours = {name: getattr(signals, name) for name in signals.__all__ if name.isupper()}

    assert ours == {name: int(getattr(signal, name)) for name in ours}
