"""The parent's side of a real priv process, in the test's own network namespace."""

import contextlib
import functools
import os
import socket
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from tests.support.network import Network
from tests.support.packets import LLADDR
from vmd.ipc.imsg import MAX_MESSAGE, Envelope, decode, encode
from vmd.ipc.messages.children import Quit, Ready
from vmd.ipc.messages.priv import (
    AdoptNics,
    ConfigureNetwork,
    MakeNics,
    NetworkConfigured,
    NetworkTrouble,
    NicMade,
    NicsFailed,
    NicsMade,
    NicsRemoved,
    NicWanted,
    RemoveNics,
    SwitchRequest,
)
from vmd.parent.forpriv import open_tables, open_tuns
from vmd.privsep import linux, privplace
from vmd.privsep.cell import Cell
from vmd.privsep.spawn import spawn
from vmd.record import Record

DEADLINE_S = 60.0
GROUPS = "/etc/iproute2/group"
RUN_DIRECTORY = Path("/run/vmd/priv")

R = TypeVar("R", bound=Record)


class Made:
    """Interfaces that priv made.  A context manager that closes their descriptors."""

    def __init__(self, nics: tuple[NicMade, ...], fds: list[int]) -> None:
        self.nics = nics
        self.fds = fds

    @property
    def names(self) -> list[str]:
        """Their names."""
        return [nic.name for nic in self.nics]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self.fds:
            os.close(self.fds.pop())


@functools.cache
def cell() -> Cell:
    """Return a cell, which has the code that priv loads.  It is built once, and stays open."""
    return Cell.build(os.getuid(), os.getgid())


class Poor(privplace.PrivPlace):
    """The host as priv sees it, with some files hidden below empty mounts."""

    def __init__(self, *without: str) -> None:
        super().__init__(cell().root_fd)
        self.without = without

    def enter(self) -> None:
        """Hide the files, then enter as usual."""
        linux.unshare(linux.CLONE_NEWNS)
        linux.mount(None, "/", None, linux.MS_REC | linux.MS_PRIVATE)
        for path in self.without:
            if os.path.isdir(path):
                linux.mount("nothing", path, "tmpfs", linux.MS_RDONLY)
            elif os.path.exists(path):
                linux.mount("/dev/null", path, None, linux.MS_BIND)
        super().enter()


class Grouped(Poor):
    """The host as priv sees it, with one more interface group: `web`, number 7."""

    def __init__(self, directory: Path, *without: str) -> None:
        super().__init__(*without)
        self.file = directory / "group"
        self.file.write_text("0\tdefault\n7\tweb\n")

    def enter(self) -> None:
        """Mount the file over the host's, then enter as usual."""
        linux.unshare(linux.CLONE_NEWNS)
        linux.mount(None, "/", None, linux.MS_REC | linux.MS_PRIVATE)
        linux.mount(str(self.file), GROUPS, None, linux.MS_BIND)
        super().enter()


class Priv:
    """A running priv.  A context manager that makes it quit and reaps it."""

    def __init__(
        self, network: Network, place: privplace.PrivPlace | None = None, adopted: AdoptNics | None = None
    ) -> None:
        """`adopted` are the interfaces that an earlier priv made for a running VM."""
        RUN_DIRECTORY.parent.mkdir(exist_ok=True)
        self.network = network
        self.log_file = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __exit__
        self.sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.settimeout(DEADLINE_S)
        self.troubles: list[NetworkTrouble] = []  # unsolicited messages
        with network.inside():
            self.child = spawn(
                "priv",
                ["priv", "stderr", "2"],
                channel=theirs,
                place=place or privplace.PrivPlace(cell().root_fd),
                log_fd=self.log_file.fileno(),
            )
        theirs.close()
        self.status: int | None = None
        self.receive(Ready)
        if adopted is not None:
            self.send(adopted)
        self.configure(again=adopted is not None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            print(f"--- log of priv\n{self.log}---")
        self.quit()
        self.sock.close()
        self.log_file.close()

    def quit(self) -> None:
        """End priv as the parent does, if it still runs."""
        if self.status is None:
            with contextlib.suppress(OSError):
                self.send(Quit())
            self.wait()

    def wait(self) -> int:
        """Wait for the end of priv; return its exit status."""
        self.status = self.child.reap(DEADLINE_S)
        assert self.status is not None
        return self.status

    @property
    def log(self) -> str:
        """Everything logged so far."""
        return os.pread(self.log_file.fileno(), 1 << 20, 0).decode(errors="replace")

    def send(self, message: Record, fds: dict[str, list[int]] | None = None) -> None:
        """Send a message and close its descriptors."""
        packet, order = encode(message, fds=fds or {})
        socket.send_fds(self.sock, [packet], order)
        for fd in order:
            os.close(fd)

    def receive_any(self) -> Envelope:
        """Return the next message that is not an unsolicited NetworkTrouble."""
        while True:
            envelope = self._next()
            if not isinstance(envelope.message, NetworkTrouble):
                return envelope
            self.troubles.append(envelope.message)

    def hear(self) -> NetworkTrouble:
        """Return the next unsolicited NetworkTrouble.  No answer may be outstanding."""
        if not self.troubles:
            message = self._next().message
            assert isinstance(message, NetworkTrouble), message
            return message
        return self.troubles.pop(0)

    def _next(self) -> Envelope:
        packet, fds, _, _ = socket.recv_fds(self.sock, MAX_MESSAGE, 64)
        assert packet, f"priv has ended:\n{self.log}"
        return decode(packet, list(fds), "priv")

    def receive(self, kind: type[R]) -> R:
        """Return the next message, which must be of this kind."""
        message = self.receive_any().message
        assert isinstance(message, kind), message
        return message

    def configure(self, *switches: SwitchRequest, nat: bool = True, again: bool = False) -> tuple[str, ...]:
        """Configure the network; return the problems."""
        self.send(ConfigureNetwork(nat=nat, switches=switches, again=again))
        return self.receive(NetworkConfigured).problems

    def ask(
        self, *nics: NicWanted, vmid: int = 1, reserved: tuple[str, ...] = (), tuns: int | None = None
    ) -> Made | NicsFailed:
        """Ask for interfaces, with one tun descriptor for each, or with `tuns` descriptors."""
        with self.network.inside():
            fds = {"tuns": open_tuns(len(nics) if tuns is None else tuns), **open_tables()}
        self.send(MakeNics(vmid=vmid, ticket=7, nics=nics, reserved=reserved), fds)
        envelope = self.receive_any()
        message = envelope.message
        assert isinstance(message, NicsMade | NicsFailed), message
        assert (message.vmid, message.ticket) == (vmid, 7)
        if isinstance(message, NicsFailed):
            assert not envelope.untaken()
            return message
        return Made(message.nics, envelope.take_fds("taps"))

    def make(self, *nics: NicWanted, vmid: int = 1, reserved: tuple[str, ...] = ()) -> Made:
        """Ask for interfaces; priv must make them."""
        made = self.ask(*nics, vmid=vmid, reserved=reserved)
        assert isinstance(made, Made), made
        return made

    def refuse(self, *nics: NicWanted, vmid: int = 1) -> NicsFailed:
        """Ask for interfaces; priv must refuse."""
        failed = self.ask(*nics, vmid=vmid)
        assert isinstance(failed, NicsFailed), failed
        return failed

    def remove(self, vmid: int = 1) -> None:
        """Remove a VM's interfaces, and wait until that is done."""
        self.send(RemoveNics(vmid=vmid))
        assert self.receive(NicsRemoved).vmid == vmid


def nic(name: str = "", **fields: object) -> NicWanted:
    """Return a request for a tap."""
    return NicWanted(**{"name": name, "alias": "vm1-if0-a", "lladdr": LLADDR, **fields})  # type: ignore[arg-type]


def switch(interface: str = "br0", **fields: object) -> SwitchRequest:
    """Return a request for a bridge."""
    return SwitchRequest(**{"interface": interface, "alias": "switch1-lan", **fields})  # type: ignore[arg-type]
