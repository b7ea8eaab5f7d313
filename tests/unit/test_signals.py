"""Signals have the numbers and the names that the standard library gives them."""

import signal

from vmd import signals


def test_names_are_those_of_the_standard_library() -> None:
    """A number may have two names; people know the same one of them."""
    for each in signal.Signals:
        assert signals.name_of(each) == each.name
    assert signals.name_of(0) == "signal 0"


def test_what_is_exported_is_the_same() -> None:
    """For type checkers it is that module."""
    ours = {name: getattr(signals, name) for name in signals.__all__ if name.isupper()}

    assert ours == {name: int(getattr(signal, name)) for name in ours}
