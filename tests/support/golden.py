"""Recorded output of earlier versions in `tests/golden`, which every later version must read; and its recording.

A golden stream is the output of `vmctl send` with the content of the VM's disk.  A golden transcript has the packets
between vmctl and a daemon on the control socket.  No file is ever recorded again: a version with other output adds
files of its own (`python -m tests.support.golden DIRECTORY`).

Paths in the recordings begin with a directory name of fixed length, so that a test can replace it with its own
directory.  A stream is adapted to the processor of the receiving host, field by field in the layout of its version.
"""

import array
import contextlib
import hashlib
import itertools
import json
import lzma
import os
import socket
import struct
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgpack

from tests.support import churn
from tests.support.blkdisk import FACTOR, HOST, MASK, SECTOR, SECTORS, pattern
from tests.support.clocks import Clocks
from tests.support.daemon import DEADLINE_S
from tests.support.guests import guest
from tests.support.hostnet import NetDaemon
from tests.support.netpeer import Peer
from tests.support.network import Interface, Network
from tests.support.transfers import ended, to_file, vmctl
from vmd.ipc.messages.clients import PROTOCOL
from vmd.kvmapi.system import System

GOLDEN = Path(__file__).parents[1] / "golden"
PLACE = "/tmp/vmd-golden-"
RECORDED = PLACE + "recorded"  # the parent directory of all recorded paths
FACTOR_INVERSE = pow(FACTOR, -1, 1 << 64)
MAX_PACKET = 1 << 16
MAX_FDS = 64
PREAMBLE, SECTION = struct.Struct("<8sII"), struct.Struct("<IIQ")
DIGEST_BYTES = 32
STATE = 2
LLADDR = "fe:e1:ba:00:00:09"


class Kind(NamedTuple):
    """A recorded VM: its guest, its command line, and other statements of its block."""

    kernel: str
    cmdline: str
    lines: tuple[str, ...]


DISK = f'disk "{RECORDED}/disk" format raw'
KINDS = {
    "churn": Kind("blk", "churn smp", ("vcpus 2", DISK, f'cdrom "{RECORDED}/disc"', "local interface")),
    "legacy": Kind("blk", "churn intx-pic", ("virtio legacy", DISK)),
    "net": Kind("net", "", (f"interface {{ lladdr {LLADDR} }}",)),
    "clocks": Kind("clocks", "", ()),
}


@contextlib.contextmanager
def place() -> Iterator[Path]:
    """Make a directory whose name is as long as the recorded one."""
    with tempfile.TemporaryDirectory(prefix=PLACE) as name:
        assert len(name) == len(RECORDED)
        yield Path(name)


def conf(name: str, directory: Path) -> str:
    """Return the configuration for recording a VM.  The VM is called `golden`."""
    kind = KINDS[name]
    boot = f'boot "{directory}/kernel" cmdline "{kind.cmdline}"'
    text = "\n".join(('vm "golden" {', "disable", "memory 64M", boot, *kind.lines, "}\n"))
    return text.replace(RECORDED, str(directory))


def furnish(name: str, directory: Path) -> None:
    """Make the files that the VM's configuration names."""
    (directory / "kernel").write_bytes(guest(KINDS[name].kernel).read_bytes())
    (directory / "disk").write_bytes(pattern(0, SECTORS, HOST))
    (directory / "disc").write_bytes(bytes(1 << 20))


@contextlib.contextmanager
def daemon(directory: Path, text: str = "") -> Iterator[NetDaemon]:
    """Run a daemon in a network namespace of its own."""
    with Network() as network:
        for scope in ("all", "default"):
            network.write(f"/proc/sys/net/ipv6/conf/{scope}/disable_ipv6", "1")
        with NetDaemon(directory, network, text) as vmd:
            yield vmd


# --- streams -------------------------------------------------------------------------------------------------


def record_streams(where: Path) -> None:
    """Send each kind of VM to a file, once paused and once running."""
    for name, options in itertools.product(KINDS, ((), ("-l",))):
        with place() as directory:
            furnish(name, directory)
            with daemon(directory, conf(name, directory)) as vmd, contextlib.ExitStack() as stack:
                vmd.must("start", "golden")
                _make_busy(name, vmd, stack)
                to_file(vmd, "golden", directory / "stream", *options)
            raw = (directory / "stream").read_bytes().replace(str(directory).encode(), RECORDED.encode())
            version = PREAMBLE.unpack_from(raw)[1]
            (where / f"stream-{version}-{name}.xz").write_bytes(lzma.compress(_signed_anew(raw), preset=9))
            if name in ("churn", "legacy"):
                generations = _generations((directory / "disk").read_bytes())
                (where / f"disk-{version}-{name}.xz").write_bytes(lzma.compress(generations))


def _make_busy(name: str, vmd: NetDaemon, stack: contextlib.ExitStack) -> None:
    """Wait until the guest has begun its work."""
    console = stack.enter_context(vmd.console("golden"))
    if name == "net":
        tap = Interface(vmd.network, vmd.interfaces("golden")[0]["tap"])
        stack.enter_context(Peer(tap))
        console.expect("ready", DEADLINE_S)
        console.answer("link", "link up, and works", DEADLINE_S)
    elif name == "clocks":
        console.expect("clocks: ready", DEADLINE_S)
        Clocks.ask(console)
    else:
        churn.begin(console)
        churn.ask_until_rounds(console, 100)


def streams(*names: str) -> list[tuple[int, str]]:
    """Return version and name of every recorded stream, or only of those with one of `names`."""
    found = [path.stem.split("-") for path in sorted(GOLDEN.glob("stream-*.xz"))]
    return [(int(version), name) for _, version, name in found if name in (names or KINDS)]


def stream(version: int, name: str, directory: Path) -> bytes:
    """Return a recorded stream, adapted to files in this directory and this host's processor."""
    return _adapt(_recorded(version, name).replace(RECORDED.encode(), str(directory).encode()), KEYS[version])


def _recorded(version: int, name: str) -> bytes:
    return lzma.decompress((GOLDEN / f"stream-{version}-{name}.xz").read_bytes())


def recorded(version: int, name: str) -> "Parts":
    """Return a stream as it was recorded."""
    return Parts(_recorded(version, name))


def restore_disk(version: int, name: str, directory: Path) -> None:
    """Make the disk with its content at the time of the send."""
    generations = lzma.decompress((GOLDEN / f"disk-{version}-{name}.xz").read_bytes())
    content = b"".join(pattern(sector, sector + 1, generation) for sector, generation in enumerate(generations))
    (directory / "disk").write_bytes(content)


def _generations(disk: bytes) -> bytes:
    """Return the generation of each sector's pattern."""
    found = bytearray()
    for sector in range(SECTORS):
        content = disk[sector * SECTOR : (sector + 1) * SECTOR]
        number = int.from_bytes(content[:8], "little") * FACTOR_INVERSE & MASK
        found.append(number >> 8 & 0xFF)
        assert content == pattern(sector, sector + 1, found[-1]), sector
    return bytes(found)


class Parts:
    """The parts of a stream: its header, and kind and body of its sections.  `joined` makes a stream of them."""

    def __init__(self, raw: bytes) -> None:
        self.magic, self.version, length = PREAMBLE.unpack_from(raw)
        at = PREAMBLE.size + length
        self.header = raw[PREAMBLE.size : at]
        at += DIGEST_BYTES
        self.sections: list[tuple[int, bytes]] = []
        while at < len(raw):
            kind, _, length = SECTION.unpack_from(raw, at)
            at += SECTION.size
            self.sections.append((kind, raw[at : at + length]))
            at += length + DIGEST_BYTES

    def joined(self) -> bytes:
        """Return the stream, with correct digests."""
        head = PREAMBLE.pack(self.magic, self.version, len(self.header)) + self.header
        bodies = [SECTION.pack(kind, 0, len(body)) + body for kind, body in self.sections]
        return b"".join(part + hashlib.sha256(part).digest() for part in (head, *bodies))


def _signed_anew(raw: bytes) -> bytes:
    return Parts(raw).joined()


class Keys(NamedTuple):
    """The keys of the processor's fields in the header, in the state, and in each vCPU of the state."""

    named: bool  # whether records are maps (True) or lists
    xsave_bytes: int | str
    tsc_khz: int | str
    cpuid: int | str
    vcpus: int | str
    xsave: int | str


BY_NAME = Keys(True, "xsave_bytes", "tsc_khz", "cpuid", "vcpus", "xsave")
KEYS = {2: Keys(False, 4, 5, 6, 0, 3), 3: BY_NAME, 4: BY_NAME}
LEAF = ("function", "index", "flags", "eax", "ebx", "ecx", "edx")


def _adapt(raw: bytes, keys: Keys) -> bytes:
    """Replace the processor in a stream with this host's.  `keys` are those of the stream's records."""
    parts = Parts(raw)
    here = _processor()
    header = msgpack.unpackb(parts.header, unicode_errors="surrogateescape")
    header[keys.xsave_bytes], header[keys.tsc_khz] = here.xsave_bytes, here.tsc_khz
    header[keys.cpuid] = [dict(zip(LEAF, leaf, strict=True)) if keys.named else leaf for leaf in here.cpuid]
    parts.header = msgpack.packb(header, unicode_errors="surrogateescape")

    def adapted(body: bytes) -> bytes:
        state = msgpack.unpackb(body)
        length = max(here.xsave_bytes, 4096)
        for vcpu in state[keys.vcpus]:
            vcpu[keys.xsave] = vcpu[keys.xsave][:length].ljust(length, b"\0")
        packed: bytes = msgpack.packb(state)
        return packed

    parts.sections = [(kind, adapted(body) if kind == STATE else body) for kind, body in parts.sections]
    return parts.joined()


class Processor(NamedTuple):
    """The fields of a stream that describe the processor."""

    xsave_bytes: int
    tsc_khz: int
    cpuid: list[list[int]]


def _processor() -> Processor:
    """Return this host's processor, as KVM reports it."""
    with contextlib.ExitStack() as stack:
        system = stack.enter_context(System(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)))
        vm = system.create_vm()
        stack.callback(vm.close)
        vcpu = vm.create_vcpu(0)
        stack.callback(vcpu.close)
        table = [[getattr(leaf, name) for name in LEAF] for leaf in system.supported_cpuid()]
        return Processor(vcpu.xsave_bytes, vcpu.get_tsc_khz(), table)


# --- transcripts ---------------------------------------------------------------------------------------------


class Packet(NamedTuple):
    """One packet.  `asked` is true if vmctl sent it."""

    asked: bool
    data: bytes
    fds: int


class Session(NamedTuple):
    """The packets between one vmctl and the daemon."""

    command: list[str]
    packets: list[Packet]


COMMANDS = (
    "status", "status -v", "status a", "start a", "status -v a", "start a", "pause a", "pause a", "unpause a",
    "send -k a", "receive b", "stop -fw b", "console a", "log verbose", "log brief", "load more.conf", "reload",
    "stop -fw a", "wait c", "start -m 16M -b kernel c", "stop -w -f c", "reset vms", "reset switches", "reset",
    "start nobody", "stop nobody", "wait nobody", "pause nobody", "unpause nobody", "console nobody", "send nobody",
    "receive x", "start -t nobody -d disk d",
)  # fmt: skip


def transcript_conf(directory: Path) -> str:
    """Return the daemon's configuration for all commands."""
    return (
        f'switch "lan" {{ interface br9 }}\nvm "a" {{ disable\n memory 16M\n boot "{directory}/kernel" }}\n'
        f'vm "t" {{ disable\n disk "{directory}/disk" format raw\n allow instance {{\n disk\n owner root }}\n}}\n'
    )


def arguments(command: str, directory: Path) -> list[str]:
    """Return a command's words, with the paths of its files."""
    files = ("kernel", "disk", "more.conf")
    return [str(directory / word) if word in files else word for word in command.split()]


def furnish_transcript(directory: Path) -> None:
    """Make the files that the commands name."""
    (directory / "kernel").write_bytes(guest("demo").read_bytes())
    (directory / "disk").write_bytes(bytes(1 << 20))
    (directory / "more.conf").write_text(f'vm "more" {{ disable\n boot "{directory}/kernel" }}\n')


def record_transcript(where: Path) -> None:
    """Run every command through a relay that records the packets."""
    sessions: list[dict[str, Any]] = []
    with place() as directory:
        furnish_transcript(directory)
        with daemon(directory, transcript_conf(directory)) as vmd:
            real, vmd.socket = vmd.socket, directory / "relay.sock"
            for command in COMMANDS:
                with Relay(real, vmd.socket) as relay, contextlib.ExitStack() as files:
                    stdin = stdout = None
                    if command.startswith("send"):
                        stdout = files.enter_context((directory / "stream").open("wb")).fileno()
                    if command.startswith("receive"):
                        stdin = files.enter_context((directory / "stream").open("rb")).fileno()
                    ended(vmctl(vmd, *arguments(command, directory), stdin=stdin, stdout=stdout))
                packets = [
                    {"asked": packet.asked, "fds": packet.fds, "data": _elsewhere(packet.data, directory).hex()}
                    for packet in relay.packets
                ]
                sessions.append({"command": command, "packets": packets})
            vmd.socket = real
    text = "[\n" + ",\n".join(json.dumps(session) for session in sessions) + "\n]\n"
    (where / f"transcript-{PROTOCOL}.json").write_text(text)


def _elsewhere(data: bytes, directory: Path) -> bytes:
    return data.replace(str(directory).encode(), RECORDED.encode())


def transcript(number: int, directory: Path) -> list[Session]:
    """Return a recorded transcript, adapted to files in this directory."""
    sessions = json.loads((GOLDEN / f"transcript-{number}.json").read_text())
    return [
        Session(
            arguments(session["command"], directory),
            [
                Packet(
                    packet["asked"],
                    bytes.fromhex(packet["data"]).replace(RECORDED.encode(), str(directory).encode()),
                    packet["fds"],
                )
                for packet in session["packets"]
            ],
        )
        for session in sessions
    ]


class Relay:
    """A thread between vmctl and a daemon that passes on every packet and keeps a copy."""

    def __init__(self, real: Path, path: Path) -> None:
        self.packets: list[Packet] = []
        self.path = path
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind(str(path))
        self.listener.listen()
        self.real = real
        self.thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Relay":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.thread.join(DEADLINE_S)
        assert not self.thread.is_alive()
        self.listener.close()
        self.path.unlink()

    def _run(self) -> None:
        client, _ = self.listener.accept()
        server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        server.connect(str(self.real))
        with client, server:
            answers = threading.Thread(target=self._pass_on, args=(server, client, False))
            answers.start()
            self._pass_on(client, server, True)
            with contextlib.suppress(OSError):
                server.shutdown(socket.SHUT_RDWR)
            answers.join(DEADLINE_S)

    def _pass_on(self, source: socket.socket, sink: socket.socket, asked: bool) -> None:
        with contextlib.suppress(OSError):
            while True:
                data, fds = receive(source)
                if not data:
                    break
                self.packets.append(Packet(asked, data, len(fds)))
                socket.send_fds(sink, [data], fds)
                for fd in fds:
                    os.close(fd)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


def receive(source: socket.socket) -> tuple[bytes, list[int]]:
    """Return a packet with its descriptors; no bytes at the end."""
    size = array.array("i").itemsize
    data, ancillary, _, _ = source.recvmsg(MAX_PACKET, socket.CMSG_SPACE(MAX_FDS * size))
    fds = array.array("i")
    for _, _, raw in ancillary:
        fds.frombytes(raw[: len(raw) // size * size])
    return data, list(fds)


if __name__ == "__main__":
    where = Path(sys.argv[1])
    record_streams(where)
    record_transcript(where)
