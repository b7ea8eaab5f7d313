"""The lost locks of a VM's disks are taken again, with notes for the user."""

from typing import Any, cast

from vmd.ipc import devmsg
from vmd.vm.lockwatch import FOUND, WRITTEN, Locks


class Disk:
    """A disk.  With answers, its lock is lost, and each attempt to take it again gives the next answer."""

    def __init__(self, label: str, *answers: int) -> None:
        self.label = label
        self.answers = list(answers)
        self.lock_lost = "its lock is lost" if answers else ""

    def take_back(self) -> int:
        """Return the next answer, as the device process does."""
        answer = self.answers.pop(0)
        if answer in devmsg.HAVE:
            self.lock_lost = ""
        return answer


class Disks:
    """All devices of a VM."""

    def __init__(self, *disks: Disk) -> None:
        self.running = disks


def locks(*disks: Disk) -> Locks:
    """Return the locks of some disks."""
    return Locks(cast("Any", Disks(*disks)))


def test_a_disk_that_nobody_has_written_to_goes_on() -> None:
    """Each disk that had lost its lock gives a note, once."""
    found = locks(Disk("disk0", devmsg.TAKEN), Disk("disk1"), Disk("disk2", devmsg.TAKEN_UNSURE))

    assert found.take_back(force=False) == ""
    assert found.notes() == (
        f"disk0: its lock was lost, and is back: {FOUND[devmsg.TAKEN]}",
        f"disk2: its lock was lost, and is back: {FOUND[devmsg.TAKEN_UNSURE]}",
    )
    assert found.take_back(force=False) == ""
    assert found.notes() == ()


def test_a_disk_that_was_written_to_goes_on_by_force_only() -> None:
    """Each attempt without force is refused, even though the lock is held after the first one."""
    found = locks(Disk("disk0", devmsg.TAKEN_WRITTEN), Disk("disk1", devmsg.TAKEN_IN_USE, devmsg.TAKEN_WRITTEN))

    assert "disk1: its lock is lost; it is in use" in found.take_back(force=True)
    for _ in range(2):
        assert f"disk0 and disk1: its lock was lost: {WRITTEN}" in found.take_back(force=False)
    assert found.take_back(force=True) == ""
    assert [WRITTEN in note for note in found.notes()] == [True, True]
    assert found.take_back(force=False) == ""
