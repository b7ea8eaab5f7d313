"""This version reads recordings of earlier versions in `tests/golden`: streams and transcripts (docs/formats.md 1)."""

import contextlib
import socket
from collections.abc import Iterator

import msgpack
import pytest

from tests.support import churn, golden
from tests.support.blkdisk import SECTOR, SECTORS
from tests.support.clocks import Clocks
from tests.support.daemon import DEADLINE_S
from tests.support.golden import Session
from tests.support.hostnet import NetDaemon, switched_off
from tests.support.netpeer import Peer
from tests.support.network import Interface
from tests.support.transfers import Stream, from_file, to_file
from vmd.ipc.imsg import HEADER
from vmd.ipc.messages.clients import PROTOCOL, ConsoleOutput, Failed, SendRequest, StartRequest
from vmd.ipc.messages.shared import TransferProgress
from vmd.ipc.routes import BY_CODE
from vmd.record import RecordType
from vmd.vm.header import read_header
from vmd.vm.state import read_machine
from vmd.vm.stream import OLDEST, VERSION

pytestmark = [pytest.mark.root, pytest.mark.kvm, pytest.mark.timeout(240)]

ROUNDS = 10
PARTIAL = (ConsoleOutput, TransferProgress)  # their number differs between runs


def each(*names: str, deep: tuple[str, ...] = ()) -> pytest.MarkDecorator:
    """Run a test with every recorded stream, or those with these names; those in `deep` only in the long rounds."""
    return pytest.mark.parametrize(("version", "name"), [
        pytest.param(version, name, marks=[pytest.mark.deep] if {name, f"{version}-{name}"} & {*deep} else [])
        for version, name in golden.streams(*names)
    ])  # fmt: skip


def test_every_version_is_recorded() -> None:
    """The present version is recorded too, so that the recording exists when the version changes."""
    assert {version for version, _ in golden.streams()} == set(range(OLDEST, VERSION + 1))


@contextlib.contextmanager
def received(version: int, name: str, *options: str) -> Iterator[NetDaemon]:
    """Receive a recorded VM, named `golden`, with its files."""
    with golden.place() as directory:
        golden.furnish(name, directory)
        if name in ("churn", "legacy"):
            golden.restore_disk(version, name, directory)
        (directory / "stream").write_bytes(golden.stream(version, name, directory))
        with golden.daemon(directory) as vmd:
            status, said = from_file(vmd, "golden", directory / "stream", *options)
            assert status == 0, f"{said}\n--- log of vmd\n{vmd.log}"
            yield vmd


@each("churn", "legacy", deep=("4-churn",))
def test_a_disk_goes_on(version: int, name: str) -> None:
    """The guest's disk, interrupts and clock continue, and it can be sent once more."""
    with received(version, name) as vmd:
        with vmd.console("golden") as console:
            churn.ask_until_rounds(console, ROUNDS)
        to_file(vmd, "golden", vmd.directory / "again")
        assert from_file(vmd, "golden", vmd.directory / "again")[0] == 0
        with vmd.console("golden") as console:
            churn.ask_until_rounds(console, ROUNDS)
            churn.finish(console)
            console.drain(DEADLINE_S)
        assert (vmd.directory / "disk").stat().st_size == SECTORS * SECTOR


@each("net")
def test_a_network_interface_goes_on(version: int, name: str) -> None:
    """The guest gets the link's interrupt, and its frames pass."""
    with received(version, name) as vmd, vmd.console("golden") as console:
        tap = Interface(vmd.network, vmd.interfaces("golden")[0]["tap"])
        with Peer(tap):
            for _ in range(2):
                with switched_off(vmd, tap):
                    console.expect("link down", DEADLINE_S)
                console.expect("link up, and works", DEADLINE_S)
            console.expect("ready", DEADLINE_S)


@each("clocks")
def test_clocks_go_on(version: int, name: str) -> None:
    """All clocks run, and the guest's time has not run since the recording."""
    with received(version, name) as vmd, vmd.console("golden") as console:
        first = Clocks.ask(console)
        later = Clocks.ask_until(console, lambda now: now.beats > first.beats + 10)
    assert later.kvmclock > first.kvmclock
    assert later.tsc > first.tsc
    assert later.pm != first.pm
    assert (first.tsc - first.up) / first.tsc < 1  # the guest came up before the send


@each(deep=("clocks", "net", "4-churn"))  # without devices, or with the same devices as the others
def test_a_received_vm_keeps_its_devices_as_sent(version: int, name: str) -> None:
    """BARs, capabilities and the rest of PCI are at the same places.  The VM has not run in between."""
    with received(version, name, "-p") as vmd:
        recorded = golden.recorded(version, name)
        (body,) = (body for kind, body in recorded.sections if kind == golden.STATE)
        sent = read_machine(version, body)
        to_file(vmd, "golden", vmd.directory / "again")
        again = Stream((vmd.directory / "again").read_bytes())
    assert len(sent.functions) > 2
    for then, now in zip(sent.functions, again.state.functions, strict=True):
        assert now == then, f"slot {then.slot}"
    assert again.state.pci_address == sent.pci_address
    kinds = [device.kind for device in again.header.devices]
    assert [device.kind for device in again.state.virtio] == kinds  # old streams do not have it
    assert again.state.virtio == tuple(
        device.replace(kind=kind) for device, kind in zip(sent.virtio, kinds, strict=True)
    )
    assert [device.replace(features=0) for device in again.header.devices] == [
        device.replace(features=0) for device in read_header(version, recorded.header).devices
    ]


# --- the control socket ------------------------------------------------------------------------------------------


def test_every_protocol_is_recorded() -> None:
    """The present protocol is recorded, too."""
    assert sorted(path.name for path in golden.GOLDEN.glob("transcript-*")) == [
        f"transcript-{number}.json" for number in range(1, PROTOCOL + 1)
    ]


@pytest.mark.parametrize("number", [1, 2])
def test_old_requests_are_answered(number: int) -> None:
    """A vmctl of an earlier version gets the messages and fields that it knows.

    Protocol 1 has the fields in their order, and no others.  Later protocols have them by name.
    """
    with golden.place() as directory:
        golden.furnish_transcript(directory)
        sessions = golden.transcript(number, directory)
        assert len(sessions) > 30
        with golden.daemon(directory, golden.transcript_conf(directory)) as vmd:
            for session in sessions:
                replay(vmd, session)


# Messages that have changed since then.
REWORDED = {"vm x: the stream ends after 0 bytes, before its end": "vm x: the stream is empty"}


def replay(vmd: NetDaemon, session: Session) -> None:
    """Send the recorded requests, and compare the answers with the recorded ones."""
    command = " ".join(session.command)
    file = vmd.directory / "stream"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client, file.open("ab+") as stream:
        client.settimeout(DEADLINE_S)
        client.connect(str(vmd.socket))
        for packet in session.packets:
            if packet.asked:
                with (vmd.directory / "kernel").open("rb") as kernel:
                    if kind(packet.data) is SendRequest:
                        stream.truncate(0)
                    stream.seek(0)
                    given = kernel if kind(packet.data) is StartRequest else stream
                    socket.send_fds(client, [packet.data], [given.fileno()] * packet.fds)
            elif kind(packet.data) not in PARTIAL:
                answer = next_answer(client)
                print(command, answer)
                assert_same(answer, packet.data, command)


def next_answer(client: socket.socket) -> bytes:
    """Return the next answer that is not one of PARTIAL."""
    while kind(data := client.recv(golden.MAX_PACKET)) in PARTIAL:
        pass
    return data


def kind(data: bytes) -> RecordType:
    """Return the type of a packet's message."""
    assert data, "the daemon hung up"
    return BY_CODE[HEADER.unpack_from(data)[0]].cls


def assert_same(answer: bytes, recorded: bytes, command: str) -> None:
    """Raise AssertionError unless an answer matches the recorded one."""
    assert kind(answer) is kind(recorded), command
    now, then = (msgpack.unpackb(data[HEADER.size :]) for data in (answer, recorded))
    assert_has(now, then, command, exact=kind(recorded) is Failed)


def assert_has(now: object, then: object, where: str, *, exact: bool) -> None:
    """Raise AssertionError unless a value has the recorded type and content; numbers may differ.

    Only where fields have names may there be additional ones.
    """
    assert type(now) is type(then), f"{where}: {now!r}, recorded: {then!r}"
    if isinstance(now, dict) and isinstance(then, dict):
        for name, value in then.items():
            if name == "program":
                continue  # the version number differs
            assert name in now, f"{where}: no {name} in {now!r}"
            assert_has(now[name], value, f"{where}: {name}", exact=exact)
    elif isinstance(now, list) and isinstance(then, list):
        assert len(now) == len(then), f"{where}: {now!r}, recorded: {then!r}"
        for each_now, each_then in zip(now, then, strict=True):
            assert_has(each_now, each_then, where, exact=exact)
    elif isinstance(now, str) and isinstance(then, str) and then.startswith("/dev/pts/"):
        assert now.startswith("/dev/pts/"), where
    elif isinstance(then, str | bool) or exact:
        assert now == (REWORDED.get(then, then) if isinstance(then, str) else then), where
