"""The messages of device processes: no message of one kind has the number of a message for all kinds."""

import errno

import pytest

from vmd.devices.process import Host, Process
from vmd.devices.vioblk.disk import VioblkProcess
from vmd.devices.vionet.main import NetProcess
from vmd.errors import ImageError, PeerError
from vmd.ipc import devmsg


@pytest.mark.parametrize("kind", [VioblkProcess, NetProcess])
def test_messages_for_all_kinds_keep_their_handlers(kind: type[Process]) -> None:
    """Otherwise a process would handle a message as another one."""
    assert Process.QUESTIONS.items() <= kind.QUESTIONS.items()
    assert Process.INFORMS.items() <= kind.INFORMS.items()
    assert not kind.QUESTIONS.keys() & kind.INFORMS.keys()


class Disk:
    """The device behind a disk's process: each method keeps its arguments, and returns a number of its own."""

    def __init__(self) -> None:
        self.image = self.hand_over = self
        self.error: Exception | None = None
        self.calls: list[tuple[object, ...]] = []
        self.config = b"configuration"
        self.features = 1 << 7
        self.paused: bool | None = None

    def _called(self, *call: object) -> None:
        self.calls.append(call)
        if self.error is not None:
            raise self.error

    def settle(self) -> int:
        """Of the disk, and of its image."""
        self._called("settle")
        return 7

    def settle_ahead(self) -> None:
        """Return nothing."""
        self._called("settle ahead")

    def let_go(self) -> int:
        """Of the lock."""
        return 8

    def take_back(self) -> int:
        """Of the lock."""
        return 9

    def sign(self) -> int:
        """Of the lock."""
        return 10

    def reload(self) -> None:
        """Return nothing."""
        self._called("reload")

    def resize(self, size: int) -> None:
        """Return nothing."""
        self._called("resize", size)

    def limit(self, requests: int, rate: int) -> None:
        """Return nothing."""
        self._called("limit", requests, rate)


class Files:
    """The part of `Host` that is used here."""

    def __init__(self) -> None:
        self.resources = [900, 901]


class DiskProcess(VioblkProcess):
    """A disk's process without memory and loop; `told` are its messages of the async channel."""

    def __init__(self) -> None:
        self.disk = Disk()
        self.device = self.disk  # type: ignore[assignment]
        self.host = Files()  # type: ignore[assignment]
        self.passing: list[int] = []
        self.troubles: tuple[str, ...] = ()
        self.paused = self.announced = False
        self.told: list[bytes] = []

    def tell(self, packet: bytes) -> None:
        """Keep it."""
        self.told.append(packet)

    def ask(self, kind: int) -> int:
        """Return the status of the answer to a question, which must be of the same kind."""
        answered, status = devmsg.STATUS.unpack(self.QUESTIONS[kind](self, devmsg.TYPE.pack(kind)))
        assert answered == kind
        found: int = status
        return found


@pytest.fixture
def process() -> DiskProcess:
    """The process of a disk."""
    return DiskProcess()


SHORT = VioblkProcess.QUESTIONS.keys() - {devmsg.ACTIVATE, devmsg.CONFIG_WRITE}


@pytest.mark.parametrize("kind", sorted(SHORT))
def test_question_with_bytes_behind_it_is_refused(process: DiskProcess, kind: int) -> None:
    """It is not what it seems to be; nothing is done."""
    with pytest.raises(PeerError, match="message of 5 bytes instead of 4"):
        process.QUESTIONS[kind](process, devmsg.TYPE.pack(kind) + b"\0")
    assert process.disk.calls == []


def test_answers_of_a_disk(process: DiskProcess, capfd: pytest.CaptureFixture[str]) -> None:
    """Each has the status of what was asked.  The reason of a failure is in the log."""
    statuses = {kind: process.ask(kind) for kind in (
        devmsg.SETTLE, devmsg.SETTLE_AHEAD, devmsg.LET_GO, devmsg.TAKE_BACK, devmsg.SIGN, devmsg.RELOAD,
    )}  # fmt: skip
    assert list(statuses.values()) == [7, 0, 8, 9, 10, 0]
    assert process.disk.calls == [("settle",), ("settle ahead",), ("reload",)]
    process.disk.error = ImageError("disk", "is damaged")
    assert process.ask(devmsg.RELOAD) == 1
    assert "disk: is damaged" in capfd.readouterr().err


def test_image_is_lent_with_all_its_files(process: DiskProcess, capfd: pytest.CaptureFixture[str]) -> None:
    """In a pause it is settled first; an image that cannot be settled is not lent."""
    assert (process.ask(devmsg.LEND), process.passing, process.disk.calls) == (0, [900, 901], [])
    process.passing, process.paused = [], True
    assert (process.ask(devmsg.LEND), process.passing, process.disk.calls) == (0, [900, 901], [("settle",)])
    process.passing, process.disk.error = [], OSError(errno.EBUSY, "requests are under way")
    assert (process.ask(devmsg.LEND), process.passing) == (1, [])
    assert "requests are under way" in capfd.readouterr().err


def test_size_and_limit_of_a_disk(process: DiskProcess) -> None:
    """They reach the device as they were sent."""
    process.take_inform(devmsg.RESIZE_BODY.pack(devmsg.RESIZE, 5 << 40))
    process.take_inform(devmsg.LIMIT_BODY.pack(devmsg.LIMIT, 100, 7 << 20))
    assert process.disk.calls == [("resize", 5 << 40), ("limit", 100, 7 << 20)]


def test_lock_of_a_disk(process: DiskProcess) -> None:
    """Its thread learns of pauses, and tells the VM of a loss in a sentence that fits."""
    for paused in (True, False):
        process.note_pause(paused=paused)
        assert process.disk.paused == paused
    process.lock_lost("x" * 300)
    assert process.told == [devmsg.TYPE.pack(devmsg.LOCK_LOST) + b"x" * devmsg.TROUBLE_MAX]


@pytest.mark.parametrize(
    ("error", "number", "text"),
    [
        (None, 0, ""), (OSError(errno.ENOSPC, "no room"), errno.ENOSPC, "no room"),
        (OSError("without a number"), errno.EIO, "without a number"),
    ],
)  # fmt: skip
def test_result_of_a_change(process: DiskProcess, error: OSError | None, number: int, text: str) -> None:
    """An error never has the number of success."""
    process.changed(error)
    assert process.told == [devmsg.CHANGED_HEAD.pack(devmsg.CHANGED, number) + text.encode()]


def test_troubles_follow_the_announcement(process: DiskProcess) -> None:
    """What is wrong before READY is sent after it; later troubles are sent at once, cut to what fits."""
    process.report("first")
    assert process.told == []
    process.announce()
    ready = process.told.pop(0)
    assert devmsg.READY_HEAD.unpack_from(ready)[::2] == (devmsg.READY, 13)
    assert ready[devmsg.READY_HEAD.size :] == b"configuration"
    process.report(*["x" * 300] * 5)
    process.report()
    assert process.told == [
        devmsg.TYPE.pack(devmsg.TROUBLES) + text for text in (b"first", b"\0".join([b"x" * 200] * 3), b"")
    ]


def test_process_without_troubles_announces_itself_only(process: DiskProcess) -> None:
    """One message."""
    process.announce()
    assert len(process.told) == 1


@pytest.mark.parametrize("packet", [b"", b"\1\0\0", devmsg.START_HEAD.pack(*[0] * 9)])
def test_process_is_not_started_by_other_messages(packet: bytes) -> None:
    """The VM process sends START first."""
    with pytest.raises(PeerError):
        Host(packet, [])
