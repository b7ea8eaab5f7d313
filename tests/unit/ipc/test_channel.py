"""Channels: delivery with descriptors, bounded queues, peers that misbehave (hostile-input 56, 57)."""

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
    """Collects what a channel reports, and stops the loop when there is enough."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.messages: list[Record] = []
        self.fds: list[int] = []
        self.lost: list[PeerError | None] = []
        self.enough = 1
        self.channels: list[Channel] = []

    def on_message(self, _channel: Channel, envelope: Envelope) -> None:
        """Note a message."""
        self.messages.append(envelope.message)
        if "client" in envelope.fds:
            fd = envelope.take_fd("client")
            assert fd is not None
            self.fds.append(fd)
        if len(self.messages) >= self.enough:
            self.loop.stop()

    def on_lost(self, _channel: Channel, error: PeerError | None) -> None:
        """Note the end."""
        self.lost.append(error)
        self.loop.stop()

    def run(self) -> None:
        """Run until there is enough; a watchdog ends a test that hangs."""
        timer = self.loop.call_later(DEADLINE_S, lambda: pytest.fail("nothing happened"))
        self.loop.run()
        timer.cancel()


@pytest.fixture
def loop() -> Iterator[Loop]:
    """Give a loop."""
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture
def recorder(loop: Loop) -> Iterator[Recorder]:
    """Give a recorder; its channels are closed at the end."""
    recorder = Recorder(loop)
    yield recorder
    for channel in recorder.channels:
        channel.close()


def control_channel(loop: Loop, recorder: Recorder, sock: socket.socket, limit: int | None = None) -> Channel:
    """Return control's side of a connection to a client."""
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
    """Several messages of one burst arrive one by one."""
    ours, theirs = socketpair()
    control_channel(loop, recorder, ours)
    recorder.enough = 3
    for path in "abc":
        theirs.send(encode(LoadRequest(path=path))[0])

    recorder.run()

    assert recorder.messages == [LoadRequest(path=path) for path in "abc"]
    theirs.close()


def test_descriptors_ride_along_and_the_sender_closes_its_own(loop: Loop, recorder: Recorder) -> None:
    """A descriptor that was sent is another open file number on the other side and closed on ours."""
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
def test_processes_that_may_be_of_other_versions_speak_by_name(loop: Loop, recorder: Recorder, sender: Proc) -> None:
    """What a later version says besides is ignored, and what an earlier one does not say takes its default."""
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


def test_descriptors_nobody_asked_for_are_closed(loop: Loop, recorder: Recorder) -> None:
    """Case 56: extra descriptors end the connection and leak nothing."""
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
    """Case 56: malformed, oversized and foreign messages."""
    ours, theirs = socketpair()
    control_channel(loop, recorder, ours)
    theirs.send(packet)

    recorder.run()

    assert recorder.messages == []
    assert isinstance(recorder.lost[0], PeerError)
    assert theirs.recv(1) == b""
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
    """By whoever has started it: for what is no message, and for what is not its to say."""
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
def test_who_has_started_us_is_not_given_up_for_a_message(
    loop: Loop, recorder: Recorder, capfd: pytest.CaptureFixture[str], me: Proc
) -> None:
    """A message that a later version has, one that is for others, one that comes at a wrong time: dropped and said.

    Their descriptors are closed.  But what is no message ends even that.
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
    """Case 56: what waits for a client is bounded."""
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
    """Return control's side of a connection on which every request has a long answer."""

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
    """Have everything looked at that is ready."""

    def then() -> None:
        loop.call_later(0, loop.stop)

    loop.call_later(0, then)
    loop.run()


def ask_as_much_as_possible(loop: Loop, client: socket.socket) -> int:
    """Send requests until the other side does not read any more; return how many were sent."""
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
    pytest.fail("a peer may fill us for ever")


def test_who_does_not_read_is_not_read(loop: Loop, recorder: Recorder) -> None:
    """Requests stay where they are until the answers to those before have left; each is answered once."""
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
    """Nothing of it is read; with `hold` taken off it all is.  One that leaves before is lost with what it has sent."""
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
    """One with many messages does not keep us from another for longer than `batch` of them."""
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
    """A peer that goes away is lost without an error."""
    ours, theirs = socketpair()
    control_channel(loop, recorder, ours)
    theirs.send(encode(ConsoleBreak())[0])
    theirs.close()
    recorder.enough = 99

    recorder.run()

    assert len(recorder.messages) == 1
    assert recorder.lost == [None]


def test_last_words_of_a_peer_that_has_not_read_ours(loop: Loop, recorder: Recorder) -> None:
    """They arrive, and then its end: the kernel reports what it left unread before what it said."""
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
    """Return a message that is told from the others, and of which few fit a socket."""
    return Failed(code=number, text="x" * 4000)


class Slow:
    """A peer that reads one message whenever the loop comes round, until it has had all or the channel is gone."""

    def __init__(self, loop: Loop, sock: socket.socket) -> None:
        self.loop = loop
        self.sock = sock
        self.seen: list[Record] = []
        loop.add(sock.fileno(), self.read)

    def read(self, _events: int) -> None:
        """Take one message; that the other side has closed with something unread is said before what it sent."""
        packet = b""
        with contextlib.suppress(ConnectionResetError):
            packet = self.sock.recv(MAX_MESSAGE)
        if packet:
            self.seen.append(decode(packet, [], "vmd").message)
        if len(self.seen) == NUMBERED:
            self.loop.stop()


def test_what_waits_for_a_slow_reader_arrives_once_and_in_order(loop: Loop, recorder: Recorder) -> None:
    """The channel stays open: each message of a long burst comes as soon as there is room, no other comes twice."""
    ours, theirs = socketpair()
    channel = control_channel(loop, recorder, ours)
    for number in range(NUMBERED):
        channel.send(numbered(number))
    peer = Slow(loop, theirs)

    recorder.run()

    assert peer.seen == [numbered(number) for number in range(NUMBERED)]
    assert not channel.closed
    theirs.close()


def test_finish_delivers_what_is_queued(loop: Loop, recorder: Recorder) -> None:
    """Last words reach a client that reads slowly."""
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
    """What the peer goes on to say is not handled; a message that came before in the same burst is."""
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
        (b"\0" * (MAX_MESSAGE + 1), 0),  # behind a message that is well-formed as far as it is received
        (b"", MAX_FDS + 10),
    ],
)
def test_what_does_not_fit_is_not_taken_for_what_fits(
    loop: Loop, recorder: Recorder, body: bytes, descriptors: int
) -> None:
    """Case 56: the kernel cuts off what is too long; what is left looks like a message, and is refused."""
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


def test_last_words_wait_for_room_and_keep_their_order(loop: Loop, recorder: Recorder) -> None:
    """A process that ends says all it has to say to a peer that reads at its own pace, descriptors included."""
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
    assert os.read(reader, 2) == b""  # our own copy is closed
    channel.close()
    channel.flush_blocking(DEADLINE_S)  # nothing is left to be said, and nowhere
    os.close(reader)
    theirs.close()


def test_last_words_do_not_make_a_receiver_wait(loop: Loop) -> None:
    """A process that says them while it handles a message has not to wait for another one as long as that takes."""
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


def test_drain_ends_with_what_is_there(loop: Loop, recorder: Recorder) -> None:
    """Though somebody has the other side open and would go on talking."""
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
    """Somebody of our uid has too many on their way: this message is lost, its sender is told, and all else goes on."""
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
    assert os.read(reader, 1) == b""  # nobody has the writing end any more
    os.close(reader)
    ours.close()


def test_what_the_kernel_refuses_to_send_ends_the_channel(
    loop: Loop, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the next turn of the loop, since the caller is still sending; the descriptors that wait are closed."""
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


def test_what_is_sent_over_a_channel_that_has_ended_is_closed(loop: Loop, recorder: Recorder) -> None:
    """Also what does not fit a message, and what is sent after the last words."""
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


def test_a_message_that_has_no_way_is_a_mistake_of_ours(loop: Loop, recorder: Recorder) -> None:
    """It is said which; nothing is sent."""
    ours, theirs = socketpair()
    channel = control_channel(loop, recorder, ours)

    with pytest.raises(AssertionError, match="Quit may not go from CONTROL to CLIENT"):
        channel.send(Quit())
    assert channel.waiting == 0
    theirs.close()


def test_a_socket_that_cannot_be_read_is_a_peer_that_is_lost(loop: Loop, recorder: Recorder) -> None:
    """Else the loop would find it ready for ever."""

    class Broken(socket.socket):
        def recvmsg(self, *_arguments: int) -> NoReturn:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    ours, theirs = socketpair()
    channel = control_channel(loop, recorder, Broken(fileno=ours.detach()))
    theirs.send(encode(ListRequest())[0])

    run_once(loop)

    assert (channel.closed, recorder.lost, recorder.messages) == (True, [None], [])
    theirs.close()


def test_it_is_said_when_the_last_that_waited_has_been_sent(loop: Loop, recorder: Recorder) -> None:
    """Once, and not for what never had to wait."""
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
