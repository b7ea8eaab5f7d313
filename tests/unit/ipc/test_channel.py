"""Channels: delivery with descriptors, bounded queues, misbehaving peers (hostile-input 56, 57)."""

import contextlib
import errno
import os
import socket
import threading
from collections.abc import Iterator
from typing import NoReturn

import msgpack
import pytest

from vmd.errors import PeerError
from vmd.ipc.channel import Channel, socketpair
from vmd.ipc.fence import Fence
from vmd.ipc.imsg import HEADER, MAX_FDS, MAX_MESSAGE, Envelope, decode, encode
from vmd.ipc.loop import Loop
from vmd.ipc.messages.children import Quit, SetVerbosity
from vmd.ipc.messages.clients import ConsoleBreak, Failed, ListRequest, LoadRequest, Ok
from vmd.ipc.messages.control import NewClient
from vmd.ipc.messages.vm import PauseDone, PauseVm
from vmd.ipc.routes import BY_CLASS, TRUSTED, Proc
from vmd.record import Record

DEADLINE_S = 20.0


class Recorder:
    """Collects the messages and ends of channels, and stops the loop when there are enough."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.messages: list[Record] = []
        self.fds: list[int] = []
        self.lost: list[PeerError | None] = []
        self.enough = 1
        self.channels: list[Channel] = []

    def on_message(self, _channel: Channel, envelope: Envelope) -> None:
        """Record a message."""
        self.messages.append(envelope.message)
        if "client" in envelope.fds:
            fd = envelope.take_fd("client")
            assert fd is not None
            self.fds.append(fd)
        if len(self.messages) >= self.enough:
            self.loop.stop()

    def on_lost(self, _channel: Channel, error: PeerError | None) -> None:
        """Record the end of a channel."""
        self.lost.append(error)
        self.loop.stop()

    def run(self) -> None:
        """Run until there are enough messages.  A timer fails a test that hangs."""
        timer = self.loop.call_later(DEADLINE_S, lambda: pytest.fail(f"not enough events after {DEADLINE_S} s"))
        self.loop.run()
        timer.cancel()


@pytest.fixture
def loop() -> Iterator[Loop]:
    """A loop."""
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture
def recorder(loop: Loop) -> Iterator[Recorder]:
    """A recorder whose channels are closed at the end."""
    recorder = Recorder(loop)
    yield recorder
    for channel in recorder.channels:
        channel.close()


def control_channel(loop: Loop, recorder: Recorder, sock: socket.socket, limit: int | None = None) -> Channel:
    """Return control's end of a connection to a client."""
    channel = Channel(
        sock,
        me=Proc.CONTROL,
        peer=Proc.CLIENT,
        label="client 1",
        loop=loop,
        on_message=recorder.on_message,
        on_lost=recorder.on_lost,
        queue_limit=limit,
    )
    recorder.channels.append(channel)
    return channel


def test_messages_arrive_in_order(loop: Loop, recorder: Recorder) -> None:
    """Several messages sent at once arrive one by one."""
    ours, theirs = socketpair()
    control_channel(loop, recorder, ours)
    recorder.enough = 3
    for path in "abc":
        theirs.send(encode(LoadRequest(path=path))[0])

    recorder.run()

    assert recorder.messages == [LoadRequest(path=path) for path in "abc"]
    theirs.close()


def test_descriptors_ride_along_and_the_sender_closes_its_own(loop: Loop, recorder: Recorder) -> None:
    """The receiver gets another descriptor of the same file, and the sender's is closed."""
    ours, theirs = socketpair()
    receiver = Channel(
        ours, me=Proc.CONTROL, peer=Proc.PARENT, label="parent", loop=loop,
        on_message=recorder.on_message, on_lost=recorder.on_lost,
    )  # fmt: skip
    sender = Channel(
        theirs, me=Proc.PARENT, peer=Proc.CONTROL, label="control", loop=loop,
        on_message=recorder.on_message, on_lost=recorder.on_lost,
    )  # fmt: skip
    reader, writer = os.pipe()
    sender.send(NewClient(uid=0), fds={"client": [writer]})

    recorder.run()

    os.write(recorder.fds[0], b"!")
    os.close(recorder.fds[0])
    assert os.read(reader, 2) == b"!"
    assert os.read(reader, 2) == b""  # the sender's copy is closed, too
    os.close(reader)
    receiver.close()
    sender.close()


@pytest.mark.parametrize("sender", [Proc.PARENT, Proc.VMM])
def test_processes_of_other_versions_get_field_names(loop: Loop, recorder: Recorder, sender: Proc) -> None:
    """Unknown fields of a later version are ignored.  Missing fields of an earlier version have their defaults."""
    receiver = {Proc.PARENT: Proc.VMM, Proc.VMM: Proc.VM}[sender]
    ours, theirs = socketpair()
    channel = Channel(
        ours, me=sender, peer=receiver, label="peer", loop=loop,
        on_message=recorder.on_message, on_lost=recorder.on_lost,
    )  # fmt: skip
    answer = PauseDone(vmid=7, paused=True)
    earlier, later = {"vmid": 7, "paused": True}, {**answer.as_dict(), "because": "of something"}
    recorder.channels.append(channel)
    recorder.enough = 2

    channel.send(PauseVm(vmid=7, paused=True))
    sent = theirs.recv(MAX_MESSAGE)
    assert msgpack.unpackb(sent[HEADER.size :]) == [{}, {"vmid": 7, "paused": True, "force": False}]
    for fields in (earlier, later):
        body = msgpack.packb([{}, fields])
        theirs.send(HEADER.pack(BY_CLASS[PauseDone].code, HEADER.size + len(body), 0, 0, 0) + body)
    recorder.run()

    assert recorder.messages == [answer, answer]
    theirs.close()


def test_extra_descriptors_are_closed(loop: Loop, recorder: Recorder) -> None:
    """Case 56: they end the connection, and none stays open."""
    ours, theirs = socketpair()
    control_channel(loop, recorder, ours)
    reader, writer = os.pipe()
    socket.send_fds(theirs, [encode(ListRequest())[0]], [writer, writer])
    os.close(writer)

    recorder.run()

    assert isinstance(recorder.lost[0], PeerError)
    assert os.read(reader, 1) == b""  # every copy of the other end is closed
    os.close(reader)
    theirs.close()


@pytest.mark.parametrize(
    "packet",
    [
        b"garbage that is no header at all",
        HEADER.pack(0x13, 17, 0, 0, 0) + b"\xc1",
        encode(Quit())[0],  # a message, but not one that a client may send
        encode(Ok())[0],
        b"x" * (MAX_MESSAGE + 1),
    ],
)
def test_a_client_that_breaks_the_protocol_is_cut_off(loop: Loop, recorder: Recorder, packet: bytes) -> None:
    """Case 56: malformed, oversized and forbidden messages."""
    ours, theirs = socketpair()
    control_channel(loop, recorder, ours)
    theirs.send(packet)

    recorder.run()

    assert recorder.messages == []
    assert isinstance(recorder.lost[0], PeerError)
    assert theirs.recv(1) == b""
    theirs.close()


@pytest.mark.parametrize(("peer", "message"), [(Proc.CLIENT, ListRequest()), (Proc.PARENT, Quit())])
@pytest.mark.parametrize("fenced", [True, False])
def test_a_message_that_leads_to_an_unexpected_error(
    loop: Loop, recorder: Recorder, peer: Proc, message: Record, fenced: bool
) -> None:
    """Behind a fence its client is cut off, but a process of the core is not.  Elsewhere it ends the loop."""

    def fails(_channel: Channel, _envelope: Envelope) -> None:
        loop.call_later(0, loop.stop)
        raise KeyError("a bug")

    loop.fence = Fence(lambda _source: None) if fenced else None
    ours, theirs = socketpair()
    recorder.channels.append(
        Channel(ours, me=Proc.CONTROL, peer=peer, label="it", loop=loop, on_message=fails, on_lost=recorder.on_lost)
    )
    theirs.send(encode(message)[0])

    with contextlib.nullcontext() if fenced else pytest.raises(KeyError, match="a bug"):
        recorder.run()

    assert len(recorder.lost) == (fenced and peer is Proc.CLIENT)
    theirs.close()


@pytest.mark.parametrize(
    ("me", "peer", "foreign"),
    [
        (Proc.PARENT, Proc.CONTROL, SetVerbosity(verbosity=0)), (Proc.PARENT, Proc.VMM, SetVerbosity(verbosity=0)),
        (Proc.PARENT, Proc.PRIV, SetVerbosity(verbosity=0)), (Proc.PARENT, Proc.LOG, Quit()),
        (Proc.VMM, Proc.VM, SetVerbosity(verbosity=0)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("garbage", [True, False])
def test_a_process_that_breaks_the_protocol_is_cut_off(
    loop: Loop, recorder: Recorder, me: Proc, peer: Proc, foreign: Record, *, garbage: bool
) -> None:
    """Its parent process ends the connection after a malformed or forbidden message."""
    ours, theirs = socketpair()
    channel = Channel(
        ours, me=me, peer=peer, label="peer", loop=loop,
        on_message=recorder.on_message, on_lost=recorder.on_lost,
    )  # fmt: skip
    recorder.channels.append(channel)
    theirs.send(b"garbage that is no header at all" if garbage else encode(foreign, form=channel.form)[0])

    recorder.run()

    assert recorder.messages == []
    assert isinstance(recorder.lost[0], PeerError)
    theirs.close()


@pytest.mark.parametrize("me", [Proc.CONTROL, Proc.VMM, Proc.PRIV, Proc.VM])
def test_a_bad_message_of_our_starter_is_dropped(
    loop: Loop, recorder: Recorder, capfd: pytest.CaptureFixture[str], me: Proc
) -> None:
    """Unknown, misdirected and untimely messages are logged and dropped, and their descriptors are closed.

    A packet that is no message still ends the channel.
    """
    ours, theirs = socketpair()
    handled: list[Record] = []

    def on_message(channel: Channel, envelope: Envelope) -> None:
        handled.append(envelope.message)
        if len(handled) == 1:
            raise PeerError(channel.label, "comes too early")
        loop.stop()

    channel = Channel(
        ours, me=me, peer=TRUSTED[me], label="above", loop=loop, on_message=on_message, on_lost=recorder.on_lost,
    )  # fmt: skip
    recorder.channels.append(channel)
    reader, writer = os.pipe()
    socket.send_fds(theirs, [HEADER.pack(0xDEAD, HEADER.size, 1, 0, 0)], [writer])
    os.close(writer)
    for message in (ListRequest(), SetVerbosity(verbosity=1), SetVerbosity(verbosity=2)):
        theirs.send(encode(message)[0])

    recorder.run()

    assert os.read(reader, 1) == b""
    os.close(reader)
    assert (handled, recorder.lost) == ([SetVerbosity(verbosity=1), SetVerbosity(verbosity=2)], [])
    said = capfd.readouterr().err
    for what in ("unknown message type 0xdead", "may not send ListRequest", "comes too early"):
        assert f"dropped: above: {what}" in said
    theirs.send(b"garbage that is no header at all")
    recorder.run()
    assert isinstance(recorder.lost[0], PeerError)
    theirs.close()


def test_a_client_that_does_not_read_is_cut_off(loop: Loop, recorder: Recorder) -> None:
    """Case 56: the queue for a client is bounded."""
    ours, theirs = socketpair()
    channel = control_channel(loop, recorder, ours, limit=10)
    for _ in range(2000):
        channel.send(Failed(code=1, text="x" * 8000))

    assert channel.closed
    assert "does not read" in str(recorder.lost[0])
    theirs.close()


LONG = 50  # answers to a request


def answering_channel(
    loop: Loop, recorder: Recorder, sock: socket.socket, *, in_step: bool = False, batch: int = 32
) -> Channel:
    """Return control's end of a connection on which every request gets a long answer."""

    def on_message(channel: Channel, envelope: Envelope) -> None:
        recorder.messages.append(envelope.message)
        for _ in range(LONG):
            channel.send(Ok(notes=("x" * 1000,)))

    channel = Channel(
        sock, me=Proc.CONTROL, peer=Proc.CLIENT, label="client 1", loop=loop, on_message=on_message,
        on_lost=recorder.on_lost, in_step=in_step, batch=batch,
    )  # fmt: skip
    recorder.channels.append(channel)
    return channel


def run_once(loop: Loop) -> None:
    """Let the loop serve everything that is ready."""

    def then() -> None:
        loop.call_later(0, loop.stop)

    loop.call_later(0, then)
    loop.run()


def ask_as_much_as_possible(loop: Loop, client: socket.socket) -> int:
    """Send requests until the other end stops reading.  Return their number."""
    client.setblocking(False)
    sent = 0
    for _ in range(10_000):
        try:
            while True:
                client.send(encode(ListRequest())[0])
                sent += 1
        except BlockingIOError:
            before = sent
        run_once(loop)
        with contextlib.suppress(BlockingIOError):
            client.send(encode(ListRequest())[0])
            sent += 1
        if sent == before:
            return sent
    pytest.fail("a peer can send without limit")


def test_a_peer_that_does_not_read_is_not_read(loop: Loop, recorder: Recorder) -> None:
    """Requests wait until the answers to earlier ones are sent.  Each is answered once."""
    ours, theirs = socketpair()
    channel = answering_channel(loop, recorder, ours, in_step=True)
    sent = ask_as_much_as_possible(loop, theirs)

    assert 0 < channel.waiting <= LONG
    assert len(recorder.messages) < sent / 2

    seen = 0

    def on_answer(_events: int) -> None:
        nonlocal seen
        theirs.recv(MAX_MESSAGE)
        seen += 1
        assert channel.waiting <= LONG
        if seen == sent * LONG:
            loop.stop()

    loop.add(theirs.fileno(), on_answer)
    recorder.run()
    assert (len(recorder.messages), recorder.lost) == (sent, [])
    loop.remove(theirs.fileno())
    theirs.close()


def test_a_peer_that_is_held(loop: Loop, recorder: Recorder) -> None:
    """It is read only after `hold` is released.  If it ends before, its pending messages are lost."""
    ours, theirs = socketpair()
    channel = control_channel(loop, recorder, ours)
    channel.hold(held=True)
    theirs.send(encode(ListRequest())[0])
    run_once(loop)
    assert recorder.messages == []

    channel.hold(held=False)
    recorder.run()
    assert recorder.messages == [ListRequest()]

    channel.hold(held=True)
    theirs.send(encode(ListRequest())[0])
    theirs.close()
    recorder.run()
    assert (recorder.messages, recorder.lost) == ([ListRequest()], [None])


def test_a_peer_has_its_turn(loop: Loop, recorder: Recorder) -> None:
    """A peer with many messages delays another peer by at most `batch` messages."""
    many, few = socketpair(), socketpair()
    order: list[str] = []
    for name, (ours, theirs) in (("many", many), ("few", few)):
        channel = Channel(
            ours, me=Proc.CONTROL, peer=Proc.CLIENT, label=name, loop=loop, on_lost=recorder.on_lost, batch=4,
            on_message=lambda channel, _envelope: order.append(channel.label),
        )  # fmt: skip
        recorder.channels.append(channel)
        for _ in range(20 if name == "many" else 1):
            theirs.send(encode(ListRequest())[0])
    run_once(loop)

    assert order.index("few") <= 4
    for _, theirs in (many, few):
        theirs.close()


def test_hang_up_is_reported_once(loop: Loop, recorder: Recorder) -> None:
    """A peer that closes its end is reported without an error."""
    ours, theirs = socketpair()
    control_channel(loop, recorder, ours)
    theirs.send(encode(ConsoleBreak())[0])
    theirs.close()
    recorder.enough = 99

    recorder.run()

    assert len(recorder.messages) == 1
    assert recorder.lost == [None]


def test_last_messages_of_a_peer_that_did_not_read_ours(loop: Loop, recorder: Recorder) -> None:
    """They arrive before its end.  The kernel reports the unread message before the peer's own messages."""
    ours, theirs = socketpair()
    channel = control_channel(loop, recorder, ours)
    channel.send(Ok())
    for _ in range(2):
        theirs.send(encode(ListRequest())[0])
    theirs.close()
    recorder.enough = 3
    recorder.run()

    assert recorder.messages == [ListRequest(), ListRequest()]
    assert recorder.lost == [None]


NUMBERED = 200


def numbered(number: int) -> Failed:
    """Return a distinguishable message.  Few of them fit into a socket."""
    return Failed(code=number, text="x" * 4000)


class Slow:
    """A peer that reads one message per turn of the loop, until it has all or the channel has ended."""

    def __init__(self, loop: Loop, sock: socket.socket) -> None:
        self.loop = loop
        self.sock = sock
        self.seen: list[Record] = []
        loop.add(sock.fileno(), self.read)

    def read(self, _events: int) -> None:
        """Read one message.  The kernel may first report that the channel was closed with unread data."""
        packet = b""
        with contextlib.suppress(ConnectionResetError):
            packet = self.sock.recv(MAX_MESSAGE)
        if packet:
            self.seen.append(decode(packet, [], "vmd").message)
        if len(self.seen) == NUMBERED:
            self.loop.stop()


def test_queued_messages_reach_a_slow_reader_once_and_in_order(loop: Loop, recorder: Recorder) -> None:
    """The channel stays open, and each message of a long burst is sent once, as soon as there is room."""
    ours, theirs = socketpair()
    channel = control_channel(loop, recorder, ours)
    for number in range(NUMBERED):
        channel.send(numbered(number))
    peer = Slow(loop, theirs)

    recorder.run()

    assert peer.seen == [numbered(number) for number in range(NUMBERED)]
    assert not channel.closed
    theirs.close()


def test_finish_delivers_queued_messages(loop: Loop, recorder: Recorder) -> None:
    """The last messages reach a slow client."""
    ours, theirs = socketpair()
    channel = control_channel(loop, recorder, ours)
    for number in range(NUMBERED):
        channel.send(numbered(number))
    channel.finish()
    peer = Slow(loop, theirs)

    recorder.run()

    assert peer.seen == [numbered(number) for number in range(NUMBERED)]
    assert channel.closed
    theirs.close()


def test_a_channel_that_finishes_receives_nothing_more(loop: Loop, recorder: Recorder) -> None:
    """Later messages of the peer are not handled; an earlier one of the same burst was."""
    ours, theirs = socketpair()

    def on_message(channel: Channel, envelope: Envelope) -> None:
        recorder.messages.append(envelope.message)
        for number in range(NUMBERED):
            channel.send(numbered(number))
        channel.finish()

    channel = Channel(
        ours, me=Proc.CONTROL, peer=Proc.CLIENT, label="client 1", loop=loop, on_message=on_message,
        on_lost=recorder.on_lost,
    )  # fmt: skip
    for path in "abc":
        theirs.send(encode(LoadRequest(path=path))[0])
    peer = Slow(loop, theirs)

    recorder.run()

    assert recorder.messages == [LoadRequest(path="a")]
    assert len(peer.seen) == NUMBERED
    assert channel.closed
    theirs.close()


@pytest.mark.parametrize(
    ("body", "descriptors"),
    [
        (b"\0" * (MAX_MESSAGE + 1), 0),  # after a part that is a well-formed message by itself
        (b"", MAX_FDS + 10),
    ],
)
def test_truncated_packets_are_refused(
    loop: Loop, recorder: Recorder, body: bytes, descriptors: int
) -> None:
    """Case 56: the kernel truncates packets that are too long, and the rest looks like a message."""
    ours, theirs = socketpair()
    control_channel(loop, recorder, ours)
    whole = padded(MAX_MESSAGE if body else 200)
    counted = HEADER.pack(0x14, len(whole), min(descriptors, MAX_FDS), 0, 0) + whole[HEADER.size :]
    socket.send_fds(theirs, [counted + body], [theirs.fileno()] * descriptors)

    recorder.run()

    assert recorder.messages == []
    assert "too long" in str(recorder.lost[0])
    theirs.close()


def padded(length: int) -> bytes:
    """Return a message of exactly this length."""
    packet = encode(LoadRequest(path="x" * (length - 200)))[0]
    return encode(LoadRequest(path="x" * (2 * length - 200 - len(packet))))[0]


def test_flush_blocking_sends_all_in_order(loop: Loop, recorder: Recorder) -> None:
    """A process that ends sends all messages and descriptors to a slow peer."""
    ours, theirs = socketpair()
    channel = Channel(
        ours, me=Proc.PARENT, peer=Proc.CONTROL, label="control", loop=loop, on_message=recorder.on_message,
        on_lost=recorder.on_lost,
    )  # fmt: skip
    reader, writer = os.pipe()
    for number in range(NUMBERED):
        channel.send(numbered(number))
    channel.send(NewClient(uid=0), fds={"client": [writer]})
    seen: list[Record] = []

    def read() -> None:
        while len(seen) <= NUMBERED:
            packet, fds, _, _ = socket.recv_fds(theirs, MAX_MESSAGE, 1)
            seen.append(decode(packet, fds, "vmd").message)
            for fd in fds:
                os.write(fd, b"!")
                os.close(fd)

    thread = threading.Thread(target=read)
    thread.start()
    channel.flush_blocking(DEADLINE_S)
    thread.join(DEADLINE_S)

    assert seen == [*(numbered(number) for number in range(NUMBERED)), NewClient(uid=0)]
    assert os.read(reader, 2) == b"!"
    assert os.read(reader, 2) == b""  # our copy is closed
    channel.close()
    channel.flush_blocking(DEADLINE_S)  # nothing is left to send, and the channel is closed
    os.close(reader)
    theirs.close()


def test_flush_blocking_does_not_delay_reads(loop: Loop) -> None:
    """Within the handler of a message, the socket stays non-blocking for reads."""
    ours, theirs = socketpair()
    said: list[bool] = []

    def on_message(channel: Channel, _envelope: Envelope) -> None:
        channel.send(Ok())
        channel.flush_blocking(DEADLINE_S)
        said.append(ours.getblocking())
        loop.stop()

    channel = Channel(
        ours, me=Proc.PARENT, peer=Proc.CONTROL, label="peer", loop=loop, on_message=on_message,
        on_lost=lambda _channel, _error: loop.stop(),
    )  # fmt: skip
    theirs.send(encode(ListRequest())[0])
    loop.run()

    assert said == [False]
    assert theirs.recv(MAX_MESSAGE) == encode(Ok(), pid=os.getpid())[0]
    channel.close()
    theirs.close()


def test_drain_reads_the_messages_that_have_arrived(loop: Loop, recorder: Recorder) -> None:
    """It ends although the peer has its end open and could send more."""
    ours, theirs = socketpair()
    channel = control_channel(loop, recorder, ours)
    recorder.enough = 1 << 30
    for _ in range(40):  # more than one batch
        theirs.send(encode(ListRequest())[0])

    channel.drain()

    assert len(recorder.messages) == 40
    assert (channel.closed, recorder.lost) == (True, [])
    with pytest.raises(BrokenPipeError):
        theirs.send(encode(ListRequest())[0])
    theirs.close()


def test_descriptors_that_cannot_be_passed_on(
    loop: Loop, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our uid has too many descriptors in flight.

    This message is lost, the sender is told, and the channel stays open.
    """
    ours, theirs = socketpair()
    sender = Channel(
        theirs, me=Proc.PARENT, peer=Proc.CONTROL, label="control", loop=loop,
        on_message=recorder.on_message, on_lost=recorder.on_lost,
    )  # fmt: skip
    recorder.channels.append(sender)
    reader, writer = os.pipe()
    refused: list[str] = []

    def send_as_the_kernel_would(packet: bytes, fds: list[int]) -> None:
        if fds:
            raise OSError(errno.ETOOMANYREFS, os.strerror(errno.ETOOMANYREFS))
        theirs.send(packet)

    monkeypatch.setattr(sender, "_sendmsg", send_as_the_kernel_would)
    sender.send(NewClient(uid=0), fds={"client": [writer]}, refused=lambda: refused.append("client"))
    sender.send(Quit())
    loop.call_later(0, loop.stop)

    loop.run()

    assert refused == ["client"]
    assert recorder.lost == []
    assert decode(ours.recv(MAX_MESSAGE), [], "parent").message == Quit()
    assert os.read(reader, 1) == b""  # every copy of the writing end is closed
    os.close(reader)
    ours.close()


def test_a_send_that_the_kernel_refuses_ends_the_channel(
    loop: Loop, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends in the next turn of the loop, because the caller is still sending.  Queued descriptors are closed."""
    ours, theirs = socketpair()
    sender = Channel(
        ours, me=Proc.PARENT, peer=Proc.CONTROL, label="control", loop=loop, on_message=recorder.on_message,
        on_lost=recorder.on_lost,
    )  # fmt: skip
    recorder.channels.append(sender)
    reader, writer = os.pipe()

    def refuse(_packet: bytes, _fds: list[int]) -> None:
        raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))

    monkeypatch.setattr(sender, "_sendmsg", refuse)
    sender.send(NewClient(uid=0), fds={"client": [writer]})
    assert (sender.waiting, recorder.lost, os.read(reader, 1)) == (0, [], b"")

    run_once(loop)

    assert "No buffer space available" in str(recorder.lost[0])
    assert sender.closed
    os.close(reader)
    theirs.close()


def test_descriptors_sent_over_an_ended_channel_are_closed(loop: Loop, recorder: Recorder) -> None:
    """This holds after `close`, and for messages sent after `finish`."""
    for end in (Channel.close, Channel.finish):
        ours, theirs = socketpair()
        sender = Channel(
            ours, me=Proc.PARENT, peer=Proc.CONTROL, label="control", loop=loop, on_message=recorder.on_message,
            on_lost=recorder.on_lost,
        )  # fmt: skip
        reader, writer = os.pipe()
        end(sender)
        sender.send(NewClient(uid=0), fds={"client": [writer]})
        assert (sender.waiting, os.read(reader, 1)) == (0, b"")
        os.close(reader)
        assert theirs.recv(1) == b""
        theirs.close()


def test_a_message_without_a_route_is_a_bug(loop: Loop, recorder: Recorder) -> None:
    """The error names the message, and nothing is sent."""
    ours, theirs = socketpair()
    channel = control_channel(loop, recorder, ours)

    with pytest.raises(AssertionError, match="Quit may not go from CONTROL to CLIENT"):
        channel.send(Quit())
    assert channel.waiting == 0
    theirs.close()


def test_a_socket_that_cannot_be_read_is_a_peer_that_is_lost(loop: Loop, recorder: Recorder) -> None:
    """Otherwise the loop would find the socket ready for ever."""

    class Broken(socket.socket):
        def recvmsg(self, *_arguments: int) -> NoReturn:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    ours, theirs = socketpair()
    channel = control_channel(loop, recorder, Broken(fileno=ours.detach()))
    theirs.send(encode(ListRequest())[0])

    run_once(loop)

    assert (channel.closed, recorder.lost, recorder.messages) == (True, [None], [])
    theirs.close()


def test_on_sent_is_called_when_the_queue_is_empty(loop: Loop, recorder: Recorder) -> None:
    """It is called once, and not if no message had to wait."""
    ours, theirs = socketpair()
    channel = control_channel(loop, recorder, ours)
    sent: list[int] = []
    channel.on_sent = lambda: sent.append(channel.waiting)
    channel.send(Ok())
    run_once(loop)
    assert sent == []
    theirs.recv(MAX_MESSAGE)

    for number in range(NUMBERED):
        channel.send(numbered(number))
    peer = Slow(loop, theirs)
    recorder.run()

    assert len(peer.seen) == NUMBERED
    assert sent == [0]
    theirs.close()
