"""How control passes an answer on to a client."""

import errno
import socket

from vmd.control.clients import Client
from vmd.control.main import Control
from vmd.ipc.channel import Channel, socketpair
from vmd.ipc.imsg import HEADER, MAX_MESSAGE, Envelope, Form, decode, encode
from vmd.ipc.loop import Loop
from vmd.ipc.messages.clients import Failed, Ok, TroubleInfo
from vmd.ipc.routes import Proc
from vmd.record import Record

NOTE_BYTES = MAX_MESSAGE - HEADER.size - 6  # an Ok with a note of this length fills a packet
TROUBLE = TroubleInfo(device="disk0", text="full", since_s=0)


def passed_on(form: Form, *answers: Record) -> list[Record]:
    """Return what a client is sent when the parent sends these answers."""
    loop = Loop()
    ours, theirs = socketpair()
    control = Control.__new__(Control)  # skips __init__, which needs a parent
    client = Client(1, 0)
    control.clients = {client.number: client}
    client.channel = Channel(
        ours, me=Proc.CONTROL, peer=Proc.CLIENT, label="client 1", loop=loop,
        on_message=lambda _channel, _envelope: None, on_lost=lambda _channel, _error: None,
    )  # fmt: skip
    control.parent = client.channel  # its queue is never full here
    client.channel.form = form
    for answer in answers:
        control.on_answer(answer, Envelope(answer, client.number, 0, {}), client.channel)
    client.channel.close()
    loop.close()
    with theirs:
        return list(received(theirs))


def received(sock: socket.socket) -> list[Record]:
    """Return all messages up to the end of the connection."""
    found = []
    while packet := sock.recv(MAX_MESSAGE):
        found.append(decode(packet, [], "vmd").message)
    return found


def test_an_answer_that_fits_its_packet_only_without_names() -> None:
    """The client gets an error.  The control that serves the user's clients must not end."""
    longest = Ok(notes=("x" * NOTE_BYTES,))
    assert len(encode(longest)[0]) == MAX_MESSAGE

    assert passed_on(Form.FIRST, longest) == [longest]
    (failed,) = passed_on(Form.NAMED, longest)
    assert isinstance(failed, Failed)
    assert failed.code == errno.EMSGSIZE


def test_messages_that_the_first_release_did_not_know_are_left_out() -> None:
    """Troubles came later, so a vmctl of the first release would not understand them."""
    assert passed_on(Form.FIRST, TROUBLE, Ok()) == [Ok()]
    assert passed_on(Form.NAMED, TROUBLE, Ok()) == [TROUBLE, Ok()]
