"""The daemon as a service: what it waits for at boot, and whether it logs to the journal."""

import errno
import os
import time
from pathlib import Path

import pytest

from vmd.parent import service


def test_kvm_that_never_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The wait is logged once.  Then the error says what to do."""
    monkeypatch.setattr(service, "KVM", str(tmp_path / "kvm"))
    monkeypatch.setattr(service, "KVM_POLL_S", 0.01)

    with pytest.raises(service.NoKvm, match="No such file or directory: load the module"):
        service.wait_for_kvm(0.1)

    assert capfd.readouterr().err.count("waiting up to") == 1


def test_kvm_is_not_waited_for_in_the_foreground(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a timeout of 0 there is one check."""
    monkeypatch.setattr(service, "KVM", str(tmp_path / "kvm"))
    monkeypatch.delattr(time, "sleep")

    with pytest.raises(service.NoKvm):
        service.wait_for_kvm(0)


def test_a_file_that_is_not_kvm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not waited for, because it never becomes KVM."""
    monkeypatch.setattr(service, "KVM", "/dev/null")
    monkeypatch.delattr(time, "sleep")

    with pytest.raises(service.NoKvm) as raised:
        service.wait_for_kvm(60)

    assert raised.value.number == errno.ENOTTY


def test_an_inherited_variable_does_not_mean_a_journal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell of a service passes the variable on, but to programs with another standard error."""
    status = os.fstat(2)
    monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
    assert service.on_journal()
    monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino + 1}")
    assert not service.on_journal()
    monkeypatch.delenv("JOURNAL_STREAM")
    assert not service.on_journal()
