"""imgwriter without a process: each change of the snapshots of two disks, and each failure."""

import errno
import os
import threading
from pathlib import Path

import pytest

from tests.support.descriptors import open_descriptors
from tests.support.images import KIB, MIB, opened_qcow2, problems, read, write
from vmd.images.create import create
from vmd.images.rewrite import Rewrite
from vmd.images.snapshots import Snapshot, read_snapshots
from vmd.imgwriter import main
from vmd.imgwriter.main import ImgWriter
from vmd.ipc import courier
from vmd.ipc.imsg import Envelope
from vmd.ipc.messages.imgwriter import (
    ChangeSnapshots,
    FinishSnapshots,
    SnapshotsChanged,
    SnapshotsFailed,
    SnapshotsReady,
    SnapshotWord,
)
from vmd.ipc.messages.shared import DiskImages, ImageLink, SnapshotAction, SnapshotInfo
from vmd.ipc.streams import MAGIC
from vmd.log import log

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmd.ipc.channel import Channel
    from vmd.ipc.routes import Proc
    from vmd.record import Record

LIST, CREATE, DELETE, GO_BACK = SnapshotAction
SIZE = MIB
CLUSTER = 64 * KIB
STATE = MAGIC + bytes(range(256)) * 2000 + b"end"
DATE_NS, CLOCK_NS = 5_000_000_009, 77


class Parent:
    """The channel to the parent; it keeps all messages."""

    def __init__(self) -> None:
        self.sent: list[Record] = []
        self.flushed = False

    def send(self, message: "Record") -> None:
        """Keep it."""
        self.sent.append(message)
        self.flushed = False

    def flush_blocking(self, _timeout_s: float) -> None:
        """Note that all messages are out."""
        self.flushed = True


class Writer(ImgWriter):
    """An imgwriter for the two disks of a VM."""

    def attach_parent(self, peer: "Proc") -> "Channel":
        """Return the fake of the channel."""
        self.heard = Parent()
        return self.heard  # type: ignore[return-value]

    def change(
        self, action: SnapshotAction, tag: str, paths: list[Path], *, files: int = 2, kind: str = "qcow2",
        stream: int | None = None, state: int | None = None,
    ) -> "list[Record]":  # fmt: skip
        """Ask for a change of the disks; return what the parent hears."""
        asks, gives = courier.pair()
        fds = [os.open(path, os.O_RDWR) for path in paths[:files]]
        courier.send(gives, {"disks": fds})
        for fd in fds:
            os.close(fd)
        disks = tuple(DiskImages(images=(ImageLink(path=str(path), format=kind, guessed=False),)) for path in paths)
        message = ChangeSnapshots(name="web", action=action, tag=tag, disks=disks, date_ns=DATE_NS, clock_ns=CLOCK_NS)
        given = {"couriers": [asks.detach()]}
        given |= {name: [fd] for name, fd in (("stream", stream), ("state", state)) if fd is not None}
        envelope = Envelope(message, 0, 0, given)
        self.on_change(message, envelope, self.parent)
        assert envelope.untaken() == []
        gives.close()
        return self.news()

    def finish(self, *, commit: bool = True, first_last: bool = False) -> "list[Record]":
        """Carry the change out, or not; return what the parent hears."""
        message = FinishSnapshots(commit=commit, first_last=first_last)
        self.on_finish(message, Envelope(message, 0, 0, {}), self.parent)
        assert self.heard.flushed
        return self.news()

    def news(self) -> "list[Record]":
        """Return the messages since the last call, without signs of life."""
        sent, self.heard.sent = self.heard.sent, []
        return [one for one in sent if not isinstance(one, SnapshotWord)]


READY, CHANGED = SnapshotsReady(), SnapshotsChanged()


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """The title of this process stays as it is."""
    monkeypatch.setattr(main, "set_title", lambda _title: None)


@pytest.fixture
def disks(tmp_path: Path) -> list[Path]:
    """Two disks."""
    paths = [tmp_path / "first", tmp_path / "second"]
    for path in paths:
        create(str(path), "qcow2", SIZE)
    return paths


def run(action: SnapshotAction, tag: str, disks: list[Path], stream: int | None = None) -> None:
    """Carry a change out."""
    writer = Writer()
    assert writer.change(action, tag, disks, stream=stream) == [READY]
    assert writer.finish() == [CHANGED]
    writer.loop.close()


def failure(answers: "list[Record]") -> str:
    """Return the sentence of a refusal, the only answer."""
    (answer,) = answers
    assert isinstance(answer, SnapshotsFailed)
    assert answer.code
    return answer.text


def snapshots(path: Path) -> list[Snapshot]:
    """Return the snapshots of an image."""
    image = opened_qcow2(path, writable=False)
    found = read_snapshots(image.fd, image.header, str(path))
    image.close()
    return found


def fill(disks: list[Path], byte: bytes) -> None:
    """Write to all disks."""
    for path in disks:
        image = opened_qcow2(path)
        write(image, 0, byte * SIZE)
        image.close()


def contents(disks: list[Path]) -> list[bytes]:
    """Return the byte of which each disk is full."""
    found = []
    for path in disks:
        image = opened_qcow2(path, writable=False)
        data = read(image, 0, SIZE)
        image.close()
        assert data == data[:1] * SIZE
        found.append(data[:1])
    return found


def file_of(data: bytes) -> int:
    """Return a file with this content, to be read from its beginning."""
    fd = os.memfd_create("state")
    os.pwrite(fd, data, 0)
    return fd


def piped(data: bytes) -> int:
    """Return the reading end of a pipe into which a thread writes."""
    reader, writer = os.pipe2(os.O_CLOEXEC)

    def fill_pipe() -> None:
        with open(writer, "wb", buffering=0) as pipe:
            rest = memoryview(data)
            while rest:
                rest = rest[pipe.write(rest[:10_000]) :]

    threading.Thread(target=fill_pipe).start()
    return reader


def test_disks_go_back_to_a_snapshot_of_all(disks: list[Path]) -> None:
    """Each step concerns both disks; the snapshot has the time of the host and that of the machine."""
    fill(disks, b"a")
    run(CREATE, "one", disks)
    for path in disks:
        (one,) = snapshots(path)
        assert (one.name, one.date_s, one.date_ns, one.clock_ns, one.state_bytes) == ("one", 5, 9, CLOCK_NS, 0)
    fill(disks, b"b")
    run(GO_BACK, "one", disks)
    assert contents(disks) == [b"a", b"a"]
    run(DELETE, "one", disks)
    assert [snapshots(path) for path in disks] == [[], []]
    assert contents(disks) == [b"a", b"a"]
    assert [problems(path) for path in disks] == [{}, {}]


def test_prepared_change_can_be_dropped(disks: list[Path]) -> None:
    """The disks are as before."""
    before = [path.read_bytes() for path in disks]
    writer = Writer()
    assert writer.change(CREATE, "one", disks, stream=file_of(STATE)) == [READY]
    assert writer.finish(commit=False) == [CHANGED]
    writer.loop.close()

    assert [snapshots(path) for path in disks] == [[], []]
    assert [path.read_bytes()[: len(old)] for path, old in zip(disks, before, strict=True)] == before


@pytest.mark.parametrize("give", [file_of, piped])
def test_state_of_the_machine_is_on_the_first_disk(
    disks: list[Path], give: "Callable[[bytes], int]", monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is taken and given in pieces; a pipe has it in smaller ones.  The disks are unlocked before it is given."""
    monkeypatch.setattr(main, "STATE_BYTES", 2 * CLUSTER)
    monkeypatch.setattr(main, "PIECE_BYTES", CLUSTER)
    fill(disks, b"a")
    run(CREATE, "one", disks, give(STATE))
    assert [snapshots(path)[0].state_bytes for path in disks] == [len(STATE), 0]
    fill(disks, b"b")

    unlocked: list[int] = []
    monkeypatch.setattr(main, "unlock", unlocked.append)
    asks, gives = courier.pair()
    writer = Writer()
    assert writer.change(GO_BACK, "one", disks, state=gives.detach()) == [READY]
    got: list[bytes] = []

    def restore() -> None:
        with asks:
            (stream,) = courier.fetch(asks)["stream"]
            assert (len(unlocked), contents(disks)) == (2, [b"a", b"a"])
            with open(stream, "rb") as pipe:
                got.append(pipe.read())

    machine = threading.Thread(target=restore)
    machine.start()
    assert writer.finish() == [CHANGED]
    machine.join()
    writer.loop.close()
    assert got == [STATE]
    assert [problems(path) for path in disks] == [{}, {}]


def test_list_says_how_many_disks_have_each_snapshot(disks: list[Path]) -> None:
    """The first disk that has it describes it; nothing is written."""
    run(CREATE, "both", disks, file_of(STATE))
    run(CREATE, "second", disks[1:])
    run(CREATE, "first", disks[:1])
    for path in disks:
        path.chmod(0o400)
    before = [path.read_bytes() for path in disks]
    writer = Writer()

    *told, end = writer.change(LIST, "", disks)

    assert end == CHANGED
    assert told == [
        SnapshotInfo(tag=tag, date_s=5, clock_ns=CLOCK_NS, state_bytes=state, disks=having, of_disks=2)
        for tag, state, having in (("both", len(STATE), 2), ("first", 0, 1), ("second", 0, 1))
    ]
    assert writer.heard.flushed
    writer.loop.close()
    assert [path.read_bytes() for path in disks] == before


# What is asked, and the refusal.  Both disks have the snapshot "both", the first one has "one".
REFUSED = {
    "there is one already": (CREATE, "one", {}, "disk {0}: has a snapshot one already"),
    "on the second disk": (CREATE, "both", {}, "disk {0}: has a snapshot both already"),
    "no disk has it": (DELETE, "none", {}, "disk {0}: has no snapshot none"),
    "one disk lacks it": (GO_BACK, "one", {}, "disk {1}: has no snapshot one, unlike another disk"),
    "files are missing": (DELETE, "both", {"files": 1}, "disk {1}: its files did not come"),
    "no file has come": (DELETE, "both", {"files": 0}, "disk {0}: its files did not come"),
    "a raw disk": (DELETE, "both", {"kind": "raw"}, "disk {0}: is raw: only qcow2 images have snapshots"),
    "a bad name": (CREATE, ".", {}, "disk {0}: "),
}


@pytest.mark.parametrize(("action", "tag", "how", "words"), REFUSED.values(), ids=REFUSED)
def test_refused_change(disks: list[Path], action: SnapshotAction, tag: str, how: dict[str, int], words: str) -> None:
    """The sentence names the disk.  Nothing is changed."""
    run(CREATE, "both", disks)
    run(CREATE, "one", disks[:1])
    before = [snapshots(path) for path in disks]
    before_fds = open_descriptors()
    writer = Writer()

    assert failure(writer.change(action, tag, disks, **how)).startswith(words.format(*disks))  # type: ignore[arg-type]

    assert writer.heard.flushed
    writer.loop.close()
    assert open_descriptors() == before_fds
    assert [snapshots(path) for path in disks] == before
    assert [problems(path) for path in disks] == [{}, {}]


@pytest.mark.parametrize(
    ("state", "words"),
    [(b"", "has the disks only: stop the VM to go back to it"), (b"QEVM" * 10, "has the machine as another program")],
)
def test_machine_does_not_go_back_to_a_state_that_is_not_ours(disks: list[Path], state: bytes, words: str) -> None:
    """Without a machine, the disks can go back to it."""
    run(CREATE, "one", disks, file_of(state) if state else None)
    asks, gives = courier.pair()
    writer = Writer()
    assert f"snapshot one {words}" in failure(writer.change(GO_BACK, "one", disks, state=gives.detach()))
    for image in writer.images:
        image.close()
    assert writer.state is not None
    os.close(writer.state)
    asks.close()
    writer.loop.close()
    run(GO_BACK, "one", disks)


def test_disks_that_do_not_come(disks: list[Path]) -> None:
    """The process that has them has ended."""
    asks, gives = courier.pair()
    gives.close()
    message = ChangeSnapshots(name="web", action=LIST, tag="", disks=())
    writer = Writer()
    writer.on_change(message, Envelope(message, 0, 0, {"couriers": [asks.detach()]}), writer.parent)
    assert failure(writer.news()) == "the disks of the VM did not come"
    writer.loop.close()


@pytest.mark.parametrize("first_last", [True, False])
@pytest.mark.parametrize("failing", [1, 2])
def test_change_that_fails_says_how_many_disks_are_changed(
    disks: list[Path], first_last: bool, failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first disk has the state of the machine, so the order matters."""
    writer = Writer()
    assert writer.change(CREATE, "one", disks) == [READY]
    order: list[str] = []
    real = Rewrite.commit

    def commit(change: Rewrite) -> None:
        order.append(change.image.path.rpartition("/")[2])
        if len(order) == failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(change)

    monkeypatch.setattr(Rewrite, "commit", commit)
    text = failure(writer.finish(first_last=first_last))
    writer.loop.close()

    names = ["second", "first"] if first_last else ["first", "second"]
    assert order == names[:failing]
    assert text == f"disk {disks[0].parent / order[-1]}: Input/output error; {failing - 1} of 2 disks are changed"
    having = [path.name for path in disks if snapshots(path)]
    assert having == order[:-1]


def test_interrupted_way_back_is_repeated_first(disks: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """After a power cut between two disks, they are of different times: only the same change is allowed."""
    fill(disks, b"a")
    run(CREATE, "one", disks)
    fill(disks, b"b")
    writer = Writer()
    assert writer.change(GO_BACK, "one", disks) == [READY]
    real = Rewrite.commit

    def cut(change: Rewrite) -> None:
        if change.image.path.endswith("second"):
            raise KeyboardInterrupt
        real(change)

    with monkeypatch.context() as patched:
        patched.setattr(Rewrite, "commit", cut)
        with pytest.raises(KeyboardInterrupt):
            writer.finish()
    for image in writer.images:
        os.close(image.fd)
    writer.loop.close()
    assert contents(disks) == [b"a", b"b"]

    for action, tag in ((CREATE, "two"), (DELETE, "one")):
        writer = Writer()
        said = failure(writer.change(action, tag, disks))
        assert said == f"disk {disks[1]}: going back to a snapshot with other disks was interrupted: repeat it with -r"
        writer.loop.close()
    run(GO_BACK, "one", disks)
    assert contents(disks) == [b"a", b"a"]
    run(CREATE, "two", disks)


def test_interrupted_way_back_of_one_disk_is_over(disks: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is of one time in any case, so that every change is allowed."""
    alone = disks[:1]
    fill(alone, b"a")
    run(CREATE, "one", alone)
    writer = Writer()
    assert writer.change(GO_BACK, "one", alone) == [READY]

    def cut(_change: Rewrite) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Rewrite, "commit", cut)
        with pytest.raises(KeyboardInterrupt):
            writer.finish()
    for image in writer.images:
        os.close(image.fd)
    writer.loop.close()
    run(CREATE, "two", alone)


def test_interrupted_deletion_is_completed(disks: list[Path]) -> None:
    """A disk that has lost the snapshot already is left alone."""
    run(CREATE, "one", disks)
    run(DELETE, "one", disks[:1])
    run(DELETE, "one", disks)
    assert [snapshots(path) for path in disks] == [[], []]


def test_long_work_gives_signs_of_life(disks: list[Path]) -> None:
    """The parent ends an imgwriter of which it hears nothing."""
    writer = Writer()
    writer.said_s = -1e9
    writer.change(CREATE, "one", disks)
    writer.said_s = -1e9
    writer.say()
    writer.say()
    assert writer.heard.sent == [SnapshotWord()]
    writer.finish(commit=False)
    writer.loop.close()


def test_state_that_cannot_be_taken(disks: list[Path]) -> None:
    """The first disk would have it, so the sentence names that one.  Nothing is changed."""
    stream = os.open(disks[0].parent / "state", os.O_WRONLY | os.O_CREAT)
    writer = Writer()
    assert failure(writer.change(CREATE, "one", disks, stream=stream)) == f"disk {disks[0]}: Bad file descriptor"
    writer.loop.close()
    assert [snapshots(path) for path in disks] == [[], []]


def test_state_that_cannot_be_given(disks: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The disks have gone back already; the log says why the machine does not follow.  No file stays open."""
    before = open_descriptors()
    run(CREATE, "one", disks, file_of(STATE))
    said: list[str] = []
    monkeypatch.setattr(log, "error", said.append)
    asks, gives = courier.pair()
    writer = Writer()
    assert writer.change(GO_BACK, "one", disks, state=gives.detach()) == [READY]
    asks.close()

    def give(*_: object) -> bool:
        raise ConnectionResetError(errno.ECONNRESET, "it is gone")

    monkeypatch.setattr(courier, "give", give)
    assert writer.finish() == [CHANGED]
    assert said == ["the state of the machine cannot be read: it is gone"]
    writer.loop.close()
    assert open_descriptors() == before
