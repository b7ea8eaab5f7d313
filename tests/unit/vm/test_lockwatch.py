"""What a VM is told when the locks of its disks, which were lost, are taken again."""

from typing import Any, cast

from vmd.ipc import devmsg
from vmd.vm.lockwatch import FOUND, WRITTEN, Locks


class Disk:
    """A disk whose lock is lost, and taken again with these answers, one after the other."""

    def __init__(self, label: str, *answers: int) -> None:
        self.label = label
        self.answers = list(answers)
        self.lock_lost = "its lock is lost" if answers else ""

    def take_back(self) -> int:
        """As the device process does it."""
        answer = self.answers.pop(0)
        if answer in devmsg.HAVE:
            self.lock_lost = ""
        return answer


class Disks:
    """All devices of a VM."""

    def __init__(self, *disks: Disk) -> None:
        self.running = disks


def locks(*disks: Disk) -> Locks:
    """Return those of some disks."""
    return Locks(cast("Any", Disks(*disks)))


def test_what_was_not_written_to_goes_on() -> None:
    """With a note for each disk that had lost its lock, said once."""
    found = locks(Disk("disk0", devmsg.TAKEN), Disk("disk1"), Disk("disk2", devmsg.TAKEN_UNSURE))

    assert found.take_back(force=False) == ""
    assert found.notes() == (
        f"disk0: its lock was lost, and is back: {FOUND[devmsg.TAKEN]}",
        f"disk2: its lock was lost, and is back: {FOUND[devmsg.TAKEN_UNSURE]}",
    )
    assert found.take_back(force=False) == ""
    assert found.notes() == ()


def test_what_was_written_to_goes_on_by_force_only() -> None:
    """However often; the lock is held from the first time on."""
    found = locks(Disk("disk0", devmsg.TAKEN_WRITTEN), Disk("disk1", devmsg.TAKEN_IN_USE, devmsg.TAKEN_WRITTEN))

    assert "disk1: its lock is lost; it is in use" in found.take_back(force=True)
    for _ in range(2):
        assert f"disk0 and disk1: its lock was lost: {WRITTEN}" in found.take_back(force=False)
    assert found.take_back(force=True) == ""
    assert [WRITTEN in note for note in found.notes()] == [True, True]
    assert found.take_back(force=False) == ""
