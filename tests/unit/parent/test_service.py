"""The daemon as a service: what it waits for at boot, and where its first words go."""

import errno
import os
import time
from pathlib import Path

import pytest

from vmd.parent import service


def test_kvm_that_never_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is waited for, which is said once; then the sentence says what to do."""
    monkeypatch.setattr(service, "KVM", str(tmp_path / "kvm"))
    monkeypatch.setattr(service, "KVM_POLL_S", 0.01)

    with pytest.raises(service.NoKvm, match="No such file or directory: load the module"):
        service.wait_for_kvm(0.1)

    assert capfd.readouterr().err.count("waiting up to") == 1


def test_kvm_is_not_waited_for_in_the_foreground(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a time of nothing it is looked at once."""
    monkeypatch.setattr(service, "KVM", str(tmp_path / "kvm"))
    monkeypatch.delattr(time, "sleep")

    with pytest.raises(service.NoKvm):
        service.wait_for_kvm(0)


def test_kvm_that_is_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting makes it KVM."""
    monkeypatch.setattr(service, "KVM", "/dev/null")
    monkeypatch.delattr(time, "sleep")

    with pytest.raises(service.NoKvm) as raised:
        service.wait_for_kvm(60)

    assert raised.value.number == errno.ENOTTY


def test_journal_is_told_from_an_inherited_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell that a service runs hands the variable on, and other descriptors."""
    status = os.fstat(2)
    monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
    assert service.on_journal()
    monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino + 1}")
    assert not service.on_journal()
    monkeypatch.delenv("JOURNAL_STREAM")
    assert not service.on_journal()
